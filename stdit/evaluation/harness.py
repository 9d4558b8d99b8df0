"""Samples a toy model at several shapes and reads from the pixels what the clips show: `evaluate_toy`."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stdit.data.decode.video import probe, read_frames
from stdit.data.decode.write import contact_sheet, write_video
from stdit.data.toy import Jitter, ToySpec, held_out_prompts, render
from stdit.errors import StditError
from stdit.evaluation.metrics import EXACT_PSNR, mean_psnr, psnr
from stdit.evaluation.report import SOURCES
from stdit.evaluation.toy import Accuracy, ToyReading, as_json, read_clip, score_readings
from stdit.files import make_folder, publish_text
from stdit.heartbeat import Report
from stdit.keyed import keyed_seed
from stdit.pixels import to_pixels, to_video
from stdit.sampling.pipeline import Pipeline
from stdit.shapes import VideoShape, nearest_frames, size_for

FORMAT = 1
TOGETHER = 8  # captions that `toy_shares` samples in one pack
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
    progress: Report = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measures how often samples of held-out captions show what the captions say, as read from the pixels.

    Three references are read the same way: the prompts rendered by the data set (the most that the reader allows), the
    rendered clips through the VAE (the most that the VAE allows), and the rendered clips against shuffled captions
    (chance). Writes out/evaluation.json, whose content it returns, and out/evaluation/SHAPE/{NN.mp4, sheet.png}.

    prompts: number of held-out captions.
    shapes: WIDTHxHEIGHTxFRAMES; None: those the model was trained at, an untrained aspect ratio, an untrained duration.
    held_out: the folder of held-out clips that `stdit data toy` wrote, for the VAE's PSNR on files; None: not measured.
    """
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
        kind = shape_kind(shape, trained)
        started = time.perf_counter()
        report = partial(progress, f"{shape} ({kind})")
        clips = sample_captions(pipeline, captions, shape, steps, guidance, seed, report)
        seconds = time.perf_counter() - started
        scores = _score_shape(pipeline, clips, captions, shape, seed, out)
        sets.append({"shape": str(shape), "kind": kind, "seconds": round(seconds, 2), **scores})
    settings = {
        "prompts": prompts, "steps": steps, "guidance": guidance, "seed": seed, "fps": pipeline.settings.fps,
        "trained_shapes": list(pipeline.settings.shapes),
    }  # fmt: skip
    result: dict[str, Any] = {
        "format": FORMAT,
        "kind": "toy",
        "model": str(model) if isinstance(model, str | Path) else "",
        "settings": settings,
        "summary": summarise(sets),
        "vae": _vae_on_files(pipeline, held_out, trained, progress) if held_out else None,
        "sets": sets,
        "seconds": round(time.perf_counter() - began, 1),
    }
    publish_text(out / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


def toy_shares(
    pipeline: Pipeline,
    captions: int,
    shapes: Sequence[VideoShape],
    steps: int,
    guidance: float,
    seed: int,
    share_out: Callable[[Sequence[Any], Callable[[Any], Any]], list[Any]] = lambda items, work: [*map(work, items)],
) -> dict[str, dict[str, float]]:
    """The shares of samples that show each attribute, and all together, as their held-out captions say: by shape.

    As `evaluate_toy` samples and reads them, without references and files, TOGETHER captions at a time.

    share_out: does the work of each item, on whatever rank, and returns all results in the order of items.
    """
    prompts, shares = held_out_prompts(captions, seed), dict[str, dict[str, float]]()
    groups = [range(len(prompts))[first : first + TOGETHER] for first in range(0, len(prompts), TOGETHER)]
    for shape in shapes:

        def read(group: range, shape: VideoShape = shape) -> list[ToyReading]:
            chosen = [prompts[index] for index in group]
            clips = sample_captions(pipeline, chosen, shape, steps, guidance, seed, indices=group)
            return [read_clip(clip) for clip in clips]

        readings = [reading for group in share_out(groups, read) for reading in group]
        scores = score_readings(prompts, readings)
        shares[str(shape)] = {name: accuracy.share for name, accuracy in scores.items()}
    return shares


def sample_captions(
    pipeline: Pipeline,
    captions: Sequence[str],
    shape: VideoShape,
    steps: int,
    guidance: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    indices: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """A clip for each caption, uint8 (T, H, W, 3), all of one shape and so in few packs. indices: key their noise."""
    clips: Any = pipeline(
        captions, size=(shape.width, shape.height), frames=shape.frames, steps=steps, guidance=guidance, seed=seed,
        progress=progress, indices=indices,
    )  # fmt: skip
    return list(clips)


def _score_shape(
    pipeline: Pipeline, clips: Sequence[np.ndarray], captions: Sequence[str], shape: VideoShape, seed: int, out: Path
) -> dict[str, Any]:
    """Reads the samples of one shape and their references (SOURCES), and writes the samples to out/evaluation/SHAPE."""
    rendered = _render_prompts(captions, shape, seed)
    rebuilt = reconstruct(pipeline.vae, rendered)
    readings, truth = [read_clip(clip) for clip in clips], [read_clip(clip) for clip in rendered]
    shuffled = shuffle(captions, keyed_seed(seed, "toy shuffle", str(shape)))
    folder = f"evaluation/{shape}"
    described, labels = [], []
    for index, (clip, caption, reading) in enumerate(zip(clips, captions, readings)):
        file, seen, right = f"{folder}/{index:02d}.mp4", reading.seen, reading.right(ToySpec.parse(caption))
        write_video(out / file, clip, pipeline.settings.fps)
        described.append({"file": file, "prompt": caption, "reading": seen, "right": right})
        wrong = ", ".join(seen[name] for name in right if not right[name])
        labels.append(f"{caption}  [read: {wrong}]" if wrong else caption)
    contact_sheet(clips, out / folder / "sheet.png", labels=labels, columns=9, side=72)
    return {
        "samples": as_json(score_readings(captions, readings)),
        "vae": as_json(score_readings(captions, [read_clip(clip) for clip in rebuilt])),
        "rendered": as_json(score_readings(captions, truth)),
        "shuffled": as_json(score_readings(shuffled, truth)),
        "vae_psnr": round(mean_psnr(rebuilt, rendered), 3),
        "sheet": f"{folder}/sheet.png",
        "clips": described,
    }


def default_shapes(
    trained: Sequence[VideoShape], multiple: tuple[int, int], stride: int | tuple[int, ...]
) -> list[VideoShape]:
    """The trained video shapes, then one with an untrained aspect ratio and one with an untrained duration.

    The aspect ratio is the first untrained one of 2:1, 1:2, 4:3, …, at about the area of the first shape. The duration
    lies between the trained ones if there is room; else it is the next longer one that the VAE's stride allows.
    """
    videos = [shape for shape in dict.fromkeys(trained) if not shape.is_image]
    if not videos:
        raise StditError("the model was trained on images alone; name video shapes to evaluate.")
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
    """TRAINED, or which property of the shape was not trained."""
    if shape in trained:
        return TRAINED
    aspect = all(abs(shape.width / shape.height * known.height / known.width - 1) > 0.02 for known in trained)
    duration = shape.frames not in {known.frames for known in trained}
    if aspect and duration:
        return f"{ASPECT} and duration"
    if aspect or duration:
        return ASPECT if aspect else DURATION
    sizes = {(known.width, known.height) for known in trained}
    return "untrained pair of size and duration" if (shape.width, shape.height) in sizes else "untrained size"


def _render_prompts(captions: Sequence[str], shape: VideoShape, seed: int) -> list[np.ndarray]:
    """The clip that the data set would show for each caption at this shape."""
    rendered = []
    for caption in captions:
        jitter = Jitter.keyed(keyed_seed(seed, "toy reference", caption, str(shape)))
        rendered.append(render(ToySpec.parse(caption), shape.width, shape.height, shape.frames, jitter))
    return rendered


def shuffle(captions: Sequence[str], seed: int) -> list[str]:
    """The captions in a keyed order in which none keeps its place."""
    order = np.random.default_rng(seed).permutation(len(captions))
    shuffled = [""] * len(captions)
    for here, there in zip(order, np.roll(order, 1)):  # one cycle through all of them
        shuffled[here] = captions[there]
    return shuffled


@torch.no_grad()
def reconstruct(vae: Any, clips: Sequence[np.ndarray], batch: int = 8) -> list[np.ndarray]:
    """Encodes and decodes clips of one shape, uint8 (T, H, W, 3)."""
    weight = next(vae.parameters())
    rebuilt = []
    for start in range(0, len(clips), batch):
        video = to_video(torch.from_numpy(np.stack(clips[start : start + batch])).to(weight.device))
        decoded = vae.decode(vae.encode(video.to(weight)))  # (B, 3, T, H, W)
        rebuilt += [*to_pixels(decoded).cpu().numpy()]
    return rebuilt


def _vae_on_files(pipeline: Pipeline, folder: str | Path, trained: Sequence[VideoShape], progress: Report) -> dict:
    """The VAE's PSNR on held-out files, each at the trained shape of nearest aspect ratio and longest duration."""
    folder = Path(folder)
    folder = folder / "held_out" if (folder / "held_out").is_dir() else folder
    if not (folder / "captions.csv").is_file():
        raise StditError(f"{folder} has no captions.csv. Name the held_out/ folder that `stdit data toy` wrote.")
    with (folder / "captions.csv").open(newline="", encoding="utf-8") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    if not names:
        raise StditError(f"{folder}/captions.csv names no clip.")
    found: dict[str, list[float]] = {}
    for done, name in enumerate(names):
        progress("VAE on held-out clips", done, len(names))
        shape, frames = _read_at_a_trained_shape(folder / name, trained, pipeline.settings.fps)
        rebuilt = reconstruct(pipeline.vae, [frames])[0]
        found.setdefault(str(shape), []).append(min(psnr(rebuilt, frames), EXACT_PSNR))
    every = [value for values in found.values() for value in values]
    return {
        "psnr": round(float(np.mean(every)), 3),
        "worst": round(min(every), 3),
        "clips": len(every),
        "shapes": {shape: round(float(np.mean(values)), 3) for shape, values in sorted(found.items())},
    }


def _read_at_a_trained_shape(path: Path, trained: Sequence[VideoShape], fps: float) -> tuple[VideoShape, np.ndarray]:
    video = probe(str(path))
    fits = [shape for shape in trained if not shape.is_image and shape.frames <= round(video.duration * fps)]
    if not fits:
        raise StditError(
            f"{path} lasts {video.duration:.2f} s, which is shorter than every trained shape at {fps:g} fps."
        )
    aspect = video.width / video.height
    shape = min(fits, key=lambda fit: (abs(np.log(fit.width / fit.height / aspect)), -fit.frames))
    return shape, read_frames(str(path), shape.frames, (shape.width, shape.height), fps)


def summarise(sets: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per kind of shape: the counts of all its clips together, for each source, and the VAE's mean PSNR."""
    found = {}
    for kind in dict.fromkeys(scores["kind"] for scores in sets):
        members = [scores for scores in sets if scores["kind"] == kind]
        found[kind] = {
            "shapes": [scores["shape"] for scores in members],
            **{source: _pooled([scores[source] for scores in members]) for source in SOURCES},
            "vae_psnr": round(float(np.mean([scores["vae_psnr"] for scores in members])), 3),
        }
    return found


def _pooled(scores: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The accuracies of several shapes together."""
    pooled = {}
    for name, first in scores[0].items():
        right, total = (sum(row[name][count] for row in scores) for count in ("right", "total"))
        pooled[name] = Accuracy.of(right, total, first["chance"])
    return as_json(pooled)
