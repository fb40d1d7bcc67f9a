"""The models of a server under the names that AUTOMATIC1111's API has for checkpoints."""

from collections.abc import Mapping
from typing import Any

from ldm_serve.errors import ServeError
from ldm_serve.served_models import ServedModel, ServedModels

#: The setting that names the model.
FIELD = "sd_model_checkpoint"


def title(model: ServedModel) -> str:
    """Return the title of a model, under which clients switch to it."""
    return f"{model.alias} {_bracketed(model)}"


def find_checkpoint(models: ServedModels, name: str | None) -> ServedModel:
    """Return a model by its name, its title or the hash of its checkpoint.

    Args:
        models: The models.
        name: What the client calls it, adapters included; None is the default.

    Raises:
        ServeError: There is none of that name.
    """
    if name is not None and name not in models:
        for model in models.values():
            if name in (model.checkpoint_sha256, model.short_hash):
                return model
            name = name.removesuffix(f" {_bracketed(model)}")
    try:
        return models.find(name)
    except ServeError as error:
        error.rename_field({"model": FIELD})
        raise


def _bracketed(model: ServedModel) -> str:
    return f"[{model.short_hash}]"


def listed(models: Mapping[str, ServedModel]) -> list[dict[str, Any]]:
    """Return the answer of `sd-models`."""
    return [
        {
            "title": title(model),
            "model_name": model.name,
            "hash": model.short_hash,
            "sha256": model.checkpoint_sha256,
            "filename": model.name,  # where it lies is the server's own business
            "config": None,
        }
        for model in models.values()
    ]
