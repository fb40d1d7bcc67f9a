"""deploy/ray_serve.py, against a stand-in for the decorators of Ray Serve, which is not installed.

With Ray 2.60 itself it was run by hand: docs/deployment.md.
"""

import asyncio
import base64
import importlib.util
import io
import shutil
import sys
import types
from pathlib import Path

import httpx2
import pytest
import yaml
from PIL import Image

from ldm_runtime import Generator
from ldm_runtime.errors import RequestError

DEPLOY = Path(__file__).parents[2] / "deploy"
SOURCE = DEPLOY / "ray_serve.py"


@pytest.fixture
def own_bundle(bundle, tmp_path):
    """A copy of the tiny bundle for one test to spoil."""
    return shutil.copytree(bundle, tmp_path / "engines")


def ingress(build):
    """Do as Ray's: the class is deployed, and a replica calls the builder and has its `app`."""

    def decorated(kind):
        class Replica(kind):
            def __init__(self):
                self.app = build()

        Replica.__name__ = kind.__name__
        return Replica

    return decorated


def deployment(kind):
    kind.bind = classmethod(lambda each: each)
    return kind


@pytest.fixture
def ray_serve(monkeypatch):
    serve = types.ModuleType("ray.serve")
    serve.ingress, serve.deployment, serve.Application = ingress, deployment, object
    ray = types.ModuleType("ray")
    ray.serve = serve
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.serve", serve)
    spec = importlib.util.spec_from_file_location("ray_serve", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_replica_answers_with_the_images_of_the_generator(ray_serve, bundle):
    replica = ray_serve.application({"flags": f"tiny={bundle} --threads 1 --backend cpu"})()

    async def scenario():
        transport = httpx2.ASGITransport(app=replica.app)
        async with (
            replica.app.router.lifespan_context(replica.app),
            httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client,
        ):
            replica.check_health()  # while the model is being opened
            while (await client.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.05)
            replica.check_health()
            asked = (
                client.post("/v1/images/generations", json={"prompt": "red", "seed": seed})
                for seed in (3, 4)
            )
            return [answer.json()["data"][0]["b64_json"] for answer in await asyncio.gather(*asked)]

    answers = asyncio.run(scenario())

    with Generator(bundle, backend="onnxruntime", threads=1) as generator:
        for seed, answer in zip((3, 4), answers, strict=True):
            with Image.open(io.BytesIO(base64.b64decode(answer))) as image:
                assert image.tobytes() == generator("red", seed=seed).image.tobytes()


def test_a_replica_whose_model_cannot_be_opened_is_not_healthy(ray_serve, own_bundle):
    replica = ray_serve.application({"flags": f"{own_bundle} --threads 1 --backend cpu"})()
    (own_bundle / "unet/weights.bin").write_bytes(b"")

    async def scenario():
        async with replica.app.router.lifespan_context(replica.app):
            while True:
                replica.check_health()
                await asyncio.sleep(0.02)

    with pytest.raises(RuntimeError, match=r"weights\.bin has 0 bytes"):
        asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize("key", [None, "k" * 22])
def test_others_are_answered_only_with_a_key(key, ray_serve, bundle, monkeypatch):
    monkeypatch.delenv("LDM_SERVE_KEYS", raising=False)
    flags = {"flags": f"{bundle} --host 0.0.0.0"}

    if key is None:
        with pytest.raises(RequestError, match=r"0\.0\.0\.0 can be reached by others"):
            ray_serve.application(flags)
    else:
        monkeypatch.setenv("LDM_SERVE_KEYS", key)
        assert ray_serve.application(flags)


def test_kuberay_deploys_what_there_is(ray_serve, bundle):
    service = next(yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    (deployed,) = application["deployments"]
    module, _, name = application["import_path"].partition(":")

    assert module == SOURCE.stem
    build = getattr(ray_serve, name)
    assert build({**application["args"], "flags": str(bundle)}).__name__ == deployed["name"]


def test_it_is_short():
    assert len(SOURCE.read_text().splitlines()) <= 60
