import random

import pytest

from pipeline import search
from pipeline.allocate import Space
from pipeline.importance import Priors
from pipeline.search import Candidate, SearchError, Study
from pipeline.trial import Result

UNITS = 8
SPACE = Space(base=1000, deltas=(10,) * UNITS, max_eights=2, budget=None)
PRIORS = Priors(
    units=tuple(map(str, range(UNITS))),
    mutual_information=(0.1, 0.9, 0.2, 0.8, 0.3, 0.0, 0.0, 0.0),
    sensitivity=(0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.4, 0.0),
    loss=1.0,
    tokens=10,
)


def result(bits):
    text = "".join(map(str, bits))
    score = sum((index + 1) * (width == 8) for index, width in enumerate(bits)) / 100
    return Result(
        text,
        score,
        0.01,
        {"piqa": (score, 0.02)},
        {},
        -1.0,
        2.0,
        SPACE.memory(bits),
        500,
        "predicted",
        {"recover": 1.0},
        4,
    )


@pytest.fixture
def settings(default):
    return default.search.model_copy(update={"n_trials": 7, "n_random": 2, "max_8bit_fraction": 0.25})


def searcher(study, tried, failing=()):
    def attempt(trial, candidate, done):
        tried.append(candidate)
        if candidate.bits in failing:
            error = MemoryError("out of memory")
            study.fail(trial, error)
            return error
        found = result(candidate.bits)
        study.complete(trial, f"run{trial.number}", found)
        return found

    return attempt


def run(folder, settings, failing=(), name="study"):
    tried = []
    study = Study(folder, name, UNITS)
    failed = search.run(study, settings, SPACE, PRIORS, 0, searcher(study, tried, failing))
    return study, tried, failed


def test_search_starts_from_the_papers_vectors_and_stays_feasible(tmp_path, settings):
    study, tried, failed = run(tmp_path, settings)
    assert [candidate.method for candidate in tried] == [
        "qpruner1", "qpruner2", "sensitivity", "random", "random", "sampler", "sampler"
    ]  # fmt: skip
    assert tried[0].bits == (4,) * UNITS
    assert tried[1].bits == (4, 8, 4, 8, 4, 4, 4, 4)
    assert tried[2].bits == (8, 4, 4, 4, 4, 4, 8, 4)
    assert failed == 0
    assert all(candidate.bits in SPACE for candidate in tried)
    assert len({candidate.bits for candidate in tried}) == len(tried) == len(study.finished())


def test_search_resumes_with_every_finished_trial_once(tmp_path, settings):
    _, first, _ = run(tmp_path, settings.model_copy(update={"n_trials": 4}))
    study, second, _ = run(tmp_path, settings)
    assert len(first) == 4 and len(second) == 3
    assert [Result.from_json(one["result"]).bits for one in study.finished()] == [
        "".join(map(str, candidate.bits)) for candidate in first + second
    ]


def test_search_with_enough_trials_runs_none(tmp_path, settings):
    run(tmp_path, settings)
    assert run(tmp_path, settings)[1] == []


def test_interrupted_trial_runs_again_first(tmp_path, settings):
    study, _, _ = run(tmp_path, settings.model_copy(update={"n_trials": 3}))
    bits = (4, 4, 4, 4, 8, 8, 4, 4)
    study.start(Candidate(bits, "sampler"))  # and the process dies here
    _, tried, _ = run(tmp_path, settings.model_copy(update={"n_trials": 4}))
    assert tried == [Candidate(bits, "sampler")]


def test_torn_journal_line_is_cut(tmp_path, settings):
    run(tmp_path, settings.model_copy(update={"n_trials": 3}))
    with (tmp_path / search.JOURNAL).open("ab") as journal:
        journal.write(b'{"op_code": 4, "worker_i')
    study, tried, _ = run(tmp_path, settings.model_copy(update={"n_trials": 4}))
    assert len(study.finished()) == 4 and len(tried) == 1


def test_studies_of_other_settings_do_not_mix(tmp_path, settings):
    run(tmp_path, settings, name="one")
    assert Study(tmp_path, "two", UNITS).finished() == []


def test_failed_trial_has_no_score_and_search_goes_on(tmp_path, settings):
    study, tried, failed = run(tmp_path, settings, failing={(4, 8, 4, 8, 4, 4, 4, 4)})
    assert failed == 1 and len(study.finished()) == 7 and len(tried) == 8
    assert all("error" not in one for one in study.finished())


def test_three_failures_in_a_row_end_the_search_with_the_cause(tmp_path, settings):
    everything = {tuple(8 if i in (a, b) else 4 for i in range(UNITS)) for a in range(UNITS) for b in range(UNITS)}
    with pytest.raises(SearchError, match="3 trials in a row failed.*MemoryError: out of memory.*same command"):
        run(tmp_path, settings, failing=everything | {(4,) * UNITS})


def test_search_ends_when_every_feasible_vector_was_tried(tmp_path, settings):
    study, tried, _ = run(tmp_path, settings.model_copy(update={"n_trials": 500}))
    assert len(tried) == 1 + UNITS + UNITS * (UNITS - 1) // 2 == len(study.finished())


def test_references_are_kept_beside_the_trials(tmp_path, settings):
    study = Study(tmp_path, "study", UNITS)
    study.record_reference("dense", "abc", result((4,) * UNITS))
    again = Study(tmp_path, "study", UNITS)
    assert again.references()["dense"]["run_id"] == "abc" and again.finished() == []


def test_sampler_proposes_unseen_feasible_vectors():
    generator = random.Random(0)
    past = [result(SPACE.draw(generator)) for _ in range(6)]
    candidate = search.propose(past, SPACE, PRIORS, seed=1)
    assert candidate.bits in SPACE
    assert "".join(map(str, candidate.bits)) not in {one.bits for one in past}
