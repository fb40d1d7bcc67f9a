import numpy as np
import pytest
from safetensors.torch import save_file

from ldm_export.detection.detect import detect
from ldm_export.detection.file_fields import FileFields, file_fields
from ldm_export.detection.inspection import inspect_checkpoint
from ldm_export.detection.overrides import Overrides
from ldm_runtime.diagnostics.inspection import readable
from ldm_runtime.schedules import rescale_zero_terminal_snr
from tests.export.sd_layout import TINY, FakeTensor, checkpoint
from tests.export.test_inspection_checkpoint import SMALL, tensors_of

MARKER = FakeTensor(shape=(0,))
SAYS_V = {"modelspec.prediction_type": "v"}
SAYS_EPSILON = {"modelspec.prediction_type": "epsilon"}
CONFIG = {"model": {"params": {"parameterization": "x0", "image_size": 16}}}


def marked(*names):
    return checkpoint(TINY) | dict.fromkeys(names, MARKER)


def sources(spec):
    return {each.field: (each.value, each.source) for each in spec.assumptions}


@pytest.mark.parametrize(
    ("tensors", "metadata", "expected"),
    [
        (marked(), SAYS_V, ("v_prediction", "file")),
        (marked(), SAYS_EPSILON, ("epsilon", "file")),
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
    ],
)
def test_unknown_values_are_ignored_with_a_short_warning(key, value, caplog):
    assert file_fields({}, {key: value}) == FileFields()

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
    assert sources(by_file)["defaults.width"] == ("128", "file")
    assert (by_config.defaults.width, by_config.defaults.height) == (64, 64)


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
