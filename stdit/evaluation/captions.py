"""Does a model follow its captions? Compares the loss of each training clip under every caption, and samples of them.

A model that ignores the text has the same loss for every caption. At fixed noise, the right caption must lower it;
among captions of one group (of the same person, say) only the words that differ can do so. A sample must be nearest to
the clip whose caption it was made from.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.data.config import DataConfig
from stdit.data.decode.write import contact_sheet
from stdit.data.load.loader import Loader
from stdit.data.manifests import named, read_manifests
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.diffusion.solvers import path_of
from stdit.errors import StditError
from stdit.evaluation.metrics import mean_psnr
from stdit.evaluation.toy import Accuracy
from stdit.files import make_folder, publish_text
from stdit.heartbeat import Report
from stdit.keyed.stream import keyed_stream
from stdit.models.packing import pack_clips, pack_texts, unpack_clips
from stdit.models.transformer import Experts
from stdit.sampling.pipeline import Pipeline
from stdit.shapes import LatentShape, VideoShape

FORMAT = 1
ROUNDING = 1e-6  # losses that differ by less, relatively, count as equal
SHEET_CAPTIONS = 40  # on the contact sheet, three rows each
TOKENS_PER_PACK = 16_384  # of one forward for the losses
MEASURES = {  # counts of clips; of pairs of a clip and a caption, None without groups; of samples
    "below_mean": "loss: own caption below the mean of the others",
    "lowest": "loss: own caption is the lowest",
    "same_group": "loss: own caption below another of its group",
    "nearest": "sample: the nearest clip has its caption",
}


@dataclass(frozen=True)
class CaptionedClip:
    """A training clip as the model saw it. frames: (T, H, W, 3) uint8. latents: normalised, (C, T', H', W')."""

    id: str
    path: str
    caption: str
    frames: np.ndarray
    latents: Tensor

    @property
    def shape(self) -> VideoShape:
        return VideoShape(*self.frames.shape[:3])


def evaluate_captions(
    model: str | Path | Pipeline,
    data: DataConfig,
    out: str | Path,
    group: str | None = None,
    limit: int | None = None,
    levels: int = 8,
    draws: int = 4,
    steps: int = 30,
    guidance: float = 5.0,
    seed: int = 0,
    device: str = "cpu",
    progress: Report = lambda what, done, total: None,
) -> dict[str, Any]:
    """Measures how the model's loss and samples follow the captions of its training clips.

    Writes out/evaluation-captions.json, whose content it returns, and out/evaluation-captions.png (source, VAE and
    sample of each caption).

    data: of the run; clips are cut to its shapes from their first frame, at the centre.
    group: a regular expression with one (group). Captions for which it captures the same text form a group.
    limit: at most so many clips, the first of the manifest.
    levels: number of noise levels, the middles of equal parts of [0, 1].
    draws: noises per level; all captions of a clip get the same ones.
    steps, guidance, seed: of the samples, one per caption at the shape of its first clip.
    """
    pipeline = Pipeline.load(model, device=device) if isinstance(model, str | Path) else model
    out = make_folder(out)
    began = time.perf_counter()
    clips, failures = read_clips(pipeline, data, limit, progress)
    captions = list(dict.fromkeys(clip.caption for clip in clips))
    if len(captions) < 2:
        raise StditError(
            f"{named(data.manifest)} gives {len(captions)} different captions; a comparison needs at least 2."
        )
    groups = group_captions(captions, group)
    own = [captions.index(clip.caption) for clip in clips]
    firsts = [own.index(caption) for caption in range(len(captions))]  # the first clip of each caption

    noise_levels = [(i + 0.5) / levels for i in range(levels)]
    by_level = caption_losses(pipeline, clips, captions, noise_levels, draws, seed, TOKENS_PER_PACK, progress)
    losses = by_level.mean(2)  # (clips, captions)

    samples = _sample(pipeline, [clips[first] for first in firsts], steps, guidance, seed, progress)
    rebuilt = [pipeline.decode(clip.latents) for clip in clips]
    distances = clip_distances(samples, rebuilt)
    nearest = distances.argmin(1)

    settings = {
        "manifest": named(data.manifest), "group": group, "levels": noise_levels, "draws": draws, "steps": steps,
        "guidance": guidance, "seed": seed,
    }  # fmt: skip
    result: dict[str, Any] = {
        "format": FORMAT,
        "kind": "captions",
        "model": str(model) if isinstance(model, str | Path) else "",
        "settings": settings,
        "measures": measures(losses, own, groups, distances),
        "levels": [_at_level(level, by_level[:, :, i], own) for i, level in enumerate(noise_levels)],
        "vae_psnr": round(mean_psnr(rebuilt, [clip.frames for clip in clips]), 3),
        "captions": [
            {
                "caption": caption,
                "group": groups[i],
                "nearest": clips[nearest[i]].caption,
                "distance": _short(distances[i, nearest[i]]),
                "distance_to_own": _short(distances[i, np.equal(own, i)].min()),
                "right": own[nearest[i]] == i,
            }
            for i, caption in enumerate(captions)
        ],
        "clips": [
            {
                "id": clip.id,
                "path": clip.path,
                "shape": str(clip.shape),
                "caption": own[row],
                "losses": [_short(loss) for loss in losses[row]],  # under each of `captions`
            }
            for row, clip in enumerate(clips)
        ],
        "failures": failures,
        "sheet": "evaluation-captions.png",
        "seconds": round(time.perf_counter() - began, 1),
    }
    rows, labels = [], []
    for first, sample, about in list(zip(firsts, samples, result["captions"]))[:SHEET_CAPTIONS]:
        rows += [clips[first].frames, rebuilt[first], sample]
        verdict = "" if about["right"] else f" [nearest: {about['nearest']}]"
        labels += [about["caption"], "through the VAE", f"sample{verdict}"]
    contact_sheet(rows, out / result["sheet"], labels=labels, columns=9, side=72)
    publish_text(out / "evaluation-captions.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


@torch.no_grad()
def read_clips(
    pipeline: Pipeline, data: DataConfig, limit: int | None, progress: Report
) -> tuple[list[CaptionedClip], list[str]]:
    """The clips that have a shape and a caption, with their first caption; and the reasons why others failed."""
    if data.fps != pipeline.settings.fps:
        raise StditError(
            f"data.fps is {data.fps:g}, but the model was trained at {pipeline.settings.fps:g}. "
            "Give the config of the run that trained it."
        )
    data = data.fixed()
    manifest = read_manifests(data.manifest)
    assignment = assign(manifest, data)
    rows = [row for row in map(int, np.flatnonzero(assignment.bucket >= 0)) if manifest[row].captions][:limit]
    if not rows:
        raise StditError(
            f"{named(data.manifest)}: no clip has a caption and fits one of data.shapes at {data.fps:g} fps."
        )
    loader = Loader(manifest, assignment, data, seed=0, workers=0)
    weight = next(pipeline.vae.parameters())
    clips, failures = [], []
    for done, row in enumerate(rows):
        progress("reading clips", done, len(rows))
        item = PlanItem(row, 0, int(assignment.bucket[row]), 0, 0, 0)
        example = loader.fetch([item], epoch=0)[0]
        if example.failure is not None or example.frames is None:
            failures.append(str(example.failure))
            continue
        latents = pipeline.vae.encode(example.video[None].to(weight))[0].float()
        clip = manifest[row]
        clips.append(CaptionedClip(clip.id, clip.path, clip.captions[0].text, example.frames.numpy(), latents))
    progress("reading clips", len(rows), len(rows))
    return clips, failures


def group_captions(captions: Sequence[str], pattern: str | None) -> list[str | None]:
    """The text that the pattern's (group) captures in each caption; None if it does not match, or is None."""
    if pattern is None:
        return [None] * len(captions)
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise StditError(f"--group {pattern!r} is not a regular expression: {error}.") from error
    if regex.groups != 1:
        raise StditError(f"--group {pattern!r} has {regex.groups} (groups); it needs exactly one.")
    found = [match[1] if (match := regex.search(caption)) else None for caption in captions]
    if not any(found):
        raise StditError(f"--group {pattern!r} matches none of {len(captions)} captions. The first is {captions[0]!r}.")
    return found


@torch.no_grad()
def caption_losses(
    pipeline: Pipeline,
    clips: Sequence[CaptionedClip],
    captions: Sequence[str],
    levels: Sequence[float],
    draws: int,
    seed: int,
    tokens_per_pack: int,
    progress: Report = lambda what, done, total: None,
) -> np.ndarray:
    """The mean squared error of the network's output, averaged over the draws: (clips, captions, levels) in fp64.

    At one level and draw, a clip has the same noise under all captions, keyed by (seed, clip, level, draw). One forward
    takes as many combinations of level, draw and caption as fit into tokens_per_pack.
    """
    patch, path = pipeline.transformer.config.patch, path_of(pipeline.scheduler)
    texts = pipeline.encode_texts(captions)
    if pipeline.transformer.config.image_channels > 1:
        raise StditError(
            "these weights take a first image, which says more about a clip than its caption does: captions of "
            "image-to-video models cannot be compared."
        )
    losses = np.zeros((len(clips), len(captions), len(levels)))
    for row, clip in enumerate(clips):
        progress("losses", row, len(clips))
        x0 = clip.latents.to(pipeline.device)  # (C, T', H', W')
        noisy, target = {}, {}
        settled = path.trained_levels(torch.tensor(levels, dtype=torch.float64), [clip.shape] * len(levels))
        for level, t in enumerate(settled):
            for draw in range(draws):
                stream = keyed_stream(seed, "caption loss", clip.id, level, draw)
                noise = stream.normal(0, x0.numel(), x0.device).view(x0.shape).to(x0)
                noisy[level, draw] = path.noisy(x0, noise, t)
                target[level, draw] = path.target(x0, noise, t)
        given = pipeline.known_frames.encode(None, clip.shape)  # none are known
        conditions = pipeline.conditions(given, clip.shape, pipeline.settings.fps)
        jobs = [(*key, column) for key in noisy for column in range(len(captions))]
        together = max(1, tokens_per_pack // LatentShape(*x0.shape[1:]).grid(patch).tokens)
        boundary = pipeline.transformer.boundary if isinstance(pipeline.transformer, Experts) else 0.0
        sides = [[job for job in jobs if bool(settled[job[0]] >= boundary) is high] for high in (True, False)]
        for part in [side[start : start + together] for side in sides for start in range(0, len(side), together)]:
            pack = pack_clips(
                [noisy[level, draw] for level, draw, _ in part],
                [settled[level] for level, _, _ in part],
                patch,
                [conditions] * len(part),
            )
            text = pack_texts([texts[column] for _, _, column in part], pipeline.text_padding)
            predicted = unpack_clips(pipeline.transformer(pack, text), pack, patch)
            for (level, draw, column), output in zip(part, predicted):
                error = (output[: len(x0)].double() - target[level, draw].double()).square().mean()
                losses[row, column, level] += float(error) / draws
    progress("losses", len(clips), len(clips))
    if not np.isfinite(losses).all():
        raise StditError("the model's loss is not finite. Did its training diverge?")
    return losses


def measures(
    losses: np.ndarray, own: Sequence[int], groups: Sequence[str | None], distances: np.ndarray
) -> dict[str, dict[str, Any] | None]:
    """MEASURES with 95 % intervals, from losses (clips, captions) and distances (captions, clips) of samples to clips.

    own: the index of each clip's caption. groups: of each caption.
    """
    clips, captions = losses.shape
    mine, others = _own_and_others(losses, own)
    lower = _lower(mine[:, None], losses)  # (clips, captions)
    alike = np.array([[a is not None and a == b for b in groups] for a in groups])[own]
    alike[np.arange(clips), own] = False
    right = np.equal.outer(np.arange(captions), own)  # (captions, clips)
    found = right[np.arange(captions), distances.argmin(1)]
    # by chance, a sample is nearest to any of the clips of its size
    comparable = np.isfinite(distances)
    chance = float(((right & comparable).sum(1) / comparable.sum(1)).mean())

    def count(answers: np.ndarray, chance: float) -> dict[str, Any]:
        return asdict(Accuracy.of(int(answers.sum()), len(answers), chance))

    return {
        "below_mean": count(_lower(mine, others.mean(1)), 0.5),
        "lowest": count(_lower(mine, others.min(1)), 1 / captions),
        "same_group": count(lower[alike], 0.5) if alike.any() else None,
        "nearest": count(found, chance) if 0 < chance < 1 else None,
    }


def _own_and_others(losses: np.ndarray, own: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Each clip's loss under its own caption (clips,), and under the others (clips, captions − 1)."""
    rows = np.arange(len(own))
    others = np.ones(losses.shape, bool)
    others[rows, own] = False
    return losses[rows, own], losses[others].reshape(len(own), -1)


def _lower(loss: np.ndarray, other: np.ndarray) -> np.ndarray:
    return loss < other * (1 - ROUNDING)


def _at_level(level: float, losses: np.ndarray, own: Sequence[int]) -> dict[str, Any]:
    """A summary of the losses (clips, captions) at one noise level."""
    mine, others = _own_and_others(losses, own)
    mean = others.mean(1)
    below = int(_lower(mine, mean).sum())
    return {"t": level, "own": _short(mine.mean()), "others": _short(mean.mean()), "below_mean": below}


def _sample(
    pipeline: Pipeline, prompted: Sequence[CaptionedClip], steps: int, guidance: float, seed: int, progress: Report
) -> list[np.ndarray]:
    """A sample of each clip's caption at the clip's shape, (T, H, W, 3) uint8."""
    samples: dict[str, np.ndarray] = {}
    for shape in dict.fromkeys(clip.shape for clip in prompted):
        captions = [clip.caption for clip in prompted if clip.shape == shape]
        made = pipeline(
            captions, size=(shape.width, shape.height), frames=shape.frames, steps=steps, guidance=guidance, seed=seed,
            progress=partial(progress, f"samples {shape}"),
        )  # fmt: skip
        samples.update(zip(captions, made))
    return [samples[clip.caption] for clip in prompted]


def clip_distances(samples: Sequence[np.ndarray], clips: Sequence[np.ndarray]) -> np.ndarray:
    """The mean squared difference of pixels in [0, 1], over the frames that both have: (samples, clips) in fp64.

    Infinite if the sizes differ. Both come from the VAE's decoder, so its losses do not count.
    """
    distances = np.full((len(samples), len(clips)), np.inf)
    for i, sample in enumerate(samples):
        for j, clip in enumerate(clips):
            if sample.shape[1:] == clip.shape[1:]:
                frames = min(len(sample), len(clip))
                difference = sample[:frames].astype(np.float32) - clip[:frames].astype(np.float32)
                distances[i, j] = float(np.square(difference, dtype=np.float64).mean()) / 255**2
    return distances


def _short(value: float) -> float:
    """Rounded to seven digits; more are noise."""
    return float(f"{value:.7g}")
