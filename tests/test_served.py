"""What the registered model makes of its inputs, and what it answers."""

import pandas as pd
import pytest
import torch
from conftest import tiny_model
from mlflow.exceptions import MlflowException

from pipeline.data import alpaca
from pipeline.stages import served, serving
from pipeline.stages.serving import RequestError, Settings

SEED = 3  # of a random model whose answers differ


@pytest.fixture
def model(tokenizer):
    model = served.Compressed()
    model.model, model.tokenizer = tiny_model(seed=SEED), tokenizer
    return model


def user(text):
    return {"role": "user", "content": text}


def test_instructions_become_prompts_in_order():
    assert serving.prompts(["Name a color.", "Add."]) == [alpaca.prompt("Name a color."), alpaca.prompt("Add.")]


def test_named_columns_are_read_by_name_and_an_absent_input_is_none():
    frame = pd.DataFrame({"input": ["1 and 2", None], "instruction": ["Add.", "Name a color."]})
    assert serving.prompts(frame) == [alpaca.prompt("Add.", "1 and 2"), alpaca.prompt("Name a color.")]


def test_a_conversation_is_one_prompt_that_holds_its_earlier_turns():
    messages = [
        {"role": "system", "content": "Be short."},
        user("Name a color."),
        {"role": "assistant", "content": "Red"},
        user("Another."),
    ]
    expected = alpaca.prompt("Be short.\nName a color.") + "Red\n\n" + alpaca.prompt("Another.")
    assert serving.prompts({"messages": messages}) == serving.prompts(messages) == [expected]
    assert serving.prompts(pd.DataFrame({"messages": [[user("A")], [user("B")]]})) == [
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
        serving.prompts(asked)


@pytest.mark.parametrize(
    "params, told",
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be a whole number from 1 to 1023"),
        ({"max_new_tokens": 10**9}, "from 1 to 1023"),
        ({"max_new_tokens": 1.5}, "whole number"),
        ({"max_new_tokens": True}, "whole number"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop": [""]}, "stop is"),
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
