"""Prints what `stdit train --dry-run` forecasts."""

from __future__ import annotations

import json

from stdit.cli.common.tables import print_table
from stdit.data.manifests import named
from stdit.heartbeat import readable_time
from stdit.training.config import RunConfig
from stdit.training.setup.forecast import MFU, Card, Forecast, forecast, summary
from stdit.training.setup.resolve import resolve

GIB = 2**30


def print_forecast(config: RunConfig, ranks: int, gpu: str | None, mfu: float | None, as_json: bool) -> None:
    """gpu: the name of a card. mfu: the share of its peak; None: MFU."""
    card = Card.named(gpu) if gpu else None
    found = forecast(resolve(config), ranks, card, mfu or MFU)
    if as_json:
        print(json.dumps(summary(found), ensure_ascii=False))
    else:
        _print_tables(found)


def _print_tables(found: Forecast) -> None:
    s, config = summary(found), found.config
    of = s["parameters"]
    print(
        f"{config.objective.kind}: {of['trained']:,} parameters that train, {of['frozen'] + of['vae']:,} frozen, "
        f"{of['text_encoder']:,} of a frozen text encoder"
    )
    pace = f"{s['clips_per_step']:.4g} clips and {s['tokens_per_step']:,.0f} tokens per step"
    if s["manifest"] is None:
        where = f"{named(config.data.manifest)} is not there" if config.data.manifest else "data.manifest is not set"
        print(f"{where}: as if every clip were of the largest shape, {found.run.largest}")
        print(f"{s['steps']:,} steps, {pace}")
    else:
        print(
            f"{s['clips']:,} clips, {s['steps_per_epoch']:,} steps per epoch, {s['steps']:,} steps "
            f"({s['steps'] / s['steps_per_epoch']:.3g} epochs), {pace}"
        )
        for bucket in s["buckets"]:
            print(f"  {bucket['shape']}: {bucket['clips']:,} clips of {bucket['tokens']:,} tokens")
    for line in s["unused"]:
        print(line)
    ranks = f"{found.ranks:,} rank{'s' * (found.ranks > 1)}"
    print(
        f"{ranks}: {s['micro_steps_per_step']:.3g} micro-steps per step, packs of at most {s['tokens_per_pack']:,} "
        f"tokens (the fullest {s['fullest_pack']:,}), balance {s['balance']:.3f}"
    )
    mine = found.configured
    parts = [(name.replace("_", " "), f"{size / GIB:,.2f}") for name, size in s["configured"]["memory"].items() if size]
    print_table(f"Memory of a rank in GiB, {mine.settings}", ("part", "GiB"), parts, right=(1,))
    _print_ways(found)
    for line in conclusions(found):
        print(line)


def _print_ways(found: Forecast) -> None:
    """A row for each number of ranks to a pack and kind of recomputation, a column for each parallel.deepspeed."""
    columns = list(dict.fromkeys(way.deepspeed for way in found.ways))
    rows = []
    for shared, kind in dict.fromkeys((way.sequence_parallel, way.recompute) for way in found.ways):
        ways = {way.deepspeed: way for way in found.ways if (way.sequence_parallel, way.recompute) == (shared, kind)}
        first = next(iter(ways.values()))
        flops = "" if first.step_flops is None else f"{first.step_flops:.3g}"
        seconds = "" if first.step_seconds is None else _step_time(first.step_seconds)
        cells = [f"{ways[name].memory.total / GIB:,.1f}{' *' * bool(ways[name].fits)}" for name in columns]
        rows.append((str(shared), str(kind), flops, seconds, *cells))
    title = "GiB by parallel.sequence_parallel, recompute and deepspeed"
    if found.card is not None:
        title += f"; * fits into {found.card.usable / GIB:.0f} GiB of {found.card.name} ({found.card.memory_gb:g} GB)"
    header = ("sequence", "recompute", "FLOPs per step", "time", *(name or "null" for name in columns))
    print_table(title, header, rows, right=range(2, len(header)))


def conclusions(found: Forecast) -> list[str]:
    """Whether the run fits and how long it takes; if it does not, what does."""
    mine, best, card, lines = found.configured, found.best, found.card, []
    if found.config.parallel.deepspeed is None and found.ranks > 1:
        lines.append(f"{found.ranks} ranks need parallel.deepspeed: zero1, zero2 or zero3.")
    if card is None:
        return [*lines, "--gpu h200 (h100, a100, 4090, …) says what fits, and how long it takes."]
    if not mine.fits:
        lines.append(f"does not fit: {mine.memory.total / GIB:,.1f} GiB of {card.usable / GIB:,.1f}. {found.advice}")
    timed = mine if mine.fits or best is None else best
    if timed.step_seconds is not None:
        steps, each = found.config.schedule.steps, timed.step_seconds
        whole = readable_time(each * steps)
        lines.append(
            f"{_step_time(each)} per step, {whole} for {steps:,} steps with {timed.settings}, at {found.mfu:.0%} of "
            f"{card.bf16_tflops:g} TFLOP/s per rank, without encoding"
        )
    elif timed.step_flops is not None:
        lines.append("times are told for run.precision=bf16")
    return lines


def _step_time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 100 else readable_time(seconds)
