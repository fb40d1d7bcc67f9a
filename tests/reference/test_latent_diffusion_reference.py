"""The loops of three tasks against diffusers' pipelines, over the same torch modules.

Which networks a bundle holds is the exporter's to prove; here both sides run diffusers' own, small
and random, so that what is compared is all that lies around them: how requests are encoded, what is
laid behind the latents, guidance, steps, scales, and the pictures that come out.
"""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import (
    LDMBertConfig,
    LDMBertModel,
)
from PIL import Image, ImageDraw
from transformers import BertTokenizer

from ldm_runtime.testing import tiny_spec
from ldm_runtime.text import WordPieceTokenizer
from tests.generated import drawn_by
from tests.reference.drawings import SEED, STEPS, assert_same_pictures, generators, twins_pictures
from tests.reference.twins import SCHEDULERS

pytestmark = [
    pytest.mark.reference,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s", ","]


class Torch:
    """A torch function as a network of ours, under the names of one component."""

    def __init__(self, output, function):
        self.output, self.function = output, function

    def run(self, inputs):
        arguments = [torch.from_numpy(np.array(array)) for array in inputs.values()]
        with torch.inference_mode():
            return {self.output: self.function(*arguments).numpy()}


def randomised(module, scale=1.0):
    """Make every weight random, so that nothing is zero and nothing is alike."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval().requires_grad_(False)


def vq_model():
    torch.manual_seed(1)
    model = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 32),
        latent_channels=3,
        num_vq_embeddings=64,
        scaling_factor=1.0,
    )
    model.quantize.embedding.weight.data.normal_()
    return randomised(model)


def plain_unet(in_channels, sample_size=None):
    torch.manual_seed(2)
    return randomised(
        UNet2DModel(
            sample_size=sample_size,
            in_channels=in_channels,
            out_channels=3,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )


def spec_of(task, **networks):
    """Return the tiny model of a task, trained as the twins' schedulers have it."""
    return replace(tiny_spec(task).with_networks(**networks), prediction_type="epsilon")


def draw(networks, spec, tokenizer=None, **fields):
    """Return the pictures (N, H, W, 3) of a request, drawn by our loop over `networks`."""
    fields = {"num_inference_steps": STEPS, "sampler": "ddim", "seed": SEED, **fields}
    images = drawn_by(networks, tokenizer, spec, **fields)
    return np.stack([np.asarray(image, dtype=np.float64) for image in images])


def without_context(unet):
    return Torch("prediction", lambda latents, timesteps: unet(latents, timesteps).sample)


def quantised(autoencoder):
    return Torch("image", lambda latents: autoencoder.decode(latents).sample)


def test_an_unconditional_model_draws_what_diffusers_draws():
    autoencoder, unet = vq_model(), plain_unet(3, sample_size=16)
    pipeline = LDMPipeline(autoencoder, unet, SCHEDULERS["ddim"])
    expected = twins_pictures(pipeline, batch_size=2, generator=generators(2))

    networks = {"unet": without_context(unet), "vae_decoder": quantised(autoencoder)}
    found = draw(networks, spec_of("unconditional"), num_images=2, height=32, width=32)

    assert_same_pictures(found, expected)


def test_a_picture_is_enlarged_as_diffusers_enlarges_it():
    autoencoder, unet = vq_model(), plain_unet(6)
    pipeline = LDMSuperResolutionPipeline(autoencoder, unet, SCHEDULERS["ddim"])
    expected = twins_pictures(pipeline, Image.fromarray(PICTURE), generator=generators(1)[0])

    networks = {"unet": without_context(unet), "vae_decoder": quantised(autoencoder)}
    found = draw(networks, spec_of("super-resolution"), image=PICTURE)

    assert_same_pictures(found, expected)
    other = draw(networks, spec_of("super-resolution"), image=255 - PICTURE)
    assert np.abs(other - found).mean() > 1


def fill_hole(autoencoder, unet, picture, mask):
    """Fill a hole as `scripts/inpaint.py` does, line by line, but with diffusers' DDIM."""
    image = torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32) / 255)
    hole = torch.from_numpy((mask[None, None].astype(np.float32) / 255 >= 0.5).astype(np.float32))
    masked = (1 - hole) * image * 2 - 1
    scheduler = SCHEDULERS["ddim"]
    scheduler.set_timesteps(STEPS)
    with torch.inference_mode():
        known = autoencoder.encode(masked).latents
        mask_channel = torch.nn.functional.interpolate(hole * 2 - 1, size=known.shape[-2:])
        condition = torch.cat([known, mask_channel], dim=1)
        latents = torch.randn(known.shape, generator=generators(1)[0])
        for step in scheduler.timesteps:
            prediction = unet(torch.cat([latents, condition], dim=1), step).sample
            latents = scheduler.step(prediction, step, latents).prev_sample
        predicted = torch.clamp((autoencoder.decode(latents).sample + 1) / 2, 0, 1)
    filled = (1 - hole) * image + hole * predicted
    return np.rint(filled.numpy().transpose(0, 2, 3, 1) * 255.0)


