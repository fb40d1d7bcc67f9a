"""Spans of a server, as OpenTelemetry's SDK gets them; names against its semantic conventions."""

import asyncio
import subprocess
import sys
import threading
import time

import httpx2
import pytest

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes, http_attributes, url_attributes
from opentelemetry.trace import SpanKind, StatusCode

from ldm_runtime.cli.commands import main
from ldm_runtime.errors import RequestError
from ldm_serve.app import create_app
from ldm_serve.executors.inline import InlineExecutor
from ldm_serve.server import Server
from ldm_serve.settings import Access, EngineSettings, ServeSettings
from ldm_serve.tracing import ENDPOINTS, Tracing, open_tracing
from tests.serve.asgi import calling
from tests.serve.fake_executor import FakeExecutor

PROMPT = "red_is_a_secret_of_the_client"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEY = "k" * 22


class Traced:
    """A server in this process, on a Unix domain socket, and the spans that it made."""

    def __init__(self, bundle, folder, access=None):
        self._exporter, provider = InMemorySpanExporter(), TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        settings = ServeSettings(
            bundles={"tiny": bundle},
            engine=EngineSettings(backend="onnxruntime", threads=1),
            access=access or Access(),
        )
        executor = InlineExecutor(settings.bundles, settings.engine)
        self._app = create_app(settings, executor, Tracing(provider))
        self._socket = folder / "s"
        self._server = Server(self._app, settings, host="", port=0, uds=self._socket)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))

    def __enter__(self):
        self._thread.start()
        transport = httpx2.HTTPTransport(uds=str(self._socket))
        self.client = httpx2.Client(transport=transport, base_url="http://localhost")
        end = time.monotonic() + 60
        while not self._socket.exists() or self.client.get("/readyz").status_code != 200:
            assert self._thread.is_alive()
            assert time.monotonic() < end
            time.sleep(0.02)
        return self

    def __exit__(self, *_):
        self.client.close()
        self._server.should_exit = True
        self._thread.join()

    def generate(self, **more):
        body = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 2, **more.pop("body", {})}
        return self.client.post("/v1/images/generations", json=body, **more)

    def spans(self, count):
        """Return the spans once there are that many: they end after the answer was sent."""
        end = time.monotonic() + 10
        while len(self._exporter.get_finished_spans()) < count and time.monotonic() < end:
            time.sleep(0.01)
        found = self._exporter.get_finished_spans()
        assert len(found) == count, [span.name for span in found]
        return {span.name: span for span in found}


@pytest.fixture
def traced(bundle, tmp_path):
    with Traced(bundle, tmp_path) as server:
        yield server


def test_a_call_has_a_span_below_its_client_s_and_its_generation_one_below_that(traced):
    traceparent = f"00-{TRACE}-{PARENT}-01"

    assert traced.generate(headers={"traceparent": traceparent}).status_code == 200

    spans = traced.spans(2)
    call, generation = spans["POST /v1/images/generations"], spans["generate_content tiny"]
    assert f"{call.context.trace_id:032x}" == f"{generation.context.trace_id:032x}" == TRACE
    assert f"{call.parent.span_id:016x}" == PARENT
    assert generation.parent.span_id == call.context.span_id
    assert (call.kind, generation.kind) == (SpanKind.SERVER, SpanKind.INTERNAL)
    assert dict(call.attributes) == {
        http_attributes.HTTP_REQUEST_METHOD: "POST",
        http_attributes.HTTP_ROUTE: "/v1/images/generations",
        http_attributes.HTTP_RESPONSE_STATUS_CODE: 200,
        url_attributes.URL_SCHEME: "http",
        url_attributes.URL_PATH: "/v1/images/generations",
    }
    operation = gen_ai_attributes.GenAiOperationNameValues.GENERATE_CONTENT.value
    assert dict(generation.attributes) == {
        gen_ai_attributes.GEN_AI_OPERATION_NAME: operation,
        gen_ai_attributes.GEN_AI_PROVIDER_NAME: "ldm-deploy",
        gen_ai_attributes.GEN_AI_REQUEST_MODEL: "tiny",
        gen_ai_attributes.GEN_AI_OUTPUT_TYPE: gen_ai_attributes.GenAiOutputTypeValues.IMAGE.value,
        gen_ai_attributes.GEN_AI_REQUEST_CHOICE_COUNT: 1,
        gen_ai_attributes.GEN_AI_REQUEST_SEED: 7,
    }
    (taken,) = generation.events
    assert call.start_time <= generation.start_time <= taken.timestamp <= generation.end_time


