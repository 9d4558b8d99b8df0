"""The curves of a run's report: training and evaluation over steps, each panel an SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

INK, COLOURS = "#808894", ("#4585e8", "#e07a3a", "#35a079", "#b066cc", "#c79a1e", "#d2506e")  # on light and dark pages
LOSSES = ("loss", "held-out loss by noise level", "gradient norm")
RIGHT = "captions right, "  # then the shape
TRAINING = {  # of the training lines, in the order of the page: title, noisy
    "grad_norm": ("gradient norm", True),
    "lr": ("learning rate", False),
    "tokens_per_second": ("tokens per second", True),
    "mfu": ("model FLOPs utilisation", True),
}


@dataclass(frozen=True)
class Series:
    """Values over steps. noisy: draw a moving average too. dots: mark every point."""

    label: str
    points: dict[int, float]
    noisy: bool = False
    dots: bool = False


def panels(train: Sequence[dict[str, Any]], evals: Sequence[dict[str, Any]]) -> dict[str, list[Series]]:
    """What to draw of the lines of metrics.jsonl, by title, in the order of the page. Without what was not measured."""
    found = {"loss": [Series("training", _points(train, "loss"), noisy=True), _evaluated(evals, "held-out", "loss")]}
    found[LOSSES[1]] = [_evaluated(evals, name, "loss_by_level", name) for name in _names(evals, "loss_by_level")]
    for shape in _names(evals, "toy"):
        names = _names([line["toy"] for line in evals if isinstance(line.get("toy"), dict)], shape)
        found[RIGHT + shape] = [_evaluated(evals, name, "toy", shape, name) for name in names]
    found["PSNR in dB"] = [_evaluated(evals, "PSNR", "psnr")]
    for key, (title, noisy) in TRAINING.items():
        found[title] = [Series(title, _points(train, key), noisy)]
    # a line takes two points, a dot one
    drawn = {title: [one for one in series if len(one.points) > (not one.dots)] for title, series in found.items()}
    return {title: series for title, series in drawn.items() if series}


def _evaluated(evals: Sequence[dict[str, Any]], label: str, *path: str) -> Series:
    return Series(label, _points(evals, *path), dots=True)


def _names(lines: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The names in the mappings under a key of the lines."""
    return list(dict.fromkeys(name for line in lines if isinstance(line.get(key), dict) for name in line[key]))


def _points(lines: Sequence[dict[str, Any]], *path: str) -> dict[int, float]:
    """The number under path[0], path[1], … of each line that has one, by step."""
    points = {}
    for line in lines:
        value: Any = line
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int | float):
            points[line["step"]] = float(value)
    return dict(sorted(points.items()))


def draw(title: str, series: Sequence[Series]) -> bytes:
    """An SVG of values over steps, on a transparent ground."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

    look: dict[Any, Any] = dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    look |= {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with rc_context(look):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        for one, colour in zip(series, cycle(COLOURS)):
            steps, values = list(one.points), list(one.points.values())
            mean = _smooth(values) if one.noisy else values
            if one.noisy:
                axes.plot(steps, values, color=colour, linewidth=1, alpha=0.3)
            marker = "o" if one.dots else ""
            axes.plot(steps, mean, color=colour, linewidth=1.8, marker=marker, markersize=3.5, label=one.label)
        numbers = [value for one in series for value in one.points.values()]
        if title in LOSSES and min(numbers) > 0 and max(numbers) > 8 * min(numbers):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        elif title.startswith(RIGHT):
            axes.set_ylim(0, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        elif title not in LOSSES and not any(one.dots for one in series):
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        axes.grid(True, color=INK, alpha=0.2, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            columns = 4 if len(series) == 4 else 3
            figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK, fontsize="small")
        file = io.BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving average over a fiftieth of the run to both sides."""
    reach = max(1, len(values) // 50)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
