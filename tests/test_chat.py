"""Conversations: what is wrong with a row, how a chat template writes one, which tokens are learned."""

import copy
import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, tiny_model, write_jsonl

from pipeline.data import alpaca, calibration, chat, fetch
from pipeline.data.alpaca import IGNORED, Example
from pipeline.data.fetch import FetchError, Sources
from pipeline.data.prompts import conversation
from pipeline.export import answers
from pipeline.trial.loss import row_losses

CHATML = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
# Earlier answers lose a word, as thoughts are taken out of them; the prompt holds more than the answer repeats.
FORGETFUL = (
    "{% for m in messages %}<s>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant\n"
    "{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
ENDED = CHATML + "{% if not add_generation_prompt %}</s>{% endif %}"  # a whole conversation ends with one more token
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}" + CHATML
DATED = "\n{{ strftime_now('%d %B %Y') }}\n" + CHATML
TURNS = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a color."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "And a tree?"},
    {"role": "assistant", "content": "Oak."},
    {"role": "user", "content": "Thanks."},
]
ROW = {"messages": TURNS}


def say(role, content):
    return {"role": role, "content": content}


@pytest.fixture
def chatting(tokenizer):
    """Return the tokenizer with a chat template, which other tests do not see."""

    def with_template(template):
        own = copy.copy(tokenizer)
        own.chat_template = template
        return own

    return with_template


def said(example, tokenizer):
    return [tokenizer.decode(example.tokens[start:end]) for start, end in example.responses]


def test_all_answers_and_the_ends_of_turns_are_learned_and_nothing_else(chatting):
    tokenizer = chatting(CHATML)
    (example,) = alpaca.encode([ROW], tokenizer, 500)
    assert said(example, tokenizer) == ["Blue.</s>", "Oak.</s>"]
    # Before each answer stands what a server would ask the model then, and what follows the last one is left out.
    for (start, _), place in zip(example.responses, (2, 4), strict=True):
        asked = tokenizer.apply_chat_template(TURNS[:place], add_generation_prompt=True, return_dict=False)
        assert list(example.tokens[:start]) == asked
    labels = alpaca.batch([example], 0, whole=False).labels[0]
    wanted = [label for label in labels.tolist() if label != IGNORED]
    assert tokenizer.decode(wanted) == "Blue.</s>Oak.</s>"
    whole = alpaca.batch([example], 0, whole=True).labels[0]
    assert whole[1 : len(example.tokens)].tolist() == list(example.tokens[1:])


@pytest.mark.parametrize("template", [FORGETFUL, ENDED], ids=["changes_earlier_turns", "ends_whole_conversations"])
def test_template_that_rewrites_earlier_turns_gives_each_answer_its_own_row(chatting, template):
    tokenizer = chatting(template)
    examples = alpaca.encode([ROW], tokenizer, 500)
    assert len(examples) == 2 and not any(example.gaps for example in examples)
    for example, place in zip(examples, (2, 4), strict=True):
        asked = chat.written(TURNS[:place], tokenizer, answered=False)
        assert tokenizer.decode(example.tokens[: example.response]) == asked
    assert [text.replace("\n</s>", "") for row in examples for text in said(row, tokenizer)] == [
        "Blue.</s>",
        "Oak.</s>",
    ]


def test_prompt_that_opens_a_thought_which_the_answer_lacks_is_cut_where_they_part(chatting):
    template = (
        "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n<think>{% endif %}"
    )
    tokenizer = chatting(template)
    (example,) = alpaca.encode([{"messages": TURNS[:3]}], tokenizer, 500)
    assert said(example, tokenizer) == ["Blue.</s>"]


