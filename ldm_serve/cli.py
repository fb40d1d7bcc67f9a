"""`ldm serve`: its flags, and what they refuse before anything is opened."""

import argparse
import dataclasses
import ipaddress
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from ldm_runtime.cli.parsing import Parser, positive
from ldm_runtime.errors import RequestError
from ldm_serve.engine_flags import (
    add_engine_arguments,
    add_worker_arguments,
    amount,
    engine_settings,
    worker_settings,
)
from ldm_serve.settings import Access, Limits, LogFormat, LogSettings, ServeSettings

#: Environment variable with a key, or several with their names: `name:key,name:key`.
KEYS_VARIABLE = "LDM_SERVE_KEYS"
#: Shortest key: 128 bits as text.
_MIN_KEY = 22
_DEFAULT_PORT = 8188
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


def add_serve_command(commands: "argparse._SubParsersAction[Parser]") -> None:
    """Add `ldm serve` to the commands of `ldm`; an entry point of `ldm_runtime.commands`."""
    parser = commands.add_parser("serve", help="answer requests for images over HTTP")
    parser.add_argument(
        "bundles",
        nargs="*",
        default=["engines"],
        metavar="[NAME=]FOLDER",
        help="bundles made by ldm-export; the first is the default model, and a model is called "
        "like its folder unless named (default: engines)",
    )
    _add_listening(parser.add_argument_group("Address"))
    _add_work(parser)
    _add_limits(parser.add_argument_group("Limits"))
    add_engine_arguments(parser)
    parser.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        default="text",
        help="format of the messages on stderr: text, or a line of JSON for every call, the end of "
        "every job and all else; neither has prompts (default: text)",
    )
    parser.set_defaults(run=serve, repeats_messages=True)


def serve(args: argparse.Namespace) -> int:
    """Run `ldm serve`, until a signal ends it.

    Raises:
        RequestError: A flag is wrong, or the address is open to others and there is no key.
        BundleError: A folder is not a bundle.
        ClusterError: No Ray cluster answers at the address.
    """
    settings = settings_of(args, os.environ)
    # Only here, so that `ldm --help` works without the extra.
    from ldm_serve.app import create_app
    from ldm_serve.logs import show_logs
    from ldm_serve.server import Server
    from ldm_serve.tracing import open_tracing

    show_logs(settings.workers.logs, "server")
    app = create_app(settings, tracing=open_tracing(os.environ))
    server = Server(app, settings, host=args.host, port=args.port, uds=args.uds)
    server.run()
    return 0 if server.started else 1


def settings_of(args: argparse.Namespace, environment: Mapping[str, str]) -> ServeSettings:
    """Return the settings that a command line asks for.

    Raises:
        RequestError: See `serve`.
    """
    keys = _keys(environment.get(KEYS_VARIABLE, ""))
    is_local = args.uds is not None or is_loopback(args.host)
    if not is_local and not keys and not args.insecure:
        raise RequestError(
            "host",
            f"{args.host} can be reached by others: set {KEYS_VARIABLE} to a secret of at least "
            f"{_MIN_KEY} characters, or say --insecure",
        )
    hosts = frozenset(each.lower() for each in args.allow_host)
    budget = args.memory_budget_gb
    return ServeSettings(
        bundles=_bundles(args.bundles),
        engine=engine_settings(args, None if budget is None else int(budget * 1e9)),
        limits=Limits(
            max_images=args.max_images,
            max_pixels=args.max_pixels,
            max_steps=args.max_steps,
            max_cost=args.max_cost,
            max_queue=args.max_queue,
            max_queue_per_key=args.max_queue_per_key,
            requests_per_minute=args.requests_per_minute,
        ),
        access=Access(keys=keys, hosts=(hosts | _LOOPBACK) if hosts or is_local else frozenset()),
        workers=dataclasses.replace(worker_settings(args), logs=_logs(args)),
        drain_seconds=args.drain_seconds,
    )


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _add_listening(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help=f"address to listen on; any but this machine's own takes {KEYS_VARIABLE} "
        "(default: 127.0.0.1)",
    )
    group.add_argument(
        "--port",
        type=int,
        default=_DEFAULT_PORT,
        help=f"port; 0 takes a free one (default: {_DEFAULT_PORT})",
    )
    group.add_argument(
        "--uds",
        type=Path,
        metavar="PATH",
        help="Unix domain socket to listen on instead, which is this machine's own",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name that clients may call this server by, as in the Host header; may be repeated",
    )
    group.add_argument(
        "--insecure", action="store_true", help="let anyone who reaches the address use it"
    )


def _logs(args: argparse.Namespace) -> LogSettings:
    """Return what is said on stderr: in JSON, every call and the end of every job."""
    level = logging.ERROR if args.quiet else logging.WARNING
    says_more = args.verbose or (args.log_format == "json" and not args.quiet)
    return LogSettings(
        format=args.log_format,
        level=level,
        own_level=logging.INFO if says_more else level,
        leaves_out_requests=True,
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = add_worker_arguments(parser)
    group.add_argument(
        "--memory-budget-gb",
        type=amount,
        metavar="GB",
        help="most weights that a worker holds open, in 10^9 bytes; idle models are closed for "
        "others (default: no limit)",
    )
    group.add_argument(
        "--drain-seconds",
        type=amount,
        default=30.0,
        metavar="S",
        help="how long requests may go on after SIGTERM (default: 30)",
    )


def _add_limits(group: argparse._ArgumentGroup) -> None:
    limits = Limits()
    wholes = {
        "max_images": "most images of a request",
        "max_pixels": "most pixels of an image",
        "max_steps": "most steps of an image",
        "max_queue": "most requests that wait",
        "max_queue_per_key": "most requests of a key that wait or run",
    }
    amounts = {
        "max_cost": "most megapixel steps of a request: pixels x steps x images / 1e6, twice "
        "with guidance",
        "requests_per_minute": "requests of a key per minute",
    }
    for names, kind in ((wholes, positive), (amounts, amount)):
        for name, text in names.items():
            default = getattr(limits, name)
            group.add_argument(
                f"--{name.replace('_', '-')}",
                type=kind,
                default=default,
                metavar="N",
                help=f"{text} (default: {default:.10g})",
            )


def _bundles(texts: Sequence[str]) -> dict[str, Path]:
    """Return the folder of every model by name, from `NAME=FOLDER` or the folder alone."""
    bundles: dict[str, Path] = {}
    for text in texts:
        name, given, folder = text.partition("=")
        path = Path(folder if given else text)
        name = name if given else path.resolve().name
        if not name or name in bundles:
            fix = f"say {name or 'NAME'}2={path}" if name else f"say NAME={path}"
            raise RequestError("bundles", f"two models are called {name!r}; {fix}")
        bundles[name] = path
    return bundles


def _keys(text: str) -> dict[str, str]:
    """Return keys by name, from `name:key,name:key` or one key alone.

    Raises:
        RequestError: One is too short, or two have one name.
    """
    keys: dict[str, str] = {}
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, named, key = part.partition(":")
        name, key = (name, key) if named else (f"key{len(keys) + 1}", part)
        if name in keys:
            raise RequestError(
                KEYS_VARIABLE,
                f"two keys are called {name!r}; give each a name of its own, as in {name}2:KEY",
            )
        if len(key) < _MIN_KEY:
            raise RequestError(
                KEYS_VARIABLE,
                f"the key {name!r} has {len(key)} characters; take at least {_MIN_KEY} random "
                'ones, such as `python -c "import secrets; print(secrets.token_urlsafe())"` prints',
            )
        keys[name] = key
    return keys
