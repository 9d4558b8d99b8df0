"""Says what to change when a step needs more memory than there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from stdit.errors import StditError
from stdit.heartbeat import HEARTBEAT
from stdit.machine import is_out_of_memory
from stdit.training.batches import StepClips
from stdit.training.engine.parallel import World
from stdit.training.setup.forecast import Way, ways_of_a_pack
from stdit.training.setup.resolve import ResolvedConfig

GIB = 2**30
NAMED = 3  # ways to need less that are named
LESS = 0.9  # share of the memory that a way needs at most to be named


@contextmanager
def explained(config: ResolvedConfig, world: World, step: int, clips: StepClips) -> Iterator[None]:
    """Turns an error of the allocator into a StditError: what this rank needs, and which settings need less.

    clips: of the step, for the fullest pack.
    """
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:  # torch's are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0] or "MemoryError"
    # The error is gone here, and with it the tensors that its traceback held.
    HEARTBEAT.doing("computing what the step needs")
    trouble = f"step {step}: out of memory on rank {world.rank} ({said})."
    pack = max((micro.items for micro in clips.micro_steps), key=lambda items: sum(item.tokens for item in items))
    shapes = [example.shape for example in clips.examples]
    if not pack or not shapes:
        raise StditError(f"{trouble} It has no clips: train a smaller model, or on more ranks with zero3.")
    tokens, clip = sum(item.tokens for item in pack), max(item.tokens for item in pack)
    largest = max(shapes, key=lambda shape: shape.frames * shape.height * shape.width)
    mine, *ways = ways_of_a_pack(config, largest, tokens, world.size)
    raise StditError(f"{trouble} {needs(mine, tokens)} {remedies(mine, ways)}{smaller_packs(tokens, clip)}")


def needs(mine: Way, tokens: int) -> str:
    """What a rank needs for a pack, the largest parts first."""
    parts = sorted(dataclasses.asdict(mine.memory).items(), key=lambda part: -part[1])
    told = ", ".join(f"{name.replace('_', ' ')} {size / GIB:.3g}" for name, size in parts if size)
    return f"By the forecast its pack of {tokens:,} tokens needs {mine.memory.total / GIB:.3g} GiB: {told}."


def remedies(mine: Way, ways: Sequence[Way]) -> str:
    """The settings that need less: those that change one thing, and the least of all."""
    less = [way for way in ways if way.memory.total <= LESS * mine.memory.total]
    one_change = [way for way in less if way.deepspeed == mine.deepspeed or way.recompute == mine.recompute]
    named = sorted(one_change, key=lambda way: way.memory.total)[:NAMED]
    least = min(less, key=lambda way: way.memory.total, default=None)
    if least is not None and least not in named:
        named.append(least)
    if not named:
        return "Train smaller shapes, or a smaller model."
    return "Less: " + ", ".join(f"{_changed(mine, way)} {way.memory.total / GIB:.3g} GiB" for way in named) + "."


def smaller_packs(tokens: int, clip: int) -> str:
    if tokens <= clip:
        return " The pack is a single clip: parallel.sequence_parallel shares it among ranks."
    return f" Packs may be smaller: plan.tokens_per_pack, at least the largest clip's {clip:,}."


def _changed(mine: Way, way: Way) -> str:
    """The settings in which a way differs."""
    changes = []
    if way.deepspeed != mine.deepspeed:
        changes.append(f"parallel.deepspeed={way.deepspeed}")
    if way.recompute != mine.recompute:
        changes.append(f"parallel.recompute={way.recompute}")
    return " ".join(changes)
