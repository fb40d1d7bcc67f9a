import dataclasses
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from ldm_export.errors import ExportError
from ldm_export.workspace import ExportStep, Workspace, check_destination
from ldm_runtime.bundle.files import check_file, sha256_of
from ldm_runtime.bundle.manifest import (
    SCHEMA_VERSION,
    BuildRecord,
    ComponentRecord,
    FileRecord,
    Manifest,
    encode_manifest,
    load_manifest,
)
from ldm_runtime.durable import exchange_folders, lock_folder
from ldm_runtime.errors import BundleError
from ldm_runtime.specs.components import COMPONENTS
from tests.export.small_spec import SPEC


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package may catch it."""


class Interrupt:
    """An `on_write` that lets `calls` changes happen and then ends the process."""

    def __init__(self, calls):
        self.left = calls
        self.labels = []

    def __call__(self, label):
        self.labels.append(label)
        if self.left == 0:
            raise Killed(label)
        self.left -= 1


def never(label):
    """An `on_write` that lets everything happen."""


def component(name, key):
    table = COMPONENTS[name]
    return ComponentRecord(
        name=name,
        inputs=table.inputs,
        outputs=table.outputs,
        graphs=(),
        weights_file=f"{name}/weights.bin",
        fp32_islands=(),
        parity=(),
        key=key,
    )


def steps(version, built=None):
    """Three stages of small files; `built` collects the names of those that are built."""

    def step(name, paths, record, **files):
        def build(folder):
            if built is not None:
                built.append(name)
            for path, text in files.items():
                target = folder / path.replace("__", "/")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(f"{text} {version.get(name, 1)}")
            return record

        return ExportStep(name=name, key=f"{name}-{version.get(name, 1)}", paths=paths, build=build)

    return [
        step(
            name,
            (name, f"golden/components/{name}.npz"),
            component(name, f"{name}-{version.get(name, 1)}"),
            **{f"{name}__weights.bin": "weights", f"golden__components__{name}.npz": "arrays"},
        )
        for name in ("text_encoder", "unet")
    ] + [step("golden", ("golden/0",), None, **{"golden__0__request.json": "latents"})]


def export(out, *, version=None, on_write=never, built=None, exchange=exchange_folders, **made):
    """What bundle.py does, with cheap stages. `version` says which build of a stage is wanted.

    `made` may have the checkpoint's `sha256`, and `replace`.
    """
    workspace = Workspace(out, on_write, exchange)
    with workspace.locked():
        records = [workspace.run(step)[0] for step in steps(version or {}, built)]
        manifest = Manifest(
            schema_version=SCHEMA_VERSION,
            spec=SPEC,
            weights_dtype="float16",
            components=tuple(each.component for each in records if each.component),
            tokenizer_file="golden/0/request.json",
            golden=("golden/0",),
            golden_key=records[-1].key,
            preview=None,
            prediction=None,
            quantization=None,
            engines=(),
            files=workspace.files,
            build=BuildRecord(
                checkpoint="a.ckpt",
                checkpoint_sha256=made.get("sha256", ""),
                components=(),
                versions={},
                seconds=0,
            ),
        )
        workspace.publish(manifest, replace=made.get("replace", False))


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def is_sound(bundle):
    """Whether a bundle has a manifest and every file it lists."""
    try:
        for record in load_manifest(bundle).files:
            check_file(bundle, record)
    except BundleError:
        return False
    return True


def partial_of(out):
    return out.with_name(out.name + ".partial")


def no_exchange(first, second):
    return False


NEW = {"unet": 2, "golden": 2}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "engines"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What an export leaves that nobody interrupted: contents by version."""
    folder = tmp_path_factory.mktemp("finished")
    export(folder / "old")
    export(folder / "new", version=NEW)
    return {"old": contents(folder / "old"), "new": contents(folder / "new")}


def write_points(tmp_path, *, over_a_bundle, exchange=exchange_folders):
    counted = Interrupt(-1)
    out = tmp_path / "counted"
    if over_a_bundle:
        export(out)
    export(out, version=NEW, on_write=counted, exchange=exchange)
    return range(len(counted.labels))


