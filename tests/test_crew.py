"""Tasks handed to workers that answer out of order, late, twice, or die."""

from collections import deque

import pytest

from pipeline.search.crew import ANSWERS, Answer, Answers, Crew, Died, Here, Task
from tests.fixtures.searches import at, result

BITS = [tuple(8 if unit == raised else 4 for unit in range(8)) for raised in range(4)]
TASKS = [Task(f"trial {number + 1}", at(*bits), f"run{number}") for number, bits in enumerate(BITS)]


def done(task, worker="worker 1"):
    return Answer(task.name, result(task.vector.bits), worker, "a host")


def died(task, cause="killed"):
    return Answer(task.name, Died(cause), "worker 1", "a host")


class Script:
    """A pool whose answers are written down beforehand; it notes what it was given."""

    def __init__(self, *answers, size=2):
        self.size, self.answers, self.given = size, deque(answers), []

    def submit(self, task):
        self.given.append(task)

    def wait(self):
        return self.answers.popleft()


def handed(pool, *tasks, **options):
    crew = Crew(pool, **options)
    for task in tasks:
        crew.submit(task)
    return crew


def test_answers_belong_to_their_tasks_in_whatever_order_they_come():
    crew = handed(Script(done(TASKS[1]), done(TASKS[0])), *TASKS[:2])
    assert (crew.free, crew.busy) == (0, True)
    ended = [crew.wait() for _ in range(2)]
    assert [(task.name, answer.outcome.bits) for task, answer in ended] == [
        ("trial 2", "48444444"),
        ("trial 1", "84444444"),
    ]
    assert (crew.free, crew.busy) == (2, False)


def test_second_and_late_answers_are_dropped():
    stranger = Task("trial 9", at(*BITS[3]), "run of a killed search")
    crew = handed(Script(done(TASKS[0]), done(TASKS[0]), done(stranger), died(TASKS[0]), done(TASKS[1])), *TASKS[:2])
    assert [crew.wait()[0].name for _ in range(2)] == ["trial 1", "trial 2"]


def test_task_of_a_dead_worker_goes_unchanged_to_another_one_and_is_said():
    said = []
    pool = Script(died(TASKS[0], "out of memory"), died(TASKS[0]), done(TASKS[0], "worker 2"))
    crew = handed(pool, TASKS[0], retries=2, told=said.append)
    task, answer = crew.wait()
    assert answer == done(TASKS[0], "worker 2") and task == TASKS[0]
    assert pool.given == [TASKS[0]] * 3
    assert said[0] == "trial 1 ended with its worker: out of memory; another worker takes it up" and len(said) == 2


def test_task_whose_workers_all_die_fails_with_the_cause():
    crew = handed(Script(*[died(TASKS[0])] * 2, died(TASKS[0], "segmentation fault")), TASKS[0], retries=2)
    task, answer = crew.wait()
    assert task == TASKS[0] and isinstance(answer.outcome, Died)
    assert str(answer.outcome) == "3 workers in turn died at it, the last: segmentation fault"
    assert not crew.busy
    alone = handed(Script(died(TASKS[0], "killed")), TASKS[0])
    assert str(alone.wait()[1].outcome) == "worker died at it, the last: killed"


def test_worker_that_died_after_it_had_written_its_answer_is_believed(tmp_path):
    answers = Answers(tmp_path, "study")
    answers.write(TASKS[0], result(BITS[0]))
    pool = Script(died(TASKS[0]))
    task, answer = handed(pool, TASKS[0], answers=answers).wait()
    assert answer.outcome == result(BITS[0]) and pool.given == [TASKS[0]]


def test_this_process_works_in_turn_and_returns_errors():
    def work(task):
        if task is TASKS[0]:
            raise MemoryError("too large")
        return result(task.vector.bits)

    crew = handed(Here(work), *TASKS[:2])
    assert crew.free == -1
    (first, failed), (second, answer) = crew.wait(), crew.wait()
    assert (first, second) == tuple(TASKS[:2])
    assert isinstance(failed.outcome, MemoryError) and answer == Answer("trial 2", result(BITS[1]))


def test_interrupt_in_this_process_is_no_answer():
    def work(task):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        handed(Here(work), TASKS[0]).wait()


def test_written_answers_are_read_until_they_are_settled(tmp_path):
    answers = Answers(tmp_path, "study")
    assert answers.read() == {}
    for task in TASKS[:3]:
        answers.write(task, result(task.vector.bits))
    (tmp_path / ANSWERS / "study/trial-3.json").write_text('{"name": "trial 3", "run')  # a failing disk
    assert answers.read() == {
        "trial 1": ("run0", result(BITS[0])),
        "trial 2": ("run1", result(BITS[1])),
    }
    crew = handed(Script(done(TASKS[0])), TASKS[0], answers=answers)
    crew.settle(crew.wait()[0])
    assert answers.read().keys() == {"trial 2"}


def test_cleared_answers_leave_no_folder_but_those_of_other_studies(tmp_path):
    mine, other = Answers(tmp_path, "mine"), Answers(tmp_path, "other")
    for answers in (mine, other):
        answers.write(TASKS[0], result(BITS[0]))
    mine.clear()
    assert mine.read() == {} and other.read().keys() == {"trial 1"}
    other.clear()
    assert list(tmp_path.iterdir()) == []


def test_folder_is_known_by_its_mark(tmp_path):
    answers, elsewhere = Answers(tmp_path / "a", "study"), Answers(tmp_path / "b", "study")
    mark = answers.mark()
    assert answers.marked(mark) and not elsewhere.marked(mark)
    elsewhere.mark()
    assert not elsewhere.marked(mark)
