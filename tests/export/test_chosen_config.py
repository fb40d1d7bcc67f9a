import pytest

from ldm_export.detection.chosen_config import chosen_config
from ldm_export.errors import ExportError, ForeignConfigError

OURS = "model: {params: {scale_factor: 0.5}}"
TRAINERS = "job: extension\nconfig: {name: my_lora, process: [{type: sd_trainer}]}\nmeta: {}\n"


@pytest.fixture
def checkpoint(tmp_path):
    return tmp_path / "model.ckpt"


#: Configurations of trainers, and words of the sentence about each.
FOREIGN = {
    "another program's": (TRAINERS, "mapping; its entries are config, job, meta"),
    "OmegaConf with anchors": (
        "data: &data\n  root: ${oc.env:ROOT}\nmodel: {name: unet, lr: 1e-4}\nval: *data\n",
        "mapping, and anchors and aliases",
    ),
    "objects of Python": ("optimizer: !!python/name:torch.optim.AdamW\n", "mapping, and the tag"),
    "merge keys": ("a: {b: 1}\nmodel: {<<: {params: 1}}\n", "mapping, and merge keys"),
    "another model's parameters": (
        "model: {params: {learning_rate: 1e-4, backbone: resnet}}",
        "params:` is CompVis'; its entries are backbone, learning_rate",
    ),
    "a model that is a name": ("model: runwayml/stable-diffusion-v1-5", "its entries are model"),
    "a list": ("- 1\n- 2\n", "it holds list"),
    "nothing": ("", "it holds NoneType"),
}


@pytest.mark.parametrize(("text", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_configuration_of_something_else_next_to_a_checkpoint_is_named_and_ignored(
    checkpoint, caplog, text, words
):
    (checkpoint.parent / "config.yaml").write_text(text)

    chosen = chosen_config(checkpoint)

    assert chosen is None
    (sentence,) = caplog.messages
    assert str(checkpoint.parent / "config.yaml") in sentence
    assert "is ignored" in sentence
    assert words in sentence
    assert "with --config FILE" in sentence


@pytest.mark.parametrize(("text", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_stated_configuration_of_something_else_is_an_error_that_names_it(
    checkpoint, text, words
):
    theirs = checkpoint.parent / "theirs.yaml"
    theirs.write_text(text)

    with pytest.raises(ForeignConfigError, match=r"theirs\.yaml is not .* --config none") as found:
        chosen_config(checkpoint, theirs)

    assert words in str(found.value)


@pytest.mark.parametrize(
    "text",
    [
        "model: &m {params: {scale_factor: 0.5}}",
        "p: &p {scale_factor: 0.5}\nmodel: {params: *p}\n",
        "model: {params: {scale_factor: 0.5}}\nextra: !!python/name:os.system\n",
    ],
)
def test_what_may_be_the_checkpoints_own_is_not_ignored_for_how_it_is_written(checkpoint, text):
    (checkpoint.parent / "config.yaml").write_text(text)

    with pytest.raises(ExportError, match=r"not a valid YAML file: .* --config none"):
        chosen_config(checkpoint)


def test_a_configuration_of_something_else_does_not_hide_the_checkpoints_own(checkpoint):
    checkpoint.with_suffix(".yaml").write_text("- 1\n- 2\n")
    (checkpoint.parent / "config.yaml").write_text(OURS)

    assert chosen_config(checkpoint).config["model"]["params"]["scale_factor"] == 0.5


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
