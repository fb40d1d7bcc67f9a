"""Folders that are not exported, damaged, or made to do harm: one clear sentence each."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from ldm_export.errors import CheckpointError, UnknownModelError
from ldm_export.intake.opening import open_model
from released.compvis_files import write_clip_vocabulary
from tests.reference.diffusers_folder import edit_json

pytestmark = pytest.mark.reference

UNET = "unet/diffusion_pytorch_model.safetensors"


def with_entries(file, **entries):
    return lambda folder: edit_json(folder / file, **entries)


def with_index(text):
    """Put an index in the place of the UNet's weights."""

    def change(folder):
        (folder / UNET).unlink()
        (folder / f"{UNET}.index.json").write_text(text)

    return change


def with_tensor(name):
    """Add a tensor to the UNet."""

    def change(folder):
        tensors = load_file(folder / UNET) | {name: torch.ones(2)}
        (folder / UNET).unlink()
        save_file(tensors, folder / UNET)

    return change


def with_copy(file, name, copy):
    """Add a tensor under a second name."""

    def change(folder):
        tensors = load_file(folder / file)
        tensors[copy] = tensors[name].clone()
        (folder / file).unlink()
        save_file(tensors, folder / file)

    return change


def with_variants(*variants):
    """Give the UNet's weights the names of variants."""

    def change(folder):
        weights = (folder / UNET).read_bytes()
        (folder / UNET).unlink()
        for variant in variants:
            name = f"unet/diffusion_pytorch_model.{variant}.safetensors"
            (folder / name).write_bytes(weights)

    return change


def with_word(folder):
    """Add a word to the vocabulary as textual inversion does."""
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    tokenizer.add_tokens("<cat-toy>")
    tokenizer.save_pretrained(folder / "tokenizer")


def with_file(file, entries):
    return lambda folder: (folder / file).write_text(json.dumps(entries))


def with_merges(change):
    """Change the merges of the tokenizer."""

    def write(folder):
        path = folder / "tokenizer/tokenizer.json"
        whole = json.loads(path.read_text())
        change(whole["model"]["merges"])
        path.write_text(json.dumps(whole))

    return write


def without(file):
    return lambda folder: (folder / file).unlink()


FLUX = {
    "_class_name": "FluxPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "unet": [None, None],
}
INDEX, TEXT = "model_index.json", "text_encoder/config.json"
SCHEDULER = "scheduler/scheduler_config.json"
TOKENIZER = "tokenizer/tokenizer_config.json"
WORD = r"tokenizer: adds words .*<cat-toy>.*--textual-inversion \"<cat-toy>=learned_embeds"
#: Noise of the image that the upscaler enlarges, as its pipeline's class has it if not told.
DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
UPSCALED = {"beta_schedule": "scaled_linear"}


def with_small_image_noise(scheduler="DDPMScheduler", **entries):
    """Add the noise of an image to enlarge."""

    def change(folder):
        edit_json(folder / INDEX, low_res_scheduler=["diffusers", scheduler])
        (folder / "low_res_scheduler").mkdir()
        path = folder / "low_res_scheduler/scheduler_config.json"
        path.write_text(json.dumps({"_class_name": scheduler, **DDPM, **entries}))

    return change


