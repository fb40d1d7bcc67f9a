import base64

import pytest

from ldm_serve.settings import MAX_TEXT_BODY_BYTES, Access, ServeSettings
from tests.serve.asgi import calling, is_error
from tests.serve.fake_executor import FakeExecutor

KEYS = {"alice": "a" * 32, "bob": "b" * 32}


@pytest.fixture
def call(bundle):
    """Runs a scenario with a client of a server with some access."""

    def call(scenario, **access):
        settings = ServeSettings(
            bundles={"tiny": bundle}, access=Access(**access), drain_seconds=0.01
        )
        return calling(settings, FakeExecutor(), scenario)

    return call


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def basic(text):
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


def get(*paths, headers=None):
    async def scenario(client, _):
        return [await client.get(path, headers=headers) for path in paths]

    return scenario


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer("a" * 31),
        {"Authorization": "a" * 32},
        basic("alice:wrong"),
        basic("alice:"),
        basic("a" * 32),
        {"Authorization": "Basic ////"},
        {"Authorization": f"Basic {'a' * 32}"},
    ],
)
def test_without_a_valid_key_there_is_no_answer(call, headers):
    (answer,) = call(get("/v1/models", headers=headers), keys=KEYS)

    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert is_error(answer)


def test_any_valid_key_opens(call):
    for key in KEYS.values():
        (answer,) = call(get("/v1/models", headers=bearer(key)), keys=KEYS)
        assert answer.status_code == 200


def test_a_key_may_be_the_password_of_any_user(call):
    for name in ("alice", "someone", ""):
        (answer,) = call(get("/v1/models", headers=basic(f"{name}:{KEYS['bob']}")), keys=KEYS)
        assert answer.status_code == 200


def test_probes_and_only_they_are_public(call):
    paths = ("/livez", "/readyz", "/health", "/metrics", "/api/jobs", "/api/models", "/v1/models")

    answers = call(get(*paths), keys=KEYS)

    assert [answer.status_code for answer in answers] == [200, 200, 200, 401, 401, 401, 401]


def test_a_key_sees_its_own_jobs_alone(call):
    async def scenario(client, _):
        made = await client.post(
            "/api/jobs", json={"request": {"prompt": "red"}}, headers=bearer(KEYS["alice"])
        )
        path = f"/api/jobs/{made.json()['id']}"
        return [
            (await client.get(path, headers=bearer(key))).status_code for key in KEYS.values()
        ] + [(await client.post(f"{path}/cancel", headers=bearer(KEYS["bob"]))).status_code]

    assert call(scenario, keys=KEYS) == [200, 404, 404]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(host, 200) for host in ("localhost", "localhost:8188", "127.0.0.1:80", "[::1]:8188")],
        *[(host, 421) for host in ("evil.example", "localhost.evil.example", "[::2]", "")],
    ],
)
def test_other_names_are_refused(call, host, status):
    (answer,) = call(get("/v1/models", headers={"Host": host}))

    assert answer.status_code == status
    assert status == 200 or is_error(answer)


def test_probes_call_a_pod_by_its_address(call):
    paths = ("/livez", "/readyz", "/health", "/metrics", "/v1/models", "/")

    answers = call(get(*paths, headers={"Host": "10.1.2.3:8188"}), hosts={"gpu.example"})

    assert [answer.status_code for answer in answers] == [200, 200, 200, 421, 421, 421]


def test_probes_do_not_say_where_files_lie(bundle):
    executor = FakeExecutor()
    executor.is_ready, executor.reason = False, "node 10.0.0.5 has no bundle in /models/secret"

    async def scenario(client, _):
        before = [await client.get(path) for path in ("/readyz", "/health")]
        executor.is_ready = True
        await client.get("/readyz")
        executor.is_ready = False
        return [*before, await client.get("/readyz")]

    settings = ServeSettings(bundles={"tiny": bundle}, drain_seconds=0.01)
    for answer in calling(settings, executor, scenario):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert not [part for part in ("10.0.0.5", "secret") if part in answer.text]


