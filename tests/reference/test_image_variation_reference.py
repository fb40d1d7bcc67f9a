"""Image variation of Stable Diffusion 2.1 unCLIP against diffusers over the same weights."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
from diffusers.pipelines.stable_diffusion import pipeline_stable_unclip_img2img
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ldm_export.errors import CheckpointError, UnknownModelError, WeightsError
from ldm_export.intake.opening import open_model
from ldm_runtime.conditioning.image_embedding import (
    augmented_embeddings,
    clip_pixels,
    embedding_noise,
)
from ldm_runtime.inputs.images import InputImage
from ldm_runtime.specs.model import NoiseAugmentation
from tests.reference.diffusers_folder import edit_json
from tests.reference.small_families import (
    SD_2,
    UNCLIP_H,
    UNCLIP_L,
    X4_UPSCALER,
    open_folder_networks,
    open_networks,
    state_dict,
)
from tests.reference.small_pipelines import (
    COMMON,
    PROMPT,
    SEED,
    as_arrays,
    diffusers_pipeline,
    generate,
    lowest_psnr,
    noise,
)

pytestmark = [
    pytest.mark.reference,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

FAMILIES = {
    "stable-diffusion-2-unclip-h": UNCLIP_H,
    "stable-diffusion-2-unclip-l": UNCLIP_L,
}
COSINE = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2")


def statistics(family):
    """Return mean and standard deviation of embeddings (1, D): of H 0 and 1, of L others."""
    shape = (1, family.image_encoder.embed_dim)
    if family is not UNCLIP_L:
        return torch.zeros(shape), torch.ones(shape)
    generator = torch.Generator().manual_seed(5)
    mean = 0.5 * torch.randn(shape, generator=generator)
    return mean, 0.5 + torch.rand(shape, generator=generator)


def as_transformers_names_it(state, layers):
    """Return the image encoder of a checkpoint under the names of transformers."""
    visual = "embedder.model.visual."
    ours = {
        name.removeprefix(visual): each for name, each in state.items() if name.startswith(visual)
    }
    found = {
        "embeddings.class_embedding": ours["class_embedding"],
        "embeddings.patch_embedding.weight": ours["conv1.weight"],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
    }
    pairs = {"pre_layrnorm": "ln_pre", "post_layernorm": "ln_post"}
    for index in range(layers):
        theirs, block = f"encoder.layers.{index}", f"transformer.resblocks.{index}"
        pairs |= {f"{theirs}.layer_norm{number}": f"{block}.ln_{number}" for number in (1, 2)}
        pairs[f"{theirs}.mlp.fc1"] = f"{block}.mlp.c_fc"
        pairs[f"{theirs}.mlp.fc2"] = f"{block}.mlp.c_proj"
        pairs[f"{theirs}.self_attn.out_proj"] = f"{block}.attn.out_proj"
        for kind in ("weight", "bias"):
            parts = ours[f"{block}.attn.in_proj_{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                found[f"{theirs}.self_attn.{name}_proj.{kind}"] = part
    for theirs, mine in pairs.items():
        found |= {f"{theirs}.{kind}": ours[f"{mine}.{kind}"] for kind in ("weight", "bias")}
    return {f"vision_model.{name}": each for name, each in found.items()} | {
        "visual_projection.weight": ours["proj"].T.contiguous()
    }


def transformers_encoder(state, spec):
    """Return transformers' image encoder over a checkpoint."""
    config = CLIPVisionConfig(
        hidden_size=spec.width,
        intermediate_size=spec.feed_forward_dim,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        image_size=spec.image_size,
        patch_size=spec.patch_size,
        projection_dim=spec.embed_dim,
        hidden_act=spec.activation,
    )
    twin = CLIPVisionModelWithProjection(config)
    missing, unexpected = twin.load_state_dict(
        as_transformers_names_it(state, spec.num_layers), strict=False
    )
    assert (unexpected, [name for name in missing if "position_ids" not in name]) == ([], [])
    return twin.eval().requires_grad_(False)