def test_an_export_leaves_a_sound_bundle_and_nothing_else(out):
    export(out)

    assert is_sound(out)
    assert sorted(contents(out)) == [
        "golden/0/request.json",
        "golden/components/text_encoder.npz",
        "golden/components/unet.npz",
        "manifest.json",
        "text_encoder/weights.bin",
        "unet/weights.bin",
    ]
    assert list(out.parent.iterdir()) == [out]


def test_killed_at_any_point_there_is_no_bundle_or_all_of_it(tmp_path, finished):
    points = write_points(tmp_path, over_a_bundle=False)
    for point in points:
        out = tmp_path / f"engines{point}"

        with pytest.raises(Killed):
            export(out, version=NEW, on_write=Interrupt(point))

        assert not out.exists() or contents(out) == finished["new"]
        export(out, version=NEW)
        assert contents(out) == finished["new"]
        assert not partial_of(out).exists()
    assert len(points) > 15


@pytest.mark.parametrize("exchange", [exchange_folders, no_exchange])
def test_killed_at_any_point_the_old_bundle_is_there_or_the_new_one(tmp_path, finished, exchange):
    for point in write_points(tmp_path, over_a_bundle=True, exchange=exchange):
        out = tmp_path / f"engines{point}"
        export(out)

        interrupt = Interrupt(point)
        with pytest.raises(Killed):
            export(out, version=NEW, on_write=interrupt, exchange=exchange)

        if interrupt.labels[-1] == "replace":  # without an exchange there is a moment without one
            assert contents(partial_of(out) / "old") == finished["old"]
        else:
            assert contents(out) in (finished["old"], finished["new"])
            assert is_sound(out)
        export(out, version=NEW, exchange=exchange)
        assert contents(out) == finished["new"]
        assert not partial_of(out).exists()


def test_the_old_bundle_comes_back_if_the_next_export_fails_too(out, finished):
    export(out)
    with pytest.raises(Killed):
        export(
            out, version=NEW, on_write=lambda label: kill_at(label, "replace"), exchange=no_exchange
        )

    with pytest.raises(Killed):
        export(out, version=NEW, on_write=lambda label: kill_at(label, "manifest"))

    assert contents(out) == finished["old"]


def kill_at(label, fatal):
    if label == fatal:
        raise Killed(label)


def test_interrupted_twice_at_different_points_an_export_still_ends_well(tmp_path, finished):
    for first in range(2, 16, 4):
        for second in range(1, 16, 4):
            out = tmp_path / f"engines{first}-{second}"
            for point in (first, second):
                with suppress(Killed):  # the second may have nothing left to do there
                    export(out, version=NEW, on_write=Interrupt(point))

            export(out, version=NEW)

            assert contents(out) == finished["new"]


def test_what_an_interrupted_export_finished_is_not_built_again(out):
    with pytest.raises(Killed):
        export(out, on_write=lambda label: kill_at(label, "build golden"))
    built = []

    export(out, built=built)

    assert built == ["golden"]


def test_an_equal_export_reuses_every_stage(out):
    export(out)
    built = []

    export(out, built=built)

    assert built == []
    assert is_sound(out)


def test_only_stages_whose_record_differs_are_built(out):
    export(out)
    built = []

    export(out, version=NEW, built=built)

    assert built == ["unet", "golden"]


def test_an_altered_file_of_the_bundle_is_built_again(out, finished):
    export(out)
    (out / "unet/weights.bin").write_text("WEIGHTS 1")  # as many bytes
    built = []

    export(out, built=built)

    assert built == ["unet"]
    assert contents(out) == finished["old"]


def test_an_altered_file_of_the_partial_bundle_is_built_again(out, finished):
    with pytest.raises(Killed):
        export(out, on_write=lambda label: kill_at(label, "build golden"))
    (partial_of(out) / "bundle/unet/weights.bin").write_text("WEIGHTS 1")
    built = []

    export(out, built=built)

    assert built == ["unet", "golden"]
    assert contents(out) == finished["old"]


