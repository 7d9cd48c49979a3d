"""Users without a name, homes that cannot be written: containers that run under an id of nobody."""

import getpass
import os
import pwd

import pytest

from pipeline import runtime

NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")  # what getpass asks before the system's list of users
PLACES = ("XDG_CACHE_HOME", "MPLCONFIGDIR")


@pytest.fixture
def plain(monkeypatch, tmp_path):
    """An environment without names and places of caches; what a test sets in it is taken back."""
    monkeypatch.chdir(tmp_path)
    for name in (*NAMES, *PLACES, "HOME"):
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    return monkeypatch


def nobody(monkeypatch):
    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


def test_user_without_a_name_is_given_one(plain):
    nobody(plain)
    runtime._name_user()
    assert getpass.getuser() == f"uid-{os.getuid()}"


def test_user_with_a_name_keeps_it(plain):
    plain.setenv("USER", "ada")
    runtime._name_user()
    assert getpass.getuser() == "ada" and "LOGNAME" not in os.environ


@pytest.mark.parametrize("home", ["", "/dev/null", "unknown"])
def test_caches_are_in_the_project_where_there_is_no_home_for_them(plain, tmp_path, home):
    if home == "unknown":
        nobody(plain)
    else:
        plain.setenv("HOME", home)
    runtime._place_caches()
    assert os.environ["XDG_CACHE_HOME"] == f"{tmp_path}/artifacts/cache"
    assert os.path.expanduser("~") == (home if home == "/dev/null" else f"{tmp_path}/artifacts/cache")
    assert os.environ["MPLCONFIGDIR"].startswith(f"{tmp_path}/artifacts/cache")


def test_home_of_another_user_gets_no_caches(plain, tmp_path):
    (tmp_path / "home").mkdir()
    plain.setenv("HOME", str(tmp_path / "home"))
    plain.setattr(runtime.os, "access", lambda path, mode: False)
    runtime._place_caches()
    assert os.environ["XDG_CACHE_HOME"] == f"{tmp_path}/artifacts/cache"


def test_caches_stay_where_a_user_wants_them(plain, tmp_path):
    plain.setenv("HOME", "/dev/null")
    plain.setenv("XDG_CACHE_HOME", "/elsewhere")
    runtime._place_caches()
    assert os.environ["XDG_CACHE_HOME"] == "/elsewhere"


def test_home_that_can_be_written_stays_the_home(plain, tmp_path):
    plain.setenv("HOME", str(tmp_path / "new"))
    runtime._place_caches()
    assert not any(name in os.environ for name in PLACES) and os.environ["HOME"] == str(tmp_path / "new")
