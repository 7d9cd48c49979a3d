"""Which bits are built: option ``build.choose``."""

import pytest

from pipeline.trial.build import BuildError, choose

RUN, OTHER, OUTSIDE = "a" * 32, "b" * 32, "4" * 31 + "8"


def row(run_id, bits, expected, memory, front=True):
    """The measured score says the opposite of the expected one: a lucky trial is not the best."""
    figures = {"score": 1 - expected, "expected": expected, "memory_bytes": memory}
    return {"run_id": run_id, "ratio": 0.2, "bits": bits, "front": front} | figures


ROWS = [row(RUN, "4448", 0.5, 90), row(OTHER, "8448", 0.6, 100), row("c" * 32, "8888", 0.9, 80, front=False)]


def test_best_is_the_highest_expected_score_on_the_front():
    assert choose("best", ROWS) == ("0.2:8448", OTHER)


def test_of_equal_expectations_the_one_with_less_memory_is_best():
    assert choose("best", [*ROWS, row("d" * 32, "4848", 0.6, 99)]) == ("0.2:4848", "d" * 32)


def test_run_is_found_on_and_off_the_front():
    assert choose(RUN, ROWS) == ("0.2:4448", RUN)
    assert choose("c" * 32, ROWS) == ("0.2:8888", "c" * 32)


def test_bits_are_taken_as_they_are():
    assert choose("4488", ROWS) == ("4488", None)
    assert choose("0:44f8", ROWS) == ("0:44f8", None)
    assert choose("0.2:4448", ROWS) == ("0.2:4448", RUN)  # a trial has tried it


@pytest.mark.parametrize("known", [True, False])
def test_thirty_two_digits_are_a_run_or_else_bits(known):
    rows = [*ROWS, row(OUTSIDE, "8448", 0.1, 1)] if known else ROWS
    assert choose(OUTSIDE, rows) == (("0.2:8448", OUTSIDE) if known else (OUTSIDE, None))


def test_unknown_run_and_empty_front_say_what_to_do():
    with pytest.raises(BuildError, match=rf"no finished trial of this study has the run id {'ab' * 16}; see reports"):
        choose("ab" * 16, ROWS)
    with pytest.raises(BuildError, match="the front is empty.*mlflow run"):
        choose("best", ROWS[2:])