def test_a_record_that_cannot_be_read_counts_as_none(out):
    with pytest.raises(Killed):
        export(out, on_write=lambda label: kill_at(label, "build golden"))
    (partial_of(out) / "steps/unet.json").write_bytes(b"\xff{")
    built = []

    export(out, built=built)

    assert built == ["unet", "golden"]


def test_what_an_interrupted_export_of_something_else_left_is_removed(out, finished):
    with pytest.raises(Killed):
        export(out, on_write=lambda label: kill_at(label, "manifest"))
    stray = partial_of(out) / "bundle/vae_decoder/deep/model.onnx"
    stray.parent.mkdir(parents=True)
    stray.write_text("stale")

    export(out)

    assert contents(out) == finished["old"]
    assert not (out / "vae_decoder").exists()


def test_a_rebuild_never_writes_into_the_old_bundle(out, finished):
    export(out)
    with pytest.raises(Killed):  # the partial bundle now has hard links into the old one
        export(out, on_write=lambda label: kill_at(label, "manifest"))

    with pytest.raises(Killed):
        export(out, version=NEW, on_write=lambda label: kill_at(label, "manifest"))

    assert contents(out) == finished["old"]


def test_reused_files_are_linked_not_copied(out):
    export(out)
    before = (out / "unet/weights.bin").stat().st_ino

    export(out, version={"golden": 2})

    assert (out / "unet/weights.bin").stat().st_ino == before


def test_the_bundle_is_never_away_while_it_is_replaced(out):
    export(out)
    seen = []

    export(out, version=NEW, on_write=lambda label: seen.append(is_sound(out)))

    assert len(seen) > 15
    assert all(seen)


def test_a_folder_that_is_no_bundle_is_left_alone(out):
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")

    with pytest.raises(ExportError, match="is not a bundle"):
        export(out)

    assert contents(out) == {"thesis.tex": b"years of work"}
    assert not partial_of(out).exists()


def test_a_folder_with_some_other_manifest_is_left_alone(out):
    out.mkdir()
    (out / "manifest.json").write_text('{"name": "a browser extension", "version": "1"}')

    with pytest.raises(ExportError, match="is not a bundle"):
        export(out)

    assert list(contents(out)) == ["manifest.json"]


def test_a_bundle_with_somebodys_files_in_it_is_left_alone(out):
    export(out)
    (out / "pictures").mkdir()
    (out / "pictures/best.png").write_bytes(b"PNG")

    with pytest.raises(ExportError, match=r"pictures/best\.png"):
        export(out, version=NEW)

    assert (out / "pictures/best.png").read_bytes() == b"PNG"


def test_a_folder_that_fills_up_during_the_export_is_left_alone(out):
    def intrude(label):
        if label == "manifest":
            out.mkdir()
            (out / "thesis.tex").write_text("years of work")

    with pytest.raises(ExportError, match="is not a bundle"):
        export(out, on_write=intrude)

    assert list(contents(out)) == ["thesis.tex"]


def test_the_bundle_of_another_checkpoint_that_came_during_the_export_is_left_alone(out, tmp_path):
    export(tmp_path / "other", sha256="0b" * 32)
    other = contents(tmp_path / "other")

    def come(label):
        if label == "manifest":
            shutil.copytree(tmp_path / "other", out, dirs_exist_ok=True)

    with pytest.raises(ExportError, match=r"another checkpoint.*0b0b.*add --replace to replace it"):
        export(out, version=NEW, sha256="0a" * 32, on_write=come)
    assert contents(out) == other
    export(out, version=NEW, sha256="0a" * 32, on_write=come, replace=True)
    assert contents(out) != other


def test_the_restored_bundle_of_another_checkpoint_is_left_alone(out):
    export(out, sha256="0b" * 32)
    other = contents(out)
    new = {"version": NEW, "sha256": "0a" * 32, "exchange": no_exchange}
    with pytest.raises(Killed):
        export(out, on_write=lambda label: kill_at(label, "replace"), replace=True, **new)
    assert not out.exists()

    with pytest.raises(ExportError, match="another checkpoint"):
        export(out, **new)

    assert contents(out) == other


