"""Samples a model folder and measures what comes out: the one place where models, data and metrics meet."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stdit.data.decode.video import read_frames
from stdit.data.decode.write import contact_sheet, write_video
from stdit.data.toy import Jitter, ToySpec, held_out_prompts, render
from stdit.errors import StditError
from stdit.evaluation.metrics import mean_psnr, psnr
from stdit.evaluation.toy import Accuracy, ToyReading, as_json, read_clip, score_readings
from stdit.files import make_folder, publish_text
from stdit.keyed import keyed_seed
from stdit.shapes import VideoShape, nearest_frames, size_for

if TYPE_CHECKING:
    from stdit.sampling.pipeline import Pipeline

FORMAT = 1
Progress = Callable[[str, int, int], None]  # what is being done, done, in all

SOURCES = ("samples", "vae", "rendered", "shuffled")
TRAINED, ASPECT, DURATION = "trained", "untrained aspect ratio", "untrained duration"


def evaluate_toy(
    model: str | Path | Pipeline,
    out: str | Path,
    prompts: int = 64,
    shapes: Sequence[str] | None = None,
    steps: int = 30,
    guidance: float = 5.0,
    seed: int = 0,
    held_out: str | Path | None = None,
    device: str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """How often samples of captions never trained show what was asked for, read from the pixels alone.

    model: a model folder, or a pipeline. shapes: WIDTHxHEIGHTxFRAMES; None: those the model was trained at, one
    untrained aspect ratio and one untrained duration. held_out: a folder that `stdit data toy` wrote its held-out clips
    to, for the VAE's PSNR on real files. For each shape the same prompts are also rendered, and the rendered clips
    passed through the VAE: what the reader, and the VAE, leave to be reached. The rendered clips against shuffled
    captions show that the reader does not agree with everything.

    Writes out/evaluation.json and out/evaluation/SHAPE/{NN.mp4, sheet.png}; returns the content of the JSON.
    """
    from stdit.sampling.pipeline import Pipeline

    pipeline = Pipeline.load(model, device=device) if isinstance(model, str | Path) else model
    out = make_folder(out)
    captions = held_out_prompts(prompts, seed)
    trained = [VideoShape.parse(shape) for shape in pipeline.settings.shapes]
    multiple, stride = pipeline.multiple, pipeline.vae.config.stride
    chosen = [VideoShape.parse(shape) for shape in shapes] if shapes else default_shapes(trained, multiple, stride)
    for shape in chosen:  # before anything is sampled
        pipeline.shape((shape.width, shape.height), shape.frames)

    began = time.perf_counter()
    sets = []
    for shape in chosen:
        what = f"{shape} ({shape_kind(shape, trained)})"
        started = time.perf_counter()
        clips: Any = pipeline(
            captions,
            size=(shape.width, shape.height),
            frames=shape.frames,
            steps=steps,
            guidance=guidance,
            seed=seed,
            progress=partial(progress, what),
        )
        seconds = time.perf_counter() - started
        rendered = render_prompts(captions, shape, seed)
        rebuilt = reconstruct(pipeline.vae, rendered)
        readings = [read_clip(clip) for clip in clips]
        folder = out / "evaluation" / str(shape)
        _write_samples(folder, clips, captions, readings, pipeline.settings.fps)
        truth = [read_clip(clip) for clip in rendered]
        sets.append(
            {
                "shape": str(shape),
                "kind": shape_kind(shape, trained),
                "seconds": round(seconds, 2),
                "samples": as_json(score_readings(captions, readings)),
                "vae": as_json(score_readings(captions, [read_clip(clip) for clip in rebuilt])),
                "rendered": as_json(score_readings(captions, truth)),
                "shuffled": as_json(
                    score_readings(shuffle(captions, keyed_seed(seed, "toy shuffle", str(shape))), truth)
                ),
                "vae_psnr": round(mean_psnr(rebuilt, rendered), 3),
                "sheet": f"evaluation/{shape}/sheet.png",
                "clips": [_describe(shape, i, *pair) for i, pair in enumerate(zip(captions, readings))],
            }
        )
    result: dict[str, Any] = {
        "format": FORMAT,
        "kind": "toy",
        "model": str(model) if isinstance(model, str | Path) else "",
        "settings": {
            "prompts": prompts,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "fps": pipeline.settings.fps,
            "trained_shapes": list(pipeline.settings.shapes),
        },
        "summary": summarise(sets),
        "vae": vae_on_files(pipeline, held_out, trained, progress) if held_out else None,
        "sets": sets,
        "seconds": round(time.perf_counter() - began, 1),
    }
    publish_text(out / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


# ------------------------------------------------------------------------------------------------------------ shapes


def default_shapes(
    trained: Sequence[VideoShape], multiple: tuple[int, int], stride: int | tuple[int, ...]
) -> list[VideoShape]:
    """The trained video shapes, then one of an untrained aspect ratio and one of an untrained duration.

    The aspect ratio is the first of 2:1, 1:2, 4:3, … that is new at about the first shape's area; the duration lies
    between the trained ones where there is room, else is the next above them that the VAE's stride allows.
    """
    videos = [shape for shape in dict.fromkeys(trained) if not shape.is_image]
    if not videos:
        raise StditError("the model was trained on images alone; name video shapes to evaluate at.")
    first = videos[0]
    area = first.width * first.height
    ratios = {shape.width / shape.height for shape in trained}
    extra = []
    for aspect in (2.0, 0.5, 4 / 3, 3 / 4, 3.0, 1 / 3):
        short = (area / max(aspect, 1 / aspect)) ** 0.5
        width, height = size_for(aspect, round(short), multiple)
        if all(abs(width / height / ratio - 1) > 0.1 for ratio in ratios):
            extra.append(VideoShape(first.frames, height, width))
            break
    lengths = {shape.frames for shape in videos}
    near = range(min(lengths) + 1, max(lengths))
    between = [n for n in near if n not in lengths and nearest_frames(n, stride)[0] == n]
    frames = between[-1] if between else nearest_frames(max(lengths) + 1, stride)[1]
    return [*videos, *extra, VideoShape(frames, first.height, first.width)]


def shape_kind(shape: VideoShape, trained: Sequence[VideoShape]) -> str:
    """Whether a shape was trained, or what of it was not."""
    if shape in trained:
        return TRAINED
    aspect = all(abs(shape.width / shape.height * one.height / one.width - 1) > 0.02 for one in trained)
    duration = shape.frames not in {one.frames for one in trained}
    if aspect and duration:
        return f"{ASPECT} and duration"
    if aspect or duration:
        return ASPECT if aspect else DURATION
    sizes = {(one.width, one.height) for one in trained}
    return "untrained pair of size and duration" if (shape.width, shape.height) in sizes else "untrained size"


# ---------------------------------------------------------------------------------------------------- reference clips


def render_prompts(captions: Sequence[str], shape: VideoShape, seed: int) -> list[np.ndarray]:
    """What each caption asks for, as the data set would show it at this shape."""
    return [
        render(
            ToySpec.parse(caption),
            shape.width,
            shape.height,
            shape.frames,
            Jitter.keyed(keyed_seed(seed, "toy reference", caption, str(shape))),
        )
        for caption in captions
    ]


def shuffle(captions: Sequence[str], seed: int) -> list[str]:
    """The captions in another order, in which none stays in its place."""
    order = np.random.default_rng(seed).permutation(len(captions))
    shuffled = [""] * len(captions)
    for here, there in zip(order, np.roll(order, 1)):  # one cycle through all of them
        shuffled[here] = captions[there]
    return shuffled


def reconstruct(vae: Any, clips: Sequence[np.ndarray], batch: int = 8) -> list[np.ndarray]:
    """Clips of one shape, uint8 (T, H, W, 3), through the VAE and back."""
    import torch

    from stdit.pixels import to_pixels, to_video

    weight = next(vae.parameters())
    rebuilt = []
    with torch.no_grad():
        for start in range(0, len(clips), batch):
            video = to_video(torch.from_numpy(np.stack(clips[start : start + batch])).to(weight.device))
            decoded = vae.decode(vae.encode(video.to(weight)))  # (B, 3, T, H, W)
            rebuilt += [*to_pixels(decoded).cpu().numpy()]
    return rebuilt


def vae_on_files(pipeline: Pipeline, folder: str | Path, trained: Sequence[VideoShape], progress: Progress) -> dict:
    """The VAE's PSNR on held-out files, each at the trained shape of the nearest aspect ratio and longest duration."""
    folder = Path(folder)
    folder = folder / "held_out" if (folder / "held_out").is_dir() else folder
    if not (folder / "captions.csv").is_file():
        raise StditError(f"{folder} has no captions.csv. Name the held_out/ folder that `stdit data toy` wrote.")
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    found: dict[str, list[float]] = {}
    for done, name in enumerate(names):
        progress("VAE on held-out clips", done, len(names))
        shape, frames = _read_at_a_trained_shape(folder / name, trained, pipeline.settings.fps)
        rebuilt = reconstruct(pipeline.vae, [frames])[0]
        found.setdefault(str(shape), []).append(min(psnr(rebuilt, frames), 100.0))
    every = [value for values in found.values() for value in values]
    if not every:
        raise StditError(f"{folder}/captions.csv names no clip.")
    return {
        "psnr": round(float(np.mean(every)), 3),
        "worst": round(min(every), 3),
        "clips": len(every),
        "shapes": {shape: round(float(np.mean(values)), 3) for shape, values in sorted(found.items())},
    }


