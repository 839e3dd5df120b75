"""Prefetch gives results in order, computes no more ahead than allowed, and raises an error in its item's place."""

import threading

import pytest

from curation.files.prefetch import Meter, prefetch


@pytest.mark.parametrize(("threads", "ahead"), [(1, 1), (2, 2), (4, 9), (3, 100)])
def test_results_come_in_order(threads: int, ahead: int) -> None:
    assert list(prefetch(str, range(40), threads=threads, ahead=ahead)) == [str(number) for number in range(40)]
    assert list(prefetch(str, [], threads=threads, ahead=ahead)) == []


def test_an_error_is_raised_in_place_of_its_result() -> None:
    results = prefetch(lambda number: 12 // number, [4, 3, 0, 2])
    assert [next(results), next(results)] == [3, 4]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_no_more_items_are_started_than_allowed() -> None:
    started: list[int] = []
    for number, _ in enumerate(prefetch(started.append, range(100), threads=2, ahead=5)):
        if number == 2:
            break
    assert len(started) <= 3 + 5


def test_items_are_computed_at_the_same_time() -> None:
    """Each of two items waits until the other has started, which would fail with one item after another."""
    barrier = threading.Barrier(2, timeout=20)
    assert sorted(prefetch(lambda number: barrier.wait() * 0 + number, range(2), threads=2, ahead=2)) == [0, 1]


def test_meter_counts_results_and_waiting_time() -> None:
    gate, meter = threading.Event(), Meter()
    results = prefetch(lambda number: number if number else gate.wait(20), range(4), threads=4, ahead=3, meter=meter)
    threading.Timer(0.2, gate.set).start()
    assert next(results) is True and meter.taken == 1 and meter.seconds_waited > 0.1
    assert list(results) == [1, 2, 3]
    assert meter.taken == 4 and 0 <= meter.ready <= 4 + 3 + 2 + 1
