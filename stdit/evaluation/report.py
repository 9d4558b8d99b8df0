"""report.html: a run as one file that opens anywhere, with curves, the plan, samples that play and toy numbers."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stdit.errors import StditError
from stdit.evaluation.run_metrics import read_metrics
from stdit.files import publish_text

STEPS_SHOWN = 6  # of the validation samples, spread from the first to the last
PROMPTS_SHOWN = 8
CLIPS_SHOWN = 12  # evaluated clips of a shape
MEDIA = {".mp4": "video/mp4", ".png": "image/png", ".jpg": "image/jpeg"}
SOURCES = (
    ("samples", "samples"),
    ("vae", "through the VAE alone"),
    ("rendered", "ground truth"),
    ("shuffled", "ground truth, captions shuffled"),
)
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
INK, ACCENT = "#010203", "#040506"  # matplotlib's colours, replaced by the page's own (dark or light)


def write_report(run: str | Path) -> Path:
    """Writes run/report.html from what the run folder holds; whatever is missing is left out. Returns its path."""
    from jinja2 import Environment, PackageLoader

    run = Path(run)
    if not run.is_dir():
        raise StditError(f"{run} is not a run folder.")
    lines = read_metrics(run)
    environment = Environment(loader=PackageLoader("stdit.evaluation", "."), autoescape=True, trim_blocks=True)
    environment.filters.update(percent=_percent, probability=_probability)
    page = environment.get_template("report.html.j2").render(
        title=run.resolve().name,
        facts=_facts(lines),
        curves=_curves(lines),
        plan=_embed(run / "plan.png"),
        steps=_samples(run),
        evaluation=_evaluation(run),
        sources=SOURCES,
        config=_text(run / "config.yaml"),
    )
    publish_text(run / "report.html", page)
    return run / "report.html"


# ----------------------------------------------------------------------------------------------------------- reading


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path) or "null")
    except ValueError:
        return None


def _embed(path: Path) -> str | None:
    """The file as a data: address, or None if it is not there."""
    if not path.is_file() or path.suffix not in MEDIA:
        return None
    return f"data:{MEDIA[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _inside(run: Path, name: Any) -> Path:
    """A path that a JSON of the run names, kept inside the run folder."""
    path = (run / str(name)).resolve()
    return path if path.is_relative_to(run.resolve()) else run / "missing"


# ------------------------------------------------------------------------------------------------------------- facts


def _facts(lines: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(what, value) for the head of the page."""
    start: dict[str, Any] = next((line for line in reversed(lines) if line.get("kind") == "start"), {})
    train = [line for line in lines if line.get("kind", "train") == "train"]
    facts: list[tuple[str, str]] = []
    if start.get("objective"):
        facts.append(
            ("trained", {"flow": "diffusion transformer", "vae": "VAE"}.get(start["objective"], start["objective"]))
        )
    if start.get("parameters"):
        facts.append(("parameters", _short(start["parameters"])))
    if train:
        wanted = f" of {start['steps']:,}" if start.get("steps", train[-1]["step"]) != train[-1]["step"] else ""
        facts.append(("steps", f"{train[-1]['step']:,}{wanted}"))
        if (loss := train[-1].get("loss")) is not None:
            facts.append(("last loss", f"{loss:.4g}"))
    measured = {
        key: value
        for line in lines
        if line.get("kind") == "eval"
        for key, value in line.items()
        if key not in ("step", "time") and isinstance(value, int | float)
    }
    facts += [
        ("PSNR" if key == "psnr" else key, f"{value:.1f} dB" if key == "psnr" else f"{value:.4g}")
        for key, value in measured.items()
    ]
    seconds = sum(
        (line["step"] - before.get("step", 0)) * (line.get("step_seconds") or 0)
        for before, line in zip([{}, *train], train)
        if line["step"] > before.get("step", 0)
    )
    if seconds:
        facts.append(("training time", _duration(seconds)))
    if start.get("clips"):
        facts.append(("clips", f"{start['clips']:,}"))
    if start.get("device"):
        ranks = start.get("ranks", 1)
        facts.append(("device", f"{start['device']}{f' × {ranks} ranks' if ranks > 1 else ''}"))
    if start.get("torch"):
        facts.append(("versions", f"stdit {start.get('stdit', '?')}, torch {start['torch']}"))
    return facts


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _probability(p: float) -> str:
    if p >= 0.001:
        return f"p = {p:.2g}"
    power = min(99, math.floor(-math.log10(max(p, 1e-99))))
    return f"p < 10⁻{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


