"""Rows and benchmark items that are damaged or senseless: one error each, which names file, place, fault and remedy."""

import gzip
import io
import json
import zipfile

import pandas as pd
import pytest
from conftest import ROOT

from pipeline.data import fetch
from pipeline.data.fetch import FetchError

ROW = {"instruction": "Name a color.", "input": "", "output": "Blue."}
LINE = json.dumps(ROW).encode() + b"\n"
DEEP = b"[" * 100_000 + b"]" * 100_000


def lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("rows.jsonl", content)
    return buffer.getvalue()


def parquet(*rows):
    buffer = io.BytesIO()
    pd.DataFrame(rows).to_parquet(buffer)
    return buffer.getvalue()


def changed(**fields):
    return lines(ROW, ROW | fields)


ALPACA = {
    "empty": (b"", ["is empty", "one JSON object a line"]),
    "blank lines": (b"\n\n  \n", ["is empty"]),
    "empty array": (b"[]", ["is empty"]),
    "no JSON": (b"instruction,input,output\na,b,c\n", ["line 1 cannot be read as JSON", "one JSON object a line"]),
    "a line cut off": (LINE + LINE[:20], ["line 2 cannot be read as JSON"]),
    "an array cut off": (b"[" + LINE, ["cannot be read as JSON"]),
    "one object over several lines": (json.dumps(ROW, indent=1).encode(), ["line 1 cannot be read as JSON"]),
    "nested deep": (DEEP, ["nested too deep"]),
    "a line nested deep": (LINE + b'{"a": ' + DEEP + b"}", ["line 2 is nested too deep"]),
    "a number of 5,000 digits": (b'{"a": ' + b"9" * 5000 + b"}", ["line 1 cannot be read as JSON"]),
    "Latin-1": (json.dumps(ROW | {"output": "é"}, ensure_ascii=False).encode("latin1"), ["is no UTF-8", "iconv"]),
    "UTF-16 cut off": ("é".encode("utf-16") + b"x", ["is no UTF-16"]),
    "UTF-16 without its mark": (LINE.decode().encode("utf-16-le"), ["line 1 cannot be read as JSON"]),
    "zeros": (bytes(200), ["line 1 cannot be read as JSON"]),
    "gzip cut off": (gzip.compress(LINE * 100)[:-12], ["damaged gzip file", "download it again"]),
    "gzip of nothing": (gzip.compress(b""), ["is empty"]),
    "gzip of garbage": (b"\x1f\x8b" + b"x" * 50, ["damaged gzip file"]),
    "gzip of CSV": (gzip.compress(b"a,b\n"), ["line 1 cannot be read as JSON"]),
    "ZIP": (zipped(LINE), ["is a ZIP archive", "convert it to"]),
    "xz": (b"\xfd7zXZ\x00" + b"x" * 50, ["is an xz archive", "convert it to"]),
    "bzip2": (b"BZh9" + b"x" * 50, ["is a bzip2 archive", "convert it to"]),
    "zstd": (b"\x28\xb5\x2f\xfd" + b"x" * 50, ["is a zstd archive", "convert it to"]),
    "Arrow": (b"ARROW1\0\0" + b"x" * 50, ["is an Arrow file", "convert it to"]),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid x\n", ["Git LFS pointer", "git lfs pull"]),
    "Parquet cut off": (parquet(ROW)[:-30], ["damaged Parquet file", "download it again"]),
    "Parquet garbage": (b"PAR1" + b"x" * 50, ["damaged Parquet file"]),
    "Parquet of other fields": (parquet({"prompt": "a", "answer": "b"}), ["row 1: needs", "instruction is missing"]),
    "Parquet with a null": (parquet(ROW, ROW | {"output": None}), ["row 2: needs", "output is null"]),
    "no instruction": (lines(ROW, {"input": "", "output": "x"}), ["row 2: needs", "instruction is missing"]),
    "no input": (lines(ROW, {"instruction": "a", "output": "x"}), ["row 2: needs", "input is missing"]),
    "no output": (lines(ROW, {"instruction": "a", "input": ""}), ["row 2: needs", "output is missing"]),
    "other fields": (lines({"prompt": "a", "completion": "b"}), ["row 1: needs", "instruction is missing"]),
    "empty answer": (changed(output=""), ["row 2: output is empty"]),
    "blank answer": (changed(output=" \n\t"), ["row 2: output is empty"]),
    "empty instruction": (changed(instruction=""), ["row 2: instruction is empty"]),
    "null answer": (changed(output=None), ["row 2: needs", "output is null"]),
    "null input": (changed(input=None), ["row 2: needs", "input is null"]),
    "answer of a number": (changed(output=3.5), ["row 2: needs", "output is 3.5"]),
    "answer of a list": (changed(output=["a"]), ["row 2: needs", "output is ['a']"]),
    "answer is true": (changed(output=True), ["row 2: needs", "output is True"]),
    "answer is NaN": (changed(output=float("nan")), ["row 2: needs", "output is nan"]),
    "half a surrogate": (changed(output="\ud83d"), ["row 2: output holds half of a surrogate pair"]),
    "a row that is a text": (lines(ROW, "instruction"), ["row 2: needs", "it is 'instruction'"]),
    "a row that is null": (lines(ROW, None), ["row 2: needs", "it is null"]),
    "a row that is a number": (b"[1, 2]", ["row 1: needs", "it is 1", "row 2"]),
    "nothing usable": (lines(*[ROW | {"output": ""}] * 3), ["3 of 3 rows cannot be used", "mend or remove"]),
}

