import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from ldm_export import export
from ldm_export.bundle import with_known_prediction
from ldm_export.checkpoint.file_fields import FileFields
from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError, WeightsError
from ldm_export.golden.prediction import NEAR, confirmed, measure_prediction
from ldm_export.graphs.torch_engine import TorchEngine
from ldm_export.networks.loading import build_network
from ldm_export.source import Source
from ldm_export.steps import vocabulary_of
from ldm_runtime.bundle.manifest import PredictionRecord
from ldm_runtime.specs.model import Assumption
from ldm_runtime.testing import FakeEngine
from models.shapes.catalog.variants import VARIANTS
from tests.conftest import SHAPES_CHECKPOINT
from tests.export.sd_layout import (
    SD1,
    SD2,
    checkpoint,
    scaled_linear,
    sdxl_checkpoint,
    with_values,
)
from tests.export.small_spec import SPEC
from tests.export.small_systems import SMALL_SYSTEMS, small_system
from tests.torch_generator import TorchGenerator

FOLDER = SHAPES_CHECKPOINT.parent
TRAINED = sorted(path.stem for path in FOLDER.glob("*.ckpt"))


class OtherTarget:
    """A UNet that predicts v, turned into one of another target by arithmetic alone."""

    def __init__(self, unet, spec, target):
        self.unet, self.target = unet, target
        self.signals = np.sqrt(np.array(spec.alphas_cumprod))
        self.channels = spec.unet.out_channels

    def run(self, inputs):
        share = self.signals[inputs["timesteps"].astype(int)][:, None, None, None]
        noise_share = np.sqrt(1 - share**2)
        noisy, v = inputs["latents"][:, : self.channels], self.unet.run(inputs)["prediction"]
        match self.target:
            case "epsilon":  # noise = s * x + a * v, and v = a * noise - s * x0
                return {"prediction": noise_share * noisy + share * v}
            case "sample":
                return {"prediction": share * noisy - noise_share * v}
            case _:
                return {"prediction": v}


@pytest.fixture(scope="module")
def trained():
    """Measure a model that comes along, as it is or with another target; each is loaded once."""
    opened = {}

    def measure(name, target="v_prediction"):
        if name not in opened:
            opened[name] = opened_model(name)
        spec, networks = opened[name]
        known = {**networks, "unet": OtherTarget(networks["unet"], spec, target)}
        return measure_prediction(spec, vocabulary_of(spec), known.__getitem__, "key")

    return measure


def opened_model(name):
    """Open a model, if it is a UNet alone with the rest of the shapes model."""
    rest = dict.fromkeys(("vae", "text_encoder"), SHAPES_CHECKPOINT) if name in VARIANTS else {}
    model = TorchGenerator(FOLDER / f"{name}.ckpt", **rest)
    return model.spec, model.networks


@pytest.mark.parametrize("name", TRAINED)
def test_every_model_that_comes_along_is_measured_to_predict_v(name, trained):
    record = trained(name)

    assert record.measured == "v_prediction"
    assert record.deviations["v_prediction"] < 0.7 * NEAR
    assert record.deviations["epsilon"] > 2.5 * NEAR


@pytest.mark.parametrize("name", ["semantic_synthesis", "shapes", "super_resolution"])
def test_the_same_model_computing_noise_is_measured_to_predict_noise(name, trained):
    record = trained(name, "epsilon")

    assert record.measured == "epsilon"
    assert record.deviations["epsilon"] < 0.5 * NEAR


def test_the_same_model_computing_clean_latents_is_measured_to_predict_them(trained):
    assert trained("shapes", "sample").measured == "sample"


def random_networks(name, seed):
    system = small_system(name, seed)

    def network(component):
        prefix = {
            "unet": "model.diffusion_model.",
            "vae_encoder": "first_stage_model.",
        }.get(component, "cond_stage_model.")
        built = build_network(component, system.spec)
        state = {each: system.state[prefix + each] for each in built.state_dict()}
        built.load_state_dict(state, assign=True)
        return TorchEngine(component, built.requires_grad_(False))

    return system.spec, network


