import pytest

from ldm_export.detection.chosen_config import chosen_config
from ldm_export.errors import ExportError, ForeignConfigError

OURS = "model: {params: {scale_factor: 0.5}}"
TRAINERS = "job: extension\nconfig: {name: my_lora, process: [{type: sd_trainer}]}\nmeta: {}\n"


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "model.ckpt"


def test_a_configuration_of_something_else_next_to_a_checkpoint_is_named_and_ignored(
    checkpoint, caplog
):
    (checkpoint.parent / "config.yaml").write_text(TRAINERS)

    chosen = chosen_config(checkpoint)

    assert chosen is None
    (sentence,) = caplog.messages
    assert str(checkpoint.parent / "config.yaml") in sentence
    assert "is ignored" in sentence
    assert "its entries are config, job, meta" in sentence


def test_a_configuration_of_something_else_does_not_hide_the_checkpoints_own(checkpoint):
    checkpoint.with_suffix(".yaml").write_text("- 1\n- 2\n")
    (checkpoint.parent / "config.yaml").write_text(OURS)

    assert chosen_config(checkpoint).config["model"]["params"]["scale_factor"] == 0.5


def test_a_stated_configuration_of_something_else_is_an_error_that_names_it(checkpoint):
    theirs = checkpoint.parent / "theirs.yaml"
    theirs.write_text(TRAINERS)

    with pytest.raises(ForeignConfigError, match=r"theirs\.yaml is not .* or --config none"):
        chosen_config(checkpoint, theirs)


def test_none_ignores_what_lies_next_to_a_checkpoint(checkpoint, caplog):
    (checkpoint.parent / "config.yaml").write_text("][")

    assert chosen_config(checkpoint, "none") is None
    assert caplog.messages == []


def test_a_broken_configuration_next_to_a_checkpoint_is_an_error(checkpoint):
    checkpoint.with_suffix(".yaml").write_text("][")

    with pytest.raises(ExportError, match="not a valid YAML file"):
        chosen_config(checkpoint)


def test_a_configuration_next_to_the_target_of_a_link_is_read(checkpoint, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store/model.yaml").write_text(OURS)
    (tmp_path / "store/model.ckpt").touch()
    checkpoint.symlink_to(tmp_path / "store/model.ckpt")

    assert chosen_config(checkpoint).path == (tmp_path / "store/model.yaml").resolve()