FAULTS = {
    "other noise of a small image": (
        with_small_image_noise(**UPSCALED, beta_end=0.03),
        r"enlarge by scaled_linear betas from 0.0001 to 0.03 in 1000 .*expected .* 0.0001 to 0.02",
    ),
    "another kind of noise of a small image": (
        with_small_image_noise(),
        "enlarge by betas of another kind .*expected scaled_linear betas from 0.0001 to 0.02",
    ),
    "a small image down to nothing but noise": (
        with_small_image_noise(**UPSCALED, rescale_betas_zero_snr=True),
        "down to nothing but noise, which is not exported",
    ),
    "another scheduler for a small image": (
        with_small_image_noise("EulerDiscreteScheduler"),
        "low_res_scheduler is 'EulerDiscreteScheduler'",
    ),
    "a tiny autoencoder": (
        with_entries(INDEX, vae=["diffusers", "AutoencoderTiny"]),
        "vae is 'AutoencoderTiny' .give an AutoencoderKL by --vae, and a tiny one by --tiny-dec",
    ),
    "a switch that is none": (
        with_entries("model_index.json", force_zeros_for_empty_prompt="yes"),
        r"says force_zeros_for_empty_prompt = 'yes', .* expected true or false",
    ),
    "flux": (with_entries(INDEX, **FLUX), "'FluxPipeline', .*no unet.*FluxTransformer2DModel"),
    "stable diffusion 3": (
        with_entries(INDEX, text_encoder_3=["transformers", "T5EncoderModel"]),
        "text_encoder_3 is 'T5EncoderModel'.*pipelines of Stable Diffusion are",
    ),
    "video": (
        with_entries(INDEX, unet=["diffusers", "UNet3DConditionModel"]),
        "unet is 'UNet3DConditionModel'",
    ),
    "another tokenizer": (
        with_entries(INDEX, tokenizer=["transformers", "BertTokenizer"]),
        "tokenizer is 'BertTokenizer'",
    ),
    "a word of textual inversion": (with_word, WORD),
    "a word in an older configuration": (
        with_entries(TOKENIZER, added_tokens_decoder={"49408": {"content": "<cat-toy>"}}),
        WORD,
    ),
    "a word in a file of its own": (
        with_file("tokenizer/added_tokens.json", {"<cat-toy>": 49408}),
        WORD,
    ),
    "merges in another order": (
        with_merges(lambda merges: merges.insert(1, merges.pop(0))),
        "has 't h' as merge 1, where CLIP has 'i n', which is not exported",
    ),
    "a merge too few": (with_merges(list.pop), "has None as merge 48894, where CLIP has"),
    "another merge in an older file": (
        lambda folder: (folder / "tokenizer/merges.txt").write_text("#version: 0.2\na b\n"),
        "has 'a b' as merge 1, where CLIP has 'i n'",
    ),
    "another vocabulary": (
        with_file("tokenizer/vocab.json", {"in": 7}),
        "gives 'in' the id 7 and not 512",
    ),
    "a control network": (
        with_entries(INDEX, controlnet=["diffusers", "ControlNetModel"]),
        "controlnet is 'ControlNetModel'",
    ),
    "a scale of the image that is neither": (
        with_entries(INDEX, is_cosxl_edit="yes"),
        "is_cosxl_edit = 'yes', which is not exported; expected true or false",
    ),
    "another autoencoder": (
        with_entries("vae/config.json", _class_name="AsymmetricAutoencoderKL"),
        "_class_name = 'AsymmetricAutoencoderKL'.*expected AutoencoderKL",
    ),
    "an unknown tensor": (
        with_tensor("down_blocks.0.motion_modules.0.weight"),
        r"1 tensors that are not of a known UNet.*down_blocks\.0\.motion_modules",
    ),
    "one tensor of the autoencoder twice": (
        with_copy(
            "vae/diffusion_pytorch_model.safetensors",
            "decoder.mid_block.attentions.0.to_q.bias",
            "decoder.mid_block.attentions.0.query.bias",
        ),
        r"has both .*attentions\.0\.query\.bias.*one tensor of the autoencoder",
    ),
    "one tensor of the text encoder twice": (
        with_copy(
            "text_encoder/model.safetensors",
            "final_layer_norm.bias",
            "text_model.final_layer_norm.bias",
        ),
        r"has both .*final_layer_norm\.bias.*one tensor of the text encoder",
    ),
    "continuous noise": (
        with_entries(SCHEDULER, _class_name="FlowMatchEulerDiscreteScheduler"),
        "'FlowMatchEulerDiscreteScheduler', whose models are trained without betas",
    ),
    "a noise level of EDM below 0": (
        with_entries(SCHEDULER, _class_name="EDMEulerScheduler", sigma_min=-1),
        "sigma_min = -1, which is not exported; expected a positive number",
    ),
    "x0 of EDM": (
        with_entries(SCHEDULER, _class_name="EDMEulerScheduler", prediction_type="sample"),
        "prediction_type = 'sample', .*; expected epsilon or v_prediction",
    ),
    "statistics of latents that are no numbers": (
        with_entries("vae/config.json", latents_mean=["a", 1, 2, 3]),
        r"latents_mean = \['a', 1, 2, 3\], .*; expected a number per channel",
    ),
    "another kind of betas": (
        with_entries(SCHEDULER, beta_schedule="sigmoid"),
        "beta_schedule = 'sigmoid', which is not exported; expected scaled_linear or linear",
    ),
    "another prediction type": (
        with_entries(SCHEDULER, prediction_type="flow"),
        "prediction_type = 'flow'",
    ),
    "impossible betas": (with_entries(SCHEDULER, beta_end=-1), "beta_end = -1"),
    "too many timesteps": (with_entries(SCHEDULER, num_train_timesteps=10**6), "1000000"),
    "betas that are no numbers": (with_entries(SCHEDULER, trained_betas=["a"]), "trained_betas"),
    "other normalisation": (
        with_entries("unet/config.json", norm_num_groups=16),
        "norm_num_groups = 16, which is not exported; expected 32",
    ),
    "heads of two sizes": (
        with_entries("unet/config.json", attention_head_dim=[4, 4, 8]),
        "attention_head_dim",
    ),
    "another activation": (with_entries(TEXT, hidden_act="relu"), "hidden_act = 'relu'"),
    "a missing component": (
        lambda folder: (folder / "vae").rename(folder / "elsewhere"),
        "no folder vae, which its model_index.json names",
    ),
    "no weights": (without(UNET), "unet: holds no weights that can be read"),
    "variants of which none is obvious": (
        with_variants("ema", "non_ema"),
        "the variants ema, non_ema and none without",
    ),
    "an index that leaves the folder": (
        with_index('{"weight_map": {"conv_in.weight": "../vae/model.safetensors"}}'),
        r"names '\.\./vae/model.safetensors', which is not a file next to it",
    ),
    "an index with an absolute path": (
        with_index('{"weight_map": {"conv_in.weight": "/etc/passwd"}}'),
        "names '/etc/passwd'",
    ),
    "an index of a folder": (
        with_index('{"weight_map": {"conv_in.weight": ".."}}'),
        r"names '\.\.'",
    ),
    "an index of numbers": (with_index('{"weight_map": {"conv_in.weight": 3}}'), "names 3"),
    "an index without a map": (with_index('{"metadata": {}}'), "has no weight_map"),
    "an index of missing parts": (
        with_index('{"weight_map": {"conv_in.weight": "part.safetensors"}}'),
        r"part.safetensors: cannot be opened: No such file",
    ),
    "an index that is not JSON": (with_index("{"), "is not the JSON it should be"),
    "a key twice": (with_index('{"weight_map": {"a": "b", "a": "c"}}'), "a key appears twice"),
    "a list": (lambda folder: (folder / INDEX).write_text("[]"), "does not hold a JSON object"),
    "not a number": (lambda folder: (folder / TEXT).write_text('{"a": NaN}'), "NaN is not valid"),
    "not text": (lambda folder: (folder / SCHEDULER).write_bytes(b"\xff"), "is not the JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_is_not_exported_is_one_sentence(folder, fault):
    change, words = FAULTS[fault]
    change(folder)

    with pytest.raises((CheckpointError, UnknownModelError), match=words) as found:
        open_model(folder)

    assert "\n" not in str(found.value)
    assert str(folder) in str(found.value)


def test_a_folder_with_words_is_read_without_its_tokenizer(folder):
    with_word(folder)
    shutil.rmtree(folder / "tokenizer")

    with open_model(folder) as checkpoint:
        assert "cond_stage_model.transformer.text_model.final_layer_norm.bias" in checkpoint.tensors


def test_the_older_files_of_a_tokenizer_are_clips(folder):
    write_clip_vocabulary(folder / "tokenizer")
    with_entries(TOKENIZER, added_tokens_decoder={"49407": {"content": "<|endoftext|>"}})(folder)

    with open_model(folder) as checkpoint:
        assert "cond_stage_model.transformer.text_model.final_layer_norm.bias" in checkpoint.tensors


@pytest.mark.parametrize(
    "change",
    [
        with_entries(TOKENIZER, pad_token="!"),
        with_entries(TOKENIZER, pad_token={"content": "!"}),
        with_file("tokenizer/special_tokens_map.json", {"pad_token": "!"}),
    ],
)
def test_padding_that_is_not_that_of_the_text_encoder_is_a_warning(folder, caplog, change):
    change(folder)

    with open_model(folder):
        pass

    assert "fills prompts up with '!', and the bundle with '<|endoftext|>'" in caplog.text


def test_usual_padding_is_no_warning(folder, caplog):
    with open_model(folder):
        pass

    assert not caplog.records


@pytest.mark.parametrize("lost", ["index", "part"])
def test_an_index_and_its_parts_must_hold_the_same_tensors(other_pipeline, tmp_path, lost):
    other_pipeline.unet.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    (tmp_path / "model_index.json").write_text(
        '{"unet": ["diffusers", "UNet2DConditionModel"], "_class_name": "StableDiffusionPipeline"}'
    )
    with open_model(tmp_path) as whole:
        assert "model.diffusion_model.out.2.bias" in whole.tensors
    index = tmp_path / "unet/diffusion_pytorch_model.safetensors.index.json"
    entries = json.loads(index.read_text())
    part = index.parent / entries["weight_map"]["conv_out.bias"]
    if lost == "index":
        del entries["weight_map"]["conv_out.bias"]
        index.write_text(json.dumps(entries))
    else:
        tensors = load_file(part)
        del tensors["conv_out.bias"]
        save_file(tensors, part)

    with pytest.raises(CheckpointError, match=r"do not hold the same tensors .conv_out"):
        open_model(tmp_path)


def test_the_noise_of_a_small_image_as_every_bundle_has_it_is_read(folder):
    with_small_image_noise(**UPSCALED)(folder)

    with open_model(folder) as checkpoint:
        assert "low_res_scheduler/scheduler_config.json" in checkpoint.files


def test_another_autoencoder_takes_the_place_of_a_tiny_one(folder, saved_folder):
    with_entries(INDEX, vae=["diffusers", "AutoencoderTiny"])(folder)

    with (
        open_model(folder, vae=saved_folder) as checkpoint,
        open_model(saved_folder) as expected,
    ):
        assert checkpoint.tensors.keys() == expected.tensors.keys()


def test_components_that_images_do_not_depend_on_are_not_read(folder, saved_folder):
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/model.safetensors").write_bytes(b"damaged")
    edit_json(
        folder / INDEX,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
    )

    with open_model(folder) as checkpoint, open_model(saved_folder) as plain:
        assert checkpoint.tensors.keys() == plain.tensors.keys()
        name = "model.diffusion_model.out.2.bias"
        np.testing.assert_array_equal(checkpoint.tensors[name].numpy(), plain.tensors[name].numpy())
