import logging
import os
import stat

import pytest

from ldm_runtime.engines.trust import (
    cache_folder,
    is_trusted_engine,
    read_own_file,
    trust_engine,
    write_own_file,
)

ONE, OTHER = "1" * 64, "2" * 64


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of trusted engines of a new user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/ldm-deploy/trusted-engines"


def test_an_engine_is_trusted_once_it_was_built_here(folder):
    assert not is_trusted_engine(ONE)

    trust_engine(ONE)
    trust_engine(ONE)

    assert is_trusted_engine(ONE)
    assert not is_trusted_engine(OTHER)


@pytest.fixture
def open_umask():
    """Let new files and folders have the modes that they are made with."""
    before = os.umask(0)
    yield
    os.umask(before)


def test_nobody_else_may_read_or_write_the_list(folder, open_umask):
    trust_engine(ONE)

    for each in (folder, folder.parent, folder.parent.parent):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / ONE).stat().st_mode) == 0o600


def test_what_libraries_keep_lies_in_a_folder_of_this_user_alone(folder, open_umask):
    path = folder.parent / "kernels"

    write_own_file(path, b"code")

    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert read_own_file(path, "kernels are compiled again") == b"code"


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_what_libraries_keep_is_not_read_where_others_may_write(folder, mode, caplog):
    path = folder.parent / "kernels"
    write_own_file(path, b"code")
    path.parent.chmod(mode)

    with caplog.at_level(logging.WARNING):
        assert read_own_file(path, "kernels are compiled again") == b""
    with pytest.raises(PermissionError, match="others may write to its folder"):
        write_own_file(path, b"more code")

    assert caplog.messages == [
        f"{path} cannot be read (others may write to its folder; run `chmod go-w {path.parent}` if "
        "it is yours, or set XDG_CACHE_HOME); kernels are compiled again"
    ]
    assert path.read_bytes() == b"code"


def test_what_another_users_folder_keeps_is_not_read(folder, monkeypatch):
    path = folder.parent / "kernels"
    write_own_file(path, b"code")
    monkeypatch.setattr("os.getuid", lambda: os.geteuid() + 1)

    assert read_own_file(path, "kernels are compiled again") == b""


def test_what_is_not_kept_yet_is_no_warning(folder, caplog):
    assert read_own_file(folder.parent / "kernels", "kernels are compiled again") == b""

    assert caplog.messages == []


def test_a_list_in_a_folder_that_others_may_write_to_is_a_warning(folder, caplog):
    trust_engine(ONE)
    folder.chmod(0o770)

    with caplog.at_level(logging.WARNING):
        trust_engine(OTHER)

    (message,) = caplog.messages
    assert message.startswith(f"{folder} cannot be written (others may write to its folder; run ")
    assert not (folder / OTHER).exists()


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_list_that_others_may_write_to_says_nothing(folder, mode):
    trust_engine(ONE)
    folder.chmod(mode)

    assert not is_trusted_engine(ONE)


def test_a_list_of_another_user_says_nothing(folder, monkeypatch):
    trust_engine(ONE)
    monkeypatch.setattr("os.getuid", lambda: os.geteuid() + 1)

    assert not is_trusted_engine(ONE)


@pytest.mark.parametrize("name", ["", ".", "../x", "1" * 63, "x" * 64, f"{ONE}\n", "a" * 65])
def test_what_is_not_a_hash_is_not_trusted(folder, name):
    trust_engine(ONE)
    (folder.parent / "x").touch()
    if name and "/" not in name and name != ".":
        (folder / name).touch()

    assert not is_trusted_engine(name)


def test_a_link_in_the_list_is_not_trusted(folder):
    trust_engine(ONE)
    (folder / OTHER).symlink_to(folder / ONE)

    assert not is_trusted_engine(OTHER)


def test_a_list_that_cannot_be_written_is_one_warning_with_the_fix(folder, caplog):
    folder.parent.parent.mkdir(parents=True)
    folder.parent.write_text("a file")

    with caplog.at_level(logging.WARNING):
        trust_engine(ONE)

    (message,) = caplog.messages
    assert message.startswith(f"{folder} cannot be written (")
    assert "XDG_CACHE_HOME" in message
    assert not is_trusted_engine(ONE)


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_the_cache_folder_is_in_the_home_folder_unless_an_absolute_path_is_set(monkeypatch, value):
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    monkeypatch.setenv("HOME", "/home/somebody")

    assert str(cache_folder()) == "/home/somebody/.cache/ldm-deploy"
