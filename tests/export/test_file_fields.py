import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ldm_export.detection.detect import detect
from ldm_export.detection.file_fields import MetadataFields, metadata_fields
from ldm_export.detection.inspection import inspect_checkpoint
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError, WeightsError
from ldm_runtime.diagnostics.inspection import readable
from ldm_runtime.schedules import rescale_zero_terminal_snr
from tests.export.sd_layout import (
    SD2,
    TINY,
    FakeTensor,
    checkpoint,
    scaled_linear,
    sdxl_checkpoint,
    with_values,
)
from tests.export.test_inspection_checkpoint import SMALL, tensors_of

MARKER = FakeTensor(shape=(0,))
SAYS_V = {"modelspec.prediction_type": "v"}
SAYS_EPSILON = {"modelspec.prediction_type": "epsilon"}
EDM_MARK = {"edm_vpred.sigma_max": with_values(120.0)}
CONFIG = {"model": {"params": {"parameterization": "x0", "image_size": 16}}}


def marked(*names):
    return checkpoint(TINY) | dict.fromkeys(names, MARKER)


def sources(spec):
    return {each.field: (each.value, each.source) for each in spec.assumptions}


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        (marked(), SAYS_V, ("v_prediction", "metadata")),
        (marked(), SAYS_EPSILON, ("epsilon", "metadata")),
        (marked("v_pred"), {}, ("v_prediction", "file")),
        (marked("v_pred"), SAYS_V, ("v_prediction", "file")),
        (marked(), {"title": "other keys"}, ("epsilon", "family")),
    ],
)
def test_the_prediction_type_is_what_the_file_says(tensors, metadata, expected):
    spec = detect(tensors, metadata=metadata).spec

    assert spec.prediction_type == expected[0]
    assert sources(spec)["prediction_type"] == expected


def test_a_configuration_wins_over_the_file_and_a_flag_over_both():
    by_config = detect(marked("v_pred"), config=CONFIG, metadata=SAYS_V).spec
    flags = Overrides(prediction_type="epsilon")
    by_flag = detect(marked("v_pred"), config=CONFIG, overrides=flags, metadata=SAYS_V).spec

    assert sources(by_config)["prediction_type"] == ("sample", "config")
    assert sources(by_flag)["prediction_type"] == ("epsilon", "flag")


def test_a_marker_that_metadata_contradicts_wins_with_a_warning(caplog):
    spec = detect(marked("v_pred"), metadata=SAYS_EPSILON).spec

    assert spec.prediction_type == "v_prediction"
    assert "its metadata says modelspec.prediction_type = epsilon" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modelspec.prediction_type", "flow\x1b[2J"),
        ("modelspec.resolution", "large"),
        ("modelspec.resolution", "0x512"),
        ("modelspec.resolution", "512x" + 5000 * "1"),
        ("modelspec.resolution", "99999x99999"),
        ("modelspec.resolution", "512x4097"),
    ],
)
def test_unknown_values_are_ignored_with_a_short_warning(key, value, caplog):
    assert metadata_fields({key: value}) == MetadataFields()

    (record,) = caplog.records
    assert f"ignoring {key} = " in record.getMessage()
    assert record.getMessage().isascii() or "…" not in value
    assert len(record.getMessage()) < 200
    assert "\x1b" not in record.getMessage()


def test_the_resolution_is_the_default_size_unless_a_configuration_has_one():
    metadata = {"modelspec.resolution": "128x64"}

    by_file = detect(checkpoint(TINY), metadata=metadata).spec
    by_config = detect(checkpoint(TINY), config=CONFIG, metadata=metadata).spec

    assert (by_file.defaults.width, by_file.defaults.height) == (128, 64)
    assert sources(by_file)["defaults.width"] == ("128", "metadata")
    assert (by_config.defaults.width, by_config.defaults.height) == (64, 64)


@pytest.mark.parametrize(
    ("resolution", "expected", "warned"),
    [("100x72", (96, 64), ["width 100", "height 72"]), ("64x1", (64, 16), ["height 1"])],
)
def test_a_resolution_that_the_model_cannot_generate_is_rounded_with_a_warning(
    resolution, expected, warned, caplog
):
    spec = detect(checkpoint(TINY), metadata={"modelspec.resolution": resolution}).spec

    assert (spec.defaults.width, spec.defaults.height) == expected
    assert sources(spec)["defaults.height"] == (str(expected[1]), "metadata")
    assert len(caplog.messages) == len(warned)
    for words in warned:
        assert f"has the {words}, but this model generates multiples of 16 pixels" in caplog.text


def test_a_resolution_of_no_model_is_ignored_with_a_warning(caplog):
    spec = detect(checkpoint(SD2), metadata={"modelspec.resolution": "99999x99999"}).spec

    assert (spec.defaults.width, sources(spec)["defaults.width"]) == (768, ("768", "family"))
    assert "ignoring modelspec.resolution = '99999x99999' of the file" in caplog.text


@pytest.mark.parametrize(("field", "flag"), [("config", None), ("flag", 64)])
def test_a_resolution_that_is_not_taken_is_not_rounded_aloud(field, flag, caplog):
    config = CONFIG if field == "config" else None
    overrides = Overrides(height=flag, width=flag)
    metadata = {"modelspec.resolution": "1000x1000"}

    spec = detect(checkpoint(TINY), config=config, overrides=overrides, metadata=metadata).spec

    assert (spec.defaults.width, sources(spec)["defaults.width"][1]) == (64, field)
    assert not caplog.messages


