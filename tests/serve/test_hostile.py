"""Hostile calls of every route: no failure of the server, nothing told, nothing opened."""

import asyncio
import base64
import json
import re
import struct
import sys
import zlib

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldm_serve.app import create_app
from ldm_serve.routes.a1111.forms import ImageToImageForm, TextToImageForm
from ldm_serve.routes.jobs import NewJob
from ldm_serve.routes.openai_images import ImageRequest
from ldm_serve.settings import MAX_IMAGE_BODY_BYTES, Access, Limits, ServeSettings
from tests.serve.asgi import is_error
from tests.serve.fake_executor import FakeExecutor

KEY = "k" * 32
RIGHT = {"Authorization": f"Bearer {KEY}"}
JSON = {"Content-Type": "application/json"}
SECRET = "canary-of-the-body"
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
#: Paths that anyone may call: the page, probes, and images by an address that cannot be guessed.
PUBLIC = {"/", "/page.js", "/page.css", "/livez", "/readyz", "/health", "/files/{job}/{index}"}
#: Routes that read JSON.
READERS = {
    "/api/jobs": NewJob,
    "/v1/images/generations": ImageRequest,
    "/sdapi/v1/txt2img": TextToImageForm,
    "/sdapi/v1/img2img": ImageToImageForm,
    "/sdapi/v1/options": None,
    "/sdapi/v1/png-info": None,
}
#: Signs of what an answer must not tell: where files lie, and how the program is made.
LEAKS = re.compile(rb"Traceback|\.py\b|/tmp/|/home/|/usr/|site-packages| at 0x|<class|_io\.")


class InstantExecutor(FakeExecutor):
    """Ends every job with an image at once."""

    def submit(self, work):
        super().submit(work)
        asyncio.get_running_loop().call_soon(self._finish, work.job)

    def _finish(self, job):
        if job in self.works:
            self.finish(job)


class Server:
    """A server in this process whose calls are made one after the other, in one event loop."""

    def __init__(self, bundle, runner):
        self._runner = runner
        self.app = create_app(
            ServeSettings(
                bundles={"tiny": bundle},
                access=Access(keys={"me": KEY}),
                limits=Limits(requests_per_minute=1e9, kept_results=4),
                drain_seconds=0.01,
            ),
            InstantExecutor(room=10**6),
        )
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
        self._client = httpx2.AsyncClient(transport=transport, base_url="http://localhost")

    def send(self, method, path, headers=RIGHT, **body):
        return self._runner.run(self._client.request(method, path, headers=headers, **body))

    def post(self, path, value):
        return self.send("POST", path, json=value)

    def raw(self, method, path, headers):
        """Call with headers that HTTP clients would not send, and return the status."""

        async def call():
            sent = []

            async def receive():
                return {"type": "http.request", "body": b""}

            async def send(message):
                sent.append(message)

            scope = {
                "type": "http",
                "method": method,
                "path": path,
                "raw_path": path.encode(),
                "query_string": b"",
                "headers": [(b"host", b"localhost"), *headers],
                "state": {},
            }
            await self.app(scope, receive, send)
            return sent[0]["status"]

        return self._runner.run(call())

    def open_lifespan(self):
        return self.app.router.lifespan_context(self.app)


@pytest.fixture(scope="module")
def server(bundle):
    with asyncio.Runner() as runner:
        server = Server(bundle, runner)
        lifespan = server.open_lifespan()
        runner.run(lifespan.__aenter__())
        server.post("/api/jobs", {"request": {"prompt": "red"}})  # what is imported on demand
        yield server
        assert server.send("GET", "/livez", {}).status_code == 200
        image = server.post("/sdapi/v1/txt2img", {"prompt": "red"}).json()["images"]
        assert image == [base64.b64encode(b"image").decode()]  # it still answers
        runner.run(lifespan.__aexit__(None, None, None))


def calls(app):
    """Yield every method and path of the routes, parameters filled in, and the path as declared."""
    for route in app.routes:
        for method in METHODS:
            path = re.sub(r"\{index(:int)?\}", "0", route.path)
            yield method, re.sub(r"\{[^}]*\}", "none", path), route


def nested(depth):
    return b"[" * depth + b"]" * depth