def image_processor(spec):
    """Return transformers' preparation of images for an encoder."""
    side = spec.image_size
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )


def diffusers_unclip(family, state, folder):
    """Return diffusers' pipeline over a checkpoint and the statistics of its family."""
    normalizer = StableUnCLIPImageNormalizer(family.image_encoder.embed_dim)
    normalizer.mean.data, normalizer.std.data = statistics(family)

    def kind(**parts):
        for name in ("safety_checker", "requires_safety_checker"):
            del parts[name]
        images = {
            "feature_extractor": image_processor(family.image_encoder),
            "image_encoder": transformers_encoder(state, family.image_encoder),
            "image_normalizer": normalizer,
            "image_noising_scheduler": COSINE,
        }
        return StableUnCLIPImg2ImgPipeline(**parts | images)

    return diffusers_pipeline(kind, family, state, folder, "v_prediction")


def whole_state(family):
    """Return a checkpoint with its buffers, and with the statistics of embeddings if need be."""
    state = state_dict(family)
    state["noise_augmentor.betas"] = COSINE.betas
    state["noise_augmentor.alphas_cumprod"] = COSINE.alphas_cumprod
    if family is UNCLIP_L:
        mean, std = statistics(family)
        state |= {"noise_augmentor.data_mean": mean, "noise_augmentor.data_std": std}
    return state


def photo(width=80, height=56):
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 3, y * 4, (x * y) % 256], axis=2).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def same_noise(monkeypatch):
    """The noise that an embedding has for the image of a seed, in diffusers."""
    monkeypatch.setattr(
        pipeline_stable_unclip_img2img,
        "randn_tensor",
        lambda shape, **_: torch.from_numpy(embedding_noise(tuple(shape), SEED)),
    )


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"noise_level": 300, "prompt": PROMPT, "negative_prompt": "blurry, a dog"},
        {"noise_level": 999, "guidance_scale": 1.0},
    ],
)
@pytest.mark.parametrize("name", FAMILIES)
def test_images_are_varied_as_diffusers_does(tmp_path, compare, name, fields):
    family = FAMILIES[name]
    state = whole_state(family)
    theirs = diffusers_unclip(family, state, tmp_path)
    ours = open_networks(state)
    common = {key: COMMON[key] for key in ("num_inference_steps", "height", "width")}
    fields = {"image": photo(), "guidance_scale": 10.0, **common, **fields}
    expected = as_arrays(theirs(latents=noise(ours), **fields).images)

    compare(name, ours, expected, **fields)
    other = lowest_psnr(generate(ours, **{**fields, "noise_level": 700}), expected)

    assert ours.spec.task == "image-variation"
    assert ours.spec.prediction_type == "v_prediction"
    assert (ours.spec.defaults.height, ours.spec.defaults.guidance_scale) == (384, 10.0)
    assert other < 60


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_embedding_of_an_image_is_that_of_transformers(family):
    state = whole_state(family)
    ours, twin = open_networks(state), transformers_encoder(state, family.image_encoder)
    for size in ((80, 56), (56, 56), (30, 100), (224, 225)):
        image = photo(*size)
        pixels = image_processor(family.image_encoder)(images=image, return_tensors="pt")
        expected = twin(**pixels).image_embeds.numpy()

        mine = clip_pixels(InputImage.read(image), family.image_encoder)
        found = ours.network("image_encoder").run({"pixels": mine})["embedding"]

        np.testing.assert_allclose(mine, pixels.pixel_values.numpy(), atol=1e-6)
        assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-5


