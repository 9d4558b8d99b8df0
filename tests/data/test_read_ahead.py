"""Reading ahead: in order, bounded, errors reach the consumer, and no thread is left."""

from __future__ import annotations

import threading
import time

import pytest

from stdit.data.read_ahead import read_ahead


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stdit-loader"]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order_whichever_read_ends_first(workers):
    def read(number):
        time.sleep(0.002 * (number % 3))
        return 2 * number

    batches = [[0, 1, 2], [], [3], list(range(4, 20))]
    assert list(read_ahead(read, batches, workers, ahead=2)) == [[2 * n for n in batch] for batch in batches]
    assert not threads()


def test_so_many_batches_are_begun_and_no_more():
    begun = []
    reads = read_ahead(begun.append, ([number] for number in range(100)), 2, ahead=3)
    for taken in range(1, 5):
        next(reads)
        end = time.monotonic() + 60
        while len(begun) < taken + 3 and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(0.02)
        assert sorted(begun) == list(range(taken + 3))
    reads.close()
    assert not threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_comes_after_the_batches_before_it(workers):
    def batches():
        yield [1]
        yield [2]
        raise OSError("no more")

    def read(number):
        if number == 3:
            raise KeyError(number)
        return number

    for reads, error in [
        (read_ahead(read, batches(), workers, ahead=4), OSError),
        (read_ahead(read, [[1], [2], [4, 3], [5]], workers, ahead=4), KeyError),
    ]:
        assert next(reads) == [1] and next(reads) == [2]
        with pytest.raises(error):
            next(reads)
        assert not threads()


def test_closing_does_not_wait_for_ever_for_a_read_that_hangs():
    free = threading.Event()
    reads = read_ahead(lambda number: number or free.wait(), [[1], [0], [2]], 2, ahead=4, closing=0.1)
    assert next(reads) == [1]
    before = time.monotonic()
    reads.close()
    assert time.monotonic() - before < 30
    free.set()
