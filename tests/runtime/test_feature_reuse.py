"""Feature reuse: calls of the UNet that compute its outermost blocks alone."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from ldm_runtime.bundle.manifest import BuildRecord
from ldm_runtime.engines.profiles import SizeRange, component_profiles, resolve_shapes
from ldm_runtime.errors import RequestError
from ldm_runtime.pipeline.deadline import Deadline
from ldm_runtime.pipeline.image_pipeline import ImagePipeline
from ldm_runtime.pipeline.infotext import InfotextModel, read_infotext, write_infotext
from ldm_runtime.pipeline.open_model import OpenModel, Origin
from ldm_runtime.requests.request import FIELDS, GenerationRequest, parse_request
from ldm_runtime.requests.request_json import request_to_json
from ldm_runtime.requests.resolution import resolve
from ldm_runtime.requests.resolved import NoReuse
from ldm_runtime.specs.model import axis_sizes, components_of
from ldm_runtime.specs.networks import UNetSpec
from ldm_runtime.specs.plausible import implausible_fields
from ldm_runtime.testing import TINY_SPEC, FakeEngine, tiny_networks, tiny_spec, unet_spec
from ldm_runtime.text import ClipTokenizer

ASKED = {"prompt": "red", "seed": 5, "num_inference_steps": 10, "schedule": "trailing"}


def reusing(spec, blocks=1):
    return spec.with_networks(unet=replace(spec.network(UNetSpec), shallow_blocks=blocks))


SPEC = reusing(TINY_SPEC)


class Model:
    """The tiny model over fakes, whose deep features are its latents times a number."""

    def __init__(self, spec=SPEC, features=2.0):
        functions = dict(tiny_networks(spec.task))
        self.order, self.spec = [], spec
        self.engines = {name: FakeEngine(each) for name, each in functions.items()}

        def whole(inputs):
            self.order.append("whole")
            deep = features * inputs["latents"]
            return {**functions["unet"](inputs), "deep_features": deep}

        def shallow(inputs):
            self.order.append("shallow")
            return {"prediction": np.tanh(inputs["latents"] + 0.1 * inputs["deep_features"])}

        self.engines |= {"unet": FakeEngine(whole), "unet_shallow": FakeEngine(shallow)}
        build = BuildRecord(
            checkpoint="model.ckpt", checkpoint_sha256="a", components=(), versions={}, seconds=0.0
        )
        self.model = OpenModel(
            network=self.engines.__getitem__,
            tokenizer=ClipTokenizer([]),
            spec=spec,
            origin=Origin(bundle_sha256="a", build=build),
        )

    def calls(self, name):
        return self.engines[name].calls

    @property
    def whole_calls(self):
        """Numbers of the calls, of all, that computed the whole."""
        return [index for index, name in enumerate(self.order) if name == "whole"]


def result_of(model, refiner=None, **fields):
    specs = [each and each.spec for each in (model, refiner)]
    request = resolve(parse_request(ASKED | fields), *specs)
    pipeline = ImagePipeline(model=model.model, refiner=refiner and refiner.model)
    *_, result = pipeline.stream(request, None, Deadline(None), batch_size=request.num_images)
    return result


def resolved(spec=SPEC, refiner=None, **fields):
    return resolve(parse_request(ASKED | fields), spec, refiner)


def pixels(result):
    return [image.tobytes() for image in result]


@pytest.mark.parametrize(("interval", "whole"), [(2, [0, 2, 4, 6, 8]), (3, [0, 3, 6, 9])])
def test_one_call_in_every_interval_computes_the_whole(interval, whole):
    model = Model()

    result_of(model, reuse=f"deep:{interval}")

    assert model.whole_calls == whole
    assert len(model.order) == 10


def test_a_shallow_call_takes_the_features_of_the_last_whole_call_and_its_own_latents():
    model = Model()

    result_of(model, reuse="deep:5")

    first, second = model.calls("unet")
    for index, call in enumerate(model.calls("unet_shallow")):
        of = first if index < 4 else second
        np.testing.assert_array_equal(call["deep_features"], 2 * of["latents"])
        assert call["timesteps"][0] < of["timesteps"][0]
        assert not np.array_equal(call["latents"], of["latents"])


def test_a_shallow_call_is_given_the_inputs_of_its_graph_and_no_others():
    attends = reusing(TINY_SPEC, blocks=2)
    unet = replace(attends.network(UNetSpec), transformer_depth=(1, 1))
    for spec in (SPEC, attends.with_networks(unet=unet)):
        model = Model(spec)

        result_of(model, reuse="deep:2")

        takes = {each.name for each in components_of(spec)["unet_shallow"].inputs}
        assert {name for call in model.calls("unet_shallow") for name in call} == takes
    assert "context" in takes


def test_an_interval_of_one_is_no_reuse():
    model = Model()

    images = pixels(result_of(model, reuse="deep:1"))

    assert images == pixels(result_of(Model()))
    assert images != pixels(result_of(Model(), reuse="deep:2"))
    assert model.calls("unet_shallow") == []


def test_guidance_that_begins_or_ends_needs_the_whole():
    model = Model()
    sigmas = resolved().sigmas

    result_of(model, reuse="deep:100", guidance_interval=(sigmas[6], sigmas[3]))

    assert model.whole_calls == [0, 3, 7]
    assert [len(call["latents"]) for call in model.calls("unet")] == [1, 2, 1]
    assert [len(call["deep_features"]) for call in model.calls("unet_shallow")] == (
        [1] * 2 + [2] * 3 + [1] * 2
    )


@pytest.mark.parametrize(
    ("prompt", "whole"), [("[red:blue:0.4]", [0, 4]), ("[red|blue]", [*range(10)])]
)
def test_another_prompt_needs_the_whole(prompt, whole):
    model = Model()

    result_of(model, reuse="deep:100", prompt=prompt)

    assert model.whole_calls == whole


def test_a_step_that_calls_twice_counts_both():
    model = Model()

    result_of(model, reuse="deep:3", sampler="heun")

    assert len(model.order) == 19
    assert model.whole_calls == [0, 3, 6, 9, 12, 15, 18]


def test_every_image_and_every_pass_begins_with_the_whole():
    model = Model()

    result_of(model, reuse="deep:100", hires_scale=2.0, hires_strength=0.5)

    assert model.whole_calls == [0, 10]
    sides = [call["latents"].shape[2] for call in model.calls("unet")]
    assert sides == [8, 16]


def test_features_are_of_every_sample_of_a_batch():
    batch = result_of(Model(), reuse="deep:3", num_images=3)

    alone = [result_of(Model(), reuse="deep:3", seed=5 + index) for index in range(3)]
    assert pixels(batch) == [image for result in alone for image in pixels(result)]


def test_a_masked_region_is_generated_with_reused_features():
    image = np.full((16, 16, 3), 99, dtype=np.uint8)
    mask = np.zeros((16, 16), dtype=np.uint8)
    mask[:8] = 255
    model = Model()

    result = result_of(model, reuse="deep:2", image=image, mask_image=mask)

    assert model.whole_calls == [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(np.asarray(result.images[0])[8:], image[8:])


@pytest.mark.parametrize("task", ["unconditional", "class-to-image", "inpainting"])
def test_models_without_text_reuse_features_too(task):
    needed = {"class-to-image": {"class_label": 1}, "unconditional": {}}
    image = np.full((16, 16, 3), 99, dtype=np.uint8)
    needed["inpainting"] = {"image": image, "mask_image": image[:, :, 0]}
    model = Model(reusing(tiny_spec(task)))
    model.engines["unet_shallow"] = FakeEngine(
        lambda inputs: {"prediction": np.tanh(inputs["latents"][:, :3])}
    )
    fields = ASKED | needed[task] | {"prompt": None, "reuse": "deep:4"}
    request = resolve(parse_request(fields), model.spec)

    list(ImagePipeline(model=model.model).stream(request, None, Deadline(None), batch_size=1))

    assert [len(model.calls(name)) for name in ("unet", "unet_shallow")] == [3, 7]


def test_requests_that_run_together_are_those_that_run_alone():
    model, fields = Model(), [{"seed": 1}, {"seed": 2, "reuse": "deep:2"}]
    fields += [{"seed": 3, "reuse": "deep:5"}, {"seed": 4, "reuse": "change:0.3"}]
    requests = [resolved(**each) for each in fields]
    pipeline = ImagePipeline(model=model.model)

    together = pipeline.together(requests, [Deadline(None)] * 4, max_samples=8, min_samples=1)

    assert [pixels(each) for each in together] == [
        pixels(result_of(Model(), **each)) for each in fields
    ]
    assert max(len(call["latents"]) for call in model.calls("unet")) == 8


def test_a_refiner_reuses_its_own_features():
    base, refiner = Model(), Model()

    result_of(base, refiner, reuse="deep:3", refiner_start=0.5)

    assert (base.whole_calls, len(base.order)) == ([0, 3], 5)
    assert (refiner.whole_calls, len(refiner.order)) == ([0, 3], 5)


def changes(model):
    """Return the relative change of the features at each shallow call, since the whole before."""
    found, whole, shallow = [], iter(model.calls("unet")), iter(model.calls("unet_shallow"))
    for name in model.order:
        if name == "whole":
            last = 2 * next(whole)["latents"]
        else:
            now = 2 * next(shallow)["latents"]
            found.append(np.abs(now - last).mean() / np.abs(last).mean())
    return found


@pytest.mark.parametrize("threshold", [0.1, 0.3])
def test_features_are_reused_while_they_would_have_changed_by_less(threshold):
    """The fake's features follow its latents, so that the predicted change is the true one."""
    model = Model()

    result_of(model, reuse=f"change:{threshold}", num_inference_steps=50)

    assert model.whole_calls[:2] == [0, 1]  # what two calls say is measured first
    assert 2 < len(model.whole_calls) < 40
    assert max(changes(model)) < threshold
    whole = model.calls("unet")
    for one, other in pairwise(whole[1:]):
        step = np.abs(other["latents"] - one["latents"]).mean() / np.abs(one["latents"]).mean()
        assert step >= threshold