@pytest.mark.parametrize(
    "name", [each for each in SMALL_SYSTEMS if not each.startswith("autoencoder")]
)
def test_random_weights_of_every_task_are_undecided(name):
    spec, network = random_networks(name, seed=1)

    record = measure_prediction(spec, vocabulary_of(spec), network, "key")

    assert record.measured is None
    assert min(record.deviations, key=record.deviations.get) == "sample"
    assert confirmed(spec, record) is spec


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_outputs_that_say_nothing_or_are_no_numbers_are_undecided(value):
    spec, network = random_networks("unconditional", seed=0)

    def constant(component):
        if component != "unet":
            return network(component)
        return FakeEngine(
            lambda inputs: {"prediction": np.full_like(inputs["latents"], np.float32(value))}
        )

    record = measure_prediction(spec, None, constant, "key")

    assert record is None or record.measured is None
    assert confirmed(spec, record) is spec


@pytest.mark.parametrize(("factor", "warned"), [(1, False), (0.2, True), (5.5, True)])
def test_latents_far_from_unit_variance_are_a_warning_with_their_spread(factor, warned, caplog):
    spec, networks = opened_model("unconditional")
    scaled = replace(
        spec.autoencoder, latent_scale_factor=factor * spec.autoencoder.latent_scale_factor
    )

    record = measure_prediction(
        spec.with_networks(autoencoder=scaled), None, networks.__getitem__, "key"
    )

    assert record is not None
    found = [each.getMessage() for each in caplog.records if "deviation" in each.getMessage()]
    assert len(found) == warned
    assert all(f"is the factor {scaled.latent_scale_factor:g} right?" in each for each in found)


def test_an_autoencoder_predicts_nothing():
    spec = small_system("autoencoder").spec

    assert measure_prediction(spec, None, pytest.fail, "key") is None


def measured(kind):
    deviations = dict.fromkeys(("epsilon", "v_prediction", "sample"), 0.5) | {kind: 0.04}
    return PredictionRecord(key="", deviations=deviations, measured=kind)


def assuming(source):
    assumption = Assumption(field="prediction_type", value=SPEC.prediction_type, source=source)
    return replace(SPEC, assumptions=(assumption,))


@pytest.mark.parametrize("source", ["config", "file", "family", "flag"])
def test_what_a_measurement_confirms_is_recorded_as_measured(source):
    spec = confirmed(assuming(source), measured("epsilon"))

    assert [each.source for each in spec.assumptions] == [f"{source}, measured"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("config", "which the configuration says"),
        ("file", "which the file says of itself"),
        ("family", "which was assumed from its family"),
    ],
)
def test_a_measurement_that_contradicts_names_both_errors_and_the_flag(source, words):
    with pytest.raises(ExportError) as raised:
        confirmed(assuming(source), measured("v_prediction"))

    assert str(raised.value) == (
        "the UNet was measured to predict v_prediction (the slope of its output on noise is off by "
        f"0.04) and not epsilon (off by 0.50), {words}; export with --prediction-type "
        "v_prediction, or with --prediction-type epsilon to keep it"
    )


def test_a_flag_is_obeyed_with_a_warning(caplog):
    spec = assuming("flag")

    assert confirmed(spec, measured("v_prediction")) is spec
    assert "not epsilon (off by 0.50); --prediction-type epsilon is used as asked" in caplog.text


UNDECIDED = PredictionRecord(
    key="", deviations=dict.fromkeys(("epsilon", "v_prediction", "sample"), 0.5), measured=None
)


def recognised(record, caplog, tensors=None, **stated):
    """Recognise Stable Diffusion 2 with a record of its measurement; return it and warnings."""
    caplog.clear()
    tensors = tensors or checkpoint(SD2)
    detect_again = partial(detect, tensors, **stated)
    source = Source(
        options=None,
        checkpoint=None,
        detection=detect_again(),
        sha256="",
        toolchain=None,
        detect_again=detect_again,
    )
    spec = with_known_prediction(source, record).spec
    return spec.prediction_type, [each for each in caplog.messages if "recognised" not in each]


BY_STEP = {"stated": FileFields(global_step=875_000)}


@pytest.mark.parametrize("record", [UNDECIDED, None])
@pytest.mark.parametrize(
    ("stated", "kept", "source", "other"),
    [
        ({}, "v_prediction", "family", "epsilon"),
        (BY_STEP, "epsilon", "training step", "v_prediction"),
    ],
)
def test_an_undecided_measurement_is_a_warning_where_a_family_has_models_of_both_kinds(
    record, stated, kept, source, other, caplog
):
    prediction_type, (warning,) = recognised(record, caplog, **stated)

    assert prediction_type == kept
    assert f"{kept} is taken (from {source}), but models of these shapes predict {other}" in warning
    assert "--prediction-type" in warning