def test_names_can_be_allowed(call):
    (answer,) = call(get("/v1/models", headers={"Host": "gpu.example"}), hosts={"gpu.example"})

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost", 202),
        ("http://localhost:1234", 403),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_pages_of_other_sites_change_nothing(call, origin, status):
    async def scenario(client, _):
        return await client.post(
            "/api/jobs", json={"request": {"prompt": "red"}}, headers={"Origin": origin}
        )

    answer = call(scenario)

    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_a_large_body_is_refused_without_being_read(call):
    async def scenario(client, _):
        async def body():
            for _ in range(10**6):
                yield b"x" * 2**16
            raise AssertionError("all of it was read")

        known = await client.post(
            "/v1/images/generations",
            content=b"x",
            headers={"Content-Type": "application/json", "Content-Length": "999999999"},
        )
        streamed = await client.post(
            "/v1/images/generations",
            content=body(),
            headers={"Content-Type": "application/json"},
        )
        return known, streamed

    for answer in call(scenario):
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
        assert str(MAX_TEXT_BODY_BYTES) in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"prompt": "\\ud800"}', "application/json", 400),
        (b'{"prompt": "red", "guidance_scale": NaN}', "application/json", 400),
        (b'{"prompt": "red", "guidance_scale": 1e999}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"prompt": "red"}', "text/plain", 415),
        (b"prompt=red", "application/x-www-form-urlencoded", 415),
    ],
)
def test_malformed_bodies_are_errors_that_echo_nothing(call, body, content_type, status):
    async def scenario(client, _):
        return await client.post(
            "/v1/images/generations", content=body, headers={"Content-Type": content_type}
        )

    answer = call(scenario)

    assert answer.status_code == status
    assert is_error(answer)
    assert len(answer.content) < 500


def test_unknown_paths_and_methods_are_errors_of_the_same_form(call):
    async def scenario(client, _):
        return await client.get("/none"), await client.delete("/v1/models")

    missing, wrong = call(scenario)

    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_every_answer_has_an_identifier_and_is_kept_from_other_pages(call):
    answers = call(get("/v1/models", "/none", "/livez"))

    assert len({answer.headers["x-request-id"] for answer in answers}) == 3
    for answer in answers:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"


def test_a_key_that_calls_too_often_is_told_when_to_come_back(bundle):
    from ldm_serve.settings import Limits

    async def scenario(client, _):
        body = {"request": {"prompt": "red"}}
        return [
            await client.post("/api/jobs", json=body, headers=bearer(key))
            for key in (KEYS["alice"], KEYS["alice"], KEYS["alice"], KEYS["bob"])
        ]

    settings = ServeSettings(
        bundles={"tiny": bundle},
        access=Access(keys=KEYS),
        limits=Limits(requests_per_minute=2),
        drain_seconds=0.01,
    )
    answers = calling(settings, FakeExecutor(), scenario)

    assert [answer.status_code for answer in answers] == [202, 202, 429, 202]
    assert answers[2].headers["retry-after"] == "30"


def test_logs_hold_no_prompt_and_no_address_of_an_image(call, caplog):
    caplog.set_level("INFO", logger="ldm_serve")

    async def scenario(client, site):
        made = await client.post("/api/jobs", json={"request": {"prompt": "a secret wish"}})
        job = made.json()["id"]
        await client.post(f"/api/jobs/{job}/cancel")
        for path in (f"/api/jobs/{job}", f"/api/jobs/{job}/events", f"/files/{job}/0"):
            await client.get(path)
        for path in (f"/api/jobs/{job}", f"/elsewhere/{job}"):
            await client.put(path)
        await client.get(f"/api/jobs/{job}", headers={"Host": "evil.example"})
        return job

    job = call(scenario)

    ours = [each.getMessage() for each in caplog.records if each.name.startswith("ldm")]
    assert [each.partition(" key=")[0] for each in ours] == [
        "POST /api/jobs 202",
        "job of tiny: cancelled, images=0",
        "POST /api/jobs/{job}/cancel 200",
        "GET /api/jobs/{job} 200",
        "GET /api/jobs/{job}/events 200",
        "GET /files/{job}/{index} 404",
        "PUT /api/jobs/{job} 405",
        "PUT - 404",
        "GET - 421",
    ]
    assert not [each for each in ours if "secret" in each or job in each]


def test_other_pages_may_show_images_and_nothing_else(bundle):
    executor = FakeExecutor()

    async def scenario(client, _):
        made = await client.post("/api/jobs", json={"request": {"prompt": "red"}})
        job = made.json()["id"]
        executor.finish(job)
        paths = (f"/files/{job}/0", f"/files/{job}/1", f"/api/jobs/{job}", "/")
        return [await client.get(path) for path in paths]

    settings = ServeSettings(bundles={"tiny": bundle}, drain_seconds=0.01)
    answers = calling(settings, executor, scenario)

    assert [answer.status_code for answer in answers] == [200, 404, 200, 200]
    policies = [answer.headers["cross-origin-resource-policy"] for answer in answers]
    assert policies == ["cross-origin", "same-origin", "same-origin", "same-origin"]
