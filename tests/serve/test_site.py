"""What a server does with a request before it waits: in which order, at which cost, and counted."""

import asyncio
import io
import re
import time

import pytest
from PIL import Image

from ldm_serve.settings import Limits, ServeSettings
from ldm_serve.site import CHECKS_AT_ONCE
from tests.serve.asgi import calling
from tests.serve.fake_executor import FakeExecutor

#: Calls whose image or mask cannot be decoded, which is an error of its own.
UNREADABLE = {
    "/api/jobs": {
        "json": {"request": {"prompt": "red", "image": "data:image/png;base64,AAAA"}},
    },
    "/v1/images/edits": {
        "files": {
            "prompt": (None, "red"),
            "image": ("a.png", b"no image"),
            "mask": ("m.png", b"no image"),
        }
    },
    "/sdapi/v1/img2img": {
        "json": {"prompt": "red", "init_images": ["AAAA"], "mask": "AAAA"},
    },
    "/sdapi/v1/png-info": {"json": {"image": "AAAA"}},
}
GENERATING = [path for path in UNREADABLE if not path.endswith("png-info")]


@pytest.fixture
def call(bundle):
    """Runs a scenario with a client of a server with some limits."""

    def call(scenario, executor=None, **limits):
        settings = ServeSettings(
            bundles={"tiny": bundle}, limits=Limits(**limits), drain_seconds=0.01
        )
        return calling(settings, executor or FakeExecutor(), scenario)

    return call


def code(answer):
    return answer.status_code, answer.json()["error"]["code"]


def requests_by_outcome(text):
    found = re.findall(r'ldm_requests_total\{model="(\w+)",outcome="(\w+)"\} (\d+)\.0', text)
    return {(model, outcome): int(count) for model, outcome, count in found}


@pytest.mark.parametrize("path", UNREADABLE)
def test_a_key_that_calls_too_often_has_nothing_decoded(call, path):
    async def scenario(client, _):
        return [await client.post(path, **UNREADABLE[path]) for _ in range(2)]

    first, second = call(scenario, requests_per_minute=1)

    assert code(first) == (400, "invalid_value")
    assert code(second) == (429, "rate_limit_exceeded")


@pytest.mark.parametrize("path", GENERATING)
def test_nothing_is_decoded_for_a_key_that_has_its_share_of_the_queue(call, path):
    async def scenario(client, _):
        await client.post("/api/jobs", json={"request": {"prompt": "red"}})
        return await client.post(path, **UNREADABLE[path])

    assert code(call(scenario, max_queue_per_key=1)) == (429, "queue_full")


@pytest.mark.parametrize("path", GENERATING)
def test_nothing_is_decoded_before_the_server_is_ready(call, path):
    executor = FakeExecutor()
    executor.is_ready = False

    async def scenario(client, _):
        return await client.post(path, **UNREADABLE[path])

    assert code(call(scenario, executor)) == (503, "not_ready")


def test_few_requests_are_checked_at_once(call):
    running, most = 0, 0

    def decode():
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.01)
        running -= 1

    async def scenario(_, site):
        await asyncio.gather(*(site.check(decode) for _ in range(4 * CHECKS_AT_ONCE)))

    call(scenario)

    assert most == CHECKS_AT_ONCE


def test_requests_that_are_checked_count_among_those_of_their_key(call):
    """Or one that sends many at once would have them all decoded before the first is queued."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, format="PNG")
    files = {"prompt": (None, "red"), "image": ("a.png", file.getvalue())}

    async def scenario(client, site):
        async with site.checks, site.checks:  # others take all places
            calls = [
                asyncio.ensure_future(client.post("/v1/images/edits", files=files))
                for _ in range(3)
            ]
            done, waiting = await asyncio.wait(calls, timeout=5, return_when="FIRST_COMPLETED")
            assert len(waiting) == 2
        for job in site.board.jobs_of("anyone"):
            site.board.cancel(job)
        for each in waiting:
            each.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return done.pop().result()

    assert code(call(scenario, max_queue_per_key=2)) == (429, "queue_full")


JSON = {"Content-Type": "application/json"}
#: Calls that are refused before a model is chosen.
REFUSED = [
    ("/api/jobs", {"content": b"{", "headers": JSON}),
    ("/api/jobs", {"json": {"request": {}, "unknown": 1}}),
    ("/api/jobs", {"json": {"request": {}, "output_compression": 5}}),
    ("/api/jobs", {"json": {"request": {}, "model": "other"}}),
    ("/v1/images/generations", {"content": b"prompt", "headers": {"Content-Type": "text/plain"}}),
    ("/v1/images/generations", {"json": {"prompt": "red", "quality": "high"}}),
    ("/v1/images/generations", {"json": {"prompt": "red", "size": "16x"}}),
    ("/v1/images/edits", {"content": b"{", "headers": JSON}),
    ("/v1/images/edits", {"files": {"prompt": (None, "red")}}),
    ("/sdapi/v1/txt2img", {"json": {"prompt": "red", "tiling": True}}),
    ("/sdapi/v1/txt2img", {"json": {"prompt": "<lora:>"}}),
    ("/sdapi/v1/img2img", {"json": {"mask_blur": 99}}),
]


@pytest.mark.parametrize(("path", "body"), REFUSED)
def test_every_request_that_is_wrong_is_counted_once(call, path, body):
    async def scenario(client, _):
        answer = await client.post(path, **body)
        return answer, (await client.get("/metrics")).text

    answer, text = call(scenario)

    assert answer.status_code in (400, 404, 415), answer.text
    assert requests_by_outcome(text) == {("unknown", "invalid"): 1}


def test_what_a_model_cannot_do_counts_as_its_own_and_other_routes_do_not(call):
    async def scenario(client, _):
        await client.post("/api/jobs", json={"request": {"prompt": "red", "width": 17}})
        await client.post("/sdapi/v1/png-info", json={"image": "AAAA"})
        await client.get("/api/jobs/none")
        return (await client.get("/metrics")).text

    assert requests_by_outcome(call(scenario)) == {("tiny", "invalid"): 1}


def test_a_job_that_fails_is_counted_by_its_end_alone(call):
    executor = FakeExecutor()

    async def scenario(client, site):
        body = {"prompt": "red"}
        asking = asyncio.ensure_future(client.post("/v1/images/generations", json=body))
        while not executor.works:
            await asyncio.sleep(0.001)
        executor.fail(next(iter(executor.works)))
        await asking
        return (await client.get("/metrics")).text

    assert requests_by_outcome(call(scenario, executor)) == {("tiny", "failed"): 1}
