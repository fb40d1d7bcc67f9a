"""Models distilled from Stable Diffusion, with fewer blocks, against diffusers' pipelines."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

from ldm_export.detection.detect import detect
from ldm_export.errors import UnknownModelError, WeightsError
from ldm_export.hyperparameters.unet import read_unet
from ldm_export.intake.unet_names import UNET_PREFIX, unet_names
from ldm_export.networks.loading import check_weights
from ldm_export.networks.unet import UNet
from tests.export.sd_layout import SD1, SD2, SDXL, FakeTensor, checkpoint, sdxl_checkpoint
from tests.reference import small_families
from tests.reference.diffusers_folder import randomised
from tests.reference.distilled_unets import (
    DISTILLED,
    full_size_unet,
    numbered_as_sdxl,
    small_unet,
)
from tests.reference.small_families import (
    open_folder_networks,
    open_networks,
    state_dict,
)
from tests.reference.small_pipelines import (
    COMMON,
    PROMPT,
    as_arrays,
    diffusers_pipeline,
    diffusers_xl_pipeline,
    generate,
    lowest_psnr,
    noise,
)
from tests.reference.twins import TRAINED

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

#: Everything but the UNet of the small models.
ORIGINALS = {
    "sd1": small_families.SD_1,
    "sd2": small_families.SD_2,
    "sdxl": small_families.SDXL,
}


def originals_pipeline(name, folder):
    """Return the tensors of a small original, and diffusers' pipeline over them."""
    family = ORIGINALS[name]
    state = state_dict(family)
    if name == "sdxl":
        return state, diffusers_xl_pipeline(StableDiffusionXLPipeline, family, state, folder)
    return state, diffusers_pipeline(StableDiffusionPipeline, family, state, folder)


def small_model(name, folder):
    """Return the tensors of a small model but for its UNet, and diffusers' pipeline."""
    model = DISTILLED[name]
    state, pipeline = originals_pipeline(model.original, folder)
    original = ORIGINALS[model.original].unet
    torch.manual_seed(11)
    unet = small_unet(model, original.context_dim, original.vector_dim)
    pipeline.register_modules(unet=randomised(unet))
    rest = {key: value for key, value in state.items() if not key.startswith(UNET_PREFIX)}
    return rest, pipeline


@pytest.mark.parametrize("name", DISTILLED)
def test_a_folder_that_diffusers_saved_generates_its_images(tmp_path, compare, name):
    _, theirs = small_model(name, tmp_path)
    folder = tmp_path / "folder"
    theirs.save_pretrained(folder)
    ours = open_folder_networks(folder)
    expected = theirs(PROMPT, latents=noise(ours), **COMMON)

    compare(name, ours, as_arrays(expected.images), prompt=PROMPT, **COMMON)


@pytest.mark.parametrize("name", ["ssd-1b", "segmind-vega"])
def test_a_single_file_numbered_as_sdxl_generates_the_images_of_diffusers(tmp_path, name):
    rest, theirs = small_model(name, tmp_path)
    numbered = {
        UNET_PREFIX + numbered_as_sdxl(key): value
        for key, value in theirs.unet.state_dict().items()
    }
    ours = open_networks(rest | numbered)
    expected = theirs(PROMPT, latents=noise(ours), **COMMON)

    images = generate(ours, prompt=PROMPT, **COMMON)

    assert ours.spec.family == name
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


def test_sdxs_makes_one_step_without_guidance(tmp_path):
    """Its one step goes from the last timestep to the image."""
    _, theirs = small_model("sdxs-512", tmp_path)
    folder = tmp_path / "folder"
    theirs.save_pretrained(folder)
    ours = open_folder_networks(folder)
    theirs.scheduler = DDIMScheduler(
        **TRAINED | {"timestep_spacing": "trailing"}, set_alpha_to_one=True, clip_sample=False
    )
    size = {"height": COMMON["height"], "width": COMMON["width"]}
    expected = theirs(
        PROMPT, latents=noise(ours), num_inference_steps=1, guidance_scale=0.0, **size
    )

    images = generate(ours, prompt=PROMPT, sampler=None, **size)

    defaults = ours.spec.defaults
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (1, 1.0)
    assert lowest_psnr(images, as_arrays(expected.images)) >= 60


def full_size_checkpoint(name):
    """Return the tensors of a released model by their names in a single file, as fakes."""
    model = DISTILLED[name]
    whole = {"sd1": checkpoint(SD1), "sd2": checkpoint(SD2), "sdxl": sdxl_checkpoint(SDXL)}
    state = full_size_unet(model).state_dict()
    unet = {
        ours: FakeTensor(shape=tuple(state[theirs].shape))
        for theirs, ours in unet_names(state).items()
    }
    others = whole[model.original].items()
    return unet | {key: tensor for key, tensor in others if not key.startswith(UNET_PREFIX)}


