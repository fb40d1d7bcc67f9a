"""Metrics in the format of Prometheus: Triton's meanings, in seconds; never a prompt."""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from ldm_serve.executors.contract import ExecutorStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one server.

    Args:
        queue_depth: Returns how many requests wait.
        stats: Returns the state of the executor.
    """

    def __init__(self, queue_depth: Callable[[], int], stats: Callable[[], ExecutorStats]) -> None:
        self._registry = CollectorRegistry()
        self._stats = stats
        self._requests = Counter(
            "ldm_requests",
            "Requests by their end.",
            ["model", "outcome"],
            registry=self._registry,
        )
        self._images = Counter(
            "ldm_images", "Generated images.", ["model"], registry=self._registry
        )
        self._queue_seconds = Histogram(
            "ldm_queue_seconds",
            "Time from the arrival of a request to its start.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._request_seconds = Histogram(
            "ldm_request_seconds",
            "Time from the arrival of a request to its images.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._stage_seconds = Histogram(
            "ldm_stage_seconds",
            "Time of a request in each network, waiting for others in shared calls included.",
            ["model", "stage"],  # codespell:ignore
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._step_seconds = Histogram(
            "ldm_step_seconds",
            "Time of a step of an image, waiting for others in turn included.",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batches = Counter(
            "ldm_batches", "Calls of the UNet.", ["model"], registry=self._registry
        )
        self._batch_images = Counter(
            "ldm_batch_images",
            "Images in calls of the UNet, each as often as it was in one.",
            ["model"],
            registry=self._registry,
        )
        self._model_info = Gauge(
            "ldm_model_info",
            "The models, with the hashes of their bundles' manifests.",
            ["model", "bundle_sha256"],
            registry=self._registry,
        )
        self._inflight = Gauge(
            "ldm_inflight", "Requests that are being generated.", registry=self._registry
        )
        depth = Gauge("ldm_queue_depth", "Requests that wait.", registry=self._registry)
        depth.set_function(queue_depth)
        self._registry.register(_ExecutorMetrics(stats))

    def serves(self, model: str, bundle_sha256: str) -> None:
        """Note a model of the server."""
        self._model_info.labels(model, bundle_sha256).set(1)

    def stepped(self, model: str, seconds: float) -> None:
        """Count a step of an image."""
        self._step_seconds.labels(model).observe(seconds)

    def refused(self, model: str, outcome: str) -> None:
        """Count a request that was not taken: "invalid" or "rejected"."""
        self._requests.labels(model, outcome).inc()

    def began(self, queue_seconds: float) -> None:
        """Count a request that a worker takes."""
        self._inflight.inc()
        self._queue_seconds.observe(queue_seconds)

    def ended(self, model: str, outcome: str, *, began: bool) -> None:
        """Count the end of a request: "ok", "failed", "cancelled" or "timeout"."""
        self._requests.labels(model, outcome).inc()
        if began:
            self._inflight.dec()

    def generated(
        self, model: str, images: int, seconds: float, timings: Mapping[str, float]
    ) -> None:
        """Count the images of a request, and its times."""
        self._images.labels(model).inc(images)
        self._request_seconds.labels(model).observe(seconds)
        for network, spent in timings.items():
            if network != "total":
                self._stage_seconds.labels(model, network).observe(spent)

    def called(self, model: str, calls: int, images: int) -> None:
        """Count calls of the UNet, and the images in them."""
        self._batches.labels(model).inc(calls)
        self._batch_images.labels(model).inc(images)

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)


class _ExecutorMetrics:
    """Metrics that are read from the executor when they are asked for."""

    def __init__(self, stats: Callable[[], ExecutorStats]) -> None:
        self._stats = stats

    def collect(self) -> list[GaugeMetricFamily]:
        stats = self._stats()
        workers = GaugeMetricFamily("ldm_workers", "Worker processes that live.", stats.workers)
        restarts = GaugeMetricFamily(
            "ldm_worker_restarts_total", "Workers that were replaced.", stats.restarts
        )
        info = GaugeMetricFamily(
            "ldm_engine_info", "How networks are run.", labels=["backend", "precision"]
        )
        info.add_metric([stats.backend, stats.precision], 1)
        return [workers, restarts, info]