def test_a_bundle_of_a_newer_schema_can_be_replaced(out, finished):
    export(out)
    manifest = out / "manifest.json"
    known = f'"schema_version": {SCHEMA_VERSION}'
    text = manifest.read_text().replace(known, '"schema_version": 99')
    manifest.write_text(text.replace('"spec"', '"model"'))

    export(out)

    assert contents(out) == finished["old"]


def test_an_empty_folder_is_a_fine_place(out):
    out.mkdir()

    export(out)

    assert is_sound(out)


def test_folders_above_are_made(tmp_path):
    export(tmp_path / "some/where/engines")

    assert is_sound(tmp_path / "some/where/engines")


def test_a_file_in_the_place_of_the_bundle_is_an_error(out):
    out.write_text("not a folder")

    with pytest.raises(ExportError, match="is a file"):
        export(out)

    assert out.read_text() == "not a folder"


@pytest.mark.parametrize("inside", [None, "notes.txt"])
def test_a_partial_folder_that_is_not_ours_is_left_alone(out, inside):
    partial = partial_of(out)
    if inside is None:
        partial.write_text("a file")
    else:
        partial.mkdir()
        (partial / inside).write_text("mine")

    with pytest.raises(ExportError, match=r"engines\.partial"):
        export(out)

    assert partial.exists()
    assert not out.exists()


def test_a_mount_point_cannot_be_replaced():
    with pytest.raises(ExportError, match="mount point"):
        check_destination(Path("/"))


def test_through_a_link_the_folder_behind_it_is_replaced(tmp_path, finished):
    export(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")

    export(tmp_path / "link", version=NEW)

    assert (tmp_path / "link").is_symlink()
    assert contents(tmp_path / "real") == finished["new"]


def test_the_current_folder_can_be_the_bundle(out, monkeypatch):
    out.mkdir()
    monkeypatch.chdir(out)

    export(Path())

    assert is_sound(out)


def test_a_second_export_to_the_same_place_is_kept_out(out):
    first = Workspace(out)

    with (
        first.locked(),
        pytest.raises(ExportError, match=r"another export .* is running"),
        Workspace(out).locked(),
    ):
        pass


def test_the_lock_goes_with_the_first_export(out):
    with Workspace(out).locked():
        pass

    export(out)

    assert is_sound(out)


@pytest.mark.parametrize("exchange", [exchange_folders, no_exchange])
def test_a_bundle_in_which_engines_are_built_is_not_replaced(out, finished, exchange):
    export(out)
    lock = lock_folder(out)  # as `ldm build-engines` holds it
    with pytest.raises(ExportError, match=r"another process is changing .*engines, so it is not"):
        export(out, version=NEW, exchange=exchange)
    os.close(lock)
    built = []

    assert contents(out) == finished["old"]
    export(out, version=NEW, built=built, exchange=exchange)
    assert contents(out) == finished["new"]
    assert built == []


@pytest.mark.parametrize("exchange", [exchange_folders, no_exchange])
def test_no_engines_are_built_in_a_bundle_while_it_is_replaced(out, exchange):
    export(out)
    locked = []

    def lock(label):
        if label == "swap":
            with pytest.raises(BlockingIOError):
                lock_folder(out)
            locked.append(label)

    export(out, version=NEW, on_write=lock, exchange=exchange)

    assert locked == ["swap"]
    os.close(lock_folder(out))


def test_checking_a_destination_writes_nothing(out):
    check_destination(out)
    Workspace(out)

    assert list(out.parent.iterdir()) == []


def test_files_that_a_manifest_names_outside_the_bundle_are_not_taken_over(out, finished):
    export(out)
    secret = out.parent / "secret"
    secret.write_text("secret")
    manifest = load_manifest(out)
    outside = FileRecord(path="unet/../../secret", sha256=sha256_of(secret), size_bytes=6)
    forged = dataclasses.replace(manifest, files=(*manifest.files, outside))
    (out / "manifest.json").write_bytes(encode_manifest(forged))

    export(out)

    assert contents(out) == finished["old"]
    assert secret.stat().st_nlink == 1
