"""Reading ahead and writing behind: order, how far ahead, and what errors do."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from qcompiler.overlap import Behind, ahead


def test_the_next_item_is_loaded_while_the_last_is_used():
    loaded, events = [], [threading.Event() for _ in range(3)]

    def load(index):
        loaded.append(index)
        events[index].set()
        return index * 10

    with closing(ahead(range(3), load)) as results:
        assert next(results) == 0
        assert events[1].wait(10)
        assert loaded == [0, 1]  # and no further
        assert list(results) == [10, 20]
    assert loaded == [0, 1, 2]


def test_an_error_of_a_load_comes_at_its_turn():
    with closing(ahead([1, 0, 2], lambda x: 1 // x)) as results:
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_leaving_early_stops_loading():
    loaded = []
    with closing(ahead(range(100), loaded.append)) as results:
        next(results)
    assert len(loaded) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_calls_run_in_order_and_one_at_a_time():
    done, gate = [], threading.Event()
    with Behind() as behind:
        behind.submit(gate.wait, 10)
        gate.set()
        for index in range(5):
            behind.submit(done.append, index)
            assert len(done) >= index
    assert done == [0, 1, 2, 3, 4]


def fail():
    raise OSError("the disk is gone")


def run_behind(*calls, error=None):
    with Behind() as behind:
        for call in calls:
            behind.submit(call)
        if error is not None:
            raise error


def test_an_error_behind_is_raised_at_the_next_call_or_at_the_end():
    done = []
    with pytest.raises(OSError, match="the disk is gone"):
        run_behind(fail, lambda: done.append(1))
    with pytest.raises(OSError, match="the disk is gone"):
        run_behind(fail)
    assert done == []


def test_the_blocks_own_error_wins_and_the_last_call_still_ends():
    done, error = [], KeyError()
    with pytest.raises(KeyError):
        run_behind(lambda: done.append(1), error=error)
    assert done == [1]
    assert not hasattr(error, "__notes__")
    with pytest.raises(KeyError):
        run_behind(fail, error=error)
    assert "the disk is gone" in error.__notes__[0]