def test_a_change_of_nothing_reuses_nothing():
    model = Model()

    result_of(model, reuse="change:0")

    assert model.whole_calls == [*range(10)]


def test_features_of_zeros_are_never_reused():
    model = Model(features=0.0)

    result_of(model, reuse="change:0.5")

    assert model.whole_calls == [*range(10)]


@pytest.mark.parametrize("rule", ["deep:3", "deep:100000", "change:0.1", "change:0", "change:2.25"])
def test_a_rule_is_recorded_as_it_was_given(rule):
    request = resolved(reuse=rule)

    again = resolve(parse_request(request_to_json(request.as_request())), SPEC)

    assert request.as_request().reuse == rule
    assert again == request


def test_images_say_how_features_were_reused():
    model, request = InfotextModel(name="model", sha256="a" * 64), resolved(reuse="deep:3")

    text = write_infotext(request, model=model, refiner=None, version="1")

    assert 'Feature reuse: "deep:3"' in text
    assert read_infotext(text).request["reuse"] == "deep:3"
    assert "reuse" not in write_infotext(resolved(), model=model, refiner=None, version="1")
    metadata = result_of(Model(), reuse="deep:3").metadata()
    assert metadata["request"]["reuse"] == "deep:3"


def test_without_a_rule_nothing_is_reused():
    assert resolved().reuse == NoReuse()
    assert resolved().as_request().reuse is None


