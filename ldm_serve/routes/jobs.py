"""The native interface: a job per request, with progress, previews, cancellation and images."""

import base64
from collections.abc import AsyncIterator
from typing import Annotated, Any, get_args

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ldm_runtime.requests.schema import request_schema
from ldm_serve.adapters import AdapterChoices
from ldm_serve.answers import events_answer, json_answer, read_json
from ldm_serve.board import Wish
from ldm_serve.errors import ServeError, invalid
from ldm_serve.executors.messages import ImageFormat, Quality
from ldm_serve.intake import cost
from ldm_serve.jobs import Job
from ldm_serve.site import Site, Submission


class NewJob(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of `POST /api/jobs`.

    Attributes:
        request: Fields of a `GenerationRequest`; images and maps are `data:` URLs.
        model: Name of the model; None is the server's default.
        adapters: Adapters of the model, unless its name has them.
        output_format: Format of the images.
        output_compression: Quality of JPEG and of lossy WebP, 0 to 100.
        previews: Whether steps have a preview.
        deadline_seconds: How long the job may take, its wait included.
    """

    request: dict[str, Any]
    model: str | None = None
    adapters: AdapterChoices | None = None
    output_format: ImageFormat = "png"
    output_compression: Quality | None = None
    previews: bool = False
    deadline_seconds: Annotated[float, msgspec.Meta(gt=0)] | None = None


class JobRoutes:
    """The routes below `/api`, and `/files`, where images are.

    Args:
        site: The server.
    """

    def __init__(self, site: Site) -> None:
        self._site, self._board = site, site.board

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/api/models", self.models),
            Route("/api/capabilities", self.capabilities),
            Route("/api/jobs", self._site.counted(self.create), methods=["POST"]),
            Route("/api/jobs", self.listed),
            Route("/api/jobs/{job}", self.one),
            Route("/api/jobs/{job}/cancel", self.cancel, methods=["POST"]),
            Route("/api/jobs/{job}/events", self.events),
            Route("/files/{job}/{index}", self.image),
        ]

    async def models(self, _: Request) -> Response:
        """Answer with what each model needs and takes."""
        models = [each.description() for each in self._site.models.values()]
        return json_answer({"models": models})

    async def capabilities(self, _: Request) -> Response:
        """Answer with the limits, and the JSON schema of a request."""
        stats = self._board.stats()
        return json_answer(
            {
                "limits": self._site.settings.limits,
                "engine": {"backend": stats.backend, "precision": stats.precision},
                "output_formats": get_args(ImageFormat),
                "request_schema": request_schema(),
            }
        )

    async def create(self, request: Request) -> Response:
        """Queue a request, and answer with its job."""
        new = await read_json(request, NewJob)
        wish = Wish(
            format=new.output_format,
            quality=quality_of(new.output_format, new.output_compression),
            previews=new.previews,
            needs_previews=new.previews,
            deadline_seconds=new.deadline_seconds,
        )
        submission = Submission(
            fields=new.request, wish=wish, model=new.model, adapters=new.adapters
        )
        job = await self._site.submit(request, submission)
        answer = json_answer(self._described(job), 202)
        answer.headers["Location"] = f"/api/jobs/{job.id}"
        return answer

    async def listed(self, request: Request) -> Response:
        """Answer with the jobs of the key that are not over."""
        jobs = self._board.jobs_of(request.state.key)
        return json_answer({"jobs": [self._described(job) for job in jobs]})

    async def one(self, request: Request) -> Response:
        """Answer with the state of a job."""
        return json_answer(self._described(self._found(request)))

    async def cancel(self, request: Request) -> Response:
        """Cancel a job, and answer with it."""
        job = self._found(request)
        if job.is_over and job.state != "cancelled":
            raise ServeError(409, "job_over", f"the job has {job.state}", should_retry=False)
        self._board.cancel(job)
        return json_answer(self._described(job))

    async def events(self, request: Request) -> Response:
        """Answer with an event now and after every change of a job."""
        job = self._found(request)

        async def states() -> AsyncIterator[tuple[str, Any]]:
            shown: bytes | None = None
            async for _ in job.changes():
                state = self._described(job)
                if job.preview is not None and job.preview is not shown:
                    state["preview"] = data_url(job.preview, "png")
                    shown = job.preview
                yield job.state, state

        return events_answer(states())

    async def image(self, request: Request) -> Response:
        """Answer with an image; the identifier of its job is all that it takes."""
        job = self._board.find(None, request.path_params["job"])
        images = [] if job.result is None else job.result.images
        # Compared as text: Python does not read every number that a path may hold.
        wanted = request.path_params["index"]
        found = [index for index in range(len(images)) if str(index) == wanted]
        if not found:
            raise ServeError(404, "image_not_found", "there is no such image")
        job.unfetched.difference_update(found)
        # Pages that are given an address show the image, whatever their site is.
        headers = {"Cross-Origin-Resource-Policy": "cross-origin"}
        return Response(images[found[0]], headers=headers, media_type=f"image/{job.work.format}")

    def _found(self, request: Request) -> Job:
        return self._board.find(request.state.key, request.path_params["job"])

    def _described(self, job: Job) -> dict[str, Any]:
        return job_json(job, self._board.position(job))


def job_json(job: Job, position: int | None) -> dict[str, Any]:
    """Return a job as the native interface has it.

    Args:
        job: The job.
        position: How many others are begun before it, if it waits.
    """
    request, result = job.checked.request, job.result
    images = [] if result is None else list(zip(result.seeds, result.metadata, strict=True))
    return {
        "id": job.id,
        "model": job.checked.model.name,
        "adapters": adapters_json(job),
        "state": job.state,
        "queue_position": position,
        "progress": round(job.progress, 4),
        "steps": [job.steps.get(index, 0) for index in range(request.num_images)],
        "total_steps": job.total,
        "cost": round(cost(request), 6),
        "seed": request.seed,
        "width": request.width,
        "height": request.height,
        "images": [
            {"url": f"/files/{job.id}/{index}", "seed": seed, "metadata": metadata}
            for index, (seed, metadata) in enumerate(images)
        ],
        "timings": {} if result is None else result.timings,
        "error": None if job.error is None else job.error.body["error"],
    }


def adapters_json(job: Job) -> list[dict[str, Any]]:
    """Return the adapters of a job as requests have them."""
    return [{"name": each.name, "scale": each.scale} for each in job.checked.model.uses]


def quality_of(image_format: ImageFormat, compression: int | None) -> int | None:
    """Return the quality of images of a format that clients ask for.

    A PNG has none, and 100 is OpenAI's default, which asks a PNG for nothing.

    Raises:
        ServeError: They ask a PNG for another.
    """
    if image_format != "png":
        return compression
    if compression not in (None, 100):
        message = "output_compression: PNG keeps every pixel; leave it out, or send 100"
        raise invalid("output_compression", message)
    return None


def data_url(data: bytes, image_format: ImageFormat) -> str:
    """Return a `data:` URL of an image."""
    return f"data:image/{image_format};base64,{base64.b64encode(data).decode()}"
