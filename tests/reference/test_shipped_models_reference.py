"""Bundles of the trained models that come along against diffusers' pipelines over the same files.

diffusers' modules take the weights as torch reads them, `transformers` tokenises, the scheduler
steps; ours are our tokenizer, our noise, our loop and our networks, in torch or, of the captions,
exported and run by ONNX Runtime. The images are scenes, not noise. Classes, layouts, maps and masks
have no pipeline in diffusers.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    LDMTextToImagePipeline,
)
from PIL import Image
from transformers import BertTokenizer

from ldm_export import export
from ldm_runtime import Generator
from models.shapes.catalog.models import MODELS
from models.shapes.data import scenes
from models.shapes.evaluation.scores import image_of, shrink
from models.shapes.training.autoencoder import under
from released.compvis_files import compvis_config
from tests.reference.bert_twin import load_bert
from tests.reference.drawings import SEED, STEPS, assert_same_pictures, generators, twins_pictures
from tests.reference.first_stage_twin import load_first_stage
from tests.reference.twins import load_unet
from tests.reference.unet_2d_twin import load_unet_2d
from tests.torch_generator import TorchGenerator

pytestmark = [
    pytest.mark.reference,
    pytest.mark.slow,
    # torch's __array__ lacks NumPy 2's `copy`, and diffusers passes tensors to np.array.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models/shapes"
VOCABULARY = ROOT / "ldm_export/vocabularies/bert_base_uncased_vocab.txt"
PROMPT = "a large red circle left of a small blue square"


def opened(name, folder):
    """Return a generator over the bundle of a shipped checkpoint, whose golden images are quick."""
    config = (FOLDER / f"{name}.yaml").read_text()
    (folder / "few.yaml").write_text(re.sub("(num_inference_steps:) .*", rf"\1 {STEPS}", config))
    export(FOLDER / f"{name}.ckpt", folder / "engines", config=folder / "few.yaml")
    return Generator(folder / "engines", backend="onnxruntime", batch_size=2, threads=1)


def weights_of(name):
    """Return what torch reads of a shipped checkpoint, in float32."""
    state = torch.load(FOLDER / f"{name}.ckpt", weights_only=True)["state_dict"]
    return {key: value.float() for key, value in state.items()}


def first_stage_of(name, state):
    return load_first_stage(
        MODELS[name].autoencoder.spec,
        under("first_stage_model.", state),
        scaling_factor=float(state["scale_factor"]),
    )


def unscaled(autoencoder):
    """Let it divide latents by its scale itself, where the pipeline has no word for that."""
    decode, scale = autoencoder.decode, autoencoder.config.scaling_factor
    autoencoder.decode = lambda latents: decode(latents / scale)
    return autoencoder


def scheduler_of(name):
    noise = MODELS[name].noise
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=noise.start,
        beta_end=noise.end,
        prediction_type="v_prediction",
        timestep_spacing="leading",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    )


def generated(generator, **fields):
    fields = {"num_inference_steps": STEPS, "seed": SEED, "sampler": "ddim", "eta": 0.0, **fields}
    result = generator(**fields)
    return np.stack([np.asarray(image, dtype=np.float64) for image in result.images])


def test_scenes_out_of_nothing_are_those_of_diffusers():
    name, state = "unconditional", weights_of("unconditional")
    unet = load_unet_2d(MODELS[name].unet, under("model.diffusion_model.", state))
    unet.register_to_config(sample_size=16)
    pipeline = LDMPipeline(first_stage_of(name, state), unet, scheduler_of(name))
    expected = twins_pictures(pipeline, batch_size=2, generator=generators(2))

    generator = TorchGenerator(FOLDER / f"{name}.ckpt")
    assert_same_pictures(generated(generator, num_images=2), expected)


def test_a_scene_is_enlarged_as_diffusers_enlarges_it():
    name, state = "super_resolution", weights_of("super_resolution")
    unet = load_unet_2d(MODELS[name].unet, under("model.diffusion_model.", state))
    autoencoder = unscaled(first_stage_of(name, state))
    pipeline = LDMSuperResolutionPipeline(autoencoder, unet, scheduler_of(name))
    four = scenes.random_scenes(np.random.default_rng(SEED), held_out=True)
    rows = [np.hstack([image_of(next(four)) for _ in range(2)]) for _ in range(2)]
    small = Image.fromarray(shrink(np.vstack(rows)))  # the pipeline takes no less than 32x32
    expected = twins_pictures(pipeline, small, generator=generators(1)[0])

    generator = TorchGenerator(FOLDER / f"{name}.ckpt")
    assert_same_pictures(generated(generator, image=small), expected)


def test_a_caption_is_generated_as_diffusers_generates_it(tmp_path):
    name, state = "text_to_image_bert", weights_of("text_to_image_bert")
    model = MODELS[name]
    autoencoder = first_stage_of(name, state)
    pipeline = LDMTextToImagePipeline(
        autoencoder,
        load_bert(model.encoder, under("cond_stage_model.", state)),
        BertTokenizer(str(VOCABULARY)),
        load_unet(state, compvis_config(model.unet, model.autoencoder.spec)),
        scheduler_of(name),
    )
    # The pipeline takes every autoencoder for one of factor 8; this one's is 4.
    expected = twins_pictures(
        pipeline, PROMPT, height=128, width=128, guidance_scale=5.0, generator=generators(1)
    )

    with opened(name, tmp_path) as generator:
        assert_same_pictures(generated(generator, prompt=PROMPT, guidance_scale=5.0), expected)