#: Bodies that no route takes.
BODIES = {
    "empty": b"",
    "malformed": b"{",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "NaN": b'{"prompt": "canary-of-the-body", "seed": NaN}',
    "infinity": b'{"prompt": "canary-of-the-body", "deadline_seconds": 1e999}',
    "lone surrogate": b'{"prompt": "canary-of-the-body \\ud800"}',
    "lone surrogate in a name": b'{"prompt": "canary-of-the-body", "\\udfff": 1}',
    "deep": nested(10_000),
    "deep in a field": b'{"request": ' + nested(10_000) + b"}",
    "unknown field": b'{"prompt": "canary-of-the-body", "unknown": 1}',
    "unknown field, long": b'{"' + b"u" * 100_000 + b'": 1}',
    "wrong types": b'{"prompt": 5, "request": 5, "image": 5, "init_images": 5}',
    "array": b'["canary-of-the-body"]',
    "huge number": b'{"prompt": "canary-of-the-body", "seed": 1' + b"0" * 5000 + b"}",
    "text": b'"canary-of-the-body"',
    "null": b"null",
}


def check(answer):
    """Check what holds for every answer."""
    assert answer.status_code < 500, (answer.request.method, answer.request.url, answer.text)
    assert not LEAKS.search(answer.content), answer.text
    if answer.status_code >= 400:
        assert SECRET.encode() not in answer.content
        assert len(answer.content) < 2000, answer.text
        assert answer.request.method == "HEAD" or is_error(answer)
        detail = json.loads(answer.content or b"{}").get("detail")
        assert (detail is not None) == (
            answer.request.url.path.startswith("/sdapi/") and answer.request.method != "HEAD"
        )


def is_reader(method, route):
    return method == "POST" and route.path in READERS and "POST" in (route.methods or ())


@pytest.mark.parametrize("name", BODIES)
def test_no_body_makes_a_route_fail(server, name):
    read = 0
    for method, path, route in calls(server.app):
        answer = server.send(method, path, {**RIGHT, **JSON}, content=BODIES[name])

        check(answer)
        if is_reader(method, route):
            read += 1
            assert answer.status_code == 400, (path, answer.text)
    assert read == len(READERS)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({**RIGHT, "Content-Type": "text/plain"}, 415),
        ({**RIGHT, "Content-Type": "multipart/form-data"}, 415),
        ({**RIGHT, "Content-Type": "canary/" + "y" * 5000}, 415),
        (RIGHT, 415),
        ({**RIGHT, **JSON, "Content-Length": str(MAX_IMAGE_BODY_BYTES + 1)}, 413),
        ({**RIGHT, **JSON, "Content-Length": "-1"}, 400),
        ({**RIGHT, **JSON, "Content-Length": "9" * 5000}, 413),
        ({**RIGHT, **JSON, "Host": "evil.example"}, 421),
        ({**RIGHT, **JSON, "Origin": "https://evil.example"}, 403),
        ({**RIGHT, **JSON, "Origin": "http://["}, 403),
        ({**RIGHT, **JSON, "Origin": "null"}, 403),
        (JSON, 401),
        ({"Authorization": "Bearer wrong", **JSON}, 401),
        ({"Authorization": "Basic ////", **JSON}, 401),
        ({"Authorization": "Basic " + base64.b64encode(b"a:wrong").decode(), **JSON}, 401),
        ({"Authorization": f"Digest {KEY}", **JSON}, 401),
    ],
)
def test_headers_that_are_wrong_are_refused_on_every_path(server, headers, status):
    for method, path, route in calls(server.app):
        answer = server.send(method, path, headers, content=b'{"prompt": "canary-of-the-body"}')

        check(answer)
        if is_reader(method, route):
            assert answer.status_code == status, (path, answer.text)


def test_without_a_key_nothing_but_the_public_paths_answers(server):
    refused = set()
    for method, path, route in calls(server.app):
        answer = server.send(method, path, {})

        declared = route.path.replace(":int", "")
        assert (answer.status_code == 401) == (declared not in PUBLIC), (method, path)
        if answer.status_code == 401:
            refused.add(declared)
    assert {"/metrics", "/api/jobs/{job}/events", "/sdapi/v1/interrupt", *READERS} <= refused