@pytest.mark.parametrize("name", DISTILLED)
def test_models_of_full_size_are_read_from_their_shapes(name):
    tensors = full_size_checkpoint(name)

    found = detect(tensors)

    with torch.device("meta"):
        network = UNet(found.spec.unet)
    state = network.state_dict()
    assert found.spec.family == name
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        key.removeprefix(UNET_PREFIX): tensor.shape
        for key, tensor in tensors.items()
        if key.startswith(UNET_PREFIX)
    }
    if (millions := DISTILLED[name].millions) is not None:
        count = sum(value.numel() for value in state.values())
        assert count / 1e6 == pytest.approx(millions, abs=0.006)


def read(tensors):
    """Detect a checkpoint, and compare its UNet's tensors with the network's, as an export does."""
    found = detect(tensors)
    unet = {parameter: tensors[name] for parameter, name in found.weights["unet"].items()}
    check_weights("unet", found.spec, unet)


def test_levels_may_have_different_numbers_of_blocks_and_blocks_different_depths():
    """No released model is like that, but diffusers builds and saves such UNets."""
    torch.manual_seed(12)
    theirs = randomised(
        UNet2DConditionModel(
            block_out_channels=(32, 64, 96),
            layers_per_block=(1, 3, 2),
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
            up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
            mid_block_type="UNetMidBlock2D",
            transformer_layers_per_block=(1, (1, 3, 2), 2),
            reverse_transformer_layers_per_block=((2, 1, 1), (1, 1, 2, 1), 1),
            cross_attention_dim=64,
            attention_head_dim=8,
        )
    )
    state = theirs.state_dict()
    names = {key: new.removeprefix(UNET_PREFIX) for key, new in unet_names(state).items()}
    shapes = {names[key]: tuple(value.shape) for key, value in state.items()}

    spec = read_unet(shapes, num_heads=8, num_head_channels=None, blocks_removed=True)

    ours = UNet(spec).eval()
    ours.load_state_dict({names[key]: value for key, value in state.items()}, strict=True)
    assert (spec.num_res_blocks, spec.middle_depth) == ((1, 3, 2), 0)
    assert spec.transformer_depth == (0, (1, 3, 2), 2)
    assert spec.output_depth == (0, (1, 1, 2, 1), (2, 1, 1))
    inputs = torch.randn(2, 4, 16, 12), torch.tensor([981.0, 17.0]), torch.randn(2, 5, 64)
    with torch.inference_mode():
        expected = theirs(*inputs).sample
        found = ours(*inputs)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


SSD, KOALA, BASE, SMALL = "ssd-1b", "koala-1b", "bk-sdm-base", "bk-sdm-small"


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        (SSD, "output_blocks.2.1.transformer_blocks.9.", r"found 4 4 9 2 1 1 0 0 0 .*4 4 10 2 1 1"),
        (SSD, "output_blocks.3.1.transformer_blocks.1.", "ssd-1b, which differs in output_depths"),
        (SSD, "middle_block.", r"differs in middle: found none, expected residual block"),
        (KOALA, "middle_block.1.", "found residual blocks .*middle_block.2.* expected attention"),
        (SMALL, "output_blocks.7.", r"7 output blocks; .* 1, 1, 1, 1 residual blocks .* need 8"),
        (BASE, "middle_block.1.", r"no attention in its middle \(middle_block\.1"),
        (KOALA, "output_blocks.3.1.transformer_blocks.1.", r"output_blocks\.3 is \(640, 1\), but"),
        (SSD, "middle_block.0.in_layers.0.bias", r"middle_block\.0\.in_layers\.0\.bias"),
    ],
)
def test_a_block_that_is_missing_is_named(name, lost, words):
    tensors = full_size_checkpoint(name)
    kept = {
        key: tensor for key, tensor in tensors.items() if not key.startswith(UNET_PREFIX + lost)
    }
    assert len(kept) < len(tensors)

    with pytest.raises((UnknownModelError, WeightsError), match=words):
        read(kept)


@pytest.mark.parametrize(
    ("name", "lost", "words"),
    [
        (SSD, "first_stage_model.", "ssd-1b without its autoencoder; give it by --vae"),
        (KOALA, "conditioner.", r"koala-1b without its text .*--text-encoder and --text-encoder-2"),
        (SMALL, "first_stage_model.", "bk-sdm-small without its autoencoder; give it by --vae"),
    ],
)
def test_a_part_that_is_missing_is_named_with_its_flag(name, lost, words):
    tensors = full_size_checkpoint(name)
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(lost)}
    assert len(kept) < len(tensors)

    with pytest.raises(UnknownModelError, match=rf"^this is {words}"):
        read(kept)


@pytest.mark.parametrize("extra", ["middle_block.1.proj_in.weight", "middle_block.3.weight"])
def test_a_tensor_of_a_block_that_was_removed_is_named(extra):
    tensors = full_size_checkpoint(SSD) | {UNET_PREFIX + extra: FakeTensor(shape=(1280, 1280))}

    with pytest.raises(WeightsError, match=r"middle_block"):
        read(tensors)