@pytest.mark.parametrize(
    "rule", ["deep", "deep:0", "deep:1.5", "deep:-1", "change:-1", "change:nan", "3", "Deep:3", ""]
)
def test_a_rule_that_is_none_is_refused(rule):
    with pytest.raises(RequestError, match=r"^reuse: is '.*'; give deep:3 for a whole call"):
        GenerationRequest(reuse=rule)


def test_a_rule_is_text():
    with pytest.raises(RequestError, match=r"^reuse: must be text, got 3$"):
        GenerationRequest(reuse=3)
    assert FIELDS["reuse"].schema["pattern"].startswith("^(deep:")


def test_a_bundle_without_the_graph_says_how_to_get_it():
    sentence = (
        "reuse: needs a graph of the UNet's outermost blocks, which {} lacks; export its "
        "checkpoint again with --reuse"
    )
    for specs, owner in (((TINY_SPEC,), "this bundle"), ((SPEC, TINY_SPEC), "the refiner")):
        with pytest.raises(RequestError) as caught:
            resolved(*specs, reuse="deep:2")
        assert str(caught.value) == sentence.format(owner)

    assert resolved(SPEC, TINY_SPEC, reuse="deep:2", refiner_start=1.0).reuse.interval == 2


def test_images_in_patches_are_refused():
    spec = reusing(tiny_spec("super-resolution"))
    fields = {"seed": 1, "reuse": "deep:2"}

    resolve(parse_request(fields | {"image": np.zeros((128, 128, 3), np.uint8)}), spec)
    with pytest.raises(RequestError, match=r"^reuse: does not go with results beyond 256x256 "):
        resolve(parse_request(fields | {"image": np.zeros((130, 128, 3), np.uint8)}), spec)


def test_a_model_has_the_graph_only_if_it_was_exported():
    assert "unet_shallow" not in components_of(TINY_SPEC)
    assert [each.name for each in components_of(TINY_SPEC)["unet"].outputs] == ["prediction"]

    found = components_of(SPEC)
    assert [each.name for each in found["unet"].outputs] == ["prediction", "deep_features"]
    assert [each.name for each in found["unet_shallow"].inputs] == [
        *("latents", "timesteps", "deep_features")
    ]


@pytest.mark.parametrize(
    ("blocks", "channels", "context_dim"), [(1, 320, 768), (2, 320, 768), (3, 640, 768)]
)
def test_deep_features_of_stable_diffusion_are_where_its_blocks_end(blocks, channels, context_dim):
    spec = reusing(TINY_SPEC.with_networks(unet=unet_spec()), blocks)

    sizes = axis_sizes(spec, "unet_shallow")

    assert (sizes["deep_channels"], sizes["context_dim"]) == (channels, context_dim)
    assert axis_sizes(spec, "unet")["deep_channels"] == channels


def test_engines_take_deep_features_as_large_as_latents():
    shapes = resolve_shapes(SPEC, SizeRange())

    profiles = {each.input: each for each in component_profiles("unet_shallow", SPEC, shapes)}

    for end in ("min", "opt", "max"):
        batch, _, *size = getattr(profiles["latents"], end)
        assert getattr(profiles["deep_features"], end) == (batch, 4, *size)
    assert profiles["latents"].max[0] == 8


@pytest.mark.parametrize("blocks", [0, 3, -1])
def test_more_blocks_than_the_first_level_has_cannot_be(blocks):
    assert [*implausible_fields(SPEC)] == [*implausible_fields(TINY_SPEC)]
    assert "networks.unet.shallow_blocks" in [*implausible_fields(reusing(TINY_SPEC, blocks))]