@pytest.mark.parametrize(
    "path",
    [
        "/files/none/" + "9" * 5000,
        "/files/none/-1",
        "/files/none/0x0",
        "/files/%2e%2e%2f%2e%2e%2fetc/0",
        "/files/" + "j" * 20_000 + "/0",
        "/api/jobs/" + "j" * 20_000,
        "/api/jobs/%00",
        "/api/jobs/%ff%fe",
        "/api/jobs/../../etc/passwd",
        "/v1/models/" + "m" * 20_000,
        "/v1/models/../../etc/passwd",
        "/%ed%a0%80",
        "/sdapi/v1/" + "x" * 20_000,
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_path_makes_the_server_fail(server, method, path):
    answer = server.send(method, path)

    check(answer)
    assert answer.status_code in (404, 405, 400)


@pytest.mark.parametrize("path", ["//evil.example/", "http://evil.example/", "*"])
def test_a_path_that_names_a_host_is_no_path(server, path):
    """Clients of HTTP make another path of these."""
    authorization = (b"authorization", f"Bearer {KEY}".encode())

    assert server.raw("GET", path, [authorization]) == 404


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        (b"content-length", "٣".encode(), 400),
        (b"content-length", b"\xff", 400),
        (b"content-length", b"1" * 10_000, 413),
        (b"origin", b"http://[", 403),
        (b"origin", b"\xff\xfe", 403),
        (b"authorization", b"Bearer \xff\x00", 401),
        (b"authorization", b"Basic \xff", 401),
        (b"x-stainless-read-timeout", b"nan", 415),
        (b"x-stainless-read-timeout", b"-1e999", 415),
    ],
)
def test_no_header_makes_the_server_fail(server, name, value, status):
    key = [] if name == b"authorization" else [(b"authorization", f"Bearer {KEY}".encode())]

    for path in READERS:
        assert server.raw("POST", path, [(name, value), *key]) == status


#: Bodies in which a field has the value DEEP.
DEEP = b'"DEEP"'
DEEP_BODIES = [
    ("/api/jobs", {"request": {"prompt": "DEEP"}}),
    *(
        ("/api/jobs", {"request": {"prompt": "red", name: "DEEP"}})
        for name in ("image", "layout", "sigmas", "seed")
    ),
    *(
        (path, {"prompt": "red", name: "DEEP"})
        for path in ("/sdapi/v1/txt2img", "/sdapi/v1/img2img")
        for name in ("styles", "script_args", "comments", "resize_mode", "override_settings")
    ),
    ("/sdapi/v1/options", {"samples_format": "DEEP"}),
    ("/sdapi/v1/options", {"sd_model_checkpoint": "DEEP"}),
    ("/sdapi/v1/png-info", {"image": "DEEP"}),
    ("/v1/images/generations", {"prompt": "red", "svg": "DEEP"}),
]


@pytest.mark.parametrize("depth", [50, 500, 800, 900, 950, 990, 1100, 5000])
def test_values_that_nest_as_deep_as_they_can_be_read_are_refused(server, depth):
    for path, fields in DEEP_BODIES:
        content = json.dumps(fields).encode().replace(DEEP, nested(depth))

        answer = server.send("POST", path, {**RIGHT, **JSON}, content=content)

        check(answer)
        assert answer.status_code == 400, (path, fields)