BOOLQ = {"question": "is ice cold", "passage": "Ice is cold.", "label": 1}
PIQA = {"goal": "Cool a drink", "sol1": "Add ice.", "sol2": "Add fire.", "label": 0}
HELLASWAG = {"activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "label": "1"} | {
    "endings": ["sings.", "eats.", "flies.", "swims."]
}
WINOGRANDE = {"sentence": "The cup hit the jar and _ broke.", "option1": "the cup", "option2": "the jar", "answer": "1"}
ARC = {"question": "What is cold?", "choices": {"text": ["ice", "fire", "sun"], "label": ["A", "B", "C"]}} | {
    "answerKey": "A"
}
OPENBOOK = {"question_stem": "Ice is", "choices": ARC["choices"], "answerKey": "B"}
MMLU = {"question": "Where is the heart?", "subject": "anatomy", "choices": ["foot", "chest", "hand", "ear"]} | {
    "answer": 1
}
SCIQ = {"question": "What is ice?", "support": "", "correct_answer": "water"} | {
    f"distractor{number}": f"stone {number}" for number in (1, 2, 3)
}
GOOD = {"boolq": BOOLQ, "piqa": PIQA, "hellaswag": HELLASWAG, "winogrande": WINOGRANDE, "arc_easy": ARC} | {
    "openbookqa": OPENBOOK, "mmlu_anatomy": MMLU, "sciq": SCIQ,
}  # fmt: skip


def choices(text, label=("A", "B", "C")):
    return {"choices": {"text": list(text), "label": list(label)}}


