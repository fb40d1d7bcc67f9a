import logging
import subprocess
import sys
from dataclasses import replace

import pytest

from ldm_runtime.cli.commands import build_parser, main
from ldm_serve.cli import KEYS_VARIABLE, is_loopback, settings_of
from ldm_serve.settings import TEXT_LOGS, WorkerSettings

KEY = "k" * 22


def settings(*arguments, **environment):
    return settings_of(build_parser().parse_args(["serve", *arguments]), environment)


def test_models_are_called_like_their_folders_or_by_name(tmp_path):
    found = settings(str(tmp_path / "cats"), f"dogs={tmp_path}/v2").bundles

    assert found == {"cats": tmp_path / "cats", "dogs": tmp_path / "v2"}
    assert list(settings().bundles) == ["engines"]


def test_flags_become_settings():
    found = settings(
        *("--max-batch", "8", "--workers", "2", "--max-queue", "5", "--drain-seconds", "1.5"),
        *("--memory-budget-gb", "3", "--threads", "2", "--backend", "cpu", "--max-cost", "9.5"),
    )

    assert (found.workers.count, found.drain_seconds) == (2, 1.5)
    assert found.workers.executor == "process"
    assert (found.limits.max_queue, found.limits.max_cost) == (5, 9.5)
    engine = found.engine
    assert (engine.max_batch, engine.threads, engine.backend) == (8, 2, "onnxruntime")
    assert engine.memory_budget_bytes == 3_000_000_000


def test_flags_of_ray_become_settings():
    found = settings(
        *("--executor", "ray", "--address", "10.0.0.5:6379", "--worker-gpus", "0.5"),
        *("--workers", "9", "--stall-seconds", "7"),
    )

    assert replace(found.workers, logs=TEXT_LOGS) == WorkerSettings(
        executor="ray", count=9, stall_seconds=7.0, address="10.0.0.5:6379", gpus=0.5
    )


@pytest.mark.parametrize(
    ("flags", "level", "own_level"),
    [
        ((), "WARNING", "WARNING"),
        (("--verbose",), "WARNING", "INFO"),
        (("--quiet",), "ERROR", "ERROR"),
        (("--log-format", "json"), "WARNING", "INFO"),
        (("--log-format", "json", "--quiet"), "ERROR", "ERROR"),
    ],
)
def test_flags_decide_what_is_said(flags, level, own_level):
    logs = settings(*flags).workers.logs

    names = [logging.getLevelName(each) for each in (logs.level, logs.own_level)]
    assert names == [level, own_level]
    assert logs.format == ("json" if "json" in flags else "text")
    assert logs.leaves_out_requests


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1", "[::1]"])
def test_this_machine_needs_no_key(host):
    assert is_loopback(host)
    assert settings("--host", host).access.hosts == {"localhost", "127.0.0.1", "[::1]"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org"])
def test_other_addresses_take_a_key_or_a_word(host, capsys):
    assert main(["serve", "--host", host]) == 2
    assert f"error: host: {host} can be reached by others: set" in capsys.readouterr().err

    with_key = settings("--host", host, **{KEYS_VARIABLE: KEY}).access
    assert (with_key.keys, with_key.hosts) == ({"key1": KEY}, frozenset())
    assert settings("--host", host, "--insecure").access.keys == {}


def test_keys_have_names_and_a_length(capsys, monkeypatch):
    access = settings(**{KEYS_VARIABLE: f"alice:{KEY}, bob:{KEY}2,{KEY}3"}).access

    assert access.keys == {"alice": KEY, "bob": f"{KEY}2", "key3": f"{KEY}3"}
    monkeypatch.setenv(KEYS_VARIABLE, "alice:short")
    assert main(["serve"]) == 2
    assert "the key 'alice' has 5 characters; take at least 22" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        (f"alice:{KEY},bob:{KEY}2,alice:{KEY}3", "alice"),
        (f"key2:{KEY},{KEY}2", "key2"),
        (f"{KEY},key1:{KEY}2", "key1"),
    ],
)
def test_two_keys_of_one_name_are_refused(keys, name, capsys, monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, keys)

    assert main(["serve"]) == 2
    error = capsys.readouterr().err
    assert f"{KEYS_VARIABLE}: two keys are called '{name}'; give each a name of its own" in error
    assert KEY not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "x/a"], "two models are called 'a'; say a2=x/a"),
        (["--workers", "0"], "must be a whole number from 1, got '0'"),
        (["--executor", "ray"], "address: --executor ray needs --address HOST:PORT"),
        (["--address", "10.0.0.5:6379"], "address: is of --executor ray, not of process"),
        (["--worker-gpus", "1"], "worker_gpus: is of --executor ray, not of process"),
        (["--executor", "thread"], "unknown value 'thread'; choose process, inline, ray"),
        (["--executor", "inline", "--workers", "2"], "workers: is 2, but --executor inline has"),
        (["--drain-seconds", "nan"], "must be a number above 0, got 'nan'"),
        (["--max-batsh", "2"], "unknown option --max-batsh (did you mean --max-batch"),
    ],
)
def test_slips_are_one_line(arguments, message, capsys):
    try:
        status = main(["serve", *arguments])
    except SystemExit as end:
        status = end.code

    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_that_is_no_bundle_is_said_at_once(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 1
    assert "manifest.json" in capsys.readouterr().err


def test_other_commands_do_not_import_the_server():
    code = (
        "import sys; from ldm_runtime.cli.commands import build_parser; build_parser();"
        "print(sorted({'starlette', 'uvicorn', 'prometheus_client', 'ldm_serve.app'} & "
        "set(sys.modules)))"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "times"),
    [(["serve"], 2), (["batch", "requests.jsonl"], 2), (["generate", "red"], 1)],
)
def test_commands_that_run_on_say_a_fault_as_often_as_it_comes(arguments, times):
    code = f"""
import logging
from ldm_runtime.cli import commands

def fail_twice(args):
    for _ in range(2):
        logging.getLogger("ldm_serve").error("a fault")
    return 0

args = commands.build_parser().parse_args({arguments!r})
args.run = fail_twice
commands._run(args)
"""

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stderr == "error: a fault\n" * times
