"""The trained models that come along: recognised without a flag, and still able to generate.

They are sampled by torch through the runtime's own loop. What their exported bundles reach is
measured by `evaluate_tasks.py`; that exporting changes nothing is shown elsewhere, model by model.
"""

from pathlib import Path

import numpy as np
import pytest

from models.shapes.catalog.models import MODELS
from models.shapes.evaluation import tasks
from models.shapes.evaluation.scores import GOALS, score_all, scores
from models.shapes.training.packing import MOST_BYTES, config_of
from tests.torch_generator import TorchGenerator

FOLDER = Path(__file__).parents[2] / "models/shapes"
IMAGES, STEPS = 8, 20
#: Share of a goal that this few images in this few steps must still reach.
SHARE = 0.75


@pytest.fixture(scope="module", params=MODELS.values(), ids=list(MODELS))
def opened(request):
    return request.param, TorchGenerator(FOLDER / f"{request.param.name}.ckpt")


def test_it_is_what_the_catalog_says_and_small_enough_to_come_along(opened):
    model, generator = opened
    spec = generator.spec

    assert (FOLDER / f"{model.name}.ckpt").stat().st_size <= MOST_BYTES
    assert (spec.task, spec.unet) == (model.task, model.unet)
    assert spec.autoencoder.codebook_size == model.autoencoder.spec.codebook_size
    assert spec.networks.get("text_encoder") == model.encoder
    assert spec.networks.get("class_embedder") == model.embedder
    assert spec.networks.get("segmentation_encoder") == model.segmentation_encoder
    assert {name: getattr(spec.defaults, name) for name in model.sampling} == model.sampling
    assert spec.label_names == config_of(model).label_names


def test_it_generates_what_is_asked_for(opened):
    model, generator = opened
    asked = tasks.held_out_prompts(model, IMAGES, tasks.SEED)

    images, _ = tasks.generate_all(generator, model, asked, STEPS)

    reached = scores(score_all(model.task, asked, images))
    goals = GOALS[model.task]
    missed = {name for name, goal in goals.items() if reached[name] < SHARE * goal}
    assert goals
    assert not missed
    assert all(np.ptp(image) > 100 for image in images)