ITEMS = [
    ("boolq", {"label": 0.5}, "its answer 0.5 is none of its 2 choices"),
    ("boolq", {"label": True}, "its answer True is none of its 2 choices"),
    ("boolq", {"label": 2}, "its answer 2 is none"),
    ("boolq", {"label": -1}, "its answer -1 is none"),
    ("boolq", {"label": None}, "its answer null is none"),
    ("boolq", {"label": "yes"}, "its answer 'yes' is none"),
    ("boolq", {"label": [1]}, "its answer [1] is none"),
    ("boolq", {"question": ""}, "question is empty"),
    ("boolq", {"question": None}, "question is null, not a text"),
    ("boolq", {"passage": 7}, "passage is 7, not a text"),
    ("boolq", {"passage": "\ud83d"}, "passage holds half of a surrogate pair"),
    ("piqa", {"goal": None}, "goal is null, not a text"),
    ("piqa", {"goal": "  "}, "goal is empty"),
    ("piqa", {"sol2": ""}, "sol2 is empty"),
    ("piqa", {"sol1": 5}, "sol1 is 5, not a text"),
    ("piqa", {"sol1": ["a"]}, "sol1 is ['a'], not a text"),
    ("piqa", {"sol2": "Add ice."}, "two of its choices are equal: 'Add ice.'"),
    ("piqa", {"label": "x"}, "its answer 'x' is none"),
    ("piqa", {"label": 10**30}, "is none of its 2 choices"),
    ("hellaswag", {"endings": []}, "it has 0 choices"),
    ("hellaswag", {"endings": ["sings."]}, "it has 1 choice, and needs two"),
    ("hellaswag", {"endings": ["sings.", "", "flies.", "swims."]}, "choice 2 is empty"),
    ("hellaswag", {"endings": ["sings.", 2, "flies.", "swims."]}, "choice 2 is 2, not a text"),
    ("hellaswag", {"endings": ["sings.", "eats.", "eats.", "swims."]}, "two of its choices are equal: 'eats.'"),
    ("hellaswag", {"endings": "sings."}, "endings is 'sings.', not a list"),
    ("hellaswag", {"endings": None}, "endings is null, not a list"),
    ("hellaswag", {"label": "4"}, "its answer 4 is none of its 4 choices"),
    ("hellaswag", {"label": ""}, "its answer '' is none"),
    ("hellaswag", {"ctx_a": None}, "ctx_a is null"),
    ("hellaswag", {"label": 1}, "label is of kind number, and of kind text in most items"),
    ("winogrande", {"sentence": "The cup broke."}, "sentence has no gap (_)"),
    ("winogrande", {"sentence": None}, "sentence is null"),
    ("winogrande", {"answer": "3"}, "its answer '3' is none of its 2 choices"),
    ("winogrande", {"answer": 1}, "its answer 1 is none"),
    ("winogrande", {"option2": "the cup"}, "two of its choices are equal"),
    ("winogrande", {"option1": ""}, "option1 is empty"),
    ("arc_easy", {"answerKey": "Z"}, "its answer 'Z' is none of its 3 choices (A, B, C)"),
    ("arc_easy", {"answerKey": None}, "its answer null is none"),
    ("arc_easy", {"choices": None}, "choices needs two lists, text and label"),
    ("arc_easy", {"choices": ["ice", "fire"]}, "choices needs two lists"),
    ("arc_easy", {"choices": {"text": ["a", "b"]}}, "choices needs two lists"),
    ("arc_easy", choices(["ice", "fire", "sun"], ["A", "B"]), "choices has 3 texts and 2 labels"),
    ("arc_easy", choices(["ice", "fire", "ice"]), "two of its choices are equal: 'ice'"),
    ("arc_easy", choices(["ice", "fire", " "]), "choice 3 is empty"),
    ("arc_easy", choices(["ice", 4, "sun"]), "choice 2 is 4, not a text"),
    ("arc_easy", choices(["ice"], ["A"]), "it has 1 choice, and needs two"),
    ("arc_easy", choices(["ice", "fire", "sun"], ["A", "A", "B"]), "the labels of its choices are ['A', 'A', 'B']"),
    ("arc_easy", choices(["ice", "fire", "sun"], [1, 2, 3]), "need to be different texts"),
    ("openbookqa", {"question_stem": ""}, "question_stem is empty"),
    ("openbookqa", {"answerKey": "D"}, "its answer 'D' is none"),
    ("mmlu_anatomy", {"answer": 9}, "its answer"),
    ("mmlu_anatomy", {"choices": ["foot", 2, "hand", "ear"]}, "choices is of kind list of number and text"),
    ("mmlu_anatomy", {"answer": "one"}, "answer is of kind text, and of kind number in most items"),
    ("sciq", {"distractor1": "water"}, "two of its choices are equal"),
    ("sciq", {"distractor2": ""}, "choice 2 is empty"),
]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(work, *arguments):
    with pytest.raises(FetchError) as caught:
        work(*arguments)
    message = str(caught.value)
    assert len(message) < 2500 and "Traceback" not in message
    return message