@pytest.mark.parametrize("noise_level", [0, 1, 50, 500, 999])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_noise_is_added_to_embeddings_as_diffusers_does(family, noise_level):
    mean, std = statistics(family)
    normalizer = StableUnCLIPImageNormalizer(mean.shape[1])
    normalizer.mean.data, normalizer.std.data = mean, std
    pipeline = SimpleNamespace(image_normalizer=normalizer, image_noising_scheduler=COSINE)
    embedding = torch.randn(1, mean.shape[1], generator=torch.Generator().manual_seed(2))
    added = embedding_noise(tuple(embedding.shape), 11)
    with torch.no_grad():
        expected = StableUnCLIPImg2ImgPipeline.noise_image_embeddings(
            pipeline, embedding, noise_level, noise=torch.from_numpy(added)
        )
    augmentation = NoiseAugmentation(
        alphas_cumprod=tuple(COSINE.alphas_cumprod.tolist()),
        mean=tuple(mean[0].tolist()),
        std=tuple(std[0].tolist()),
    )

    found = augmented_embeddings(embedding.numpy(), added, noise_level, augmentation)

    # Features of the level are sines and cosines of angles up to 999, in float32.
    np.testing.assert_allclose(found, expected.numpy(), atol=2e-4)


def test_the_schedule_is_the_files_own_or_else_the_cosine_of_the_configuration():
    state = whole_state(UNCLIP_H)
    stored = open_networks(state).spec.noise_augmentation
    bare = {name: each for name, each in state.items() if not name.startswith("noise_augmentor")}

    computed = open_networks(bare).spec.noise_augmentation

    np.testing.assert_array_equal(stored.alphas_cumprod, COSINE.alphas_cumprod.double())
    np.testing.assert_allclose(computed.alphas_cumprod, stored.alphas_cumprod, rtol=2e-4)
    assert (set(stored.mean), set(stored.std)) == ({0.0}, {1.0})


def test_a_file_of_the_l_model_without_statistics_says_where_they_are():
    state = whole_state(UNCLIP_L)
    del state["noise_augmentor.data_mean"], state["noise_augmentor.data_std"]

    with pytest.raises(WeightsError, match="give that with --image-normalizer"):
        open_networks(state)


def test_statistics_of_another_model_are_refused():
    state = whole_state(UNCLIP_L)
    state["noise_augmentor.data_mean"] = torch.zeros(1, 1024)

    with pytest.raises(WeightsError, match=r"a mean of 1024 numbers .* of 768, but .* have 768"):
        open_networks(state)
    state["noise_augmentor.data_mean"] = torch.full((1, 768), float("nan"))
    with pytest.raises(WeightsError, match="a mean that is not finite"):
        open_networks(state)


def test_an_image_encoder_of_another_unet_is_refused():
    other = replace(UNCLIP_H.image_encoder, embed_dim=512)
    state = whole_state(replace(UNCLIP_H, image_encoder=other))

    with pytest.raises(WeightsError, match=r"a vector of 2048 numbers .* are 1024"):
        open_networks(state)


