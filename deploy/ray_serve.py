"""The server of `ldm serve` as an application of Ray Serve, whose replicas each hold the models.

    cd deploy && serve run ray_serve:application flags="engines=/bundle --max-batch 8"

A replica is the whole server: its requests share calls of the UNet, and keys, limits and metrics
are its own. It alone knows its jobs and the addresses of their images, so that those take one
replica; `POST /v1/images/generations` with `b64_json` takes any number. The requests of a replica
that dies are answered with 500, and OpenAI's client asks again.
"""

import os
import shlex

from ray import serve
from ray.serve import Application
from starlette.applications import Starlette

from ldm_runtime.cli.commands import build_parser
from ldm_serve.app import create_app
from ldm_serve.cli import settings_of
from ldm_serve.executors.inline import InlineExecutor
from ldm_serve.settings import ServeSettings
from ldm_serve.tracing import open_tracing


def application(args: dict[str, str]) -> Application:
    """Return the application.

    Args:
        args: `flags` are those of `ldm serve`. Ray listens and starts processes, so that those of
            address and workers do nothing but one: without `--host 0.0.0.0`, which takes keys in
            LDM_SERVE_KEYS, requests are answered that name this machine alone.

    Raises:
        RequestError: A flag is wrong, or there is no key.
    """
    flags = args["flags"]
    _settings(flags)  # here too, so that a wrong flag ends the deployment and not every replica

    def app() -> Starlette:
        settings = _settings(flags)  # keys are in the environment of each, and not sent around
        executor = InlineExecutor(settings.bundles, settings.engine)
        return create_app(settings, executor, open_tracing(os.environ))

    @serve.deployment
    @serve.ingress(app)
    class Images:
        def check_health(self) -> None:
            """Let Ray replace a replica whose model cannot be opened, or whose worker has ended."""
            stats = self.app.state.site.board.stats()
            if not stats.is_ready and stats.reason != "the model is being opened":
                raise RuntimeError(stats.reason)

    return Images.bind()


def _settings(flags: str) -> ServeSettings:
    return settings_of(build_parser().parse_args(["serve", *shlex.split(flags)]), os.environ)