def test_a_measurement_outweighs_metadata():
    hinted = detect(marked(), metadata=SAYS_V)
    measured = detect(marked(), metadata=SAYS_V, measured="epsilon").spec

    assert hinted.siblings == {"epsilon"}
    assert sources(measured)["prediction_type"] == ("epsilon", "measured")


def test_a_mark_of_zero_terminal_snr_rescales_the_noise_schedule():
    plain = detect(marked("v_pred")).spec
    rescaled = detect(marked("v_pred", "ztsnr")).spec

    assert rescaled.alphas_cumprod == rescale_zero_terminal_snr(plain.alphas_cumprod)
    assert sources(rescaled)["alphas_cumprod"] == ("rescaled to zero terminal SNR", "file")
    assert np.sqrt(1 / rescaled.alphas_cumprod[-1]) > 4000


def test_a_mark_of_zero_terminal_snr_means_nothing_for_epsilon(caplog):
    plain, ignored = (detect(marked(*names)).spec for names in ((), ("ztsnr",)))

    assert ignored.alphas_cumprod == plain.alphas_cumprod
    assert "its prediction_type is epsilon, so the mark is ignored" in caplog.text


def noisy(spec):
    return sources(spec).get("alphas_cumprod")


SAMPLING = {"model": {"params": {}}, "sampling": {"zero_terminal_snr": True}}


@pytest.mark.parametrize(
    ("stated", "source"),
    [
        ({"overrides": Overrides(zero_terminal_snr=True)}, "flag"),
        ({"config": SAMPLING}, "config"),
        ({"config": SAMPLING, "overrides": Overrides(zero_terminal_snr=True)}, "flag"),
    ],
)
def test_zero_terminal_snr_is_stated_by_a_flag_or_a_configuration(stated, source):
    plain = detect(marked("v_pred")).spec

    rescaled = detect(marked("v_pred"), **stated).spec

    assert rescaled.alphas_cumprod == rescale_zero_terminal_snr(plain.alphas_cumprod)
    assert noisy(rescaled) == ("rescaled to zero terminal SNR", source)
    assert rescaled.defaults == plain.defaults


@pytest.mark.parametrize("dtype", ["float16", "float8_e5m2"])
def test_a_coarse_schedule_that_ends_in_noise_is_exported_as_one_if_that_is_stated(dtype):
    rescaled = np.array(rescale_zero_terminal_snr(scaled_linear().tolist()))
    rounded = torch.tensor(rescaled).to(getattr(torch, dtype)).float().numpy()
    rounded[-1] = 0
    tensors = checkpoint(SD2) | {"alphas_cumprod": with_values(rounded, dtype)}

    with pytest.raises(WeightsError, match="state with --zero-terminal-snr"):
        detect(tensors)
    flagged = detect(tensors, overrides=Overrides(zero_terminal_snr=True)).spec
    marked_so = detect(tensors | {"ztsnr": MARKER}).spec

    assert flagged.alphas_cumprod == marked_so.alphas_cumprod
    np.testing.assert_allclose(flagged.alphas_cumprod, rescaled, rtol=1e-9)


def test_a_configuration_denies_the_mark_of_zero_terminal_snr():
    denied = {"model": {"params": {}}, "sampling": {"zero_terminal_snr": False}}

    spec = detect(marked("v_pred", "ztsnr"), config=denied).spec

    assert noisy(spec) is None
    assert spec.alphas_cumprod == detect(marked("v_pred")).spec.alphas_cumprod


@pytest.mark.parametrize(
    ("stated", "place"),
    [
        ({"overrides": Overrides(zero_terminal_snr=True)}, "--zero-terminal-snr"),
        ({"config": SAMPLING}, "config: sampling.zero_terminal_snr"),
    ],
)
def test_zero_terminal_snr_of_a_model_that_does_not_predict_v_is_an_error(stated, place):
    with pytest.raises(ExportError, match=f"^{place} is for models that predict v, .* epsilon"):
        detect(marked(), **stated)
    with pytest.raises(ExportError, match=f"^{place} rescales the noise of training timesteps"):
        detect(sdxl_checkpoint() | EDM_MARK, **stated)


def test_zero_terminal_snr_means_nothing_to_an_autoencoder():
    tensors = {name: each for name, each in marked().items() if name.startswith("first_stage")}

    with pytest.raises(ExportError, match=r"^--zero-terminal-snr does not go with this checkpoint"):
        detect(tensors, overrides=Overrides(zero_terminal_snr=True))


def test_metadata_is_shown_escaped_and_cut(tmp_path):
    path = tmp_path / "model.safetensors"
    metadata = SAYS_V | {"modelspec.thumbnail": 9000 * "A", "title": "a\x1b[31mred"}
    save_file(tensors_of(SMALL), path, metadata=metadata)

    report = inspect_checkpoint(path)
    text = readable(report)

    assert report["prediction_type"] == "v_prediction"
    assert "modelspec.prediction_type: v\n" in text
    assert "\x1b" not in text
    assert f"{500 * 'A'}… (9,000 characters)" in text


def test_a_file_without_metadata_is_described_without_it(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(tensors_of(SMALL), path)

    assert inspect_checkpoint(path)["metadata"] is None
