"""Fixtures of the page's tests: Debian's Chromium, and a server of tiny bundles on the loopback."""

import asyncio
import shutil
import threading
import time
from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("starlette", reason="needs the extra serve")

from ldm_runtime.bundle.manifest import MANIFEST_NAME, encode_manifest
from ldm_runtime.testing import write_tiny_bundle
from ldm_serve.app import create_app
from ldm_serve.executors.inline import InlineExecutor
from ldm_serve.server import Server
from ldm_serve.settings import Access, EngineSettings, ServeSettings

#: Tasks with a part of the page to themselves; the first is what the page opens with.
TASKS = ("text-to-image", "text-inpainting", "layout-to-image", "semantic-synthesis")
NAMES = ("sky", "grass", "water", "sand", "stone", "snow")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
SECONDS = 20


@pytest.fixture(scope="session")
def bundles(tmp_path_factory):
    """Folders of tiny bundles by task; classes of maps and layouts have names."""
    folder = tmp_path_factory.mktemp("bundles")
    for task in TASKS:
        manifest = write_tiny_bundle(folder / task, task)
        if task in ("layout-to-image", "semantic-synthesis"):
            named = replace(manifest, spec=replace(manifest.spec, label_names=NAMES))
            (folder / task / MANIFEST_NAME).write_bytes(encode_manifest(named))
    return {task: folder / task for task in TASKS}


@contextmanager
def serving(bundles, keys=None, adapters=None):
    """Serve bundles from a thread until the end of the block; yields the address of the page."""
    engine = EngineSettings(backend="onnxruntime", threads=1, adapters=adapters or {})
    settings = ServeSettings(
        bundles=bundles, engine=engine, access=Access(keys=keys or {}), drain_seconds=0.1
    )
    app = create_app(settings, InlineExecutor(bundles, engine))
    server = Server(app, settings, host="127.0.0.1", port=0, uds=None)
    thread = threading.Thread(target=server.run, name="page-server")
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(30)


def wait_for(is_true, seconds=SECONDS):
    """Wait until a function returns something true, and return that."""
    end = time.monotonic() + seconds
    while not (value := is_true()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="session")
def address(bundles):
    """The address of a server of all the bundles."""
    with serving(bundles) as address:
        yield address


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, with a profile that is thrown away."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail(
            "Chromium is not installed; the page's tests need it: apt-get install chromium",
            pytrace=False,
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()
    asyncio.set_event_loop(None)


@pytest.fixture
def new_page(browser, address):
    """A function that opens the page; it must report no error and ask no other server."""
    faults, contexts, own = [], [], ["blob:", "data:", address]

    def note(message):
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            faults.append(message.text)

    def asked(request):
        if not request.url.startswith(tuple(own)):
            faults.append(request.url)

    def opened(url=address, *, width=1280, scheme="light"):
        context = browser.new_context(
            base_url=url,
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
        )
        context.set_default_timeout(SECONDS * 1000)
        contexts.append(context)
        own.append(url)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", asked)
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def page(new_page):
    """The page in a wide window, once it knows its models."""
    page = new_page()
    page.get_by_role("combobox", name="Model").wait_for()
    return page
