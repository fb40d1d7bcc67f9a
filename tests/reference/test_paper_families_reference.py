"""Small checkpoints of the paper's models against a plain loop over diffusers' networks.

Every kind of model is written as a checkpoint, detected as an export would detect it, and sampled
by the runtime's loop. The loop here is `scripts/*.py` of CompVis' latent-diffusion with the
networks, the scheduler and the tokenizer of diffusers and transformers.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention
from transformers import BertTokenizer

from ldm_runtime.inputs.layouts import layout_tokens, read_layout
from ldm_runtime.specs.networks import TextEncoderSpec
from released.compvis_files import compvis_config
from tests.export.small_systems import small_system
from tests.reference.bert_twin import load_bert
from tests.reference.first_stage_twin import load_first_stage
from tests.reference.small_families import open_networks
from tests.reference.small_pipelines import PROMPT, SIDE, noise, photo
from tests.reference.test_shipped_models_reference import VOCABULARY
from tests.reference.twins import load_unet
from tests.reference.unet_2d_twin import load_unet_2d

pytestmark = pytest.mark.reference

STEPS = 6
GUIDED = {"guidance_scale": 4.0}
LAYOUT = [{"label": 7, "box": [0.1, 0.2, 0.5, 0.6]}, {"label": 300, "box": [0.4, 0.0, 0.6, 0.9]}]
PIXELS = np.asarray(photo()[0])
MASK = np.asarray(photo()[1])
SEGMENTATION = (np.add.outer(np.arange(SIDE), np.arange(SIDE)) // 23 % 5).astype(np.uint8)
EMBEDDINGS = np.random.default_rng(3).standard_normal((3, 48)).astype(np.float32)
#: `scripts/knn2img.py` retrieves neighbours of norm 1.
DIRECTIONS = EMBEDDINGS / np.linalg.norm(EMBEDDINGS, axis=1, keepdims=True)


def part(state, prefix):
    return {
        name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)
    }


def scaled(image):
    """Return an image (H, W, 3) as a tensor (1, 3, H, W) from -1 to 1."""
    return torch.from_numpy(np.array(image)).movedim(2, 0)[None].float() / 127.5 - 1


def bert_of(model):
    """Return diffusers' BERT, without the logits that only training used."""
    weights = part(model.state, "cond_stage_model.")
    used = {name: each for name, each in weights.items() if "to_logits" not in name}
    return load_bert(model.spec.network(TextEncoderSpec), used)


def text_context(model):
    twin = bert_of(model)
    tokenizer = BertTokenizer(str(VOCABULARY))
    tokens = tokenizer(
        ["", PROMPT], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    )
    return twin(tokens.input_ids)[0]


def layout_context(model):
    """The tokens of boxes are compared with the paper's code elsewhere; the encoder is here."""
    spec = model.spec.network(TextEncoderSpec)
    layouts = [(), read_layout(LAYOUT)]
    return bert_of(model)(
        torch.from_numpy(np.stack([layout_tokens(each, spec) for each in layouts]))
    )[0]


def class_context(model):
    table = model.state["cond_stage_model.embedding.weight"]
    return table[[len(table) - 1, 3]][:, None]


def map_channels(model):
    """`SpatialRescaler`: half of the size as often as need be, then a convolution of 1x1."""
    classes = torch.from_numpy(SEGMENTATION.astype(np.int64))
    encoded = F.one_hot(classes, 5).movedim(2, 0)[None].float()
    for _ in range(2):
        encoded = F.interpolate(encoded, scale_factor=0.5, mode="bilinear")
    return F.conv2d(encoded, *part(model.state, "cond_stage_model.channel_mapper.").values())


def masked_channels(model):
    """`scripts/inpaint.py`: latents of the image without what the mask hides, then the mask."""
    mask = torch.from_numpy(MASK >= 128).float()[None, None]
    image = (1 - mask) * (scaled(PIXELS) + 1) / 2 * 2 - 1
    known = model.autoencoder.encode(image).latents
    return torch.cat([known, F.interpolate(mask * 2 - 1, size=known.shape[-2:])], dim=1)


def in_the_mask(image):
    """Return an image outside the mask, and what was generated inside."""
    return np.where(MASK[..., None] >= 128, image, PIXELS)


