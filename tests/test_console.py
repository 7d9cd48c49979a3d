import io
import sys

import pytest

from pipeline import console
from pipeline.console import Finished, Search


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that a test sets."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (754, "13 min"), (3600, "1 h 0 min"), (7530, "2 h 6 min")],
)
def test_duration_in_words(seconds, text):
    assert console.duration(seconds) == text


def test_time_left_is_the_mean_of_finished_trials_for_those_to_come(clock):
    screen = Search(5, clock)
    assert screen.seconds_left() is None
    screen.finished = [Finished("trial 1", -2.0, 100.0), Finished("trial 2", -1.5, 200.0)]
    screen.begin("trial 3")
    assert screen.seconds_left() == 3 * 150
    clock.now = 50.0
    assert screen.seconds_left() == 3 * 150 - 50
    clock.now = 1000.0  # slower than the others: it counts no further
    assert screen.seconds_left() == 2 * 150


def test_state_names_count_best_and_time_left(clock):
    screen = Search(3, clock)
    assert screen.state() == "0 of 3 trials"
    screen.finished = [Finished("trial 1", -2.0, 60.0), Finished("trial 2", -1.5, 180.0)]
    assert screen.state() == "2 of 3 trials, best score -1.5 by trial 2, about 2 min left in the search"
    screen.finished.append(Finished("trial 3", -3.0, 60.0))
    assert screen.state() == "3 of 3 trials, best score -1.5 by trial 2"


def test_time_left_of_several_workers_is_when_the_last_of_them_ends(clock):
    screen = Search(7, clock, workers=2)
    screen.finished = [Finished("trial 1", -2.0, 100.0), Finished("trial 2", -1.5, 100.0)]
    screen.begin("trial 3")
    clock.now = 40.0
    screen.begin("trial 4")
    clock.now = 50.0
    # Trials 3 and 4 end after 50 and 90 s; 5 and 7 follow the one, 6 the other.
    assert screen.seconds_left() == 50 + 2 * 100
    assert screen.state() == ("2 of 7 trials, 2 at work, best score -1.5 by trial 2, about 4 min left in the search")
    screen.end("trial 3")
    screen.finish(Finished("trial 3", -3.0, 100.0), "")
    assert screen.seconds_left() == 2 * 100  # 5 and 7 by the free worker, 6 by the other until 190


def test_a_terminal_shows_all_that_is_at_work(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Search(9, clock, workers=2) as screen:
        screen.begin("trial 1 (random)")
        screen.begin("trial 2 (sampler)")
        clock.now = 30.0
        screen._live.refresh()
    shown = terminal.getvalue()
    assert "trial 1 (random), 30 s" in shown and "trial 2 (sampler), 30 s" in shown


def test_a_log_gets_a_line_for_each_trial_with_the_state_of_the_search(capsys, clock):
    with Search(2, clock) as screen:
        screen.begin("trial 1 (random)")
        assert list(screen.steps([1, 2])) == [1, 2]
        screen.finish(Finished("trial 1", -2.0, 60.0), "trial 1 (random): response -2.000")
    assert capsys.readouterr().out.splitlines() == [
        "trial 1 (random): response -2.000; 1 of 2 trials, best score -2 by trial 1, about 1 min left in the search"
    ]


def test_a_terminal_gets_one_screen_and_lines_above_it(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with Search(2, clock) as screen:
        screen.begin("trial 1 (random)")
        for _ in screen.steps(range(3)):
            screen._live.refresh()
        screen.finish(Finished("trial 1", -2.0, 60.0), "trial 1 (random): response -2.000")
        screen._live.refresh()
    shown = terminal.getvalue()
    assert "trial 1 (random), step 1 of 3" in shown
    assert "trial 1 (random): response -2.000\n" in shown
    assert "1 of 2 trials, best score -2 by trial 1, about 1 min left in the search" in shown


def test_screen_ends_with_an_error_so_that_the_terminal_is_left_as_it_was(monkeypatch, clock):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with pytest.raises(KeyboardInterrupt), Search(2, clock):
        raise KeyboardInterrupt
    assert terminal.getvalue().rstrip().endswith("\x1b[2K") or "\x1b[?25h" in terminal.getvalue()  # the cursor is back
    assert sys.stdout is terminal


def test_table_in_a_log_is_not_cut(capsys):
    console.table("A title", ["name", "value"], [["long " * 10, "1" * 40]])
    shown = capsys.readouterr().out
    assert "A title" in shown and "1" * 40 in shown and ("long " * 10).strip() in shown