@pytest.mark.parametrize("case", ALPACA)
def test_bad_rows_are_refused_with_one_error(case, tmp_path):
    content, told = ALPACA[case]
    (tmp_path / "rows.jsonl").write_bytes(content)
    message = refused(fetch.alpaca, "path:rows.jsonl", 0.01)
    for text in ("data.alpaca: path:rows.jsonl", *told):
        assert text in message
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(("task", "change", "fault"), ITEMS, ids=[f"{task}-{change}" for task, change, _ in ITEMS])
def test_bad_item_is_named_by_its_number_and_its_own_fault(task, change, fault, tmp_path):
    (tmp_path / f"{task}.jsonl").write_bytes(lines(GOOD[task], GOOD[task] | change, GOOD[task], GOOD[task]))
    message = refused(fetch.benchmark, f"path:{tmp_path}", task, 0.01)
    first, *_, last = message.splitlines()
    assert first.startswith(f"data.benchmarks: {tmp_path / task}.jsonl, item 2: ") and fault in first
    assert "1 of 4 items cannot be used" in last and "data.max_skipped" in last
    assert "definition" not in message
    assert [path.name for path in tmp_path.iterdir()] == [f"{task}.jsonl"]
    kept, skipped = fetch.benchmark(f"path:{tmp_path}", task, 0.25)
    assert (kept, skipped) == ([GOOD[task]] * 3, [2])


@pytest.mark.parametrize("content", [b"", b"[]", b"{", DEEP, zipped(b"x"), b"\x1f\x8bxx", b"PAR1xx"])
def test_bad_file_of_items_is_refused_with_one_error(content, tmp_path):
    (tmp_path / "piqa.jsonl").write_bytes(content)
    message = refused(fetch.benchmark, f"path:{tmp_path}", "piqa", 0.01)
    assert "data.benchmarks" in message and "piqa.jsonl" in message


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + LINE * 2,
        (LINE * 2).decode().encode("utf-16"),
        b"\xfe\xff" + (LINE * 2).decode().encode("utf-16-be"),
        (LINE * 2).decode().encode("utf-32"),
        gzip.compress(LINE * 2),
        gzip.compress(b"\xef\xbb\xbf" + json.dumps([ROW, ROW]).encode()),
        parquet(ROW, ROW),
        b"\xef\xbb\xbf" + json.dumps([ROW, ROW], indent=2).encode(),
        (LINE * 2).replace(b"\n", b"\r\n"),
    ],
    ids=["bom", "utf-16", "utf-16-be", "utf-32", "gzip", "gzip-array", "parquet", "bom-array", "crlf"],
)
def test_forms_that_libraries_read_are_read(content, tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(content)
    assert fetch.alpaca("path:rows.jsonl") == ([ROW, ROW], [])
    (tmp_path / "boolq.jsonl").write_bytes("\ufeff".encode() + lines(BOOLQ))
    assert fetch.benchmark(f"path:{tmp_path}", "boolq") == ([BOOLQ], [])


def test_temporary_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    import tempfile

    def none_usable():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "_get_default_tempdir", none_usable)
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "boolq.jsonl").write_bytes(lines(BOOLQ))
    from pipeline.errors import UserError

    with pytest.raises(UserError, match="set TMPDIR"):
        fetch.benchmark(f"path:{tmp_path}", "boolq")


def test_hub_cache_that_cannot_be_written_is_named_and_not_the_data(monkeypatch):
    import datasets

    def fail(*_, **__):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from PermissionError(
            13, "Permission denied", "/nowhere/.cache"
        )

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refused(fetch.alpaca, "hub:org/name@main")
    for text in ("Permission denied", "/nowhere/.cache", "set HF_HOME"):
        assert text in message


def test_items_are_read_where_home_cannot_be_written_and_nothing_else_is_imported(tmp_path):
    import os
    import subprocess
    import sys

    sample = ROOT / "data/sample/benchmarks"
    code = f"from pipeline.data import tasks; assert list(tasks.load(['piqa'], {str(sample)!r})) == ['piqa']\n"
    code += f"from pipeline.data import fetch; assert len(fetch.benchmark('path:{sample}', 'hellaswag')[0]) == 64"
    environment = os.environ | {"HOME": "/dev/null"}
    environment.pop("HF_HOME", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-800:]


def test_there_are_enough_cases():
    assert len(ALPACA) + len(ITEMS) >= 75