def test_no_span_has_a_prompt_a_job_or_a_key(bundle, tmp_path):
    with Traced(bundle, tmp_path, Access(keys={"alice": KEY}, hosts=frozenset())) as server:
        key = {"Authorization": f"Bearer {KEY}"}
        url = server.generate(headers=key, body={"response_format": "url"}).json()["data"][0]["url"]
        assert server.client.get(url).status_code == 200
        assert server.generate(headers={"Authorization": "Bearer wrong"}).status_code == 401

        spans = server.spans(4)
    text = "".join(span.to_json() for span in spans.values())
    job = url.split("/")[-2]
    assert "/files/{job}/{index}" in text
    for secret in (PROMPT, job, KEY, "alice", "wrong"):
        assert secret not in text


def test_probes_and_metrics_have_no_spans_and_unknown_paths_and_methods_no_names(traced):
    for path in ("/livez", "/readyz", "/metrics", "/none"):
        traced.client.get(path)
    traced.client.request("BREW", "/none")

    spans = traced.spans(2)

    assert spans.keys() == {"GET", "HTTP"}
    assert spans["HTTP"].attributes["http.request.method"] == "_OTHER"
    assert spans["GET"].attributes["http.response.status_code"] == 404


def test_a_wrong_call_is_not_the_server_s_error_and_makes_no_generation(traced):
    assert traced.generate(body={"num_inference_steps": 0}).status_code == 400

    (span,) = traced.spans(1).values()
    assert span.status.status_code is StatusCode.UNSET
    assert error_attributes.ERROR_TYPE not in span.attributes


def calls_of_a_fake(scenario, bundle):
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    settings = ServeSettings(bundles={"tiny": bundle})
    calling(settings, FakeExecutor(), scenario, Tracing(provider))
    return {span.name: span for span in exporter.get_finished_spans()}


def test_a_failure_is_an_error_of_both_spans_with_its_code(bundle):
    async def scenario(client, site):
        asked = asyncio.create_task(
            client.post("/v1/images/generations", json={"prompt": PROMPT, "seed": 2**64 - 1})
        )
        executor = site.board._executor
        while not executor.works:
            await asyncio.sleep(0.01)
        executor.fail(next(iter(executor.works)))
        assert (await asked).status_code == 500

    spans = calls_of_a_fake(scenario, bundle)

    call, generation = spans["POST /v1/images/generations"], spans["generate_content tiny"]
    assert generation.attributes[error_attributes.ERROR_TYPE] == "worker_crash"
    assert call.attributes[error_attributes.ERROR_TYPE] == "500"
    assert {call.status.status_code, generation.status.status_code} == {StatusCode.ERROR}
    assert "gen_ai.request.seed" not in generation.attributes  # does not fit an attribute


def test_a_job_that_is_cancelled_ends_its_span_after_the_call_that_brought_it(bundle):
    async def scenario(client, site):
        created = await client.post("/api/jobs", json={"request": {"prompt": PROMPT}})
        await client.post(f"/api/jobs/{created.json()['id']}/cancel")

    spans = calls_of_a_fake(scenario, bundle)

    call, generation = spans["POST /api/jobs"], spans["generate_content tiny"]
    assert generation.parent.span_id == call.context.span_id
    assert generation.end_time > call.end_time
    assert generation.attributes[error_attributes.ERROR_TYPE] == "cancelled"
    assert generation.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_SERVICE_NAME": "images"},
        {ENDPOINTS[1]: "http://localhost:4318", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINTS[1]: "http://localhost:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_traces_are_off_unless_there_is_a_place_to_send_them_to(environment):
    assert open_tracing(environment) is None


@pytest.mark.parametrize("variable", ENDPOINTS)
def test_they_are_sent_to_the_place_of_the_environment(variable, monkeypatch):
    monkeypatch.setenv(variable, "http://collector.example:4318/v1/traces")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")

    tracing = open_tracing({variable: "http://collector.example:4318/v1/traces"})

    resource = tracing._provider.resource.attributes
    assert resource["service.name"] == "ldm-serve"
    assert resource["deployment.environment.name"] == "test"
    asyncio.run(tracing.close())


def test_the_environment_names_the_service(monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "images")

    tracing = open_tracing({ENDPOINTS[1]: "http://localhost:4318", "OTEL_SERVICE_NAME": "images"})

    assert tracing._provider.resource.attributes["service.name"] == "images"
    asyncio.run(tracing.close())


def test_another_protocol_is_refused():
    environment = {ENDPOINTS[1]: "http://localhost:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}

    with pytest.raises(RequestError, match="'grpc'; this server sends http/protobuf"):
        open_tracing(environment)


def test_without_the_extra_the_command_says_what_to_install(bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(ENDPOINTS[1], "http://localhost:4318")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    assert main(["serve", str(bundle), "--uds", str(tmp_path / "s")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: OTEL_EXPORTER_OTLP_ENDPOINT: traces need the package ")
    assert "install the extra 'otel' of ldm-deploy, or unset the variable" in message
    assert message.count("\n") == 1


def test_nothing_of_it_is_imported_when_it_is_off():
    code = (
        "import sys, ldm_serve.app, ldm_serve.server; from ldm_serve.tracing import open_tracing;"
        "assert open_tracing({}) is None;"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
