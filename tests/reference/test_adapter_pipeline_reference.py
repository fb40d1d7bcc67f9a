"""Images of adapted models against diffusers, which loads the same files.

There PEFT computes every low-rank product beside its layer; ours are merged into the weights of a
bundle. The adapters are random, made by PEFT, and saved under the names of diffusers or of kohya's
trainers, both of which diffusers reads itself.
"""

from copy import deepcopy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from ldm_runtime import Generator, RequestError
from tests.reference.small_pipelines import as_arrays, lowest_psnr, noise
from tests.reference.twins import SCHEDULERS

pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # Of a second adapter of one model.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]

PROMPT = "a large red circle left of a small blue square"
FIELDS = {
    "negative_prompt": "blurry, a dog",
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "height": 64,
    "width": 64,
}
RANK, ALPHA = 4, 2.0
UNET_LAYERS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in"),
    *("conv1", "time_emb_proj", "conv_in", "linear_1"),
]
TEXT_LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"]


@pytest.fixture(scope="module")
def adapters(pipeline, tmp_path_factory):
    """Files of two adapters, the one with diffusers' names, the other with kohya's."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("diffusers", "kohya")):
        torch.manual_seed(seed)
        layers = {
            "unet_lora_layers": random_adapter(pipeline.unet, UNET_LAYERS),
            "text_encoder_lora_layers": random_adapter(pipeline.text_encoder, TEXT_LAYERS),
        }
        StableDiffusionPipeline.save_lora_weights(
            folder, weight_name=f"{name}.safetensors", **layers
        )
    path = folder / "kohya.safetensors"
    save_file(with_names_of_kohya(load_file(path)), path)
    return folder


def random_adapter(network, layers):
    """Return the tensors of a random adapter of a network."""
    config = LoraConfig(
        r=RANK, lora_alpha=RANK, target_modules=layers, init_lora_weights="gaussian"
    )
    network = deepcopy(network)
    network.add_adapter(config, adapter_name="made")
    state = get_peft_model_state_dict(network, adapter_name="made")
    return {
        name: torch.randn_like(tensor) * (0.3 if "lora_B" in name else 0.1)
        for name, tensor in state.items()
    }


def with_names_of_kohya(state):
    renamed = {}
    for name, tensor in state.items():
        component, _, layer = name.partition(".")
        module, _, kind = layer.partition(".lora")
        prefix = {"unet": "lora_unet", "text_encoder": "lora_te"}[component]
        flat = f"{prefix}_{module.replace('.', '_')}"
        is_down = kind.startswith(("_A", ".down", "_linear_layer.down"))
        renamed[f"{flat}.lora_{'down' if is_down else 'up'}.weight"] = tensor.contiguous()
        renamed[f"{flat}.alpha"] = torch.tensor(ALPHA)
    return renamed


def images_of_diffusers(pipeline, model, scales):
    """Return diffusers' images with adapters at scales, by file."""
    pipeline.scheduler = SCHEDULERS["ddim"]
    try:
        for file in scales:
            pipeline.load_lora_weights(
                file.parent, weight_name=file.name, adapter_name=file.stem, local_files_only=True
            )
        pipeline.set_adapters([file.stem for file in scales], list(scales.values()))
        return as_arrays(pipeline(PROMPT, latents=noise(model), **FIELDS).images)
    finally:
        pipeline.unload_lora_weights()


def our_images(bundle, scales, **options):
    options = {"backend": "onnxruntime", "threads": 1, **options}
    with Generator(bundle, adapters=scales, **options) as generator:
        return as_arrays(generator(PROMPT, seed=7, sampler="ddim", **FIELDS).images), generator


@pytest.mark.parametrize(
    "scales", [{"diffusers": 1.0}, {"kohya": 0.7}, {"kohya": -0.5, "diffusers": 0.4}], ids=str
)
def test_an_adapted_bundle_generates_the_images_of_diffusers(
    pipeline, adapters, small_bundle_fp32, scales
):
    files = {adapters / f"{name}.safetensors": scale for name, scale in scales.items()}
    plain, generator = our_images(small_bundle_fp32, {})
    expected = images_of_diffusers(pipeline, generator, files)

    for options in ({}, {"backend": "openvino", "precision": "fp32"}):
        images, _ = our_images(small_bundle_fp32, files, **options)

        assert lowest_psnr(images, expected) >= 60
        assert lowest_psnr(plain, expected) < 30


def test_half_precision_weights_are_adapted_to_nearly_the_images_of_diffusers(
    pipeline, adapters, small_bundle_fp16
):
    files = {adapters / "kohya.safetensors": 0.7}

    images, generator = our_images(small_bundle_fp16, files)

    assert lowest_psnr(images, images_of_diffusers(pipeline, generator, files)) >= 35


def test_without_adapters_a_bundle_is_what_it_was(adapters, small_bundle_fp32):
    before, _ = our_images(small_bundle_fp32, {})
    our_images(small_bundle_fp32, {adapters / "kohya.safetensors": 1.0})

    after, _ = our_images(small_bundle_fp32, {})
    nothing, _ = our_images(small_bundle_fp32, {adapters / "kohya.safetensors": 0.0})

    assert (after == before).all()
    assert (nothing == before).all()


def test_an_adapter_of_another_model_is_refused(adapters, small_bundle_fp32, tmp_path):
    state = load_file(adapters / "kohya.safetensors")
    wider = {
        name: torch.cat([tensor, tensor], dim=1) if name.endswith("lora_down.weight") else tensor
        for name, tensor in state.items()
    }
    save_file(wider, tmp_path / "wider.safetensors")
    deeper = {name.replace("down_blocks_1", "down_blocks_7"): each for name, each in state.items()}
    save_file(deeper, tmp_path / "deeper.safetensors")

    for name in ("wider", "deeper"):
        with pytest.raises(RequestError, match=f"adapters: .*{name}.safetensors.*this model"):
            our_images(small_bundle_fp32, {tmp_path / f"{name}.safetensors": 1.0})