IMAGE = "data:image/png;base64,"
#: Requests of which one field is wrong, by the name of that field.
WRONG = [
    *(
        ("/v1/images/generations", {"prompt": "red"} | fields, param)
        for fields, param in [
            ({"prompt": 5}, "prompt"),
            ({"prompt": "x" * 40_000}, "prompt"),
            ({"n": "2"}, "n"),
            ({"n": 10**30}, "n"),
            ({"size": [16, 16]}, "size"),
            ({"size": "16x"}, "size"),
            ({"size": "99999x99999"}, "size"),
            ({"seed": -1}, "seed"),
            ({"seed": 2**80}, "seed"),
            ({"seed": 1.5}, "seed"),
            ({"guidance_scale": 1e30}, "guidance_scale"),
            ({"num_inference_steps": 0}, "num_inference_steps"),
            ({"num_inference_steps": 10**9}, "num_inference_steps"),
            ({"sampler": "\N{SNOWMAN}"}, "sampler"),
            ({"model": ["tiny"]}, "model"),
            ({"model": "other"}, "model"),
            ({"stream": "yes"}, "stream"),
            ({"output_compression": 101}, "output_compression"),
            ({"response_format": "tiff"}, "response_format"),
            ({"background": "transparent"}, "background"),
            ({"strength": 0.5}, "strength"),
            ({"colour": 1}, "colour"),
        ]
    ),
    ("/v1/images/generations", {}, "prompt"),
    *(
        ("/api/jobs", {"request": {"prompt": "red"}} | fields, param)
        for fields, param in [
            ({"request": []}, "request"),
            ({"request": {"prompt": 5}}, "prompt"),
            ({"request": {"prompt": "red", "num_images": 10**6}}, "num_images"),
            ({"request": {"prompt": "red", "width": -16}}, "width"),
            ({"request": {"prompt": "red", "sigmas": [1, 2]}}, "sigmas"),
            ({"request": {"prompt": "red", "image": IMAGE + "AAAA"}}, "image"),
            ({"request": {"prompt": "red", "image": "/etc/passwd"}}, "image"),
            ({"request": {"prompt": "red", "latents": "http://localhost/"}}, "latents"),
            ({"request": {"prompt": "red", "mask_image": IMAGE + "!"}}, "mask_image"),
            ({"deadline_seconds": "soon"}, "deadline_seconds"),
            ({"output_format": "gif"}, "output_format"),
            ({"previews": 1}, "previews"),
            ({"priority": 9}, "priority"),
        ]
    ),
    ("/api/jobs", {}, "request"),
    *(
        (path, {"prompt": "red"} | images | fields, param)
        for path, images in [
            ("/sdapi/v1/txt2img", {}),
            ("/sdapi/v1/img2img", {"init_images": [IMAGE + "AAAA"]}),
        ]
        for fields, param in [
            ({"prompt": 5}, "prompt"),
            ({"prompt": "a <lora:cat:1>"}, "prompt"),
            ({"steps": "20"}, "steps"),
            ({"batch_size": 0}, "batch_size"),
            ({"styles": ["anime"]}, "styles"),
            ({"restore_faces": True}, "restore_faces"),
            ({"tiling": True}, "tiling"),
            ({"script_name": "x/y/z plot"}, "script_name"),
            ({"alwayson_scripts": {"ControlNet": {"args": []}}}, "alwayson_scripts"),
            ({"save_images": True}, "save_images"),
            ({"s_noise": 1.1}, "s_noise"),
            ({"override_settings": {"eta_noise_seed_delta": 31337}}, "eta_noise_seed_delta"),
            ({"override_settings": {"sd_model_checkpoint": "other"}}, "sd_model_checkpoint"),
            ({"colour": 1}, "colour"),
        ]
    ),
    *(
        ("/sdapi/v1/txt2img", {"prompt": "red"} | fields, param)
        for fields, param in [
            ({"prompt": "x" * 40_000}, "prompt"),
            ({"steps": 0}, "steps"),
            ({"cfg_scale": -1}, "cfg_scale"),
            ({"width": 17}, "width"),
            ({"height": 10**9}, "height"),
            ({"seed": -2}, "seed"),
            ({"subseed_strength": 2}, "subseed_strength"),
            ({"sampler_name": "none"}, "sampler_name"),
            ({"scheduler": "none"}, "scheduler"),
            ({"batch_size": 4, "n_iter": 100}, "batch_size"),
            ({"n_iter": 0}, "n_iter"),
            ({"enable_hr": True, "hr_upscaler": "Latent"}, "hr_upscaler"),
            ({"enable_hr": True, "hr_resize_x": 64}, "hr_resize_x"),
            ({"enable_hr": True, "hr_scale": 100}, "hr_scale"),
            ({"enable_hr": True, "denoising_strength": 2}, "denoising_strength"),
            ({"clip_skip": 0}, "clip_skip"),
            ({"init_images": []}, "init_images"),
        ]
    ),
    *(
        ("/sdapi/v1/img2img", {"prompt": "red"} | fields, param)
        for fields, param in [
            ({}, "init_images"),
            ({"init_images": []}, "init_images"),
            ({"init_images": ["AAAA", "AAAA"]}, "init_images"),
            ({"init_images": "AAAA"}, "init_images"),
            ({"init_images": ["AAAA"]}, "init_images"),
            ({"init_images": ["\N{SNOWMAN}"]}, "init_images"),
            ({"init_images": ["AAAA"], "resize_mode": 1}, "init_images"),
            ({"init_images": ["AAAA"], "mask": "AAAA"}, "mask"),
            ({"init_images": ["AAAA"], "mask": "AAAA", "mask_blur": 99}, "mask_blur"),
            ({"init_images": ["AAAA"], "mask": "AAAA", "inpainting_fill": 2}, "inpainting_fill"),
            ({"init_images": ["AAAA"], "latent_mask": "AAAA"}, "latent_mask"),
        ]
    ),
    ("/sdapi/v1/options", {"outdir_samples": "/etc"}, "outdir_samples"),
    ("/sdapi/v1/options", {"sd_model_checkpoint": "other"}, "sd_model_checkpoint"),
    ("/sdapi/v1/options", {"sd_model_checkpoint": 5}, "sd_model_checkpoint"),
    ("/sdapi/v1/options", {"samples_format": "gif"}, "samples_format"),
    ("/sdapi/v1/png-info", {}, "image"),
    ("/sdapi/v1/png-info", {"image": 5}, "image"),
    ("/sdapi/v1/png-info", {"image": "AAAA"}, "image"),
    ("/sdapi/v1/png-info", {"image": IMAGE + "AAAA", "model": "clip"}, "model"),
]
#: The same for a form with files.
WRONG_FORMS = [
    ({}, "image"),
    ({"image": "AAAA"}, "image"),
    ({"image": b"no image"}, "image"),
    ({"image": b"no image", "mask": b"no image"}, "mask"),
    ({"image": b"no image", "picture": b""}, "picture"),
    ({"image": b"no image", "n": "two"}, "n"),
    ({"image": b"no image", "strength": "much"}, "strength"),
    ({"image": b"no image", "colour": "1"}, "colour"),
]