@pytest.mark.parametrize("beyond, expected", [(-1, None), (0, None), (1, 1), (2, 2)])
def test_long_conversation_is_cut_within_an_answer(chatting, beyond, expected):
    tokenizer = chatting(CHATML)
    (whole,) = alpaca.encode([ROW], tokenizer, 500)
    (first, end), (second, _) = whole.responses
    found = alpaca.encode([ROW], tokenizer, second + beyond)
    lengths = [stop - start for start, stop in found[0].responses]
    assert lengths == [end - first, *([expected] if expected else [])]
    assert found[0].tokens == whole.tokens[: second + beyond if expected else end]
    assert alpaca.encode([ROW], tokenizer, first) == []


def test_tokens_are_the_same_on_any_day(chatting):
    tokenizer = chatting(DATED)
    assert chat.written(TURNS, tokenizer, answered=False).startswith("\n01 January 2026\n<s>system")


def test_response_loss_and_exported_rows_follow_all_answers(chatting):
    model, tokenizer = tiny_model(), chatting(CHATML)
    (example,) = alpaca.encode([ROW], tokenizer, 500)
    rows = answers.rows_of([example])
    assert [tokenizer.decode(response) for _, response in rows] == ["Blue.</s>", "Oak.</s>"]
    expected = -sum(map(sum, answers.log_probabilities(model, rows)))  # each answer by itself, by full logits
    ((loss, count),) = row_losses(model, [example], 1, tokenizer.pad_token_id)
    assert count == sum(len(response) for _, response in rows)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_example_without_gaps_is_learned_from_its_response_on():
    assert Example((5, 6, 7, 8), 2).responses == [(2, 4)]
    assert Example((5, 6, 7, 8, 9), 1, ((2, 4),)).responses == [(1, 2), (4, 5)]


@pytest.mark.parametrize("text", ["packed", "responses", "snippets"])
def test_calibration_reads_what_is_said(tmp_path, tokenizer, text):
    write_jsonl(tmp_path / "rows.jsonl", [ROW] * 3)
    (part,) = calibration.batches(tokenizer, tmp_path / "rows.jsonl", 1, 0, text=text, samples=2, max_length=8)
    found = tokenizer.decode(part.tokens[0][:8])
    said = "Name a color.\nBlue.\nAnd a tree?\nOak.\nThanks."
    expected = {"responses": "Blue.\n\nBlue.\n\nOak.\n\nOak.\n\n"}  # of the two rows that are not held out
    assert found and found in expected.get(text, said)


# --- rows as users have them


def test_alpaca_row_becomes_a_conversation():
    assert conversation("Add.", "1 2", "3") == [say("user", "Add.\n\n1 2"), say("assistant", "3")]
    assert conversation("Add.") == [say("user", "Add.")]


@pytest.mark.parametrize(
    "messages, wanted",
    [
        (None, "needs a list of messages"),
        ([], "needs a list of messages"),
        ("hello", "needs a list of messages"),
        ([say("user", "a"), "b"], "message 2 is 'b', and needs role and content"),
        ([say("user", "a"), {"role": "assistant"}], "message 2 is {'role': 'assistant'}, and needs"),
        ([say("user", "a"), say("tool", "b")], "message 2 has the role 'tool'; known are system, user, assistant"),
        ([say(["user"], "a")], "message 1 has the role ['user']"),
        ([say("user", "a"), say("system", "b")], "message 2 is the system's"),
        ([say("user", "a"), say("assistant", None)], "message 2 has the content null"),
        ([say("user", "a"), say("assistant", " \n")], "message 2 is empty"),
        ([say("user", "\ud800"), say("assistant", "b")], "half of a surrogate pair"),
        ([say("user", "a")], "it has no message of the assistant"),
        ([say("assistant", "a"), say("user", "b")], "the assistant speaks before the user"),
        (TURNS, ""),
    ],
)
def test_row_of_messages_is_judged(messages, wanted):
    found = chat.fault({"messages": messages})
    assert (wanted in found) if wanted else found == ""