def _read_at_a_trained_shape(path: Path, trained: Sequence[VideoShape], fps: float) -> tuple[VideoShape, np.ndarray]:
    from stdit.data.decode.video import probe

    about = probe(str(path))
    fits = [shape for shape in trained if not shape.is_image and shape.frames <= round(about.duration * fps)]
    if not fits:
        raise StditError(
            f"{path} lasts {about.duration:.2f} s; that is shorter than every trained shape at {fps:g} fps."
        )
    aspect = about.width / about.height
    shape = min(fits, key=lambda one: (abs(np.log(one.width / one.height / aspect)), -one.frames))
    return shape, read_frames(str(path), shape.frames, (shape.width, shape.height), fps)


# ------------------------------------------------------------------------------------------------------------ results


def summarise(sets: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each kind of shape: the counts of all its clips together, for each source, and the VAE's mean PSNR."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for one in sets:
        kinds.setdefault(one["kind"], []).append(one)
    return {
        kind: {
            "shapes": [one["shape"] for one in members],
            **{source: _pooled([one[source] for one in members]) for source in SOURCES},
            "vae_psnr": round(float(np.mean([one["vae_psnr"] for one in members])), 3),
        }
        for kind, members in kinds.items()
    }


def _pooled(scores: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    return {
        name: asdict(
            Accuracy.of(
                sum(one[name]["right"] for one in scores), sum(one[name]["total"] for one in scores), first["chance"]
            )
        )
        for name, first in scores[0].items()
    }


def _describe(shape: VideoShape, index: int, caption: str, reading: ToyReading) -> dict[str, Any]:
    return {
        "file": f"evaluation/{shape}/{index:02d}.mp4",
        "prompt": caption,
        "reading": {name: getattr(reading, name) for name in ("colour", "shape", "size", "direction", "background")},
        "right": reading.right(ToySpec.parse(caption)),
    }


def _write_samples(
    folder: Path, clips: Sequence[np.ndarray], captions: Sequence[str], readings: Sequence[ToyReading], fps: float
) -> None:
    labels = []
    for index, (clip, caption, reading) in enumerate(zip(clips, captions, readings)):
        write_video(folder / f"{index:02d}.mp4", clip, fps)
        wrong = [name for name, right in reading.right(ToySpec.parse(caption)).items() if not right]
        labels.append(
            caption + ("" if not wrong else f"  [read: {', '.join(getattr(reading, name) for name in wrong)}]")
        )
    contact_sheet(clips, folder / "sheet.png", labels=labels, columns=9, side=72)
