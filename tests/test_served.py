"""What the registered model makes of its inputs, and what it answers, also as MLflow's server hands them on."""

import json
import threading
import warnings
from dataclasses import asdict

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from banks import make_bank, mixed_bits, pruned, real_model
from conftest import ROOT, tiny_model
from mlflow.exceptions import MlflowException
from mlflow.pyfunc import scoring_server
from peft import get_peft_model

from pipeline import checkpoint, storage
from pipeline.data import alpaca
from pipeline.data import prompts as data_prompts
from pipeline.stages import served, serving
from pipeline.stages.serving import RequestError, Settings
from pipeline.tracking import registry
from pipeline.trial import adapters

SEED = 3  # of a random model whose answers differ
TEMPLATE = (
    "{% for message in messages %}{% if message.content == 'forbidden' %}{{ raise_exception('Not that.') }}{% endif %}"
    "<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def model(tokenizer):
    model = served.Compressed()
    model.model, model.tokenizer, model.one_at_a_time = tiny_model(seed=SEED), tokenizer, threading.Lock()
    return model


@pytest.fixture
def template(model):
    """The chat template of the model's tokenizer, which other tests share."""
    model.tokenizer.chat_template = TEMPLATE
    yield
    model.tokenizer.chat_template = None


def user(text):
    return {"role": "user", "content": text}


def prompts(asked):
    """Alpaca prompts of what is asked; no params stand in it."""
    found, given = serving.questions(asked)
    assert given == {}
    return [one if isinstance(one, str) else serving.flat(one) for one in found]


def test_instructions_become_prompts_in_order():
    assert prompts(["Name a color.", "Add."]) == [alpaca.prompt("Name a color."), alpaca.prompt("Add.")]


def test_named_columns_are_read_by_name_and_an_absent_input_is_none():
    frame = pd.DataFrame({"input": ["1 and 2", None], "instruction": ["Add.", "Name a color."]})
    assert prompts(frame) == [alpaca.prompt("Add.", "1 and 2"), alpaca.prompt("Name a color.")]


def test_a_conversation_is_one_prompt_that_holds_its_earlier_turns():
    messages = [
        {"role": "system", "content": "Be short."},
        user("Name a color."),
        {"role": "assistant", "content": "Red"},
        user("Another."),
    ]
    expected = alpaca.prompt("Be short.\nName a color.") + "Red\n\n" + alpaca.prompt("Another.")
    assert prompts({"messages": messages}) == prompts(messages) == [expected]
    assert serving.questions(messages) == ([messages], {})
    assert prompts(pd.DataFrame({"messages": [[user("A")], [user("B")]]})) == [
        alpaca.prompt("A"),
        alpaca.prompt("B"),
    ]


@pytest.mark.parametrize(
    "asked, told",
    [
        (pd.DataFrame({"id": [7], "instruction": ["Add."]}), "columns id, instruction; give a list"),
        (pd.DataFrame({"instruction": []}), "0 rows"),
        (pd.DataFrame({0: ["Add."]}), "columns 0"),
        ({"prompt": "Add."}, "keys prompt"),
        ({"prompt": ["Add."]}, "columns prompt"),
        ({"instruction": ["Add.", "Sum."], "input": ["1"]}, "differ in length \\(instruction 2, input 1\\)"),
        (np.array("Add."), "'Add.'"),
        (np.array([None]), "instruction 0 is empty"),
        ({}, "keys none"),
        ("Add.", "'Add.'"),
        (None, "input is None"),
        ([], r"input is \[\]"),
        (["Add.", None], "instruction 1 is empty"),
        (["  "], "instruction 0 is empty"),
        ([3], "instruction 0 is 3; it must be a text"),
        ([{"instruction": "Add."}], "is no message"),
        ([user("")], "content of message 0 is empty"),
        ([user("A"), user("B")], "roles are user, user"),
        ([user("A"), {"role": "assistant", "content": "B"}], "the last one user"),
        ([{"role": "system", "content": "Be short."}], "roles are system"),
        ({"messages": "Add."}, "messages: is 'Add.'"),
    ],
)
def test_what_cannot_be_answered_is_one_clear_error(asked, told):
    with pytest.raises(RequestError, match=told):
        serving.questions(asked)


@pytest.mark.parametrize(
    "params, told",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number from 1 to 1023"),
        ({"max_new_tokens": 10**9}, "from 1 to 1023"),
        ({"max_new_tokens": 1.5}, "whole number"),
        ({"max_new_tokens": True}, "whole number"),
        ({"max_new_tokens": None}, "max_new_tokens is None"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": True}, "top_p is True"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [""]}, "stop is"),
        ({"stop": "###"}, "stop is '###'; it must be a list of texts"),
        ({"max_tokens": 5, "n": 1}, "unknown params max_tokens, n; known are max_new_tokens, temperature"),
    ],
)
def test_params_outside_their_limits_are_refused(params, told):
    with pytest.raises(RequestError, match=told):
        serving.settings(params, context=1024)


def test_params_have_defaults():
    assert serving.settings(None, 1024) == Settings(max_new_tokens=64, temperature=0, top_p=1, seed=0, stop=[])


def test_answers_of_a_batch_are_those_of_each_prompt_alone(model):
    asked = ["Name a color.", "List three animals that live in the sea and say what each of them eats.", "Add."]
    params = {"max_new_tokens": 8}
    together = model.predict(None, asked, params)
    assert together == [model.predict(None, [text], params)[0] for text in asked]
    assert len(set(together)) > 1


def test_greedy_answer_is_the_likeliest_token_each_time(model):
    row = model.tokenizer.encode(alpaca.prompt("Add."))
    expected = []
    with torch.inference_mode():
        for _ in range(5):
            expected.append(model.model(input_ids=torch.tensor([row + expected])).logits[0, -1].argmax().item())
    text = model.tokenizer.decode(expected, skip_special_tokens=True)
    assert model.predict(None, ["Add."], {"max_new_tokens": 5}) == [text]


def test_drawn_answers_follow_the_seed_and_leave_the_process_its_own(model):
    before = torch.random.get_rng_state()
    drawn = [
        model.predict(None, ["Add."], {"max_new_tokens": 8, "temperature": 1.5, "seed": seed})[0] for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_answer_ends_before_a_stop_text(model):
    whole = model.predict(None, ["Add."], {"max_new_tokens": 12})[0]
    mark = whole[3:5]
    assert model.predict(None, ["Add."], {"max_new_tokens": 12, "stop": [mark]}) == [whole[: whole.find(mark)]]


def test_prompt_longer_than_the_context_is_refused_by_its_number(model):
    with pytest.raises(MlflowException, match=r"prompt 1 has \d+ tokens: .*more than the 1024") as caught:
        model.predict(None, ["Add.", "word " * 2000])
    assert caught.value.get_http_status_code() == 400


# --- chats


def test_chat_is_asked_by_the_models_own_template(model, template):
    row = model._tokens([{"role": "system", "content": "Be short."}, user("Name a color.")])
    assert model.tokenizer.decode(row) == "<s>system: Be short.</s><s>user: Name a color.</s><s>assistant: "


def test_chat_without_a_template_is_asked_in_alpacas_prompt(model):
    assert model._tokens([user("Add.")]) == model.tokenizer.encode(alpaca.prompt("Add."))


def test_model_that_was_recovered_on_chats_is_asked_instructions_in_its_template_too(model, template):
    model.chats = True
    asked = [{"instruction": "Add.", "input": "1 2"}, {"instruction": "Name a color."}]
    found, _ = serving.questions(pd.DataFrame(asked), data_prompts.conversation)
    assert [model.tokenizer.decode(model._tokens(question)) for question in found] == [
        "<s>user: Add.\n\n1 2</s><s>assistant: ",
        "<s>user: Name a color.</s><s>assistant: ",
    ]
    (answer,) = model.predict(None, ["Add."], {"max_new_tokens": 4})
    chat = {"messages": [user("Add.")], "max_new_tokens": 4}
    assert model.predict(None, chat)["choices"][0]["message"]["content"] == answer
    with pytest.raises(MlflowException, match="template refuses it: Not that."):
        model.predict(None, ["forbidden"])


def test_what_the_template_refuses_is_one_clear_error(model, template):
    with pytest.raises(MlflowException, match="chat template refuses these messages: Not that.") as caught:
        model.predict(None, {"messages": [user("forbidden")]})
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens"])
def test_chat_is_answered_in_openais_form(model, template, name):
    found = model.predict(None, {"messages": [user("Add.")], name: 3})
    row = model._tokens([user("Add.")])
    with torch.inference_mode():
        for _ in range(3):
            row.append(model.model(input_ids=torch.tensor([row])).logits[0, -1].argmax().item())
    text = model.tokenizer.decode(row[-3:], skip_special_tokens=True)
    (choice,) = found["choices"]
    assert found["object"] == "chat.completion"
    assert (choice["message"]["role"], choice["message"]["content"]) == ("assistant", text)
    assert choice["finish_reason"] == "length"
    asked = len(row) - 3
    assert found["usage"] == {"prompt_tokens": asked, "completion_tokens": 3, "total_tokens": len(row)}


def test_chat_that_ends_by_itself_or_by_a_stop_text_says_so(model):
    chat = {"messages": [user("Add.")], "max_new_tokens": 12}
    whole = model.predict(None, chat)["choices"][0]["message"]["content"]
    (choice,) = model.predict(None, chat | {"stop": [whole[3:5]]})["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == whole[: whole.find(whole[3:5])]
    with torch.inference_mode():
        logits = model.model(input_ids=torch.tensor([model._tokens(chat["messages"])])).logits
    model.model.generation_config.eos_token_id = [logits[0, -1].argmax().item()]
    found = model.predict(None, chat)
    assert found["choices"][0]["finish_reason"] == "stop" and found["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    "ends, rest, stop, tokens, complete, text",
    [
        (1, [1, 1, 1], [], 4, True, "A tree"),  # the end of text is the padding, too
        ([7, 9], [9, 1, 1], [], 4, True, None),
        ([7], [], [], 3, False, "A tree"),
        ([7], [1, 1], ["ree"], 3, True, "A t"),  # a stop text ended it before its neighbours
        (None, [], ["x"], 3, False, "A tree"),
    ],
)
def test_answer_ends_where_the_row_does(model, ends, rest, stop, tokens, complete, text):
    row = model.tokenizer.encode("A tree")
    assert len(row) == 3 and model.tokenizer.pad_token_id == 1
    model.model.generation_config.eos_token_id = ends
    found = model._answer(row + rest, stop)
    assert (found.tokens, found.complete) == (tokens, complete)
    assert text is None or found.text == text


@pytest.mark.parametrize("extra", [{"n": 2}, {"stream": True}, {"temperature": "hot"}, {"max_tokens": 10**9}])
def test_params_beside_messages_are_refused_as_others_are(model, extra):
    with pytest.raises(MlflowException, match="unknown params|must be a"):
        model.predict(None, {"messages": [user("Add.")]} | extra)


def test_several_chats_are_answered_as_texts_each_as_alone(model, template):
    chats = [[user("Add.")], [user("Name a color.")]]
    params = {"max_new_tokens": 4}
    alone = [model.predict(None, {"messages": chat}, params)["choices"][0]["message"]["content"] for chat in chats]
    assert model.predict(None, pd.DataFrame({"messages": chats}), params) == alone
    assert model.predict(None, {"messages": chats}, params) == alone


def test_answers_stop_at_their_own_ends_in_a_batch(model):
    asked = ["Name a color.", "Add.", "List three animals that live in the sea."]
    long = [model.predict(None, [one], {"max_new_tokens": 12})[0] for one in asked]
    params = {"max_new_tokens": 12, "stop": [long[1][2:4]]}
    alone = [model.predict(None, [one], params)[0] for one in asked]
    assert alone[1] == long[1][: long[1].find(long[1][2:4])]
    assert model.predict(None, asked, params) == alone


# --- through MLflow


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tokenizer):
    """A built model of 4, 8 and 16 bits, logged by MLflow and loaded as its server loads it."""
    folder = tmp_path_factory.mktemp("served")
    config, state = pruned()
    (folder / "bank").mkdir()
    bank = make_bank(folder / "bank", config, state)
    with storage.writing(folder / "final") as inside:
        real = real_model(config, state, bank, mixed_bits(config))
        real.save_pretrained(inside)
        get_peft_model(real, adapters.lora_config(config, bank.settings, 0.0)).save_pretrained(
            inside / checkpoint.ADAPTER
        )
        tokenizer.save_pretrained(inside)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*input example", UserWarning)
        mlflow.pyfunc.save_model(
            folder / "model",
            python_model=str(ROOT / "pipeline/stages/served.py"),
            artifacts={"checkpoint": str(folder / "final")},
            pip_requirements=[],
            signature=registry._signature(asdict(Settings())),
        )
    return mlflow.pyfunc.load_model(str(folder / "model"))


def invoked(loaded, **body):
    return json.loads(scoring_server.invocations(json.dumps(body), "application/json", loaded, None).response)


def test_every_form_of_the_server_asks_the_same(loaded):
    params = {"max_new_tokens": 4}
    expected = loaded.predict(["Add.", "Name a color."], params=params)
    assert len(expected) == 2 and expected[0]
    for body in (
        {"instances": ["Add.", "Name a color."]},
        {"inputs": ["Add.", "Name a color."]},
        {"instances": [{"instruction": "Add."}, {"instruction": "Name a color."}]},
        {"dataframe_split": {"columns": ["instruction"], "data": [["Add."], ["Name a color."]]}},
        {"dataframe_records": [{"instruction": "Add."}, {"instruction": "Name a color."}]},
    ):
        assert invoked(loaded, **body, params=params) == {"predictions": expected}
    with_input = {"instruction": "Add.", "input": "1 and 2"}
    assert (
        invoked(loaded, instances=[with_input], params=params)
        == invoked(loaded, dataframe_records=[with_input], params=params)
        == {"predictions": loaded.predict(pd.DataFrame([with_input]), params=params)}
    )


def test_server_answers_a_chat_unwrapped(loaded):
    found = invoked(loaded, messages=[user("Add.")], max_new_tokens=4)
    assert found["choices"][0]["message"]["content"] == loaded.predict(["Add."], params={"max_new_tokens": 4})[0]
    assert found["usage"]["completion_tokens"] == 4
    several = invoked(loaded, instances=[{"messages": [user("Add.")]}], params={"max_new_tokens": 4})
    assert several == {"predictions": [found["choices"][0]["message"]["content"]]}


@pytest.mark.parametrize(
    "body, told",
    [
        ({"instances": [None]}, "instruction 0 is empty"),
        ({"instances": []}, "give a list of instructions"),
        ({"instances": [" "]}, "instruction 0 is empty"),
        ({"instances": ["word " * 2000]}, "more than the 1024 that the model can hold"),
        ({"instances": ["Add."], "params": {"max_new_tokens": 10**9}}, "from 1 to 1023"),
        ({"instances": ["Add."], "params": {"temperature": None}}, "temperature"),
        ({"dataframe_split": {"columns": ["question"], "data": [["Add."]]}}, "columns question"),
        ({"messages": [user("Add.")], "n": 2}, "unknown params n; known are max_new_tokens, temperature"),
        ({"messages": []}, "messages: is []"),
        ({"messages": [user(None)]}, "content of message 0 is empty"),
        ({"messages": [user("word " * 2000)]}, "more than the 1024 that the model can hold"),
    ],
)
def test_server_refuses_with_status_400_and_what_to_give(loaded, body, told):
    with pytest.raises(MlflowException) as caught:
        scoring_server.invocations(json.dumps(body), "application/json", loaded, None)
    assert caught.value.get_http_status_code() == 400 and told in str(caught.value)
