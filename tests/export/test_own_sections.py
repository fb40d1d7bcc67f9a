from pathlib import Path

import pytest
import yaml

from ldm_export.detection.detect import detect
from ldm_export.detection.overrides import Overrides
from ldm_export.errors import ExportError
from tests.export.ldm_layouts import CELEBA, CIN256_V2, LAYOUT2IMG
from tests.export.sd_layout import SD1, checkpoint

NAMES = ["tench", "goldfish", "great white shark"]


def with_sections(**sections):
    return {"model": {"params": {}}, **sections}


def detected(layout, **sections):
    return detect(checkpoint(layout), config=with_sections(**sections)).spec


def test_sampling_defaults_of_a_configuration_win_over_the_familys():
    sampling = {
        "sampler": "dpmpp_2m",
        "schedule": "karras",
        "num_inference_steps": 30,
        "guidance_scale": 4,
    }

    spec = detected(SD1, sampling=sampling)

    defaults = spec.defaults
    assert (defaults.sampler, defaults.schedule) == ("dpmpp_2m", "karras")
    assert (defaults.num_inference_steps, defaults.guidance_scale) == (30, 4.0)
    sources = {each.field: each.source for each in spec.assumptions}
    assert {sources[f"defaults.{name}"] for name in sampling} == {"config"}


def test_the_sections_in_the_documentation_are_read():
    page = (Path(__file__).parents[2] / "docs/command-line.md").read_text()
    (block,) = [part.split("```")[0] for part in page.split("```yaml\n")[1:]]

    spec = detected(CIN256_V2, **yaml.safe_load(block))

    assert spec.label_names == ("red circle", "green circle")
    assert (spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == (50, 1.5)


def test_entries_that_a_configuration_leaves_out_are_the_familys():
    spec = detected(CIN256_V2, sampling={"num_inference_steps": 50})

    assert (spec.defaults.num_inference_steps, spec.defaults.guidance_scale) == (50, 3.0)
    sources = {each.field: each.source for each in spec.assumptions}
    assert sources["defaults.num_inference_steps"] == "config"
    assert sources["defaults.guidance_scale"] == "family"


def test_the_eta_of_the_familys_sampler_is_not_anothers():
    assert detected(CELEBA, sampling={}).defaults.eta == 1.0  # of ddim
    assert detected(CELEBA, sampling={"sampler": "euler"}).defaults.eta == 0.0


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ({"steps": 50}, "sampling has steps; its entries are sampler, schedule, num_inf"),
        ([50], r"sampling has \[50\]"),
        ({"num_inference_steps": 0}, "sampling.num_inference_steps: must lie between 1 and"),
        ({"guidance_scale": "much"}, "sampling.guidance_scale: must be a number"),
        ({"sampler": "eulr"}, "sampling.sampler: "),
        ({"schedule": "custom"}, "sampling.schedule 'custom' is of requests that list sigmas"),
        ({"sampler": "euler", "eta": 0.5}, "sampling.eta is 0.5, but euler has none"),
        ({"num_inference_steps": 1001}, "sampling.num_inference_steps: "),
    ],
)
def test_sampling_defaults_that_no_request_could_ask_for_are_an_error(sampling, message):
    with pytest.raises(ExportError, match=f"config: {message}"):
        detected(SD1, sampling=sampling)


def test_guidance_of_a_model_without_a_null_condition_is_an_error():
    with pytest.raises(ExportError, match=r"sampling.guidance_scale: is 3.0, .* no null cond"):
        detected(CELEBA, sampling={"guidance_scale": 3})


def test_label_names_come_from_the_flag_or_else_the_configuration():
    flag = Overrides(label_names=("cat", "dog"))
    config = with_sections(label_names=NAMES)

    assert detected(CIN256_V2, label_names=NAMES).label_names == tuple(NAMES)
    assert detected(LAYOUT2IMG, label_names=NAMES).label_names == tuple(NAMES)
    assert detected(CIN256_V2).label_names == ()
    tensors = checkpoint(CIN256_V2)
    assert detect(tensors, config=config, overrides=flag).spec.label_names == ("cat", "dog")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tench", "label_names is str; give a list"),
        ([], "has 0 names"),
        (["tench", 7], "the name of label 1 is 7; give a line of text"),
        (["tench", "gold\nfish"], "the name of label 1 is 'gold"),
        ([str(each) for each in range(1002)], "1002 names, but this model has 1001 labels"),
    ],
)
def test_label_names_that_are_not_a_name_per_label_are_an_error(names, message):
    with pytest.raises(ExportError, match=f"config: .*{message}"):
        detected(CIN256_V2, label_names=names)


def test_label_names_for_a_model_without_labels_are_an_error():
    with pytest.raises(ExportError, match=r"--label-names does not go with .* text-to-image"):
        detect(checkpoint(SD1), overrides=Overrides(label_names=("cat",)))
    with pytest.raises(ExportError, match=r"config: label_names has 3 names, but .* 0 labels"):
        detected(SD1, label_names=NAMES)
