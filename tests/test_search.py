import dataclasses
import json
import random

import pytest

from pipeline import bits as bit_text
from pipeline.bits import Vector
from pipeline.identity import Identity
from pipeline.search import SearchError, journal, pareto, search
from pipeline.search.allocate import Spaces
from pipeline.search.history import export_history, import_history
from pipeline.search.search import Ended, Problem, Settings
from pipeline.search.study import Candidate, Study
from pipeline.search.surrogate import Observation
from pipeline.trial.result import Result
from tests.fixtures.searches import PRIORS, PROBLEM, RATIO, SPACE, SPACES, STUDY, UNITS, Attempts, at, result


@pytest.fixture
def settings():
    return Settings(n_trials=7, n_random=2, patience=0, objective="gold_logprob", seed=0)


def run(folder, settings, failing=(), identity=STUDY, history=(), **workers):
    tried = []
    study = Study(folder, identity, settings.objective)
    attempts = Attempts(study, tried, failing, **workers)
    ended = search.run(study, settings, Problem(SPACES, {RATIO: PRIORS}, history), attempts)
    return study, tried, ended


def test_search_starts_from_the_papers_vectors_and_stays_feasible(tmp_path, settings):
    study, tried, ended = run(tmp_path, settings)
    assert [candidate.method for candidate in tried] == [
        "qpruner1", "qpruner2", "sensitivity", "random", "random", "sampler", "sampler"
    ]  # fmt: skip
    assert tried[0].vector.bits == (4,) * UNITS
    assert tried[1].vector.bits == (4, 8, 4, 8, 4, 4, 4, 4)
    assert tried[2].vector.bits == (8, 4, 4, 4, 4, 4, 8, 4)
    assert ended == Ended("7 trials are finished (search.n_trials)", 0)
    assert all(candidate.vector in SPACES for candidate in tried)
    assert len({candidate.vector for candidate in tried}) == len(tried) == len(study.finished())


def test_search_resumes_with_every_finished_trial_once(tmp_path, settings):
    _, first, _ = run(tmp_path, dataclasses.replace(settings, n_trials=4))
    study, second, _ = run(tmp_path, settings)
    assert len(first) == 4 and len(second) == 3
    assert [one.result.bits for one in study.finished()] == [
        bit_text.write(candidate.vector.bits) for candidate in first + second
    ]


def test_search_with_enough_trials_runs_none(tmp_path, settings):
    run(tmp_path, settings)
    assert run(tmp_path, settings)[1] == []


def test_interrupted_trial_runs_again_first(tmp_path, settings):
    study, _, _ = run(tmp_path, dataclasses.replace(settings, n_trials=3))
    bits = (4, 4, 4, 4, 8, 8, 4, 4)
    study.start(Candidate(at(*bits), "sampler"), PROBLEM.options)  # and the process dies here
    _, tried, _ = run(tmp_path, dataclasses.replace(settings, n_trials=4))
    assert tried == [Candidate(at(*bits), "sampler")]


def test_result_that_a_kill_left_untold_is_a_finished_trial(tmp_path, settings):
    study, _, _ = run(tmp_path, dataclasses.replace(settings, n_trials=3))
    bits = (4, 4, 4, 4, 8, 8, 4, 4)
    trial = study.start(Candidate(at(*bits), "sampler"), PROBLEM.options)
    trial.set_user_attr("run_id", "run")
    trial.set_user_attr("result", result(bits).as_json())  # and the process dies here
    again, tried, _ = run(tmp_path, dataclasses.replace(settings, n_trials=4))
    assert tried == [] and [one.run_id for one in again.finished()][-1] == "run"
    assert again._study.trials[-1].values == [pytest.approx(result(bits).gold_logprob), SPACE.memory(bits)]


@pytest.mark.parametrize("figure", ["accuracy", "gold_logprob", "validation_loss"])
def test_score_that_is_no_number_is_refused(tmp_path, figure):
    study = Study(tmp_path, STUDY)
    trial = study.start(Candidate(at(*(4,) * UNITS), "qpruner1"), PROBLEM.options)
    with pytest.raises(SearchError, match="is nan; lower recover.learning_rate"):
        study.complete(trial, "run", result((4,) * UNITS, **{figure: float("nan")}))
    assert study.finished() == []


