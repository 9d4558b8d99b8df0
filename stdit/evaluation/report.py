"""report.html: a run in one file that opens anywhere, with curves, the plan, playing samples and toy scores."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

from stdit.errors import StditError
from stdit.evaluation.curves import draw, panels
from stdit.files import publish_text, whole_objects
from stdit.heartbeat import readable_time

STEPS_SHOWN = 6  # of the validation samples, spread from the first to the last
PROMPTS_SHOWN = 8
CLIPS_SHOWN = 12  # evaluated clips of a shape
MEDIA = {".mp4": "video/mp4", ".png": "image/png", ".svg": "image/svg+xml"}
SOURCES = {  # of the evaluated clips
    "samples": "samples",
    "vae": "through the VAE alone",
    "rendered": "ground truth",
    "shuffled": "ground truth, captions shuffled",
}
MEASURED = ("loss", "psnr")  # numbers of the evaluation lines that stand at the top of the page


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind if given. Lines without a step, or cut off by a crash, are left out."""
    lines = whole_objects(Path(folder) / "metrics.jsonl")
    return [line for line in lines if isinstance(line.get("step"), int) and kind in (None, line.get("kind"))]


def write_report(run: str | Path) -> Path:
    """Writes run/report.html from the contents of the run folder, without what is missing. Returns its path."""
    from jinja2 import Environment, PackageLoader

    run = Path(run)
    if not run.is_dir():
        raise StditError(f"{run} is not a run folder.")
    lines = read_metrics(run)
    starts, train, evals = ([line for line in lines if line.get("kind") == kind] for kind in ("start", "train", "eval"))
    befores = [0, *(line["step"] for line in train)]
    seconds = (max(0, line["step"] - before) * (line.get("step_seconds") or 0) for before, line in zip(befores, train))
    environment = Environment(loader=PackageLoader("stdit.evaluation", "."), autoescape=True, trim_blocks=True)
    environment.filters.update(probability=_probability, short=_short, duration=readable_time)
    page = environment.get_template("report.html.j2").render(
        title=run.resolve().name,
        start=starts[-1] if starts else {},
        last=train[-1] if train else {},
        measured={key: line[key] for key in MEASURED for line in evals if isinstance(line.get(key), int | float)},
        seconds=sum(seconds),
        curves=[(title, _data_uri(draw(title, series), ".svg")) for title, series in panels(train, evals).items()],
        plan=_embed(run, "plan.png"),
        steps=_samples(run),
        evaluation=_evaluation(run),
        sources=SOURCES.items(),
        config=_text(run / "config.yaml"),
    )
    publish_text(run / "report.html", page)
    return run / "report.html"


def _short(number: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def _probability(p: float) -> str:
    if p >= 0.001:
        return f"p = {p:.2g}"
    power = min(99, math.floor(-math.log10(max(p, 1e-99))))
    return f"p < 10⁻{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"


def _samples(run: Path) -> dict[str, Any] | None:
    """{"steps": [step], "rows": [{"prompt", "clips": [data URI or None, per step]}]}, or None if there are none."""
    found: list[tuple[int, dict[str, str]]] = []
    for path in run.glob("samples/step-*/samples.json"):
        record = _json(path)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            clips = {str(clip.get("prompt", "")): str(clip.get("file", "")) for clip in record.get("samples", [])}
            found.append((record["step"], clips))
    found.sort(key=lambda pair: pair[0])
    if len(found) > STEPS_SHOWN:
        found = [found[round(i * (len(found) - 1) / (STEPS_SHOWN - 1))] for i in range(STEPS_SHOWN)]
    prompts = list(dict.fromkeys(prompt for _, clips in found for prompt in clips))[:PROMPTS_SHOWN]
    rows = [{"prompt": prompt, "clips": [_embed(run, clips.get(prompt)) for _, clips in found]} for prompt in prompts]
    return {"steps": [step for step, _ in found], "rows": rows} if rows else None


def _evaluation(run: Path) -> dict[str, Any] | None:
    """evaluation.json of `stdit eval toy`, with its clips and sheets embedded."""
    result = _json(run / "evaluation.json")
    if not isinstance(result, dict) or result.get("format") != 1 or not result.get("sets"):
        return None
    for shape in result["sets"]:
        shape["sheet"] = _embed(run, shape.get("sheet"))
        shown = shape["clips"][:CLIPS_SHOWN]
        shape["shown"] = [{**clip, "video": _embed(run, clip.get("file"))} for clip in shown]
    return result


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Any:
    """The content of a JSON file; None if it is missing or damaged."""
    try:
        return json.loads(_text(path))
    except ValueError:
        return None


def _embed(run: Path, name: object) -> str | None:
    """A file of the run as a data URI; None if it is not there, or if its path leads out of the run folder."""
    path = (run / str(name or "")).resolve()
    if not path.is_relative_to(run.resolve()) or not path.is_file() or path.suffix not in MEDIA:
        return None
    return _data_uri(path.read_bytes(), path.suffix)


def _data_uri(content: bytes, suffix: str) -> str:
    return f"data:{MEDIA[suffix]};base64,{base64.b64encode(content).decode()}"
