import threading

import pytest
import torch

from pipeline import cores


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    told = []
    monkeypatch.setattr(torch, "set_num_threads", lambda count: told.append((threading.get_ident(), count)))
    return request.param, told


def test_items_ahead_come_in_order_and_the_next_one_is_computed_meanwhile(threads):
    count, told = threads
    here, made, begun = threading.get_ident(), [], threading.Event()

    def items():
        for number in range(4):
            made.append((number, threading.get_ident()))
            if number == 1:
                begun.set()
            yield number

    found = []
    for number in cores.ahead(items()):
        if number == 0 and count > 1:
            assert begun.wait(10)  # the second one, while the first is being used
        found.append(number)
    assert found == [0, 1, 2, 3] and [number for number, _ in made] == found
    assert {thread == here for _, thread in made} == {count == 1}
    if count > 1:
        ours = [given for thread, given in told if thread == here]
        theirs = [given for thread, given in told if thread != here]
        assert ours == [count - count // 2, count] and theirs == [count // 2]


def test_what_goes_wrong_ahead_is_raised_and_all_cores_are_given_back(threads):
    count, told = threads

    def items():
        yield 0
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(cores.ahead(items()))
    assert count == 1 or told[-1] == (threading.get_ident(), count)