def rectangle():
    mask = Image.new("L", (32, 32))
    ImageDraw.Draw(mask).rectangle((8, 5, 30, 22), fill=255)
    return mask


def soft_disc():
    large = Image.new("L", (320, 320))
    ImageDraw.Draw(large).ellipse((50, 60, 290, 250), fill=255)
    return large.resize((32, 32), Image.Resampling.LANCZOS)


def stored_as_jpeg():
    file = io.BytesIO()
    rectangle().save(file, format="JPEG", quality=50)
    return Image.open(file)


def ramp():
    return Image.linear_gradient("L").resize((32, 32), Image.Resampling.BILINEAR)


@pytest.mark.parametrize("make_mask", [rectangle, soft_disc, stored_as_jpeg, ramp])
def test_a_masked_region_is_filled_as_the_reference_fills_it(make_mask):
    autoencoder, unet = vq_model(), plain_unet(7)
    mask = np.asarray(make_mask())
    expected = fill_hole(autoencoder, unet, PICTURE, mask)

    networks = {
        "unet": without_context(unet),
        "vae_encoder": Torch("moments", lambda image: autoencoder.encode(image).latents),
        "vae_decoder": quantised(autoencoder),
    }
    found = draw(networks, spec_of("inpainting"), image=PICTURE, mask_image=mask)

    assert_same_pictures(found, expected)
    known = mask / 255 < 0.5
    np.testing.assert_array_equal(found[0][known], PICTURE[known])


@pytest.fixture(scope="module")
def text_to_image():
    torch.manual_seed(3)
    bert = LDMBertModel(
        LDMBertConfig(
            vocab_size=len(WORDS),
            encoder_layers=2,
            encoder_ffn_dim=64,
            encoder_attention_heads=2,
            head_dim=8,
            d_model=16,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    autoencoder = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32,) * 4,
        latent_channels=4,
        scaling_factor=0.18215,
    )
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return randomised(autoencoder), bert.eval().requires_grad_(False), randomised(unet, 1.5)


@pytest.mark.parametrize("prompt", ["A red circle", "red circles, a dog", ""])
def test_a_bert_model_draws_what_diffusers_draws(text_to_image, tmp_path, prompt):
    autoencoder, bert, unet = text_to_image
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    pipeline = LDMTextToImagePipeline(autoencoder, bert, tokenizer, unet, SCHEDULERS["ddim"])
    expected = twins_pictures(
        pipeline, prompt, height=64, width=32, guidance_scale=5.0, generator=generators(1)
    )

    tiny = tiny_spec("text-to-image")
    spec = spec_of(
        "text-to-image",
        autoencoder=replace(
            tiny.autoencoder, channel_mult=(1, 1, 1, 1), latent_scale_factor=0.18215
        ),
        text_encoder=replace(
            tiny.networks["text_encoder"],
            kind="bert",
            vocab_size=len(WORDS),
            max_tokens=77,
            pad_token_id=0,
        ),
    )
    networks = {
        "text_encoder": Torch("context", lambda tokens: bert(tokens)[0]),
        "unet": Torch(
            "prediction",
            lambda context, latents, timesteps: unet(latents, timesteps, context).sample,
        ),
        "vae_decoder": quantised(autoencoder),
    }
    found = draw(
        networks,
        spec,
        WordPieceTokenizer(WORDS),
        prompt=prompt,
        height=64,
        width=32,
        guidance_scale=5.0,
    )

    assert_same_pictures(found, expected)