# ------------------------------------------------------------------------------------------------------------ curves


def _curves(lines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """One picture a quantity: {"name", "svg"}."""
    train = [line for line in lines if line.get("kind", "train") == "train"]
    measured = [line for line in lines if line.get("kind") == "eval"]
    wanted = [("loss", "loss"), ("grad_norm", "gradient norm"), ("lr", "learning rate")]
    wanted += [("tokens_per_second", "tokens a second"), ("mfu", "model FLOPs utilisation")]
    curves = [_curve(name, *_series(train, key)) for key, name in wanted]
    keys = dict.fromkeys(key for line in measured for key, value in line.items() if isinstance(value, int | float))
    curves[1:1] = [
        _curve("PSNR in dB" if key == "psnr" else key, *_series(measured, key), dots=True)
        for key in keys
        if key not in ("step", "time")
    ]
    return [curve for curve in curves if curve]


def _series(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    points = {line["step"]: line[key] for line in lines if isinstance(line.get(key), int | float)}
    return sorted(points), [float(points[step]) for step in sorted(points)]


def _smooth(values: Sequence[float]) -> list[float]:
    """A moving average over a fiftieth of the run to both sides."""
    reach = max(1, len(values) // 50)
    return [
        sum(values[max(0, i - reach) : i + reach + 1]) / len(values[max(0, i - reach) : i + reach + 1])
        for i in range(len(values))
    ]


def _curve(name: str, steps: list[int], values: list[float], dots: bool = False) -> dict[str, str] | None:
    if not values or (len(values) < 2 and not dots):
        return None
    import matplotlib

    matplotlib.use("agg", force=False)
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings: dict[Any, Any] = dict.fromkeys(INKED, INK)
    settings |= {"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(4.6, 2.5), layout="constrained")
        axes = figure.add_subplot()
        noisy = not dots and name in ("loss", "gradient norm", "tokens a second", "model FLOPs utilisation")
        axes.plot(
            steps,
            values,
            color=ACCENT,
            linewidth=1,
            alpha=0.3 if noisy else 1,
            marker="o" if dots else "",
            markersize=4,
        )
        if noisy:
            axes.plot(steps, _smooth(values), color=ACCENT, linewidth=1.8)
        if name in ("loss", "gradient norm") and min(values) > 0 and max(values) > 8 * min(values):
            axes.set_yscale("log")
        elif not dots and name not in ("loss", "gradient norm"):
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel("step")
        axes.grid(True, color=INK, alpha=0.12, linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace(ACCENT, "var(--accent)")
    svg = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
    return {"name": name, "svg": svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(name)} over steps"', 1)}


# ----------------------------------------------------------------------------------------------------------- samples


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` items, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _samples(run: Path) -> dict[str, Any] | None:
    """{"steps": [step], "rows": [{"prompt", "clips": [address or None, one a step]}]}, or None if there are none."""
    found: list[tuple[int, dict[str, str]]] = []
    for path in sorted(run.glob("samples/step-*/samples.json")):
        about = _json(path)
        if isinstance(about, dict) and isinstance(about.get("step"), int):
            clips = {str(one.get("prompt", "")): str(one.get("file", "")) for one in about.get("samples", [])}
            found.append((about["step"], clips))
    found = _spread(sorted(found, key=lambda pair: pair[0]), STEPS_SHOWN)
    prompts = list(dict.fromkeys(prompt for _, clips in found for prompt in clips))[:PROMPTS_SHOWN]
    rows = [
        {"prompt": prompt, "clips": [_embed(_inside(run, clips.get(prompt, ""))) for _, clips in found]}
        for prompt in prompts
    ]
    return {"steps": [step for step, _ in found], "rows": rows} if rows else None


def _evaluation(run: Path) -> dict[str, Any] | None:
    """evaluation.json of `stdit eval toy`, its clips and sheets embedded."""
    result = _json(run / "evaluation.json")
    if not isinstance(result, dict) or result.get("format") != 1 or not result.get("sets"):
        return None
    for one in result["sets"]:
        one["sheet"] = _embed(_inside(run, one.get("sheet", "")))
        one["shown"] = [
            {**clip, "video": _embed(_inside(run, clip.get("file", "")))} for clip in one["clips"][:CLIPS_SHOWN]
        ]
    return result
