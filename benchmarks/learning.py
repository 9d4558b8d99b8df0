"""How fast a toy transformer learns: held-out captions right and held-out loss, over clips and CPU seconds, by setting.

Every run is `stdit train toy/dit` on a finished demo's clips, VAE and cached latents, with other settings and seeds.
A killed run continues, a finished one is read. Draws the curves, and says how many clips each setting needs.

    make demo                                                            # once: clips, VAE and cache
    python benchmarks/learning.py --out runs/learning adamw muon         # two of SETTINGS, three seeds each
    python benchmarks/learning.py --out runs/learning muon wide="optimizer.name=muon model.dim=288" --seeds 0

Runs use one thread each, and --jobs of them share the machine, so their time is that of their process on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rich.console import Console
from rich.table import Table

from stdit.evaluation.report import read_metrics

GOALS = {"colour": 0.95, "direction": 0.90, "shape": 0.85}  # shares of held-out captions
MEASURES = ("colour", "size", "direction", "shape")
SETTINGS: dict[str, list[str]] = {  # beside toy/dit as it is
    "adamw": ["optimizer.name=adamw", "optimizer.lr=2e-3", "optimizer.betas=[0.9, 0.98]"],
    "muon": ["optimizer.name=muon", "optimizer.lr=2e-2"],
}
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#ccaa22", "#66ccee", "#777777")  # Paul Tol's bright scheme


@dataclass(frozen=True)
class Run:
    """A setting's run with one seed. Each list has a number for every evaluation.

    clips: seen until then.
    seconds: of CPU time, for the steps until then without evaluations and saving.
    loss: on the held-out clips at fixed noise, the mean over equal parts of the noise levels. So settings that draw or
        weigh noise levels differently compare.
    right: shares of the held-out captions, by shape of clip and measure.
    """

    setting: str
    seed: int
    clips: list[float]
    seconds: list[float]
    loss: list[float]
    right: dict[str, dict[str, list[float]]]

    def until(self, goals: dict[str, float], axis: Sequence[float]) -> float | None:
        """Where on the axis (clips or seconds) all goals are met at the first shape, and stay met; None if nowhere.

        Linear between two evaluations.
        """
        curves = next(iter(self.right.values()))
        slack = [min(curves[name][i] - goal for name, goal in goals.items()) for i in range(len(axis))]
        below = [i for i, value in enumerate(slack) if value < 0]
        if not below:
            return axis[0]
        last = below[-1]
        if last == len(slack) - 1:
            return None
        share = -slack[last] / (slack[last + 1] - slack[last])
        return axis[last] + share * (axis[last + 1] - axis[last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", metavar="NAME[=OVERRIDES]", help=f"of {', '.join(SETTINGS)}, or new")
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="the folder of a finished `make demo`")
    parser.add_argument("--out", type=Path, required=True, help="runs, learning.json and learning.png go here")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--captions", type=int, default=64, help="held-out captions per evaluation and shape")
    parser.add_argument("--shapes", nargs="+", default=["64x64x17"], help="of the samples; the first is the goals'")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    options = parser.parse_args()

    settings = dict(map(parse_setting, options.settings))
    pool = ThreadPoolExecutor(options.jobs)
    try:
        jobs = [pool.submit(train, name, settings[name], seed, options) for seed in options.seeds for name in settings]
        runs = [job.result() for job in jobs]
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C or a failure no further run begins
    results = {name: [run for run in runs if run.setting == name] for name in settings}
    Console().print(table(results))
    written = {name: [vars(run) for run in found] for name, found in results.items()}
    about = {"goals": GOALS, "settings": settings, "runs": written}
    (options.out / "learning.json").write_text(json.dumps(about, indent=1) + "\n")
    draw(results, options.out / "learning.png")
    print(f"{options.out / 'learning.json'}, {options.out / 'learning.png'}")


def parse_setting(text: str) -> tuple[str, list[str]]:
    """(name, overrides of toy/dit) of NAME, which is one of SETTINGS, or of NAME=OVERRIDES with spaces between them."""
    name, given, overrides = text.partition("=")
    if not given and name not in SETTINGS:
        sys.exit(f"{name} is none of {', '.join(SETTINGS)}: give its overrides, such as {name}='optimizer.lr=1e-3'.")
    return name, shlex.split(overrides) if given else SETTINGS[name]


def train(name: str, overrides: Sequence[str], seed: int, options: argparse.Namespace) -> Run:
    """Trains to the end what is not yet trained, and reads the run."""
    folder, demo, shapes = options.out / f"{name}-{seed}", options.demo, ", ".join(options.shapes)
    command = [
        sys.executable, "-m", "stdit.cli.main", "train", "toy/dit", f"run={folder}", f"run.seed={seed}",
        f"data.manifest={demo}/manifest.parquet", f"data.cache={demo}/cache", f"vae.path={demo}/vae/model/vae",
        f"schedule.steps={options.steps}", f"checkpoint.every={options.every}", "checkpoint.keep=1", "log.every=1",
        "log.progress=false", "log.tensorboard=false", f"eval.every={options.every}", "eval.prompts=[]",
        f"eval.manifest={demo}/held_out.parquet", "eval.clips=64", "eval.steps=12",
        f"eval.toy={{captions: {options.captions}, shapes: [{shapes}]}}", *overrides,
    ]  # fmt: skip
    print(f"{name}, seed {seed}: {folder}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / f"{name}-{seed}.log").open("a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, stdout=log, stderr=log, env=environment)
    if done.returncode:
        sys.exit(f"{name}, seed {seed} ended with exit status {done.returncode}: see {log.name}")
    return read_run(folder, name, seed)


def read_run(folder: Path, name: str, seed: int) -> Run:
    """The evaluations of a run, and the clips and CPU seconds until each, from metrics.jsonl, a line for each step."""
    clips = seconds = 0.0
    until: dict[int, tuple[float, float]] = {}
    for line in read_metrics(folder, "train"):
        clips, seconds = clips + line["clips"], seconds + line["cpu_seconds"]
        until[line["step"]] = clips, seconds
    evaluations = [line for line in read_metrics(folder, "eval") if line["step"] in until]
    right = {
        shape: {measure: [line["toy"][shape][measure] for line in evaluations] for measure in MEASURES}
        for shape in evaluations[0]["toy"]
    }
    seen, spent = zip(*(until[line["step"]] for line in evaluations))
    loss = [fmean(line["loss_by_level"].values()) for line in evaluations]
    return Run(name, seed, list(seen), list(spent), loss, right)


def table(results: dict[str, list[Run]]) -> Table:
    """Per setting: CPU time per clip; clips and CPU seconds to the goals, by seed; the last loss, median and range; the
    last shares right of the worst seed."""
    goals = ", ".join(f"{name} {goal:.0%}" for name, goal in GOALS.items())
    title = f"Clips and CPU seconds until {goals}, by seed; then the last loss, and captions right with the worst seed"
    view = Table(title=title, title_justify="left")
    for heading in ("setting", "ms per clip", "clips", "CPU seconds", "loss"):
        view.add_column(heading, justify="left" if heading == "setting" else "right")
    shapes = list(next(iter(results.values()))[0].right)
    for shape in shapes:
        for measure in MEASURES:
            view.add_column(f"{measure}\n{shape}", justify="right")
    for name, runs in results.items():
        speed = median(run.seconds[-1] / run.clips[-1] for run in runs)
        clips, seconds = [run.until(GOALS, run.clips) for run in runs], [run.until(GOALS, run.seconds) for run in runs]
        losses = [run.loss[-1] for run in runs]
        loss = f"{median(losses):.3f} ({min(losses):.3f}–{max(losses):.3f})"
        right = [f"{min(run.right[shape][one][-1] for run in runs):.0%}" for shape in shapes for one in MEASURES]
        view.add_row(name, f"{1000 * speed:.1f}", _numbers(clips), _numbers(seconds), loss, *right)
    return view


def _numbers(values: Sequence[float | None]) -> str:
    return ", ".join("never" if value is None else f"{value:,.0f}" for value in values)


def draw(results: dict[str, list[Run]], path: Path) -> None:
    """Held-out loss and captions right at the first shape, over clips and below over CPU seconds. A line is the median
    of the seeds, its band their range, a dotted line a goal."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    shape = next(iter(next(iter(results.values()))[0].right))
    titles = ("held-out loss", *(f"{measure} right" for measure in MEASURES))
    figure = Figure(figsize=(3.1 * len(titles), 6), layout="constrained")
    rows: Any = figure.subplots(2, len(titles), sharey="col")
    for (name, runs), colour in zip(results.items(), cycle(COLOURS)):
        curves = [[run.loss, *(run.right[shape][measure] for measure in MEASURES)] for run in runs]
        axes = [_over_seeds(median, [run.clips for run in runs]), _over_seeds(median, [run.seconds for run in runs])]
        for panels, along in zip(rows, axes):
            for panel, seeds in zip(panels, zip(*curves)):
                panel.plot(along, _over_seeds(median, seeds), color=colour, linewidth=2, label=name)
                panel.fill_between(
                    along, _over_seeds(min, seeds), _over_seeds(max, seeds), color=colour, alpha=0.18, linewidth=0
                )
    for panels, along in zip(rows, ("clips seen", "CPU seconds")):
        for panel, title, measure in zip(panels, titles, ("", *MEASURES)):
            panel.set(xlabel=along, xlim=(0, None))
            panel.set_title(title, fontsize="medium")
            panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"))
            panel.grid(color="#000000", alpha=0.1, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
            if measure:
                panel.set_ylim(0, 1.03)
                panel.yaxis.set_major_formatter(PercentFormatter(1))
            if measure in GOALS:
                panel.axhline(GOALS[measure], color="#555555", linewidth=1, linestyle=":")
    rows[0][0].set_yscale("log")  # with labels at 1, 2, 3, 5, 7 of every power of ten, since a run crosses one at most
    rows[0][0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    rows[0][0].yaxis.set_minor_locator(NullLocator())
    rows[0][0].yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    seeds = len(next(iter(results.values())))
    handles, names = rows[0][0].get_legend_handles_labels()
    about = f"median and range of {seeds} seeds" if seeds > 1 else "one seed"
    figure.legend(
        handles, names, loc="outside upper center", ncols=min(6, len(names)), frameon=False, fontsize="large",
        title=f"{about}, {shape}",
    )  # fmt: skip
    figure.savefig(path, dpi=120)


def _over_seeds(reduce: Callable[[Sequence[float]], float], seeds: Sequence[Sequence[float]]) -> list[float]:
    """One number for each evaluation, of those of all seeds."""
    return [reduce(values) for values in zip(*seeds)]


if __name__ == "__main__":
    main()
