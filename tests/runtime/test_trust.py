import logging
import os
import stat

import pytest

from ldm_runtime.engines.trust import cache_folder, is_trusted_engine, trust_engine

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


def test_nobody_else_may_read_or_write_the_list(folder):
    trust_engine(ONE)

    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / ONE).stat().st_mode) == 0o600


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
