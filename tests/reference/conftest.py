import shutil

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from released.compvis_files import compvis_config
from tests.export.small_checkpoint import AUTOENCODER, TEXT_ENCODER, UNET
from tests.reference.diffusers_folder import small_pipeline
from tests.reference.family_comparison import Comparison
from tests.reference.twins import (
    SCHEDULERS,
    clip_tokenizer,
    load_autoencoder,
    load_text_encoder,
    load_unet,
)


@pytest.fixture
def means(monkeypatch):
    """Let diffusers take the mean of an image's latents, as ours do, in place of a sample."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )


@pytest.fixture
def compare(request, tmp_path_factory, traces):
    """Compares the images of a family with those of another implementation."""
    return Comparison(
        results=request.config.getoption("--families"),
        through_graphs=request.config.getoption("--graphs"),
        test=request.node.nodeid.rpartition("/")[2],
        folder=tmp_path_factory.mktemp("graphs"),
        traces=traces,
    )


@pytest.fixture(scope="package")
def pipeline(small_checkpoint_path, tmp_path_factory):
    """diffusers' pipeline over the checkpoint."""
    config = compvis_config(UNET, AUTOENCODER)
    path = str(small_checkpoint_path)
    state = torch.load(path, weights_only=True)["state_dict"]
    pipeline = StableDiffusionPipeline(
        vae=load_autoencoder(path, config),
        text_encoder=load_text_encoder(state, TEXT_ENCODER, tmp_path_factory.mktemp("text")),
        tokenizer=clip_tokenizer(tmp_path_factory.mktemp("tokenizer")),
        unet=load_unet(path, config),
        scheduler=SCHEDULERS["ddim"],
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="package")
def other_pipeline(tmp_path_factory):
    """A small pipeline that diffusers built itself, of other sizes than the checkpoint's."""
    return small_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="package")
def saved_folder(other_pipeline, tmp_path_factory):
    """The folder that it saves by default; do not change it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    other_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved_folder, tmp_path):
    """A copy of it to change. Its weights are links to files elsewhere, as in the hub's cache."""
    copy = tmp_path / "copy"
    shutil.copytree(saved_folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in saved_folder.glob("*/*.safetensors"):
        (copy / weights.parent.name / weights.name).symlink_to(weights)
    return copy
