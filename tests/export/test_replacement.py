import json
import shlex

import pytest

from ldm_export.errors import ExportError
from ldm_export.next_command import next_command
from ldm_export.replacement import BundleOrigin, check_replacement, origin_of
from ldm_runtime.cli.commands import build_parser
from ldm_runtime.specs.tasks import TASKS

MANIFEST = {"schema_version": 1, "build": {"checkpoint": "a.ckpt", "checkpoint_sha256": "0a" * 32}}


def bundle_with(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    return tmp_path


def test_the_origin_of_a_bundle_of_any_version_is_read(tmp_path):
    bundle = bundle_with(tmp_path, json.dumps(MANIFEST))

    assert origin_of(bundle) == BundleOrigin(checkpoint="a.ckpt", checkpoint_sha256="0a" * 32)


@pytest.mark.parametrize("manifest", ["", "{}", '{"build": {}}', "[" * 100_000, "\udcff"])
def test_what_is_no_bundle_has_no_origin_and_is_left_to_other_checks(tmp_path, manifest):
    (tmp_path / "manifest.json").write_bytes(manifest.encode(errors="surrogateescape"))

    assert origin_of(tmp_path) is None
    check_replacement(tmp_path, "b.ckpt", "00" * 32)


def test_the_same_checkpoint_under_another_name_may_be_exported_again(tmp_path):
    bundle = bundle_with(tmp_path, json.dumps(MANIFEST))

    check_replacement(bundle, "b.ckpt", "0a" * 32)


def test_another_checkpoint_of_the_same_name_is_refused_with_both_hashes(tmp_path):
    bundle = bundle_with(tmp_path, json.dumps(MANIFEST))

    with pytest.raises(
        ExportError, match=r"0a0a0a0a0a0a…\), not of a\.ckpt \(0b0b0b0b0b0b…\); add"
    ):
        check_replacement(bundle, "a.ckpt", "0b" * 32)


@pytest.mark.parametrize("task", TASKS)
def test_the_next_command_has_what_the_task_needs(task, tmp_path):
    program, *arguments = shlex.split(next_command(task, tmp_path / "my bundle"))

    args = vars(build_parser().parse_args(arguments))

    assert program == "ldm"
    assert args["bundle"] == tmp_path / "my bundle"
    given = {name for name, value in args.items() if value is not None}
    for needed in TASKS[task].needs:
        assert given & {"text" if name == "prompt" else name for name in needed}