def test_torn_journal_line_is_cut(tmp_path, settings):
    run(tmp_path, dataclasses.replace(settings, n_trials=3))
    with (tmp_path / journal.NAME).open("ab") as file:
        file.write(b'{"op_code": 4, "worker_i')
    study, tried, _ = run(tmp_path, dataclasses.replace(settings, n_trials=4))
    assert len(study.finished()) == 4 and len(tried) == 1


def test_studies_of_other_settings_do_not_mix(tmp_path, settings):
    run(tmp_path, settings, identity=Identity("one", "code"))
    assert Study(tmp_path, Identity("two", "code")).finished() == []


def test_failed_trial_has_no_score_and_search_goes_on(tmp_path, settings):
    study, tried, ended = run(tmp_path, settings, failing={(4, 8, 4, 8, 4, 4, 4, 4)})
    assert ended.failed == 1 and len(study.finished()) == 7 and len(tried) == 8


def test_three_failures_in_a_row_end_the_search_with_the_cause(tmp_path, settings):
    everything = {tuple(8 if i in (a, b) else 4 for i in range(UNITS)) for a in range(UNITS) for b in range(UNITS)}
    with pytest.raises(SearchError, match="3 trials in a row failed.*MemoryError: out of memory.*same command"):
        run(tmp_path, settings, failing=everything | {(4,) * UNITS})


def test_search_ends_when_every_feasible_vector_was_tried(tmp_path, settings):
    study, tried, ended = run(tmp_path, dataclasses.replace(settings, n_trials=500, n_random=30))
    assert ended.reason == "every feasible vector was tried"
    assert len(tried) == 1 + UNITS + UNITS * (UNITS - 1) // 2 == len(study.finished())


def test_references_are_kept_beside_the_trials(tmp_path, settings):
    study = Study(tmp_path, STUDY)
    study.record_reference("dense", "abc", result((4,) * UNITS))
    again = Study(tmp_path, STUDY)
    assert [(one.name, one.run_id) for one in again.references()] == [("dense", "abc")] and again.finished() == []


def read(text):
    return tuple(int(digit) for digit in text)


def test_sampler_proposes_unseen_feasible_vectors():
    generator = random.Random(0)
    past = [result(SPACE.draw(generator)) for _ in range(6)]
    candidate = search.propose(past, PROBLEM, "gold_logprob", {at(8, *(4,) * 7)}, seed=1)
    assert candidate.vector in SPACES
    assert bit_text.write(candidate.vector.bits) not in {"84444444"} | {one.bits for one in past}


@pytest.mark.parametrize(
    "objective, expected", [("accuracy", 0.08), ("gold_logprob", -0.92), ("response_logprob", -1.98)]
)
def test_study_holds_the_objective_and_memory(tmp_path, settings, objective, expected):
    study, _, _ = run(tmp_path, dataclasses.replace(settings, objective=objective, n_trials=3))
    values = {trial.user_attrs["bits"]: trial.values for trial in study._study.trials}
    assert values["48484444"] == pytest.approx([expected - 0.02, SPACE.memory(read("48484444"))])
    assert study._study.metric_names == [objective, "training_memory_bytes"]  # as Optuna's tools label the axes


def test_sampler_maximizes_the_objective_of_the_search():
    pairs = [tuple(8 if i in (a, b) else 4 for i in range(UNITS)) for a in range(UNITS) for b in range(a + 1)]
    tried = [result(bits) for bits in [(4,) * UNITS, *pairs[::2]]]
    opposed = [Result.from_json(one.as_json() | {"gold_logprob": -one.gold_logprob}) for one in tried]
    up = search.propose(opposed, PROBLEM, "accuracy", set(), 0)
    down = search.propose(opposed, PROBLEM, "gold_logprob", set(), 0)
    assert result(up.vector.bits).accuracy >= 0.07
    assert down.vector.bits == (4,) * UNITS or result(down.vector.bits).accuracy <= 0.03


