"""Measurement of a UNet's prediction target, which no shape tells and a wrong one ruins silently.

Latents of procedural images are mixed with noise, x = a * x0 + s * noise with a² + s² = 1, and the
output of the UNet is regressed on the noise and on x0. If e is the slope on the noise of the x0
that the model estimates, the slope of its output on the noise is

* 1 - e * a / s  if it predicts the noise,
* a - e / s      if it predicts v = a * noise - s * x0 (Salimans and Ho 2022, arXiv:2202.00512),
* e              if it predicts x0,

and e is small wherever noise prevails, whatever the model makes of images that it was not trained
on. The distance of the output itself from each target tells less: the shapes models all predict v,
and on such images the output of some is nearer to the noise. The spread of the latents is checked
as well.

A model of EDM (Karras et al. 2022, arXiv:2206.00364) is given the same mixture, of latents divided
by their standard deviation. Its output F is s * x0 - a * noise there, the negative of v, and either
may be what it is trained for; it is called "epsilon" as diffusers calls it, with a slope of -a.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ldm_export.errors import ExportError
from ldm_export.golden.images import make_images
from ldm_export.golden.one_network import OneNetwork, OpenReference
from ldm_export.golden.requests import unguided_request
from ldm_runtime.backends.contract import Runner
from ldm_runtime.bundle.manifest import PredictionRecord
from ldm_runtime.conditioning import Conditioning, encode_conditioning, open_tokenizer
from ldm_runtime.latents.codec import encode_image
from ldm_runtime.noise import TorchCpuGenerator
from ldm_runtime.schedules import edm_timestep
from ldm_runtime.specs.model import Assumption, ModelSpec, PredictionType, latent_step

_LOGGER = logging.getLogger(__name__)

_Number = TypeVar("_Number", np.float32, np.int64)

#: Shares of the image, a, at which it is measured: far from 0 and from 1, the other two slopes.
_SHARES = (0.6, 0.45, 0.3)
_IMAGES, _LATENT_SIDE = 2, 16
#: Largest deviation of a decided measurement, as a root mean square over `_SHARES`: less than half
#: of the 0.47 that are between x0 and v, and of the 0.56 between v and noise. The shapes models
#: have at most 0.14, and what computes noise or x0 from their v at most 0.12.
NEAR = 0.2
#: Least correlation with x0 of a model that predicts it: zeros have no noise in them either.
_FOLLOWS = 0.3
_STATED_BY: Mapping[str, str] = MappingProxyType(
    {
        "config": "the configuration says",
        "file": "the file says of itself",
        "family": "was assumed from its family",
        "metadata": "the file's metadata says",
        "config default": "is what a configuration without `parameterization` means",
        "training step": "was assumed from its steps of training",
    }
)
#: Standard deviation of latents in the UNet's scale: about 1 in training, by construction where the
#: factor was measured, and 0.9 to 1.3 for these images in the shapes models. Stable Diffusion's
#: latents without its factor have 5.5.
_LEAST_SPREAD, _MOST_SPREAD = 1 / 3, 3.0

Float32Array = npt.NDArray[np.float32]


def measure_prediction(
    spec: ModelSpec, vocabulary: Path | None, open_reference: OpenReference, key: str
) -> PredictionRecord | None:
    """Measure what a UNet predicts, in three calls with a batch of two small images.

    Args:
        spec: The model.
        vocabulary: Vocabulary of its tokenizer, or None without prompts.
        open_reference: Opens a component in torch.
        key: Hash of everything that the measurement depends on.

    Returns:
        The measurement, or None without a UNet and where an output is not finite.
    """
    if spec.unet is None:
        return None
    network, step = OneNetwork(open_reference), latent_step(spec)
    images = make_images(-(-_LATENT_SIDE // step) * step * spec.autoencoder.factor)[:_IMAGES]
    encoded = [encode_image(network("vae_encoder"), image[None], spec) for image in images]
    latents: Float32Array = np.concatenate(encoded) / np.float32(spec.sigma_data)
    _warn_of_spread(float(latents.std()), spec.autoencoder.latent_scale_factor)
    tokenizer = None if vocabulary is None else open_tokenizer(vocabulary, spec)
    conditioning = [
        encode_conditioning(network, tokenizer, unguided_request(spec, image), spec).of_images(
            range(1)
        )
        for image in images
    ]
    levels = [_level(share, spec) for share in _SHARES]
    responses = np.array(
        [
            _response(network("unet"), timestep, share, latents, conditioning)
            for timestep, share in levels
        ]
    )
    if not np.isfinite(responses).all():
        return None
    shares = np.array([share for _, share in levels])
    return _record(responses[:, 0], responses[:, 1], _slopes(shares, spec), key)


def confirmed(spec: ModelSpec, record: PredictionRecord | None) -> ModelSpec:
    """Return a model whose prediction type a measurement confirms, or does not contradict.

    A measurement that confirms it is added to the source of the assumption. The user's flag is
    obeyed with a warning, whatever was measured.

    Raises:
        ExportError: The measurement contradicts a preset, the configuration, the file or the
            family.
    """
    if record is None or record.measured is None:
        return spec
    assumption = _assumption(spec)
    if record.measured != spec.prediction_type:
        contradiction = _contradiction(record, record.measured, spec.prediction_type)
        if assumption.source != "flag":
            raise ExportError(
                f"{contradiction}, which {_stated_by(assumption.source)}; export with "
                f"--prediction-type {record.measured}, or with --prediction-type "
                f"{spec.prediction_type} to keep it"
            )
        _LOGGER.warning(
            "%s; --prediction-type %s is used as asked", contradiction, spec.prediction_type
        )
        return spec
    measured = replace(assumption, source=f"{assumption.source}, measured")
    assumptions = (measured if each is assumption else each for each in spec.assumptions)
    return replace(spec, assumptions=tuple(assumptions))


def warn_of_hint(spec: ModelSpec, record: PredictionRecord) -> None:
    """Warn that a measurement contradicts a hint, in whose place it is taken.

    Args:
        spec: The model, as it was recognised before.
        record: The decided measurement.
    """
    assumption = _assumption(spec)
    if assumption.source != "family" and record.measured is not None:
        _LOGGER.warning(
            "%s, which %s; going by the measurement, unless --prediction-type says otherwise",
            _contradiction(record, record.measured, spec.prediction_type),
            _stated_by(assumption.source),
        )


def warn_of_siblings(spec: ModelSpec, siblings: Collection[PredictionType]) -> None:
    """Warn that nothing tells a model from those of its shapes that predict something else.

    Args:
        spec: The model, whose measurement is undecided.
        siblings: What the others predict; without them there is no warning.
    """
    if siblings:
        _LOGGER.warning(
            "it could not be measured what the UNet predicts: %s is taken (from %s), but models of "
            "these shapes predict %s as well, and with the wrong one images are noise; look at the "
            "golden images, and state it with --prediction-type",
            spec.prediction_type,
            _assumption(spec).source,
            " or ".join(sorted(siblings)),
        )


def _assumption(spec: ModelSpec) -> Assumption:
    """Return who says what the UNet predicts."""
    (found,) = (each for each in spec.assumptions if each.field == "prediction_type")
    return found


def _level(share: float, spec: ModelSpec) -> tuple[float, float]:
    """Return the timestep nearest to where an image has a share of the mixture, and its share."""
    if spec.edm is not None:
        return edm_timestep(spec.edm.sigma_data * math.sqrt(1 / share**2 - 1)), share
    signals = np.sqrt(np.array(spec.alphas_cumprod))
    timestep = int(np.abs(signals - share).argmin())
    return timestep, float(signals[timestep])


def _slopes(
    shares: npt.NDArray[np.float64], spec: ModelSpec
) -> Mapping[PredictionType, npt.NDArray[np.float64]]:
    """Return the slope of every output on noise that a model may have, at shares of the image."""
    if spec.edm is not None:
        return {"epsilon": -shares, "v_prediction": shares}
    return {"epsilon": np.ones_like(shares), "v_prediction": shares, "sample": 0 * shares}


def _stated_by(source: str) -> str:
    return _STATED_BY.get(source) or f"the {source} says"


def _contradiction(
    record: PredictionRecord, measured: PredictionType, stated: PredictionType
) -> str:
    near, far = (record.deviations[kind] for kind in (measured, stated))
    return (
        f"the UNet was measured to predict {measured} (the slope of its output on noise is off by "
        f"{near:.2f}) and not {stated} (off by {far:.2f})"
    )


def _warn_of_spread(spread: float, factor: float) -> None:
    if not _LEAST_SPREAD <= spread <= _MOST_SPREAD:
        _LOGGER.warning(
            "latents of procedural images have a standard deviation of %.2g in the UNet's scale, "
            "where models are trained with about 1; is the factor %g right? "
            "--latent-scale-factor states another",
            spread,
            factor,
        )


def _response(
    unet: Runner,
    timestep: float,
    share: float,
    latents: Float32Array,
    conditioning: Sequence[Conditioning],
) -> npt.NDArray[np.float64]:
    """Return the slope of a UNet's output on the noise, and its correlation with x0."""
    noise = TorchCpuGenerator(round(1000 * share)).randn(latents.shape)
    noisy = np.float32(share) * latents + np.float32(math.sqrt(1 - share**2)) * noise
    concat = [noisy, *_joined([each.concat for each in conditioning])]
    inputs = {
        "latents": np.concatenate(concat, axis=1),
        "timesteps": np.full(len(latents), timestep, dtype=np.float32),
    }
    for context in _joined([each.context for each in conditioning]):
        inputs["context"] = context
    for vector in _joined([each.vector for each in conditioning]):
        inputs["vector"] = vector
    for labels in _joined([each.class_labels for each in conditioning]):
        inputs["class_labels"] = labels
    for guidance in _joined([each.guidance for each in conditioning]):
        inputs["guidance"] = guidance
    prediction = unet.run(inputs)["prediction"].ravel().astype(np.float64)
    if not (np.isfinite(prediction).all() and np.isfinite(latents).all()):
        return np.full(2, math.nan)
    known = np.stack([noise.ravel(), latents.ravel()], axis=1).astype(np.float64)
    slope = float(np.linalg.lstsq(known, prediction, rcond=None)[0][0])
    spread = float(prediction.std() * known[:, 1].std())
    shared = float(np.mean((prediction - prediction.mean()) * known[:, 1]))
    return np.array([slope, shared / spread if spread else 0.0])


def _joined(parts: Sequence[npt.NDArray[_Number] | None]) -> list[npt.NDArray[_Number]]:
    """Return the parts of a batch as one array, or nothing where a model has none."""
    present = [part for part in parts if part is not None]
    return [np.concatenate(present)] if present else []


def _record(
    slopes: npt.NDArray[np.float64],
    correlations: npt.NDArray[np.float64],
    expected: Mapping[PredictionType, npt.NDArray[np.float64]],
    key: str,
) -> PredictionRecord:
    """Compare slopes at some noise levels with those of every prediction type."""
    deviations = {
        kind: float(np.sqrt(np.mean((slopes - those) ** 2))) for kind, those in expected.items()
    }
    nearest = min(deviations, key=lambda kind: deviations[kind])
    is_clear = deviations[nearest] <= NEAR
    if nearest == "sample":
        is_clear &= bool(correlations.mean() >= _FOLLOWS)
    return PredictionRecord(key=key, deviations=deviations, measured=nearest if is_clear else None)
