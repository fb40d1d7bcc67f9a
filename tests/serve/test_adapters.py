"""Adapters of a server, with real workers: images are those of a `Generator` that has them."""

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from ldm_runtime import Generator
from ldm_runtime.adapters.files import read_adapter
from ldm_runtime.bundle.files import sha256_of
from ldm_runtime.cli import main
from ldm_runtime.errors import LdmError, RequestError
from ldm_runtime.pipeline.image_files import read_metadata
from ldm_runtime.requests.request import parse_request
from ldm_serve.adapters import (
    AdapterChoice,
    AdapterUse,
    NamedAdapter,
    adapter_paths,
    alias_of,
    chosen_adapters,
    fitting_adapters,
)
from ldm_serve.executors.open_models import OpenModels
from ldm_serve.settings import EngineSettings
from tests.serve.adapter_files import LAYERS, write_lora
from tests.serve.batches import results_of
from tests.serve.conftest import serving
from tests.serve.test_a1111 import WebUIApi
from tests.serve.test_jobs import finished, image_of, submit

FIELDS = {"num_inference_steps": 3, "height": 64, "width": 64, "guidance_scale": 3.0}
SIZE = "64x64"
TWO = {"style": 0.5, "other": -0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    metadata = {"ss_output_name": "mine", "ss_dataset_dirs": "/home/me/faces"}
    write_lora(folder / "style.safetensors", 0, metadata=metadata)
    write_lora(folder / "second.safetensors", 1)
    return folder


@pytest.fixture(scope="module")
def flags(folder):
    """The flags of two adapters, called style and other."""
    style, other = folder / "style.safetensors", f"other={folder / 'second.safetensors'}"
    return ["--adapter", str(style), "--adapter", other]


@pytest.fixture(scope="module")
def server(small_bundle_fp32, bundle, flags, tmp_path_factory):
    models = (f"engines={small_bundle_fp32}", f"tiny={bundle}")
    with serving(tmp_path_factory.mktemp("s"), *models, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def expected(small_bundle_fp32, folder):
    """Returns the image of a prompt and of scales by name, generated without a server."""
    files = {"style": folder / "style.safetensors", "other": folder / "second.safetensors"}
    found = {}

    def image(scales, prompt="red", seed=7):
        key = tuple(sorted(scales.items())), prompt, seed
        if key not in found:
            adapters = {files[name]: scale for name, scale in sorted(scales.items())}
            with Generator(small_bundle_fp32, threads=1, adapters=adapters) as generator:
                found[key] = generator(prompt, seed=seed, **FIELDS).image.tobytes()
        return found[key]

    return image


def generated(ask, prompt="red", seed=7, **options):
    """Return the pixels of an image of the OpenAI client, and the answer."""
    extra = {
        "seed": seed,
        "num_inference_steps": FIELDS["num_inference_steps"],
        "guidance_scale": FIELDS["guidance_scale"],
        **options.pop("extra", {}),
    }
    answer = ask.images.generate(prompt=prompt, size=SIZE, extra_body=extra, **options)
    data = base64.b64decode(answer.data[0].b64_json)
    return Image.open(io.BytesIO(data)).tobytes(), answer


@pytest.mark.slow
class TestOpenAI:
    def test_an_alias_is_the_generator_with_adapters_bit_for_bit(self, ask, expected):
        image, answer = generated(ask, model="engines:style@0.7")
        plain, _ = generated(ask, model="engines")

        assert image == expected({"style": 0.7})
        assert plain == expected({})
        difference = np.frombuffer(image, np.uint8).astype(int) - np.frombuffer(plain, np.uint8)
        assert np.abs(difference).mean() > 3
        assert answer.model_extra["ldm"]["adapters"] == [{"name": "style", "scale": 0.7}]

    def test_their_order_and_scales_of_0_make_no_other_model(self, ask, expected):
        aliases = ("engines:style@0.5+other@-0.3", "engines:other@-0.3+style@0.5")

        images = {generated(ask, model=alias)[0] for alias in aliases}
        nothing, answer = generated(ask, model="engines:other@0+style@-0.0")
        whole, _ = generated(ask, model="engines:style")

        assert images == {expected(TWO)}
        assert nothing == expected({})
        assert answer.model_extra["ldm"]["adapters"] == []
        assert whole == expected({"style": 1.0})

    def test_the_field_means_the_same(self, ask, expected):
        listed = [{"name": "style", "scale": 0.5}, {"name": "other", "scale": -0.3}]

        image, _ = generated(ask, extra={"adapters": listed})
        text, _ = generated(ask, model="engines", extra={"adapters": "other@-0.3+style@0.5"})

        assert image == text == expected(TWO)

    def test_an_edit_takes_them_too(self, ask, small_bundle_fp32, folder):
        file = io.BytesIO()
        Image.new("RGB", (64, 64), (255, 0, 0)).save(file, format="PNG")
        steps = {"num_inference_steps": 4, "strength": 0.5, "seed": 3}

        answer = ask.images.edit(
            image=("red.png", file.getvalue(), "image/png"),
            prompt="blue",
            extra_body={**steps, "adapters": "style@0.7"},
        )

        with Generator(
            small_bundle_fp32, threads=1, adapters={folder / "style.safetensors": 0.7}
        ) as generator:
            result = generator("blue", image=file.getvalue(), **steps)
        data = base64.b64decode(answer.data[0].b64_json)
        assert Image.open(io.BytesIO(data)).tobytes() == result.image.tobytes()

    def test_models_say_which_adapters_they_take(self, ask):
        models = {each.id: each.model_extra["adapters"] for each in ask.models.list()}

        assert models == {"engines": ["other", "style"], "tiny": []}
        assert ask.models.retrieve("engines:style@0.70+other@1").id == "engines:other+style@0.7"

    def test_interleaved_requests_each_get_their_own_image(self, ask, expected):
        chosen = [{}, {"style": 0.7}, TWO, {"style": 0.2}] * 3

        def image(index):
            uses = [AdapterUse(name=n, sha256="", scale=s) for n, s in chosen[index].items()]
            model = alias_of("engines", uses)
            return generated(ask, "blue", seed=index // 4, model=model)[0]

        with ThreadPoolExecutor(12) as pool:
            images = list(pool.map(image, range(len(chosen))))

        for index, found in enumerate(images):
            assert found == expected(chosen[index], "blue", index // 4), chosen[index]
        assert len(set(images)) == len(images)


@pytest.mark.slow
class TestJobs:
    def test_take_the_same_field(self, server, expected):
        with server.client() as client:
            fields = {**FIELDS, "prompt": "red", "seed": 7}
            job = submit(client, fields, adapters=[{"name": "style", "scale": 0.7}])
            state = finished(client, job)

            assert image_of(client, state).tobytes() == expected({"style": 0.7})
            assert state["model"] == "engines"
            assert state["adapters"] == [{"name": "style", "scale": 0.7}]
            (recorded,) = state["images"][0]["metadata"]["adapters"]
            assert (recorded["name"], recorded["scale"]) == ("style.safetensors", 0.7)
            models = client.get("/api/models").json()["models"]
            described = {each["name"]: each["adapters"] for each in models}
            assert described["tiny"] == []
            assert described["engines"][1] == {"name": "style", "sha256": recorded["sha256"]}

    def test_the_server_answers_while_a_model_with_adapters_is_opened(self, server):
        with server.client() as client:
            fields = {**FIELDS, "prompt": "red", "seed": 7}
            jobs = [submit(client, fields, adapters=f"style@0.{each}1") for each in range(1, 5)]
            assert client.get("/readyz").status_code == 200
            metrics = client.get("/metrics").text
            cancelled = client.post(f"/api/jobs/{jobs[0]['id']}/cancel").json()
            last = client.get(f"/api/jobs/{jobs[-1]['id']}").json()

            assert cancelled["state"] == "cancelled"
            assert last["state"] in ("queued", "generating")  # it is yet to be opened
            assert 'model="engines"' in metrics
            assert "style" not in metrics  # whose scales would be series without end
            assert [finished(client, job)["state"] for job in jobs[1:]] == ["completed"] * 3


@pytest.mark.slow
class TestA1111:
    @pytest.fixture
    def web_ui(self, server):
        with server.client() as client:
            yield WebUIApi(client, steps=FIELDS["num_inference_steps"], sampler="DPM++ 2M")

    def image(self, web_ui, prompt):
        return web_ui.txt2img(
            prompt=prompt, seed=7, cfg_scale=3.0, width=64, height=64, scheduler="Karras"
        )

    def expected(self, bundle, prompt, adapters=None):
        options = {**FIELDS, "sampler": "dpmpp_2m", "schedule": "karras", "seed": 7}
        with Generator(bundle, threads=1, adapters=adapters) as generator:
            return generator(prompt, **options).image.tobytes()

    def test_tags_of_a_prompt_are_adapters(self, web_ui, small_bundle_fp32, folder):
        file = folder / "style.safetensors"

        answer = self.image(web_ui, "red<lora:style:0.7>")
        whole = self.image(web_ui, "<lora:style>red")
        off = self.image(web_ui, "<lora:style:0>red")

        assert answer.image.tobytes() == self.expected(small_bundle_fp32, "red", {file: 0.7})
        assert whole.image.tobytes() == self.expected(small_bundle_fp32, "red", {file: 1.0})
        assert off.image.tobytes() == self.expected(small_bundle_fp32, "red")
        assert answer.info["prompt"] == "red<lora:style:0.7>"  # as in the web UI
        sha256 = read_adapter(file).web_ui_sha256
        (text,) = answer.info["infotexts"]
        assert text.startswith("red <lora:style:0.7>\nSteps: 3, ")
        assert f'Lora hashes: "style: {sha256[:12]}"' in text

    def test_a_text_names_adapters_as_the_server_does(self, web_ui):
        answer = self.image(web_ui, "<lora:other:0.7>red")

        (text,) = answer.info["infotexts"]
        assert text.startswith("red <lora:other:0.7>\n")

    def test_extra_networks_can_be_turned_off(self, web_ui, small_bundle_fp32):
        body = {"prompt": "red<lora:style:0.7>", "disable_extra_networks": True, "steps": 3}
        body |= {
            "seed": 7,
            "cfg_scale": 3.0,
            "width": 64,
            "height": 64,
            "sampler_name": "DPM++ 2M",
            "scheduler": "Karras",
        }
        answer = web_ui.session.post(f"{web_ui.baseurl}/txt2img", json=body).json()

        image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        assert image.tobytes() == self.expected(small_bundle_fp32, "red")

    def test_they_are_listed_without_what_training_wrote_down(self, web_ui):
        other, style = web_ui.get_loras()

        assert style["name"] == style["alias"] == "style"
        assert (style["path"], other["path"]) == ("style.safetensors", "second.safetensors")
        assert style["metadata"] == {"ss_output_name": "mine"}

    def test_a_checkpoint_may_have_them_in_its_name(self, web_ui, small_bundle_fp32, folder):
        file = folder / "style.safetensors"
        try:
            web_ui.set_options({"sd_model_checkpoint": "engines:style@0.7"})
            told = web_ui.get_options()["sd_model_checkpoint"]
            web_ui.set_options({"sd_model_checkpoint": told})  # as clients do
            image = self.image(web_ui, "red").image
            body = {"prompt": "red<lora:other>"}
            twice = web_ui.session.post(f"{web_ui.baseurl}/txt2img", json=body)
        finally:
            web_ui.set_options({"sd_model_checkpoint": "engines"})

        assert told.startswith("engines:style@0.7 [")
        assert image.tobytes() == self.expected(small_bundle_fp32, "red", {file: 0.7})
        assert twice.status_code == 400
        assert twice.json()["error"]["param"] == "prompt"

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ("a <lora:cat:1>", "there is no adapter 'cat'; the adapters of this model are other,"),
            ("<lora:style><lora:style:2>", "has the adapter 'style' twice"),
            ("<lora:style:11>", "the scale of 'style' must be from -10 to 10, got 11"),
            ("<lora:style:nan>", "the scale of 'style' must be from -10 to 10, got nan"),
            ("<lora:style:0.5:0.7>", "write <lora:NAME> or <lora:NAME:SCALE>"),
            ("<lora:style:unet=0.5>", "write <lora:NAME> or <lora:NAME:SCALE>"),
            ("<hypernet:style:1>", "this server cannot do that"),
            ("<lora:style", "this server cannot do that"),
        ],
    )
    def test_tags_that_cannot_be_honoured_are_refused(self, web_ui, prompt, message):
        answer = web_ui.session.post(f"{web_ui.baseurl}/txt2img", json={"prompt": prompt})

        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "prompt"
        assert error["message"].startswith("prompt: ")
        assert message in error["message"]


ADAPTERS = {
    name: NamedAdapter(name=name, path=Path(name), sha256=name * 8, metadata={})
    for name in ("other", "style")
}
NUMBERS = st.floats(-10, 10).filter(lambda scale: scale != 0)


class TestNames:
    @given(st.dictionaries(st.sampled_from(sorted(ADAPTERS)), NUMBERS, min_size=1))
    def test_an_alias_is_read_as_what_it_was_made_of(self, scales):
        listed = [AdapterChoice(*each) for each in reversed(scales.items())]
        uses = chosen_adapters(listed, ADAPTERS)

        name, _, text = alias_of("a:b", uses).rpartition(":")

        assert name == "a:b"
        assert chosen_adapters(text, ADAPTERS) == uses
        assert {each.name: each.scale for each in uses} == scales
        assert [each.name for each in uses] == sorted(scales)

    def test_are_the_stems_of_files_unless_given(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

        paths = adapter_paths(["my/style.v2.safetensors", "x=other.pt", "y=/a=b.pt"])

        assert paths == {
            "style.v2": tmp_path / "my/style.v2.safetensors",
            "x": tmp_path / "other.pt",
            "y": Path("/a=b.pt"),
        }

    @pytest.mark.parametrize("separator", ["@", "+", ":", ",", "<", ">", " ", "\t", "\n"])
    def test_cannot_be_told_from_what_stands_around_them(self, separator):
        name = f"a{separator}b"
        with pytest.raises(RequestError, match=r"adapter: .* cannot be a name, .*; say NAME=x.pt"):
            adapter_paths([f"{name}=x.pt"])
        with pytest.raises(RequestError, match="cannot be a name"):
            adapter_paths([f"{name}.safetensors"])

    @pytest.mark.parametrize(
        ("texts", "message"),
        [
            (["a.pt", "x/a.bin"], "two are called 'a'; say a2=x/a.bin"),
            (["=a.pt"], "'' cannot be a name"),
        ],
    )
    def test_are_unique(self, texts, message):
        with pytest.raises(RequestError, match=f"^adapter: {message}"):
            adapter_paths(texts)


KNOWN = "the adapters of this model are other, style"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"model": "engines:styel"}, "model", f"'styel' (did you mean style?); {KNOWN}"),
        ({"model": "engines:"}, "model", f"there is no adapter ''; {KNOWN}"),
        ({"model": "engines:/etc/passwd"}, "model", f"no adapter '/etc/passwd'; {KNOWN}"),
        ({"model": "engines:style@11"}, "model", f"from -10 to 10, got 11; {KNOWN}"),
        ({"model": "engines:style@-inf"}, "model", f"from -10 to 10, got -inf; {KNOWN}"),
        ({"model": "engines:style@nan"}, "model", f"from -10 to 10, got nan; {KNOWN}"),
        ({"model": "engines:style@much"}, "model", f"must be a number, got 'much'; {KNOWN}"),
        ({"model": "engines:style+style@2"}, "model", f"'style' twice; {KNOWN}"),
        ({"model": "tiny:style"}, "model", "the adapters of this model are none"),
        ({"adapters": [{"name": "x"}]}, "adapters", f"no adapter 'x'; {KNOWN}"),
        ({"adapters": [{"name": "style", "scale": 1e9}]}, "adapters", "from -10 to 10, got 1e+09"),
        ({"adapters": [{"name": "style", "scale": "1"}]}, "adapters[0].scale", "Expected `float`"),
        ({"adapters": [{"scale": 1}]}, "adapters[0].name", "name is missing"),
        ({"adapters": [{"name": "style", "file": "x"}]}, "adapters[0].file", "unknown field"),
        ({"model": "engines:style", "adapters": []}, "adapters", "names some already"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_every_interface(server, options, param, message):
    with server.client() as client:
        calls = {
            "/v1/images/generations": {"prompt": "red", **options},
            "/api/jobs": {"request": {"prompt": "red"}, **options},
        }
        for path, body in calls.items():
            answer = client.post(path, json=body)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, param), error
            assert message in error["message"]


@pytest.mark.slow
def test_an_unknown_model_is_still_that(server):
    with server.client() as client:
        answer = client.post("/v1/images/generations", json={"prompt": "a", "model": "cat:style"})

        assert answer.status_code == 404
        assert "there is no model 'cat:style'" in answer.json()["error"]["message"]


@pytest.mark.slow
class TestStart:
    """A server that cannot honour its adapters says so in a line, and does not start."""

    def refused(self, capsys, *arguments):
        assert main(["serve", *map(str, arguments), "--port", "0"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    def test_files_that_are_no_adapters(self, small_bundle_fp32, tmp_path, capsys):
        (tmp_path / "text.safetensors").write_text("no")
        np.save(tmp_path / "array.npy", np.ones(3))

        for name in ("text.safetensors", "array.npy", "missing.safetensors"):
            error = self.refused(capsys, small_bundle_fp32, "--adapter", f"x={tmp_path / name}")
            assert f"error: adapter: {tmp_path / name}" in error

    @pytest.mark.parametrize("live", [(), ("--live-adapters",)])
    def test_adapters_of_graphs_in_8_bits(self, small_bundle_fp32, tmp_path, capsys, live):
        style = write_lora(tmp_path / "style.safetensors")

        error = self.refused(
            capsys, small_bundle_fp32, "--adapter", f"x={style}", "--precision", "int8", *live
        )

        assert "error: adapter: changes weights, whose 8 bits were measured without it" in error

    def test_adapters_of_other_models(self, small_bundle_fp32, bundle, tmp_path, capsys):
        wide = write_lora(tmp_path / "wide.safetensors", width=96)
        deep = [each.replace("mid_block", "mid_block_7") for each in LAYERS]
        write_lora(tmp_path / "deep.safetensors", layers=deep)

        for name, reason in {"wide": "does not fit a weight of shape", "deep": "has not"}.items():
            models = (f"engines={small_bundle_fp32}", f"tiny={bundle}")
            error = self.refused(capsys, *models, "--adapter", wide.with_stem(name))
            assert f"'{name}' fits none of the models, engines: " in error
            assert reason in error

    def test_one_file_with_two_names(self, small_bundle_fp32, folder, capsys):
        file = folder / "style.safetensors"
        both = ("--adapter", f"a={file}", "--adapter", f"b={file}")
        assert "'a' and 'b' are one file" in self.refused(capsys, small_bundle_fp32, *both)

    def test_what_cannot_be_live(self, small_bundle_fp32, tmp_path, capsys):
        tensors = {f"{LAYERS[0]}.diff": np.ones((64, 64), np.float32)}
        save_file(tensors, tmp_path / "whole.safetensors")
        live = ["--adapter", tmp_path / "whole.safetensors", "--live-adapters"]

        error = self.refused(capsys, small_bundle_fp32, *live)
        on_gpu = self.refused(capsys, small_bundle_fp32, *live, "--backend", "cuda")

        assert "only a LoRA of a matrix can be live; merge the adapter" in error
        assert "cuda runs graphs as they are; leave out --live-adapters" in on_gpu

    def test_a_backend_that_takes_none(self, small_bundle_fp32, folder, tmp_path, capsys):
        adapter = ["--adapter", folder / "style.safetensors", "--backend", "tensorrt-rtx-ort"]

        error = self.refused(capsys, small_bundle_fp32, *adapter)

        assert "tensorrt-rtx-ort has its weights built in and takes none" in error
        (tmp_path / "requests.jsonl").write_text('{"prompt": "red"}\n')
        batch = ["batch", tmp_path / "requests.jsonl", "--out", tmp_path / "out", *adapter]
        assert main([*map(str, batch), "--bundle", str(small_bundle_fp32)]) == 2
        assert "takes none; use another backend" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
class TestOpenModels:
    @pytest.fixture
    def models(self, small_bundle_fp32, folder):
        adapters = {"style": folder / "style.safetensors"}
        settings = EngineSettings(
            backend="onnxruntime", threads=1, adapters=adapters, max_adapted=2
        )
        with OpenModels({"engines": small_bundle_fp32}, settings) as models:
            yield models

    def use(self, folder, scale):
        sha256 = sha256_of(folder / "style.safetensors")
        return (AdapterUse(name="style", sha256=sha256, scale=scale),)

    @pytest.mark.slow
    def test_the_least_recently_used_is_closed_for_another(self, models, folder):
        plain = models.open("engines")
        first, second = (models.open("engines", self.use(folder, s)) for s in (0.1, 0.2))
        assert models.open("engines", self.use(folder, 0.1)) is first

        third = models.open("engines", self.use(folder, 0.3))

        assert models.open("engines", self.use(folder, 0.1)) is first
        assert models.open("engines") is plain
        assert models.open("engines", self.use(folder, 0.2)) is not second
        assert models.open("engines", self.use(folder, 0.3)) is not third

    @pytest.mark.slow
    def test_a_file_that_peft_saved_is_the_one_that_was_checked(self, small_bundle_fp32, tmp_path):
        path = tmp_path / "adapter_model.safetensors"
        write_lora(path, 0)
        (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1}')
        bundles = {"engines": small_bundle_fp32}
        named = fitting_adapters({"style": path}, bundles)["engines"]["style"]
        use = AdapterUse(name="style", sha256=named.sha256, scale=1.0)
        settings = EngineSettings(backend="onnxruntime", threads=1, adapters={"style": path})

        with OpenModels(bundles, settings) as models:
            assert models.open("engines", (use,)) is not None

    @pytest.mark.slow
    def test_another_waits_for_busy_ones(self, models, folder):
        busy = [models.open("engines", self.use(folder, scale)) for scale in (0.1, 0.2)]
        request = parse_request({"prompt": "red", "seed": 1, **FIELDS})
        numbers = [each.batch.add(request) for each in busy]

        assert models.open("engines", self.use(folder, 0.3)) is None
        assert models.open("engines") is not None
        busy[0].batch.cancel(numbers[0])
        assert models.open("engines", self.use(folder, 0.3)) is not None

    @pytest.mark.slow
    def test_a_file_that_has_changed_is_not_used(self, small_bundle_fp32, folder, tmp_path):
        path = write_lora(tmp_path / "style.safetensors", 5)
        settings = EngineSettings(backend="onnxruntime", threads=1, adapters={"style": path})
        with OpenModels({"engines": small_bundle_fp32}, settings) as models:
            for change in (lambda: None, path.unlink):
                change()
                with pytest.raises(LdmError, match="of the adapter 'style' has changed") as error:
                    models.open("engines", self.use(folder, 1.0))
                assert str(tmp_path) not in str(error.value)

    @pytest.mark.slow
    def test_clients_are_not_told_where_files_lie(self, small_bundle_fp16, tmp_path):
        path = write_lora(tmp_path / "style.safetensors", strength=1e6)
        settings = EngineSettings(backend="onnxruntime", threads=1, adapters={"style": path})
        with OpenModels({"engines": small_bundle_fp16}, settings) as models:
            with pytest.raises(
                RequestError, match=r"adapters: style: .* beyond the range"
            ) as error:
                models.open("engines", self.use(tmp_path, 1.0))
            assert str(tmp_path) not in str(error.value)


@pytest.mark.slow
class TestBatch:
    def batch(self, out, requests, bundle, flags, *more):
        arguments = ["batch", requests, "--out", out, "--bundle", bundle, "--threads", "1"]
        return main([*map(str, arguments), *flags, *more])

    @pytest.mark.parametrize("executor", ["inline", "process"])
    def test_images_are_those_of_the_generator(
        self, executor, small_bundle_fp32, flags, expected, tmp_path
    ):
        lines = [
            {},
            {"adapters": "style@0.7"},
            {"adapters": [{"name": "style", "scale": 0.5}, {"name": "other", "scale": -0.3}]},
            {"adapters": "style@0"},
        ]
        requests, out = tmp_path / "requests.jsonl", tmp_path / "out"
        fields = {**FIELDS, "prompt": "red", "seed": 7}
        requests.write_text("".join(json.dumps(fields | line) + "\n" for line in lines))

        assert self.batch(out, requests, small_bundle_fp32, flags, "--executor", executor) == 0

        results = {each["line"]: out / each["path"] for each in results_of(out)}
        images = [Image.open(results[line]).tobytes() for line in range(1, 5)]
        assert images == [expected({}), expected({"style": 0.7}), expected(TWO), expected({})]
        assert results[1] == results[4]
        (recorded,) = read_metadata(results[2])["adapters"]
        assert recorded["scale"] == 0.7

    def test_a_changed_file_is_another_image(self, small_bundle_fp32, tmp_path):
        path = write_lora(tmp_path / "style.safetensors", 0)
        flags = ["--adapter", str(path), "--executor", "inline"]
        requests, out = tmp_path / "requests.jsonl", tmp_path / "out"
        requests.write_text(json.dumps({**FIELDS, "prompt": "a", "seed": 1, "adapters": "style"}))
        self.batch(out, requests, small_bundle_fp32, flags)
        self.batch(out, requests, small_bundle_fp32, flags)
        (first,) = out.glob("*/*.png")

        write_lora(path, 1)
        assert self.batch(out, requests, small_bundle_fp32, flags) == 0

        (second,) = set(out.glob("*/*.png")) - {first}
        assert first.read_bytes() != second.read_bytes()
        assert [each["path"] for each in results_of(out)] == [str(second.relative_to(out))]

    @pytest.mark.parametrize(
        ("adapters", "message"),
        [
            ("styel", "line 1: adapters: there is no adapter 'styel' (did you mean style?); the"),
            ([{"name": "style", "scale": 20}], "line 1: adapters: the scale of 'style' must be"),
            ({"style": 1}, "line 1: adapters: cannot be read: Expected `str | array | null`"),
        ],
    )
    def test_a_wrong_line_is_refused_before_all(
        self, adapters, message, small_bundle_fp32, flags, tmp_path, capsys
    ):
        requests = tmp_path / "requests.jsonl"
        requests.write_text(json.dumps({"prompt": "a", "adapters": adapters}))

        assert self.batch(tmp_path / "out", requests, small_bundle_fp32, flags) == 2
        assert message in capsys.readouterr().err
        assert not list((tmp_path / "out").glob("*/*.png"))
