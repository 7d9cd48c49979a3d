import pytest
from conftest import ROOT

from pipeline.data import definitions, tasks
from pipeline.errors import UserError
from pipeline.params import TASKS

SAMPLE = ROOT / "data/sample/benchmarks"
PASSAGE = (
    "Sound wave -- Sound is a vibration that passes through a material as regions of higher and lower pressure. It "
    "needs particles that can push on one another, so it moves through air, water and steel, usually fastest in stiff "
    "solids. In a vacuum there are no particles to carry the disturbance, and no sound is transmitted. Robert Boyle "
    "showed this in the seventeenth century by removing air from a glass jar until the ticking of a watch inside faded."
)
PARK = "The dog chased the squirrel across the park until the"
JAVELIN = "Throwing a javelin: An athlete grips her javelin and runs down the track toward the white line. She"
# The prompt and choices of each sample file's first item, and the number of its gold choice.
PROMPTS = {
    "boolq": (f"{PASSAGE}\nQuestion: can sound travel through a vacuum?\nAnswer:", [" no", " yes"], 0),
    "piqa": (
        "Question: How can I tell if a frying pan is hot enough?\nAnswer:",
        [
            " Press your bare palm on the metal and count slowly to twenty.",
            " Flick in a drop of water and see whether it sizzles.",
        ],
        1,
    ),
    "hellaswag": (
        JAVELIN,
        [
            " plants her front foot and hurls the javelin high over the field.",
            " plants her javelin in a pot and waters it in front of the judges.",
            " throws her shoes over the field and runs home with the line.",
            " stops at the line and breaks the javelin up for firewood.",
        ],
        0,
    ),
    "arc_easy": (
        "Question: Which habit best helps stop germs from spreading before a meal?\nAnswer:",
        [" sitting up straight", " combing your hair", " putting on a hat", " washing hands with soap"],
        3,
    ),
    "arc_challenge": (
        "Question: A bottle of perfume is opened in one corner, and soon people across the still room can smell it. "
        "Which process spread the scent?\nAnswer:",
        [" erosion", " freezing", " diffusion", " reflection"],
        2,
    ),
    "openbookqa": (
        "A girl pushes a swing harder, and the swing",
        [" gets heavier", " stops sooner", " loses its chains", " goes higher"],
        3,
    ),
}
HUB = {
    "boolq": ("aps/super_glue", "boolq", "validation"),
    "piqa": ("baber/piqa", None, "validation"),
    "hellaswag": ("Rowan/hellaswag", None, "validation"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test"),
    "openbookqa": ("allenai/openbookqa", "main", "test"),
}


@pytest.fixture(scope="module")
def loaded():
    return tasks.load(TASKS, SAMPLE)


@pytest.fixture(scope="module")
def pairs(loaded):
    """The (context, continuation) pairs of each task's first item."""
    found = {}
    for name, task in loaded.items():
        task.build_all_requests(limit=1, rank=0, world_size=1)
        found[name] = [instance.args for instance in task.instances]
        task._instances = None
    return found


def test_all_seven_load_in_order_with_every_sample_item(loaded):
    assert tuple(loaded) == TASKS
    for name, task in loaded.items():
        assert len(list(task.eval_docs)) == len((SAMPLE / f"{name}.jsonl").read_text().splitlines())


def test_tables_name_the_seven_tasks():
    assert tuple(tasks.FIELDS) == TASKS
    assert set(tasks.CHANCE) == set(TASKS)


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_is_lm_evals_own(pairs, name):
    context, choices, _ = PROMPTS[name]
    assert pairs[name] == [(context, choice) for choice in choices]


def test_winogrande_puts_each_option_into_the_context(pairs):
    ending = " escaped up a tall oak tree."
    assert pairs["winogrande"] == [(f"{PARK} squirrel", ending), (f"{PARK} dog", ending)]


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_one_over_the_number_of_choices(pairs, name):
    assert tasks.CHANCE[name] == 1 / len(pairs[name])


@pytest.mark.parametrize("name", PROMPTS)
def test_gold_choice_of_the_first_item(loaded, name):
    document = next(iter(loaded[name].eval_docs))
    assert int(loaded[name].doc_to_target(document)) == PROMPTS[name][2]


def test_winogrande_gold_is_the_answer(loaded):
    document = next(iter(loaded["winogrande"].eval_docs))
    assert loaded["winogrande"].doc_to_text(document) == 0


@pytest.mark.parametrize("name", TASKS)
def test_own_metric_is_one_that_lm_eval_computes(loaded, name):
    assert definitions.metric(name) in loaded[name].aggregation()


@pytest.mark.parametrize("name", TASKS)
def test_hub_source_is_where_lm_eval_looks(name):
    assert tasks.hub_source(name) == tasks.HubSource(*HUB[name])


def test_missing_file_names_the_stage(tmp_path):
    with pytest.raises(UserError, match=r"piqa\.jsonl does not exist; run: dvc repro fetch"):
        tasks.load(["piqa"], tmp_path)


def test_items_come_from_the_folder_that_was_named(tmp_path):
    (tmp_path / "piqa.jsonl").write_text('{"goal": "Walk", "sol1": "one", "sol2": "two", "label": 0}\n')
    task = tasks.load(["piqa"], tmp_path)["piqa"]
    assert [task.doc_to_text(document) for document in task.eval_docs] == ["Question: Walk\nAnswer:"]


def test_changed_items_are_read_anew(tmp_path):
    for goal in ("First", "Second"):
        (tmp_path / "piqa.jsonl").write_text(f'{{"goal": "{goal}", "sol1": "one", "sol2": "two", "label": 0}}\n')
        (document,) = tasks.load(["piqa"], tmp_path)["piqa"].eval_docs
        assert document["goal"] == goal


def test_templates_are_compiled_once_for_a_while():
    from lm_eval import utils

    plain = utils.env.from_string
    with tasks.compiled_templates():
        assert utils.env.from_string("{{a}} and {{b}}") is utils.env.from_string("{{a}} and {{b}}")
        assert [utils.apply_template("{{a}}!", {"a": value}) for value in (1, 2)] == ["1!", "2!"]
    assert utils.env.from_string == plain
    assert utils.env.from_string("{{a}}") is not utils.env.from_string("{{a}}")
