"""The commands that only report: verify, inspect and doctor."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ldm_runtime.cli.messages import say
from ldm_runtime.escaping import printable

if TYPE_CHECKING:
    from ldm_runtime.diagnostics.verify import Check


def verify(args: argparse.Namespace) -> int:
    """Run `ldm verify`: 1 if a promise of the bundle does not hold on this machine."""
    from ldm_runtime.diagnostics import verify as verification

    checks = []
    for check in verification.verify(
        args.bundle,
        backend=args.backend,
        precision=args.precision,
        threads=args.threads,
        sha256=args.sha256,
        trust_engines=args.trust_engines,
    ):
        checks.append(check)
        if not args.json:
            print(_check_line(check), flush=True)
    missed = sum(not check.passed for check in checks)
    if args.json:
        records = [asdict(check) | {"passed": check.passed} for check in checks]
        _print_json({"bundle": str(args.bundle), "passed": not missed, "checks": records})
    if missed:
        say(f"error: {missed} of the promises of {args.bundle} do not hold on this machine")
    return 1 if missed else 0


def inspect(args: argparse.Namespace) -> int:
    """Run `ldm inspect`."""
    from ldm_runtime.diagnostics import inspection
    from ldm_runtime.diagnostics.summary import summary

    description = inspection.inspect(args.path)
    if args.json:
        _print_json(description)
    else:
        print(inspection.readable(description) if args.full else summary(description))
    return 0


def doctor(args: argparse.Namespace) -> int:
    """Run `ldm doctor`: 1 if no backend can run here."""
    from ldm_runtime.diagnostics.doctor import diagnose

    diagnosis = diagnose()
    if args.json:
        _print_json(asdict(diagnosis) | {"can_run": diagnosis.can_run})
    else:
        print(f"Python {diagnosis.python}, NumPy {diagnosis.numpy}, {diagnosis.system}, ", end="")
        print(f"{diagnosis.processors} processors")
        for backend in diagnosis.backends:
            verdict = "can run" if backend.why_not is None else f"cannot run: {backend.why_not}"
            print(f"{backend.name} {backend.version or ''}".strip(), verdict, sep=": ")
        if diagnosis.problem:
            print(f"problem: {diagnosis.problem}")
    return 0 if diagnosis.can_run else 1


def _check_line(check: "Check") -> str:
    bound = "" if check.bound is None else f"bound {check.bound:g}"
    verdict = "ok" if check.passed else "MISSED"
    value = f"{check.value:.1f} dB" if check.measure == "psnr" else f"{check.value:.2e}"
    subject = printable(check.subject)
    return f"{subject:<20} {check.measure:<18} {value:>10}  {bound:<12} {verdict}"


def _print_json(value: Any) -> None:  # noqa: ANN401  (whatever JSON holds)
    print(json.dumps(_finite(value), indent=1, default=str, allow_nan=False))


def _finite(value: Any) -> Any:  # noqa: ANN401  (whatever JSON holds)
    """Return a value with None for each number that is not finite, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