def test_stale_counts_the_samplers_trials_since_the_front_grew():
    def one(score, memory, method="sampler"):
        return method, result((4,) * UNITS, gold_logprob=score, peak_memory_bytes=memory)

    trials = [one(-1.0, 10, "qpruner1"), one(-0.9, 20), one(-0.95, 20), one(-1.0, 10), one(-0.8, 30, "random")]
    assert [search.stale(trials[:count], "gold_logprob") for count in range(6)] == [0, 0, 0, 1, 2, 0]
    trials += [one(-0.8, 30, "random"), one(-0.85, 25), one(-2.0, 9), one(-0.85, 26)]
    assert [search.stale(trials[:count], "gold_logprob") for count in range(6, 10)] == [0, 0, 0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_front_is_stale_exactly_while_its_hypervolume_stands_still(seed):
    generator = random.Random(seed)
    trials, area = [], 0.0
    for _ in range(40):
        score, memory = generator.randrange(12), generator.randrange(12)
        trials.append(("sampler", result((4,) * 8, accuracy=score, peak_memory_bytes=memory)))
        now = pareto.hypervolume([(one.accuracy, one.peak_memory_bytes) for _, one in trials], -1, 12)
        assert (search.stale(trials, "accuracy") == 0) == (now > area)
        area = now


def test_patience_ends_the_search_and_a_rerun_stays_ended(tmp_path, settings):
    patient = dataclasses.replace(settings, n_trials=30, patience=3)
    study, tried, ended = run(tmp_path, patient)
    assert ended.reason == "3 trials of the sampler in a row did not improve the front (search.patience)"
    assert len(tried) < 30
    records = [(one.method, one.result) for one in study.finished()]
    assert search.stale(records, "gold_logprob") == 3
    assert search.stale(records[:-1], "gold_logprob") == 2
    assert run(tmp_path, dataclasses.replace(patient, n_trials=35))[1] == []
    more = run(tmp_path, dataclasses.replace(patient, patience=0, n_trials=len(tried) + 1))[1]
    assert len(more) == 1


def test_patient_search_that_was_interrupted_ends_where_it_would_have(tmp_path, settings):
    patient = dataclasses.replace(settings, n_trials=30, patience=3)
    _, whole, _ = run(tmp_path / "whole", patient)
    _, first, _ = run(tmp_path / "parts", dataclasses.replace(patient, n_trials=7))
    _, second, _ = run(tmp_path / "parts", patient)
    assert first + second == whole


def exported(folder, vectors, **changes):
    path = folder / "earlier.json"
    history = export_history("earlier", [result(bits) for bits in vectors])
    history["results"][0] |= changes
    path.write_text(json.dumps(history))
    return str(path)


def test_exported_history_is_imported_as_observations(tmp_path):
    vectors = [(4,) * UNITS, (8,) + (4,) * 7]
    path = exported(tmp_path, vectors)
    assert json.loads((tmp_path / "earlier.json").read_text())["results"][1] == {
        "ratio": RATIO, "bits": "84444444", "accuracy": 0.01, "accuracy_stderr": 0.01, "gold_logprob": -0.99,
        "gold_logprob_stderr": 0.005, "response_logprob": -2.0, "response_logprob_stderr": 0.1,
        "peak_memory_bytes": 1010, "inference_memory_bytes": 500,
    }  # fmt: skip
    assert import_history(path, UNITS, [RATIO], "gold_logprob") == [
        Observation(at(*vectors[0]), -1.0, 0.005, True), Observation(at(*vectors[1]), -0.99, 0.005, True)
    ]  # fmt: skip
    assert import_history(path, UNITS, [RATIO], "accuracy")[1] == Observation(at(*vectors[1]), 0.01, 0.01, True)


def test_no_history_teaches_nothing():
    assert import_history(None, UNITS, [RATIO], "accuracy") == []


def test_history_of_another_number_of_units_is_refused(tmp_path):
    path = exported(tmp_path, [(4,) * UNITS], bits="4484")
    with pytest.raises(
        SearchError, match="search.history: .*earlier.json holds bits '4484'.* 4 units.*this model has 8"
    ):
        import_history(path, UNITS, [RATIO], "accuracy")


def test_history_teaches_the_sampler_but_is_no_trial(tmp_path, settings):
    generator = random.Random(5)
    vectors = {SPACE.draw(generator) for _ in range(25)}
    history = import_history(exported(tmp_path, sorted(vectors)), UNITS, [RATIO], "gold_logprob")
    misled = dataclasses.replace(PRIORS, sensitivity=tuple(reversed(range(UNITS))))
    start = [result((4,) * UNITS)]
    taught = search.propose(start, Problem(SPACES, {RATIO: misled}, history), "gold_logprob", set(), 0)
    untaught = search.propose(start, Problem(SPACES, {RATIO: misled}), "gold_logprob", set(), 0)
    assert taught.vector.bits == (4,) * 7 + (8,)  # the best unit
    assert untaught.vector.bits == (8,) + (4,) * 7  # the best by the misleading prior
    study, tried, _ = run(tmp_path, dataclasses.replace(settings, n_trials=5), history=history)
    assert len(tried) == len(study.finished()) == 5
    assert not {one.vector.bits for one in tried if one.method == "random"} & vectors


def test_imported_result_of_a_vector_tried_here_no_longer_teaches():
    wrong = Observation(at(*(4,) * 7, 8), -50.0, 0.005, True)
    tried = [result((4,) * UNITS), result(wrong.vector.bits), result((8,) + (4,) * 7)]
    taught = search.propose(tried, Problem(SPACES, {RATIO: PRIORS}, [wrong]), "gold_logprob", set(), 0)
    assert taught == search.propose(tried, PROBLEM, "gold_logprob", set(), 0)


# --- several ratios ----------------------------------------------------------------------------------------------

JOINT = Spaces(
    {ratio: dataclasses.replace(SPACE, base=1100 - int(500 * ratio), max_raised=8) for ratio in (0.0, 0.2, 0.5)}, {}
)


def joint_result(vector):
    found = result(vector.bits)
    changes = {"ratio": vector.ratio, "gold_logprob": found.gold_logprob - 2 * vector.ratio}
    return Result.from_json(found.as_json() | changes | {"peak_memory_bytes": JOINT.memory(vector)})


def run_joint(folder, settings):
    tried, study = [], Study(folder, STUDY, settings.objective)
    problem = Problem(JOINT, dict.fromkeys(JOINT.at, PRIORS))
    search.run(study, settings, problem, Attempts(study, tried, measure=joint_result))
    return study, tried


def test_joint_search_begins_with_the_ends_and_the_papers_methods(tmp_path, settings):
    study, tried = run_joint(tmp_path, dataclasses.replace(settings, n_random=0, n_trials=12))
    named = [(candidate.method, candidate.vector.ratio, bit_text.summary(bit_text.write(candidate.vector.bits)))
             for candidate in tried[:5]]  # fmt: skip
    assert named == [
        ("smallest", 0.5, "all 4"),
        ("uniform", 0.0, "all 4"),
        ("uniform", 0.0, "all 8"),
        ("qpruner1", 0.2, "all 4"),
        ("qpruner2", 0.2, "2 of 8 at 8"),  # a quarter, though all may be raised
    ]
    assert {candidate.method for candidate in tried[5:]} == {"sampler"}
    assert all(candidate.vector in JOINT for candidate in tried)
    assert [one.result.vector for one in study.finished()] == [candidate.vector for candidate in tried]


def test_joint_search_resumes_with_ratio_and_bits(tmp_path, settings):
    few = dataclasses.replace(settings, n_random=0, n_trials=6)
    study, first = run_joint(tmp_path, few)
    study.start(Candidate(Vector(0.0, (8, 4) * 4), "sampler"), Problem(JOINT, dict.fromkeys(JOINT.at, PRIORS)).options)
    _, second = run_joint(tmp_path, dataclasses.replace(few, n_trials=8))
    assert len(first) == 6 and second[0] == Candidate(Vector(0.0, (8, 4) * 4), "sampler") and len(second) == 2


def test_trials_in_the_study_have_ratio_and_bits_as_parameters(tmp_path, settings):
    study, tried = run_joint(tmp_path, dataclasses.replace(settings, n_random=0, n_trials=4))
    (trial, *_), first = study._study.trials, tried[0].vector
    assert trial.params == {"ratio": 0.5, **{f"bits_{unit}": 4 for unit in range(UNITS)}}
    assert trial.distributions["ratio"].choices == (0.0, 0.2, 0.5)
    assert trial.distributions["bits_3"].choices == (4, 8)
    assert trial.values[1] == JOINT.memory(first)


# --- several trials side by side ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [lambda open: 0, lambda open: -1, lambda open: len(open) // 2])
def test_trials_side_by_side_are_each_tried_once_in_whatever_order_they_end(tmp_path, settings, order):
    study, tried, ended = run(tmp_path, dataclasses.replace(settings, n_trials=12), workers=4, order=order)
    assert ended == Ended("12 trials are finished (search.n_trials)", 0)
    assert len({candidate.vector for candidate in tried}) == len(tried) == len(study.finished()) == 12
    assert [record.number for record in study.finished()] == list(range(12))
    assert all(candidate.vector in SPACES for candidate in tried)


def test_search_of_several_workers_is_the_same_again(tmp_path, settings):
    more = dataclasses.replace(settings, n_trials=12)
    first, second = (run(tmp_path / name, more, workers=3, order=lambda open: -1)[1] for name in "ab")
    assert first == second


def test_failed_trial_is_replaced_by_another_vector_while_others_run(tmp_path, settings):
    failing = {(4, 8, 4, 8, 4, 4, 4, 4)}
    study, tried, ended = run(tmp_path, settings, failing, workers=4)
    assert ended.failed == 1 and len(study.finished()) == 7 and len(tried) == 8


def test_trials_at_work_when_patience_ends_are_waited_for_and_may_go_on_with_the_search(tmp_path, settings):
    patient = dataclasses.replace(settings, n_trials=30, patience=3)
    study, tried, ended = run(tmp_path, patient, workers=4)
    assert ended.reason == "3 trials of the sampler in a row did not improve the front (search.patience)"
    assert len(tried) == len(study.finished()) < 30
    assert search.stale([(one.method, one.result) for one in study.finished()], "gold_logprob") >= 3


def test_killed_search_tries_all_that_was_at_work_again_first(tmp_path, settings):
    class Killed(Exception):
        pass

    def kill(open):
        if len(study_of["finished"]()) == 4:
            raise Killed
        return 0

    study_of = {"finished": lambda: Study(tmp_path, STUDY).finished()}
    begun = []
    study = Study(tmp_path, STUDY)
    with pytest.raises(Killed):
        search.run(study, settings, PROBLEM, Attempts(study, begun, workers=3, order=kill))
    study, tried, _ = run(tmp_path, settings, workers=3)
    assert [candidate.vector for candidate in tried] == [candidate.vector for candidate in begun[4:]]
    assert len(study.finished()) == 7 == len({record.result.vector for record in study.finished()})


def test_proposal_avoids_what_is_tried_now_and_what_that_will_tell():
    past = [result((4,) * UNITS), result((8,) + (4,) * 7), result((4,) * 7 + (8,))]
    pending = []
    for _ in range(4):
        seen = {one.vector for one in past} | set(pending)
        pending.append(search.propose(past, PROBLEM, "gold_logprob", seen, 0, pending).vector)
    assert len(set(pending)) == 4 and not set(pending) & {one.vector for one in past}
    again = [search.propose(past, PROBLEM, "gold_logprob", set(pending[:3]), 0, pending[:3]).vector for _ in range(2)]
    assert again == [pending[3]] * 2


def test_answer_that_a_worker_wrote_finishes_the_trial_that_a_kill_left_open(tmp_path, settings):
    study, _, _ = run(tmp_path, dataclasses.replace(settings, n_trials=3))
    bits = (4, 4, 4, 4, 8, 8, 4, 4)
    study.start(Candidate(at(*bits), "sampler"), PROBLEM.options)  # and the process dies here
    again = Study(tmp_path, STUDY)
    assert not again.take_up("trial 4", "run", result((8,) + (4,) * 7))  # of another vector
    assert not again.take_up("trial 2", "run", result(bits))  # finished long ago
    assert not again.take_up("trial 4", "run", result(bits, gold_logprob=float("nan")))
    assert again.take_up("trial 4", "run", result(bits))
    assert not again.take_up("trial 4", "run", result(bits))
    _, tried, _ = run(tmp_path, dataclasses.replace(settings, n_trials=4))
    last = again.finished()[-1]
    assert tried == [] and (last.name, last.run_id, last.method) == ("trial 4", "run", "sampler")