def test_columns_and_roles_go_by_the_rows_own_names():
    names = {"messages": "conversations", "role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    row = {"id": 3, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 1}]}
    assert chat.of_columns(row, names) == {"messages": [say("user", "a"), say("assistant", "b")]}
    row["conversations"][1]["from"] = "bing"
    assert "the role 'bing'" in chat.fault(chat.of_columns(row, names))
    assert chat.of_columns([row], names) == [row] and chat.fault([row])


def files(folder):
    lines = "".join(json.dumps(ROW) + "\n" for _ in range(2))
    (folder / "a.jsonl").write_text(lines)
    (folder / "a.json").write_text(json.dumps([ROW, ROW]))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), folder / "a.parquet")
    return ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"]


def test_rows_of_messages_are_read_in_every_form(tmp_path):
    for name in files(tmp_path):
        assert fetch.alpaca(f"path:{tmp_path / name}", form="chat") == ([ROW, ROW], [])


def test_hub_rows_are_mapped_from_their_own_columns(monkeypatch):
    monkeypatch.setattr(fetch, "_hub_rows", lambda path, **_: [{"question": "Add.", "answer": "3", "id": 1}])
    names = {"instruction": "question", "output": "answer", "input": None}
    assert fetch.alpaca("hub:org/name@main", names=names)[0] == [{"instruction": "Add.", "input": "", "output": "3"}]


# --- fetch


@pytest.fixture
def sources(tmp_path, monkeypatch, model_folder, chatting):
    """Return a maker of sources with a model whose tokenizer has a chat template; rows are then fetched."""
    monkeypatch.chdir(tmp_path)

    def of(rows, template=CHATML, form="chat", **others):
        folder = tmp_path / "model"
        folder.mkdir()
        for file in model_folder.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        chatting(template).save_pretrained(folder)
        write_jsonl(Path("rows.jsonl"), rows)
        given = {"form": form, "prompt": "chat", "max_skipped": 0.0} | others
        benchmarks = f"path:{ROOT / 'data/sample/benchmarks'}"
        return Sources(f"path:{folder}", "path:rows.jsonl", benchmarks, ("boolq",), 1, **given)

    return of


def refused(given):
    with pytest.raises(FetchError) as caught:
        fetch.run(given)
    assert not fetch.ALPACA.exists() and not fetch.BASE.exists()
    return str(caught.value)


def test_fetched_rows_are_conversations_whatever_they_came_as(sources):
    rows = [{"instruction": "Add.", "input": "1 2", "output": str(number)} for number in range(3)]
    figures = fetch.run(sources(rows, form="alpaca"))
    assert (figures["alpaca_rows"], figures["alpaca_skipped"]) == (3, 0)
    assert alpaca.read(fetch.ALPACA) == [{"messages": conversation("Add.", "1 2", str(number))} for number in range(3)]


def test_faulty_conversations_are_named_at_once(sources):
    message = refused(sources([ROW, {"messages": TURNS[:2]}, ROW, {"messages": [say("robot", "a")]}]))
    assert "row 2: it has no message of the assistant" in message and "row 4: message 1 has the role" in message
    assert "2 of 4 rows cannot be used" in message


def test_what_the_template_refuses_is_named_by_its_row_in_the_file(sources):
    rows = [{"messages": TURNS[1:]}] * 8 + [{"messages": []}, ROW]
    message = refused(sources(rows, STRICT, max_skipped=0.1))
    assert "row 10: the model's chat template refuses it: No system." in message


def test_few_conversations_that_the_template_refuses_are_left_out(sources):
    figures = fetch.run(sources([{"messages": TURNS[1:]}] * 9 + [ROW], STRICT, max_skipped=0.1))
    assert (figures["alpaca_rows"], figures["alpaca_skipped"]) == (9, 1)


def test_tokenizer_without_a_template_is_refused(sources):
    message = refused(sources([ROW, ROW], None))
    assert "data.prompt: chat is the model's own template" in message and "has none" in message


def test_conversations_that_leave_no_room_for_an_answer_are_refused(sources):
    assert "recover.max_length: 9 tokens leave no room" in refused(
        sources([ROW, ROW], prompts={"recover.max_length": 9})
    )
