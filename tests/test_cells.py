import pytest

from pipeline.results import cells
from pipeline.results.cells import FACTORS, ROWS, VARIANT, Cell

ORIGIN = {"base": "b", "alpaca": "a", "items": ["i"], "device": "cpu"}


@pytest.fixture
def params(default):
    table = default.table.model_copy(update={"ratios": (0.2, 0.35), "steps": 7, "limit": 5, "n_trials": 3})
    return default.model_copy(update={"table": table})


def at(params, row, **changes):
    """A cell whose params have values of sections replaced: `recover__steps=3`."""
    for name, value in changes.items():
        section, _, field = name.partition("__")
        params = cells.changed(params, section, **{field: value})
    return Cell(row, params, "title")


def test_cells_are_the_untouched_model_once_and_four_methods_at_each_ratio(params):
    found = cells.cells(params)
    assert [one.row for one in found] == ["dense", *ROWS, *ROWS]
    assert [one.params.prune.ratio for one in found] == [0.2] * 5 + [0.35] * 4
    assert found[1].title == "20% LLM-Pruner (16-bit)" and found[8].title == "35% QPruner3"
    assert len({cells.key(one, ORIGIN) for one in found}) == 9


def test_qpruner3_of_the_ablation_is_the_tables(params):
    assert cells.qpruner3(cells.at_ratio(params, 0.35)) == cells.cells(params)[-1]


# What each row's result depends on, and what it does not.
DEPENDS = [
    ("dense", {"table__limit": 6}, True),
    ("dense", {"evaluate__limit": 3}, True),
    ("dense", {"evaluate__tasks": ("piqa",)}, True),
    ("dense", {"table__steps": 8}, False),
    ("dense", {"prune__ratios": (0.3,)}, False),
    ("dense", {"quantize__four_bit": "fp4"}, False),
    ("qpruner1", {"table__steps": 8}, True),
    ("qpruner1", {"prune__ratios": (0.3,)}, True),
    ("qpruner1", {"quantize__four_bit": "fp4"}, True),
    ("qpruner1", {"recover__learning_rate": 0.001}, True),
    ("qpruner1", {"data__validation_rows": 3}, True),
    ("qpruner1", {"recover__steps": 8}, False),
    ("qpruner1", {"importance__clusters": 5}, False),
    ("qpruner1", {"table__n_trials": 4}, False),
    ("qpruner1", {"build__steps": 99}, False),
    ("qpruner2", {"importance__clusters": 5}, True),
    ("qpruner2", {"search__max_8bit_fraction": 0.5}, True),
    ("qpruner2", {"search__average_bits": 4.5}, True),
    ("qpruner2", {"search__memory_budget_gib": 2.0}, True),
    ("qpruner2", {"search__n_random": 9}, False),
    ("qpruner3", {"search__n_random": 9}, True),
    ("qpruner3", {"table__n_trials": 4}, True),
    ("qpruner3", {"recover__steps": 8}, True),
    ("qpruner3", {"search__n_trials": 99}, False),
    ("qpruner3", {"search__workers": 4}, False),
    ("qpruner3", {"search__cluster": "auto"}, False),
    ("qpruner3", {"search__retries": 7}, False),
    ("qpruner3", {"table__ratios": (0.1,)}, False),
]


@pytest.mark.parametrize("row, change, depends", DEPENDS)
def test_key_of_a_cell_follows_what_its_result_depends_on(params, row, change, depends):
    assert (cells.key(at(params, row, **change), ORIGIN) != cells.key(at(params, row), ORIGIN)) is depends


@pytest.mark.parametrize("name, value", [("base", "c"), ("alpaca", "c"), ("items", ["c"]), ("device", "cuda")])
def test_key_of_a_cell_follows_model_data_and_device(params, name, value):
    assert cells.key(at(params, "dense"), ORIGIN | {name: value}) != cells.key(at(params, "dense"), ORIGIN)


def test_key_of_a_variant_follows_its_bits_and_not_its_title(params):
    keys = [
        cells.key(Cell(VARIANT, params, title, bits), ORIGIN) for title, bits in (("a", "48"), ("b", "48"), ("a", "84"))
    ]
    assert keys[0] == keys[1] != keys[2]


def test_variants_of_the_default_params_share_one_default_cell(params):
    default = cells.qpruner3(params)
    found = cells.variants(default, "4484")
    assert [(factor.title, title) for factor, title, _ in found] == [
        ("4-bit type", "NF4"), ("4-bit type", "FP4"),
        ("4-bit codes", "nearest"), ("4-bit codes", "calibrated"),
        ("initialization", "LoftQ"), ("initialization", "weighted"), ("initialization", "Gaussian"),
        ("initialization", "PiSSA"),
        ("target", "answers"), ("target", "teacher"),
        ("LoftQ iterations", "1"), ("LoftQ iterations", "2"), ("LoftQ iterations", "4"),
        ("importance", "Element1"), ("importance", "Element2"),
    ]  # fmt: skip
    own = [title for _, title, cell in found if cell is default]
    assert own == ["NF4", "calibrated", "weighted", "teacher", "Element1"]
    assert len({cells.key(cell, ORIGIN) for *_, cell in found}) == 10
    assert {cell.bits for *_, cell in found if cell is not default} == {"4484"}


def test_variant_changes_its_factor_alone(params):
    for factor, title, cell in cells.variants(cells.qpruner3(params), "4484"):
        (value,) = [value for value, name in factor.values.items() if name == title]
        start = {"init": "loftq"} if factor.name == "iterations" else {}
        assert cell.params == cells.changed(params, factor.section, **{factor.name: value}, **start)


def test_default_that_the_paper_does_not_vary_over_comes_first_in_its_factor(params):
    default = cells.qpruner3(cells.changed(params, "prune", importance="surgeon"))
    found = [(title, cell is default) for factor, title, cell in cells.variants(default, "44") if factor == FACTORS[-1]]
    assert found == [("surgeon", True), ("Element1", False), ("Element2", False)]


def test_iterations_are_varied_under_loftq_whatever_the_default_is(params):
    default = cells.qpruner3(cells.changed(params, "quantize", init="gaussian"))
    found = [cell.params.quantize for factor, _, cell in cells.variants(default, "44") if factor.name == "iterations"]
    assert [(one.init, one.iterations) for one in found] == [("loftq", 1), ("loftq", 2), ("loftq", 4)]
