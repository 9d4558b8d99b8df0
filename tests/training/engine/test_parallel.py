"""Work that ranks share, and numbers that they put together."""

from __future__ import annotations

import time

import pytest
import torch
from thread_world import ThreadWorld, on_ranks

from stdit.errors import StditError
from stdit.training.engine import parallel
from stdit.training.engine.parallel import Ask


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("items", [0, 1, 3, 7])
def test_every_item_is_done_once_and_all_ranks_get_all_results_in_order(ranks: int, items: int) -> None:
    done: list[tuple[int, int]] = []

    def work(world: ThreadWorld) -> list[int]:
        def square(item: int) -> int:
            done.append((item, world.rank))
            return item**2

        return world.share_out(range(items), square)

    assert on_ranks(ranks, work) == [[item**2 for item in range(items)]] * ranks
    assert sorted(done) == [(item, item % ranks) for item in range(items)]


def test_no_rank_begins_a_second_item_while_another_is_at_its_first() -> None:
    """So none waits for the others longer than an item takes."""
    begun: list[tuple[float, int]] = []
    ended: list[tuple[float, int]] = []

    def work(world: ThreadWorld) -> None:
        def take(item: int) -> None:
            begun.append((time.monotonic(), item // 2))
            time.sleep(0.2 * (item == 0))
            ended.append((time.monotonic(), item // 2))

        world.share_out(range(6), take)

    on_ranks(2, work)
    for number in range(2):
        assert max(at for at, part in ended if part == number) <= min(at for at, part in begun if part == number + 1)


def test_an_error_on_one_rank_is_raised_on_all() -> None:
    def work(world: ThreadWorld) -> None:
        def fails(item: int) -> None:
            if item == 2:
                raise StditError("no room")

        world.share_out(range(5), fails)

    first, second = on_ranks(2, work)
    assert isinstance(first, StditError) and str(first) == "no room"
    assert isinstance(second, StditError) and str(second) == "another rank stopped: StditError: no room"


def test_long_work_of_rank_0_is_waited_for_in_short_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "ALIVE", 0.05)
    gathers, ended = [0, 0], [False]

    class Counted(ThreadWorld):
        def gather(self, value: object) -> list[object]:
            gathers[self.rank] += 1
            return super().gather(value)

    def work(world: ThreadWorld) -> bool:
        def long() -> None:
            time.sleep(0.3)
            ended[0] = True

        Counted(world.rank, world.size, world.device).after_main(lambda ask: long(), torch.tensor)
        return ended[0]

    assert on_ranks(2, work) == [True, True]
    assert gathers[0] == gathers[1] >= 4

    def fails() -> None:
        raise StditError("no room")

    errors = on_ranks(2, lambda world: world.after_main(lambda ask: fails(), torch.tensor))
    assert [str(error) for error in errors] == ["no room", "another rank stopped: StditError: no room"]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rank_0_asks_for_what_all_ranks_give_together(ranks: int) -> None:
    got: list[float] = []

    def work(world: ThreadWorld) -> None:
        numbers = {"a": 1.0, "b": 10.0}

        def asks(ask: Ask) -> None:
            for name in ("b", "a", "b"):
                got.append(float(ask(name)))

        world.after_main(asks, lambda name: world.sum_(torch.tensor(numbers[name] * (1 + world.rank))))

    assert on_ranks(ranks, work) == [None] * ranks
    each = sum(range(1, ranks + 1))
    assert got == [10 * each, each, 10 * each]


def test_parts_of_numbers_are_put_together_bit_for_bit() -> None:
    """-0, subnormal numbers, infinities and nan with its bits, too."""
    whole = torch.tensor([-0.0, 1e-42, float("inf"), -float("inf"), float("nan"), 1.1, -2.2])
    whole.view(torch.int32)[4] = 0x7FC12345

    def work(world: ThreadWorld) -> torch.Tensor:
        mine = torch.zeros(7)
        mine[world.rank :: world.size] = whole[world.rank :: world.size]
        return world.join_(mine)

    for found in on_ranks(3, work):
        assert torch.equal(found.view(torch.int32), whole.view(torch.int32))