def test_every_route_that_reads_has_rows_in_the_table():
    assert {path for path, _, _ in WRONG} == set(READERS)


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
def test_a_wrong_field_is_named(server, path, body, param):
    answer = server.post(path, body)

    check(answer)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (404 if "other" in str(body) else 400, param)
    assert param in error["message"] or error["code"] == "model_not_found"


@pytest.mark.parametrize(("fields", "param"), WRONG_FORMS)
def test_a_wrong_field_of_a_form_is_named(server, fields, param):
    parts = {
        name: ("a.png", value) if isinstance(value, bytes) else (None, value)
        for name, value in {"prompt": "red", **fields}.items()
    }

    answer = server.send("POST", "/v1/images/edits", files=parts)

    check(answer)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert param in error["message"]


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-5, 5),
        st.integers(),
        st.integers(min_value=2**62, max_value=2**66),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=20),
        st.sampled_from(["png", "euler", "Karras", "16x16", "auto", "data:,", "/etc/passwd"]),
        st.sampled_from(
            ["data:image/png;base64,", "data:image/png;base64,AAAA", "custom", "torch-cpu"]
        ),
    ),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["label", "box", "args"]) | st.text(max_size=5), inner)
    ),
    max_leaves=6,
)


def bodies(names, **needed):
    known = st.dictionaries(st.sampled_from(sorted(names)), VALUES, max_size=4)
    return st.builds(lambda fields: {**needed, **fields}, known)


def request_names():
    from ldm_runtime.requests.request import FIELDS

    return set(FIELDS)


ANY_REQUEST = {
    "/api/jobs": st.one_of(
        st.builds(lambda fields: {"request": fields}, bodies(request_names(), prompt="red")),
        bodies(NewJob.__struct_fields__, request={"prompt": "red"}),
    ),
    "/v1/images/generations": bodies(ImageRequest.__struct_fields__, prompt="red"),
    "/sdapi/v1/txt2img": bodies(TextToImageForm.__struct_fields__, prompt="red"),
    "/sdapi/v1/img2img": bodies(ImageToImageForm.__struct_fields__, init_images=["AAAA"]),
    "/sdapi/v1/options": bodies(
        {"sd_model_checkpoint", "CLIP_stop_at_last_layers", "samples_format", "randn_source"}
    ),
}


