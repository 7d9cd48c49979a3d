"""YAML by version 1.2's core rules, and what hostile files come to."""

import glob
import importlib.util
import itertools
import math
import time
from pathlib import Path

import pytest

from pipeline import documents
from pipeline.documents import DocumentError

LAUGHS = "a: &a [lol]\n" + "\n".join(f"{b}: &{b} [*{a}, *{a}, *{a}]" for a, b in itertools.pairwise("abcdefghijklm"))


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-05", 1e-05),
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("+12", 12),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("042", 42),
        ("0x1F", 31),
        ("0o17", 15),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("yes", "yes"),
        ("on", "on"),
        ("2026-01-01", "2026-01-01"),
        ("True", True),
        ("'true'", "true"),
        ("'3'", "3"),
        ("~", None),
        ("", None),
        ("null", None),
        ("<<", "<<"),
        ("²", "²"),
        ("9" * 5000, "9" * 5000),  # no number that any key takes
        ("0x" + "f" * 5000, "0x" + "f" * 5000),
        ("[1, {a: b}]", [1, {"a": "b"}]),
    ],
)
def test_scalars_follow_the_core_schema(text, value):
    read = documents.parse(f"key: {text}")["key"]
    assert read == value and type(read) is type(value)


def test_not_a_number_is_read():
    assert math.isnan(documents.parse("key: .nan")["key"])


@pytest.mark.parametrize(
    "text, said",
    [
        (LAUGHS, "line 2, column 8: alias \\*a is not allowed"),
        ("a: &a [*a]", "alias \\*a is not allowed"),
        ("[" * 100_000, "line 1, column 21: nested more than 20 levels deep"),
        ("{a: " * 50_000, "nested more than 20 levels deep"),
        ("- " * 30 + "a", "nested more than 20 levels deep"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: key 'a' stands here twice"),
        ("{[a]: 1}", "a key must be a word"),
        (
            "a: !!python/object/apply:os.system [ls]",
            "tag tag:.*:python/object/apply:os.system is not allowed",
        ),
        ("a: !function utils.f", "tag !function is not allowed"),
        ("a: !!binary aGk=", "is not allowed"),
        ("---\na\n---\nb", "another document"),
        ("a: [1, 2", "line 1"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("a: \x07", "unacceptable character"),
    ],
)
def test_what_no_settings_file_needs_is_refused_at_once_in_one_line(text, said):
    start = time.monotonic()
    with pytest.raises(DocumentError, match=said) as caught:
        documents.parse(text)
    assert time.monotonic() - start < 5
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "content, said",
    [
        (b"\xef\xbb\xbfa: 1", None),  # with a byte order mark
        (b"a: \xff", "byte 3 is not UTF-8"),
        (b"a: " + b"x" * 300_000, "is larger than 256 KiB"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_file_is_read_or_refused_by_name(tmp_path, content, said):
    path = tmp_path / "a.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    if said is None:
        assert documents.read(path) == {"a": 1}
        return
    with pytest.raises(DocumentError, match=said) as caught:
        documents.read(path)
    assert str(path) in str(caught.value)


def test_endless_file_is_refused():
    with pytest.raises(DocumentError, match="larger than"):
        documents.read("/dev/zero")


def test_definitions_of_lm_eval_are_read():
    folder = Path(importlib.util.find_spec("lm_eval").submodule_search_locations[0]) / "tasks"
    assert documents.read(folder / "piqa/piqa.yaml", functions=True)["output_type"] == "multiple_choice"
    for path in sorted(glob.glob(f"{folder}/**/*.yaml", recursive=True))[::500]:
        assert isinstance(documents.read(path, functions=True), dict)
    assert documents.parse("a: !function utils.f\nb: 1\nb: 2", functions=True) == {"a": "utils.f", "b": 2}


def test_what_is_written_is_read_back():
    shared = [1, "two", "3", "yes", "1e-5", None, True, 1e-5, "ü"]
    value = {"a": shared, "b": {"c": shared}}
    assert documents.parse(documents.write(value)) == value