@pytest.mark.parametrize(
    ("family", "key"), [(UNCLIP_H, "crossattn-adm"), (X4_UPSCALER, "hybrid-adm")]
)
def test_the_configurations_of_models_with_a_vector_or_classes_agree_with_them(family, key):
    state = state_dict(family)
    params = {"conditioning_key": key, "cond_stage_config": {"target": "x.FrozenOpenCLIPEmbedder"}}

    open_networks(state, config={"model": {"params": params}})

    with pytest.raises(WeightsError, match=f"conditioning_key is {key[:-4]}, .* have {key}"):
        open_networks(state, config={"model": {"params": params | {"conditioning_key": key[:-4]}}})


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A family, and a folder that diffusers saved with what its checkpoint holds."""
    family, path = FAMILIES[request.param], tmp_path_factory.mktemp("unclip")
    diffusers_unclip(family, whole_state(family), path).save_pretrained(path / "folder")
    return request.param, path / "folder"


@pytest.mark.usefixtures("same_noise")
def test_a_folder_that_diffusers_saved_is_the_same_model(folder, tmp_path):
    name, path = folder
    family = FAMILIES[name]
    ours, file = open_folder_networks(path), open_networks(whole_state(family))
    theirs = diffusers_unclip(family, whole_state(family), tmp_path)
    fields = {"image": photo(), "noise_level": 200, "num_inference_steps": 4, "prompt": PROMPT}
    fields |= {"height": 64, "width": 64, "guidance_scale": 5.0}
    expected = theirs(latents=noise(ours), **fields)

    images = generate(ours, **fields)

    assert (ours.spec.family, ours.spec.task) == (name, "image-variation")
    assert ours.spec.networks["image_encoder"] == file.spec.networks["image_encoder"]
    assert ours.spec.noise_augmentation.mean == file.spec.noise_augmentation.mean
    sources = {each.field: each.source for each in ours.spec.assumptions}
    assert sources["image_encoder.num_heads"] == sources["prediction_type"] == "file"
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


EXTRACTOR = "feature_extractor/preprocessor_config.json"


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        (EXTRACTOR, {"resample": 2}, "says resample = 2"),
        (EXTRACTOR, {"do_center_crop": False}, "says do_center_crop = False"),
        (EXTRACTOR, {"crop_size": 48}, "says crop_size = 48"),
        (EXTRACTOR, {"image_mean": [0.5]}, r"says image_mean = \[0.5\]"),
        ("image_encoder/config.json", {"hidden_act": "relu"}, "says hidden_act = 'relu'"),
        (
            "image_noising_scheduler/scheduler_config.json",
            {"beta_schedule": "sigmoid"},
            "says beta_schedule = 'sigmoid'",
        ),
    ],
)
def test_a_folder_that_prepares_images_in_another_way_is_refused(folder, file, changes, message):
    path = folder[1] / file
    before = path.read_text()
    edit_json(path, **changes)

    try:
        with pytest.raises(CheckpointError, match=message):
            open_model(folder[1])
    finally:
        path.write_text(before)


def test_a_folder_without_its_image_encoder_or_with_a_prior_is_refused(folder):
    index = folder[1] / "model_index.json"
    before = index.read_text()
    entries = json.loads(before)

    try:
        edit_json(index, prior=["diffusers", "PriorTransformer"])
        with pytest.raises(UnknownModelError, match="its prior is 'PriorTransformer'"):
            open_model(folder[1])
        del entries["image_encoder"]
        index.write_text(json.dumps(entries))
        with pytest.raises(UnknownModelError, match="it has no image_encoder"):
            open_model(folder[1])
    finally:
        index.write_text(before)


def test_statistics_may_come_from_the_folder_of_diffusers(tmp_path):
    state = whole_state(UNCLIP_L)
    mean, std = (state.pop(f"noise_augmentor.data_{name}") for name in ("mean", "std"))
    model, normalizer = tmp_path / "model.safetensors", tmp_path / "image_normalizer"
    save_file(state, model)
    normalizer.mkdir()
    file = normalizer / "diffusion_pytorch_model.safetensors"
    save_file({"mean": mean, "std": std}, file)

    for path in (file, normalizer):
        with open_model(model, image_normalizer=path) as checkpoint:
            tensors = {
                name: torch.from_numpy(np.array(each.numpy()))
                for name, each in checkpoint.tensors.items()
            }
            spec = open_networks(tensors).spec
            assert spec.noise_augmentation.mean == tuple(mean[0].tolist())
            assert spec.noise_augmentation.std == tuple(std[0].tolist())
            assert [each.component for each in checkpoint.components] == ["image normalizer"]


def test_statistics_mean_nothing_to_a_model_without_images(tmp_path):
    model, normalizer = tmp_path / "model.safetensors", tmp_path / "stats.safetensors"
    save_file(state_dict(SD_2), model)
    save_file({"mean": torch.zeros(4), "std": torch.ones(4)}, normalizer)

    with pytest.raises(CheckpointError, match="--image-normalizer means nothing to it"):
        open_model(model, image_normalizer=normalizer)