def test_an_undecided_measurement_is_no_warning_where_the_prediction_type_is_stated(caplog):
    flag = Overrides(prediction_type="epsilon")

    assert recognised(UNDECIDED, caplog, overrides=flag) == ("epsilon", [])


def test_a_measurement_decides_between_models_of_both_kinds_without_a_warning(caplog):
    assert recognised(measured("epsilon"), caplog) == ("epsilon", [])


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        (BY_STEP, "which was assumed from its steps of training; going by the measurement"),
        (
            {"metadata": {"modelspec.prediction_type": "epsilon"}},
            "which the file's metadata says; going by the measurement",
        ),
        (
            {"config": {"model": {"target": "ddpm.LatentDiffusion", "params": {"unet_config": 0}}}},
            "which is what a configuration without `parameterization` means; going by",
        ),
    ],
)
def test_a_measurement_outweighs_a_hint_with_a_warning(stated, words, caplog):
    prediction_type, (warning,) = recognised(measured("v_prediction"), caplog, **stated)

    assert prediction_type == "v_prediction"
    assert words in warning


HINTS_OF_EPSILON = [
    BY_STEP,
    {"metadata": {"modelspec.prediction_type": "epsilon"}},
    {"config": {"model": {"target": "ddpm.LatentDiffusion", "params": {"unet_config": 0}}}},
]


@pytest.mark.parametrize("hint", HINTS_OF_EPSILON)
def test_a_noise_schedule_that_ends_in_noise_outweighs_a_hint_of_epsilon(hint):
    alphas = np.append(scaled_linear()[:-1], 0)
    tensors = checkpoint(SD2) | {"alphas_cumprod": with_values(alphas, "float64")}

    spec = detect(tensors, **hint).spec

    assert spec.prediction_type == "v_prediction"
    assert ("prediction_type", "family") in {(each.field, each.source) for each in spec.assumptions}


@pytest.mark.parametrize("hint", HINTS_OF_EPSILON)
@pytest.mark.parametrize("asked_by", ["flag", "config"])
def test_asking_for_zero_terminal_snr_outweighs_a_hint_of_epsilon(hint, asked_by):
    asked = {"overrides": Overrides(zero_terminal_snr=True)}
    if asked_by == "config":
        config = hint.get("config", {"model": {"params": {}}})
        asked = {"config": config | {"sampling": {"zero_terminal_snr": True}}}

    spec = detect(checkpoint(SD2), **(hint | asked)).spec

    assert spec.prediction_type == "v_prediction"
    assert spec.alphas_cumprod[-1] == 2.0**-24


def test_a_hint_of_v_stays_where_the_noise_schedule_ends_in_noise():
    alphas = np.append(scaled_linear()[:-1], 0)
    tensors = sdxl_checkpoint() | {"alphas_cumprod": with_values(alphas, "float64")}

    with pytest.raises(WeightsError, match="cannot predict epsilon"):
        detect(tensors)
    spec = detect(tensors, metadata={"modelspec.prediction_type": "v"}).spec

    assert spec.prediction_type == "v_prediction"


@pytest.mark.parametrize("tensors", [checkpoint(SD1), sdxl_checkpoint()], ids=["SD1", "SDXL"])
@pytest.mark.parametrize("measurement", ["v_prediction", "epsilon"])
def test_a_measurement_outweighs_metadata_that_agrees_with_the_family(tensors, measurement, caplog):
    copied = {"modelspec.prediction_type": "epsilon"}

    prediction_type, warnings = recognised(measured(measurement), caplog, tensors, metadata=copied)

    assert prediction_type == measurement
    assert len(warnings) == (measurement != "epsilon")
    assert all("which the file's metadata says; going by the measure" in each for each in warnings)


def test_a_download_without_its_configuration_is_refused_before_anything_is_written(tmp_path):
    download = shutil.copy(SHAPES_CHECKPOINT, tmp_path / "model.ckpt")

    with pytest.raises(ExportError, match=r"to predict v_prediction .* --prediction-type v_pred"):
        export(download, tmp_path / "engines")

    assert list(tmp_path.iterdir()) == [download]