#: The request of each kind, its context (the null condition first) and its channels.
KINDS = {
    "unconditional": ({}, None, None),
    "churches": ({}, None, None),
    "class-to-image": ({"class_label": 3}, lambda model: class_context(model)[1:], None),
    "class-guided": ({"class_label": 3, **GUIDED}, class_context, None),
    "text-to-image": ({"prompt": PROMPT, **GUIDED}, text_context, None),
    "text-vq": ({"prompt": PROMPT, **GUIDED}, text_context, None),
    "layout-to-image": ({"layout": LAYOUT, **GUIDED}, layout_context, None),
    "semantic-synthesis": ({"segmentation": SEGMENTATION}, None, map_channels),
    "super-resolution": (
        {"image": PIXELS[::4, ::4].copy()},
        None,
        lambda _: scaled(PIXELS[::4, ::4]),
    ),
    "inpainting": ({"image": PIXELS, "mask_image": MASK}, None, masked_channels),
    "retrieval": (
        {"embeddings": EMBEDDINGS, **GUIDED},
        lambda _: torch.from_numpy(np.stack([0 * DIRECTIONS, DIRECTIONS])),
        None,
    ),
}
OF_SIZE = {"class_label", "prompt", "layout", "embeddings"}


def opened(name):
    """Return a checkpoint's tensors, what they are, and diffusers' networks over them."""
    system = small_system(name)
    state, spec = system.state, system.spec
    alone = spec.unet is None
    autoencoder = load_first_stage(
        spec.autoencoder,
        part(state, "" if alone else "first_stage_model."),
    )
    model = SimpleNamespace(state=state, spec=spec, autoencoder=autoencoder, unet=None)
    if not alone:
        model.unet = unet_of(model)
    return model


def unet_of(model):
    """Return a function of latents, a timestep and context, of diffusers' UNet."""
    spec = model.spec.unet
    if spec.attention == "qkv":
        plain = load_unet_2d(spec, part(model.state, "model.diffusion_model."))
        return lambda latents, timestep, _: plain(latents, timestep).sample
    # diffusers' loader knows heads of a fixed size only where projections are linear.
    counted = replace(spec, num_heads=spec.num_heads or 1, num_head_channels=None)
    unet = load_unet(model.state, compvis_config(counted, model.spec.autoencoder))
    if spec.num_head_channels is not None:
        for module in unet.modules():
            if isinstance(module, Attention):
                module.heads = module.to_q.out_features // spec.num_head_channels
                module.scale = spec.num_head_channels**-0.5
    return lambda latents, timestep, context: unet(latents, timestep, context).sample


@torch.inference_mode()
def plain_loop(model, start, context, channels, guidance_scale=1.0):
    """Return the image (1, H, W, 3), 0 to 255, of DDIM without noise."""
    betas = model.state["betas"]
    scheduler = DDIMScheduler(
        trained_betas=betas.numpy(), set_alpha_to_one=False, clip_sample=False, steps_offset=1
    )
    scheduler.set_timesteps(STEPS)
    latents = start
    for timestep in scheduler.timesteps:
        count = 1 if context is None else len(context)
        joined = latents if channels is None else torch.cat([latents, channels], dim=1)
        predicted = model.unet(joined.expand(count, -1, -1, -1), timestep, context)
        if count == 2:
            null, cond = predicted.chunk(2)
            predicted = null + guidance_scale * (cond - null)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return decoded(model, latents / model.spec.autoencoder.latent_scale_factor)


def decoded(model, latents):
    pixels = (model.autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    return np.rint(pixels.movedim(1, 3).double().numpy() * 255.0)


@pytest.mark.parametrize("name", KINDS)
def test_a_model_of_the_paper_generates_the_images_of_a_plain_loop(compare, name):
    fields, context, channels = KINDS[name]
    model = opened(name)
    ours = open_networks(model.state)
    with torch.inference_mode():
        given = [None if make is None else make(model) for make in (context, channels)]
    scale = fields.get("guidance_scale", 1.0)
    expected = plain_loop(model, noise(ours), *given, guidance_scale=scale)
    if name == "inpainting":
        expected = in_the_mask(expected)
    size = {} if fields and not OF_SIZE & fields.keys() else {"height": SIDE, "width": SIDE}

    compare(
        *(model.spec.family, ours, expected),
        num_inference_steps=STEPS,
        eta=0.0,
        **size,
        **fields,
    )


@pytest.mark.parametrize("name", ["autoencoder", "autoencoder-kl"])
@torch.inference_mode()
def test_an_autoencoder_reconstructs_as_diffusers_does(compare, name):
    model = opened(name)
    encoded = model.autoencoder.encode(scaled(PIXELS))
    latents = encoded.latent_dist.mode() if name == "autoencoder-kl" else encoded.latents

    compare(
        *(model.spec.family, open_networks(model.state), decoded(model, latents)),
        image=PIXELS,
        sampler=None,
        seed=None,
    )
