"""Measures a VAE on clips of any length, in the memory of a few frames: `evaluate_vae`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.data.decode.checks import VideoError
from stdit.data.decode.write import contact_sheet, sheet_frames
from stdit.data.load.loader import local_file
from stdit.data.manifest import Clip, Manifest, read_manifest
from stdit.data.remote.paths import is_remote, join
from stdit.data.scan.scan import scan
from stdit.data.workers.pool import READER
from stdit.errors import StditError
from stdit.evaluation.measures import DEFINITIONS, MEASURES, RATIOS, ClipMeasures, latent_statistics, pooled_statistics
from stdit.evaluation.metrics import SMALLEST_SSIM
from stdit.files import journal, make_folder, part_folder, publish_text
from stdit.heartbeat import Report
from stdit.keyed import keyed_generator
from stdit.pixels import to_pixels, to_video
from stdit.prepare.encode import vae_identity
from stdit.shapes import VideoShape, nearest_frames
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.training.lpips import Lpips
from stdit.weights.io import load_vae, save_vae, vae_on_meta
from stdit.weights.sources import find

FORMAT = 1
FRAMES_PER_READ = 16  # that are read and measured at a time
PICTURE_FRAMES = 5  # of a clip that its picture shows


@torch.no_grad()
def reconstruct_in_parts(
    vae: Any, pieces: Iterator[np.ndarray], posterior: torch.Generator | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """Yields parts of a clip as (source, reconstruction, raw latents): uint8 (t, H, W, 3) twice, and (z, n, H', W').

    The latents of a part are those that were encoded since the part before. A CausalVAE streams; other VAEs take the
    whole clip as one part.

    pieces: the clip, in uint8 (t, H, W, 3).
    posterior: draws the latents; None: their mode.
    """
    weight = next(vae.parameters())
    if not isinstance(vae, CausalVAE):
        source = np.concatenate([*pieces])
        latents = vae.encode(to_video(torch.from_numpy(source)).to(weight)[None], posterior is not None, posterior)
        yield source, to_pixels(vae.decode(latents)[0]).cpu().numpy(), vae.denormalise(latents)[0]
        return
    waiting: list[np.ndarray] = []
    found: list[Tensor] = []

    def frames() -> Iterator[Tensor]:
        for piece in pieces:
            for frame in piece:
                waiting.append(frame)
                yield to_video(torch.from_numpy(frame[None])).to(weight)[:, 0]

    def latents_of() -> Iterator[Tensor]:
        for chunk in vae.encode_stream(frames(), posterior=posterior):
            found.append(chunk)
            yield chunk

    for video in vae.decode_stream(latents_of()):
        count = video.shape[1]
        z = vae.denormalise(torch.cat(found, 1)[None])[0] if found else weight.new_empty(vae.config.z_dim, 0, 1, 1)
        found.clear()
        yield np.stack(waiting[:count]), to_pixels(video).cpu().numpy(), z
        del waiting[:count]


def evaluate_vae(
    model: str | Path,
    clips: str | Path,
    out: str | Path,
    size: tuple[int, int] | None = None,
    frames: int = 33,
    fps: float | None = None,
    limit: int = 100,
    lpips: Sequence[str | Path] = (),
    pictures: int = 16,
    memory: int | None = None,
    sample: bool = False,
    device: str = "cpu",
    progress: Report = lambda what, done, total: None,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Measures a VAE in fp32 on the first clips; see `measures.DEFINITIONS`.

    Writes out/evaluation-vae.json, whose content it returns; out/evaluation-vae/ with pictures of source,
    reconstruction and difference; and out/evaluation-vae.jsonl with every clip that is done, from which a stopped call
    resumes.

    model: the VAE's folder, or a model folder with vae/.
    clips: a manifest, a folder, or the URL of either.
    size: (width, height) to which clips are scaled and centre-cropped; None: their own, cropped to multiples of the
        VAE's stride.
    frames: at most so many of each clip, from its start.
    fps: at which clips are read; None: their own.
    limit, pictures: at most so many clips are measured, and drawn.
    lpips: files or folders with LPIPS' weights; none: LPIPS is not measured. trust_pickle: .pth files too.
    memory: bytes for a CausalVAE to work in; an error for other VAEs.
    sample: draw latents from the posterior, keyed by the clip, instead of taking the mode.
    """
    began = time.perf_counter()
    if size is not None and min(size) < SMALLEST_SSIM:
        raise StditError(f"size {size[0]}x{size[1]}: SSIM takes at least {SMALLEST_SSIM} pixels a side.")
    vae = load_vae(model, dtype=torch.float32, device=device).eval()
    vae.memory = memory
    out = make_folder(out)
    manifest, failures = _manifest(str(clips))
    settings = {
        "clips": str(clips), "size": size and list(size), "frames": frames, "fps": fps, "lpips": [*map(str, lpips)],
        "sample": sample, "vae": vae_identity(Path(model).expanduser()),
    }  # fmt: skip
    perceptual = Lpips(lpips, trust_pickle).to(device) if lpips else None
    measured_as = {"format": FORMAT, "settings": settings}
    measured: list[dict[str, Any]] = []
    rows = min(limit, len(manifest))
    with journal(out / "evaluation-vae.jsonl") as (lines, add):
        known = {line["clip"]["id"]: line["clip"] for line in lines if line.get("measured") == measured_as}
        for row in range(rows):
            progress("clips", row, rows)
            clip = manifest[row]
            name = f"{row:03d}-{Path(clip.path).stem[:50]}.png"  # at most 255 bytes with what `publish` adds
            picture = Path("evaluation-vae") / name if row < pictures else None
            line = known.get(clip.id)
            if line is None or (picture is not None and not (out / picture).is_file()):
                try:
                    shape = _shape_of(clip, vae.config.stride, size, frames, fps or clip.fps)
                    line = _measure(vae, clip, shape, fps or clip.fps, perceptual, picture and out / picture, sample)
                except VideoError as error:
                    failures.append(str(error))
                    continue
                add([{"measured": measured_as, "clip": line}])
            measured.append(line | {"picture": picture and str(picture)})
    progress("clips", rows, rows)
    if not measured:
        raise StditError(f"{clips}: no clip could be measured. {' '.join(failures[:3])}")
    result = {
        "format": FORMAT,
        "kind": "vae",
        "model": str(model),
        "settings": settings,
        "definitions": DEFINITIONS,
        "measures": {name: _over_clips(name, [line["measures"][name] for line in measured]) for name in MEASURES},
        "latents": pooled_statistics([line["latents"] for line in measured]),
        "clips": measured,
        "failures": failures,
        "seconds": round(time.perf_counter() - began, 1),
    }
    publish_text(out / "evaluation-vae.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def _manifest(place: str) -> tuple[Manifest, list[str]]:
    """The clips of a manifest or a folder, and the reasons why files of a folder were skipped."""
    is_folder = not place.endswith((".parquet", ".jsonl", ".csv")) if is_remote(place) else os.path.isdir(place)
    if not is_folder:
        return read_manifest(place), []
    found = scan(place, uncaptioned=True, verify=False)
    return found.manifest, [f"{join(place, skipped.file)}: {skipped.message}" for skipped in found.skipped]


def _shape_of(clip: Clip, stride: tuple[int, ...], size: tuple[int, int] | None, frames: int, fps: float) -> VideoShape:
    """The part of a clip that is measured. Raises VideoError for a clip that is too small or too short."""
    width, height = size or (clip.width // stride[2] * stride[2], clip.height // stride[1] * stride[1])
    if min(width, height) < SMALLEST_SSIM or width > clip.width or height > clip.height:
        wanted = f"{width}x{height}" if size else f"{SMALLEST_SSIM} pixels a side and the VAE's stride"
        raise VideoError(clip.path, "too_small", f"is {clip.width}x{clip.height}, smaller than {wanted}.")
    # as many as `buckets.slack` allows
    there = 1 if clip.image else 1 + math.floor((clip.end - clip.start - 0.5 / clip.fps + 1e-6) * fps)
    first = nearest_frames(1, stride)[1]
    if (count := min(there, frames)) < first:
        raise VideoError(clip.path, "too_short", f"gives {count} frames; this VAE takes at least {first}.")
    return VideoShape(nearest_frames(count, stride)[0], height, width)


def _measure(
    vae: Any, clip: Clip, shape: VideoShape, fps: float, lpips: Lpips | None, picture: Path | None, sample: bool
) -> dict[str, Any]:
    measures = ClipMeasures(lpips)
    latents: list[Tensor] = []
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    picks = set(sheet_frames(shape.frames, PICTURE_FRAMES))
    done = 0
    posterior = keyed_generator(0, "posterior", clip.id) if sample else None
    for source, rebuilt, found in reconstruct_in_parts(vae, _pieces(clip, shape, fps), posterior):
        if not found.isfinite().all():
            raise StditError(f"{clip.path}: the VAE's latents are not finite. Did its training diverge?")
        measures.add(source, rebuilt)
        latents.append(found.float().cpu())
        shown += [(source[i], rebuilt[i]) for i in range(len(source)) if done + i in picks]
        done += len(source)
    result = measures.result()
    if picture is not None:
        before, after = (np.stack(frames).astype(np.int16) for frames in zip(*shown))
        difference = np.clip(4 * np.abs(after - before), 0, 255)
        rows = [frames.astype(np.uint8) for frames in (before, after, difference)]
        labels = ["source", f"reconstruction, {result['psnr']:.1f} dB", "difference, 4 times"]
        contact_sheet(rows, picture, labels=labels, columns=PICTURE_FRAMES, side=min(shape.height, 240))
    return {
        "id": clip.id,
        "path": clip.path,
        "shape": str(shape),
        "fps": fps,
        "measures": result,
        "latents": latent_statistics(torch.cat(latents, 1)),
    }


def _pieces(clip: Clip, shape: VideoShape, fps: float) -> Iterator[np.ndarray]:
    with local_file(clip) as path:
        for first in range(0, shape.frames, FRAMES_PER_READ):
            count = min(FRAMES_PER_READ, shape.frames - first)
            yield READER(path, count, (shape.width, shape.height), fps, clip.start + first / fps)


def _over_clips(name: str, values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    return float(np.median(there) if name in RATIOS else np.mean(there))


def normalised_folder(model: str | Path) -> Path:
    """The folder whose config.json holds the VAE's latents_mean and latents_std; reads no weights.

    Raises StditError for another family's VAE, which diffusers normalises, and for one without a config.json.
    """
    folder = part_folder(model, "vae")
    vae = vae_on_meta(folder)
    if not isinstance(vae, CausalVAE):
        raise StditError(f"{folder}: diffusers defines the normalisation of {vae.config.name}; it cannot be changed.")
    if find("vae", folder).config_path is None:
        raise StditError(
            f"{folder}: an original release has no place for its normalisation. Make a diffusers folder of it with "
            "`stdit weights convert`."
        )
    return folder


def write_normalisation(model: str | Path, latents: dict[str, list[float]]) -> Path:
    """Writes the mean and std of `pooled_statistics` into the VAE's config, as latents_mean and latents_std.

    This changes its latents: caches become outdated (and say so), and a transformer has to be trained again. Returns
    the folder. Raises StditError like `normalised_folder`, and for a channel that never changes.
    """
    folder = normalised_folder(model)
    if dead := [channel for channel, std in enumerate(latents["std"]) if not std > 0]:
        raise StditError(f"latent channels {dead} never change on these clips: train the VAE.")
    vae = load_vae(folder)
    vae.config = replace(vae.config, latents_mean=tuple(latents["mean"]), latents_std=tuple(latents["std"]))
    save_vae(vae, folder)
    return folder