@pytest.mark.parametrize("path", ANY_REQUEST)
def test_no_values_of_fields_make_a_route_fail(server, path):
    statuses = set()

    @settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
    @given(ANY_REQUEST[path])
    def try_one(body):
        try:
            content = json.dumps(body).encode()
        except UnicodeEncodeError:
            return
        answer = server.send("POST", path, {**RIGHT, **JSON}, content=content)

        assert answer.status_code < 500, answer.text
        assert not LEAKS.search(answer.content)
        assert answer.status_code < 400 or is_error(answer)
        statuses.add(answer.status_code < 400)

    try_one()
    server.post("/sdapi/v1/options", {"CLIP_stop_at_last_layers": 1, "randn_source": "CPU"})

    assert False in statuses
    assert True in statuses or path == "/sdapi/v1/img2img"


class Audit:
    """Records what files are opened and what is connected to, while it is on."""

    def __init__(self):
        self.opened, self.network, self.is_on = [], [], False
        sys.addaudithook(self._heard)

    def _heard(self, event, arguments):
        if not self.is_on:
            return
        if event == "open":
            self.opened.append(str(arguments[0]))
        elif event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            self.network.append(arguments)


@pytest.fixture(scope="module")
def audit():
    return Audit()  # a hook stays until the end of the process


FILE_FIELDS = (
    "image",
    "mask_image",
    "layout",
    "segmentation",
    "latents",
    "embeddings",
    "depth_map",
)


@pytest.mark.parametrize("prefix", ["{}", "file://{}", "FILE://{}", "http://127.0.0.1:9{}", "{}\0"])
def test_text_in_a_field_for_a_file_opens_nothing(server, audit, tmp_path, prefix):
    path = tmp_path / "secret.png"
    path.write_bytes(png(4, 4, bytes(4 * (1 + 4))))
    text = prefix.format(path)
    fields = [{"request": {"prompt": "red", name: text}} for name in FILE_FIELDS]
    fields += [{"request": {"prompt": "red", name: [text]}} for name in FILE_FIELDS]
    multipart = {"prompt": "red", "image": text, "mask": text}

    audit.is_on = True
    answers = [server.post("/api/jobs", each) for each in fields]
    answers.append(server.post("/sdapi/v1/img2img", {"init_images": [text]}))
    answers.append(server.post("/sdapi/v1/img2img", {"init_images": ["AAAA"], "mask": text}))
    answers.append(server.post("/sdapi/v1/png-info", {"image": text}))
    answers.append(server.send("POST", "/v1/images/edits", files=as_form(multipart)))
    audit.is_on = False

    assert {answer.status_code for answer in answers} == {400}
    assert not [each for each in audit.opened if "secret.png" in each]
    assert audit.network == []


def as_form(fields):
    return {name: (None, value) for name, value in fields.items()}


def png(width, height, pixels):
    """Return a gray PNG from its rows, each after a byte for its filter."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(pixels)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_that_would_fill_the_memory_is_refused_before_a_pixel_is_decoded(server):
    # Its pixels are not there: to decode them would say that it is cut off.
    large, small = png(12_000, 12_000, b""), png(16, 16, bytes(16 * 17))
    url, text = (
        "data:image/png;base64," + base64.b64encode(each).decode() for each in (large, small)
    )

    answers = [
        *(
            server.post("/api/jobs", {"request": {"prompt": "red", "image": text, name: url}})
            for name in ("image", "mask_image", "depth_map", "segmentation")
        ),
        server.post("/sdapi/v1/img2img", {"init_images": [url]}),
        server.post("/sdapi/v1/img2img", {"init_images": [text], "mask": url}),
        server.send(
            "POST", "/v1/images/edits", data={"prompt": "red"}, files={"image": ("a.png", large)}
        ),
        server.send(
            "POST",
            "/v1/images/edits",
            data={"prompt": "red"},
            files={"image": ("a.png", small), "mask": ("m.png", large)},
        ),
    ]

    assert len(large) < 1000
    for answer in answers:
        check(answer)
        assert answer.status_code == 400
        assert "more than 67108864 pixels" in answer.text, answer.text


def test_text_about_a_large_image_is_read_without_its_pixels(server):
    large = base64.b64encode(png(12_000, 12_000, b"")).decode()

    check(answer := server.post("/sdapi/v1/png-info", {"image": large}))

    assert answer.json() == {"info": "", "items": {}, "parameters": {}}
