"""How well a VAE reconstructs clips, and what its latents are like: any length, in the memory of a few frames."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stdit.data.decode.video import VideoError
from stdit.data.decode.write import contact_sheet, sheet_frames
from stdit.data.load.loader import local_file
from stdit.data.manifest import Clip, Manifest, read_manifest
from stdit.data.remote.paths import is_remote, join
from stdit.data.scan.scan import scan
from stdit.data.workers.pool import READER
from stdit.errors import StditError
from stdit.evaluation.metrics import ALIKE, SMALLEST_SSIM, decibels, ssim
from stdit.files import make_folder, publish_text
from stdit.keyed import keyed_generator
from stdit.pixels import to_pixels, to_video
from stdit.prepare.encode import vae_identity
from stdit.shapes import first_frames, nearest_frames
from stdit.text_files import json_lines
from stdit.vae.autoencoder import CausalVAE
from stdit.vae.training.lpips import Lpips
from stdit.weights.io import load_vae, save_vae, vae_on_meta
from stdit.weights.sources import find

FORMAT = 1
PIECE = 16  # frames that are read of a file, and measured, at a time
PICTURE_FRAMES = 5  # of a clip that its picture shows
OUTLIER = 3.0  # standard deviations
STILL, STILL_SHARE = 1, 0.01  # grey levels that a still pixel changes at most; of all pixels, for it to be measured

DEFINITIONS = {  # x the source, y the reconstruction
    "psnr": "dB, per clip: 10·log10(255² / MSE) over all frames, pixels and colours of uint8 RGB, no border left out; "
    f"a clip that is exact counts {ALIKE:g}",
    "psnr_frames": "dB: the same per frame, then the mean over a clip's frames",
    "ssim": "per frame (Wang et al. 2004): each colour of uint8 RGB, range 255, Gaussian window 11×11 of σ 1.5, 5 "
    "pixels at each border left out; the mean over colours and frames",
    "lpips": "per frame: VGG16, version 0.1, RGB in [−1, 1]; the mean over frames; lower is nearer",
    "flicker": "how much the error changes from frame to frame, in grey levels of 255: the mean of "
    "|(y_t − y_(t−1)) − (x_t − x_(t−1))| over frames, pixels and colours. 0 only if all motion is the source's: a "
    "picture that stands still has the source's motion as its flicker",
    "flicker_still": "the same over the pixels that stand still in the source (no colour changes by more than "
    f"{STILL} grey level from the frame before): all change is flicker there, and none motion. None for an image, and "
    f"where less than {STILL_SHARE:.0%} of the pixels stand still",
    "motion": "the sum of squares of y_t − y_(t−1) over that of x_t − x_(t−1): 1 as much as the source, less is "
    "stiller, more is restless; none for an image or a clip that stands still",
    "sharpness": "gradient energy: the sum of squares of the differences between neighbouring pixels of a row and of a "
    "column, over the source's: 1 as sharp, less is blurred, more is noise or ringing",
    "latents": "a channel's mean and standard deviation over all raw latents; outliers: the share further than "
    f"{OUTLIER:g} standard deviations from the mean, both of the clip and channel (0.0027 if normal), and the furthest",
}
MEASURES = tuple(DEFINITIONS)[:-1]
RATIOS = ("motion", "sharpness")  # over the source's, which may have next to none: a mean would be that clip's

Progress = Callable[[str, int, int], None]  # what is being done, done, in all


@dataclass
class ClipMeasures:
    """The measures of DEFINITIONS of one clip, of which frames come a few at a time."""

    lpips: Lpips | None = None
    squares: list[float] = field(default_factory=list)  # mean squared error of each frame
    similar: list[float] = field(default_factory=list)  # SSIM of each frame
    perceived: list[float] = field(default_factory=list)  # LPIPS of each frame
    flicker: list[float] = field(default_factory=list)  # of each frame after the first
    still: list[np.ndarray] = field(default_factory=list)  # of each frame after the first: sum over still pixels, share
    moved: np.ndarray = field(default_factory=lambda: np.zeros(2))  # source, reconstruction
    gradients: np.ndarray = field(default_factory=lambda: np.zeros(2))
    last: np.ndarray | None = None  # the frame before, (2, H, W, 3)

    def add(self, source: np.ndarray, rebuilt: np.ndarray) -> None:
        """The next frames of both, uint8 (T, H, W, 3)."""
        for frame, made in zip(source, rebuilt):
            both = np.stack([frame, made]).astype(np.int32)  # (2, H, W, 3)
            self.squares.append(float(np.square(both[1] - both[0]).mean()))
            self.similar.append(ssim(made, frame))
            for axis in (1, 2):
                self.gradients += np.square(np.diff(both, axis=axis)).sum((1, 2, 3))
            if self.last is not None:
                change = both - self.last
                error, still = np.abs(change[1] - change[0]).mean(2), np.abs(change[0]).max(2) <= STILL  # (H, W)
                self.flicker.append(float(error.mean()))
                self.still.append(np.array([error[still].sum() / still.size, still.mean()]))
                self.moved += np.square(change).sum((1, 2, 3))
            self.last = both
            if self.lpips is not None:
                device = self.lpips.heads[0].device
                pair = [to_video(torch.from_numpy(one[None])).to(device)[None] for one in (frame, made)]
                with torch.no_grad():
                    self.perceived.append(float(self.lpips(*pair)))

    def result(self) -> dict[str, float | None]:
        return {
            "psnr": min(decibels(float(np.mean(self.squares))), ALIKE),
            "psnr_frames": float(np.mean([min(decibels(mse), ALIKE) for mse in self.squares])),
            "ssim": float(np.mean(self.similar)),
            "lpips": float(np.mean(self.perceived)) if self.perceived else None,
            "flicker": float(np.mean(self.flicker)) if self.flicker else None,
            "flicker_still": self._flicker_still(),
            "motion": float(self.moved[1] / self.moved[0]) if self.moved[0] else None,
            "sharpness": float(self.gradients[1] / self.gradients[0]) if self.gradients[0] else None,
        }

    def _flicker_still(self) -> float | None:
        flicker, share = np.mean(self.still, 0) if self.still else (0.0, 0.0)
        return float(flicker / share) if share >= STILL_SHARE else None


def latent_statistics(latents: Tensor) -> dict[str, Any]:
    """Of one clip's raw latents (z, T', H', W'): how many a channel has, and a channel's lists; see DEFINITIONS."""
    values = latents.double().flatten(1)  # (z, N)
    mean, std = values.mean(1), values.std(1, correction=0)
    far = ((values - mean[:, None]).abs() / std.clamp_min(1e-12)[:, None]).cpu()
    return {
        "count": values.shape[1],
        "mean": mean.tolist(),
        "std": std.tolist(),
        "outliers": (far > OUTLIER).double().mean(1).tolist(),
        "furthest": far.amax(1).tolist(),
    }


def pooled_statistics(clips: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """`latent_statistics` of all clips' latents together, from those of each: every latent counts once."""
    counts = np.array([clip["count"] for clip in clips], float)
    weights = (counts / counts.sum())[:, None]
    mean, std, outliers, furthest = (
        np.array([clip[name] for clip in clips]) for name in ("mean", "std", "outliers", "furthest")
    )
    whole = (weights * mean).sum(0)
    variance = (weights * (std**2 + (mean - whole) ** 2)).sum(0)
    return {
        "mean": whole.tolist(),
        "std": np.sqrt(variance).tolist(),
        "outliers": (weights * outliers).sum(0).tolist(),
        "furthest": furthest.max(0).tolist(),
    }


@torch.no_grad()
def reconstructed(
    vae: Any, pieces: Iterator[np.ndarray], posterior: torch.Generator | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, Tensor]]:
    """A clip in pieces, uint8 (t, H, W, 3), through the VAE and back: (source, reconstruction, raw latents) of parts.

    The latents (z, n, H', W') of a part are those that became known with it. A CausalVAE streams; another family's
    takes the clip whole. posterior: draws the latents; None: their mode.
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
    progress: Progress = lambda what, done, total: None,
    trust_pickle: bool = False,
) -> dict[str, Any]:
    """Measures a VAE in fp32 on the clips of a manifest or a folder, or of a URL; see DEFINITIONS.

    size: (width, height) that clips are scaled to cover and cut to at the centre; None: each its own, cut to multiples
    of the VAE's stride. frames: at most so many of each clip from its start. fps: that they are read at; None: each its
    own. limit: only the first so many clips. lpips: files or folders of LPIPS' weights (trust_pickle: .pth ones too).
    pictures: of the first so many
    clips. memory: bytes for a CausalVAE to work in; another family's keeps to none, and is an error. sample: latents
    are drawn from the posterior, keyed by the clip, instead of its mode: not exact, as a transformer's are not.

    Writes out/evaluation-vae.json, out/evaluation-vae/ with a picture of a clip's source, reconstruction and their
    difference, and out/evaluation-vae.jsonl with each clip when it is done: a call that was stopped goes on from there.
    Returns the content of evaluation-vae.json.
    """
    began = time.perf_counter()
    if size is not None and min(size) < SMALLEST_SSIM:
        raise StditError(f"size {size[0]}x{size[1]}: SSIM takes at least {SMALLEST_SSIM} pixels a side.")
    if fps is not None and not 0 < fps < math.inf:
        raise StditError(f"fps is {fps}; it must be positive and finite.")
    vae = load_vae(model, dtype=torch.float32, device=device).eval()
    vae.memory = memory
    out = make_folder(out)
    manifest, failures = _manifest(str(clips))
    settings = {
        "clips": str(clips), "size": size and list(size), "frames": frames, "fps": fps, "lpips": [*map(str, lpips)],
        "sample": sample, "vae": vae_identity(Path(model).expanduser()),
    }  # fmt: skip
    perceptual = Lpips(lpips, trust_pickle).to(device) if lpips else None
    record = out / "evaluation-vae.jsonl"
    known = _known(record, settings)
    measured: list[dict[str, Any]] = []
    rows = min(limit, len(manifest))
    lines = [{"format": FORMAT, "settings": settings}, *known.values()]
    publish_text(record, "".join(json.dumps(line) + "\n" for line in lines))
    with record.open("a", encoding="utf-8") as file:
        for row in range(rows):
            progress("clips", row, rows)
            clip = manifest[row]
            name = f"{row:03d}-{Path(clip.path).stem[:50]}.png"  # at most 255 bytes with what `publish` adds
            picture = Path("evaluation-vae") / name if row < pictures else None
            if (line := known.get(clip.id)) and (picture is None or (out / picture).is_file()):
                measured.append(line | {"picture": picture and str(picture)})
                continue
            try:
                cut = _cut(clip, vae.config.stride, size, frames, fps)
                line = _measure(vae, clip, cut, perceptual, picture and out / picture, sample)
            except VideoError as error:
                failures.append(str(error))
                continue
            file.write(json.dumps(line) + "\n")
            file.flush()
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
    """The clips of a manifest or of a folder, and why files of a folder are none."""
    is_folder = not place.endswith((".parquet", ".jsonl", ".csv")) if is_remote(place) else os.path.isdir(place)
    if not is_folder:
        return read_manifest(place), []
    found = scan(place, uncaptioned=True, verify=False)
    return found.manifest, [f"{join(place, skipped.file)}: {skipped.message}" for skipped in found.skipped]


def _known(record: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The clips that an earlier call with the same settings measured, by id."""
    if not record.is_file():
        return {}
    lines: list[dict[str, Any]] = []
    with suppress(StditError):  # the last line may be cut off
        lines.extend(line for _, line in json_lines(record))
    same = bool(lines) and lines[0] == {"format": FORMAT, "settings": settings}
    return {line["id"]: line for line in lines[1:]} if same else {}


@dataclass(frozen=True)
class Cut:
    """What is measured of a clip."""

    width: int
    height: int
    frames: int
    fps: float


def _cut(clip: Clip, stride: tuple[int, ...], size: tuple[int, int] | None, frames: int, fps: float | None) -> Cut:
    """Raises VideoError for a clip that is too small or too short."""
    width, height = size or (clip.width // stride[2] * stride[2], clip.height // stride[1] * stride[1])
    if min(width, height) < SMALLEST_SSIM or width > clip.width or height > clip.height:
        wanted = f"{width}x{height}" if size else f"{SMALLEST_SSIM} pixels a side and the VAE's stride"
        raise VideoError(clip.path, "too_small", f"is {clip.width}x{clip.height}, smaller than {wanted}.")
    rate, first = fps or clip.fps, first_frames(stride)
    # the most that `buckets.slack` has room for
    there = 1 if clip.image else 1 + math.floor((clip.end - clip.start - 0.5 / clip.fps + 1e-6) * rate)
    if (count := min(there, frames)) < first:
        raise VideoError(clip.path, "too_short", f"gives {count} frames; this VAE takes at least {first}.")
    return Cut(width, height, nearest_frames(count, stride)[0], rate)


def _measure(vae: Any, clip: Clip, cut: Cut, lpips: Lpips | None, picture: Path | None, sample: bool) -> dict[str, Any]:
    measures = ClipMeasures(lpips)
    latents: list[Tensor] = []
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    picks = set(sheet_frames(cut.frames, PICTURE_FRAMES))
    done = 0
    posterior = keyed_generator(0, "posterior", clip.id) if sample else None
    for source, rebuilt, found in reconstructed(vae, _pieces(clip, cut), posterior):
        if not found.isfinite().all():
            raise StditError(f"{clip.path}: the VAE gives latents that are not finite. Has its training diverged?")
        measures.add(source, rebuilt)
        latents.append(found.float().cpu())
        shown += [(source[i], rebuilt[i]) for i in range(len(source)) if done + i in picks]
        done += len(source)
    if picture is not None:
        before, after = (np.stack(frames).astype(np.int16) for frames in zip(*shown))
        difference = np.clip(4 * np.abs(after - before), 0, 255)
        contact_sheet(
            [clip.astype(np.uint8) for clip in (before, after, difference)],
            picture,
            labels=["source", f"reconstruction, {measures.result()['psnr']:.1f} dB", "difference, 4 times"],
            columns=PICTURE_FRAMES,
            side=min(cut.height, 240),
        )
    return {
        "id": clip.id,
        "path": clip.path,
        "shape": f"{cut.width}x{cut.height}x{cut.frames}",
        "fps": cut.fps,
        "measures": measures.result(),
        "latents": latent_statistics(torch.cat(latents, 1)),
    }


def _pieces(clip: Clip, cut: Cut) -> Iterator[np.ndarray]:
    with local_file(clip) as path:
        for first in range(0, cut.frames, PIECE):
            count = min(PIECE, cut.frames - first)
            yield READER(path, count, (cut.width, cut.height), cut.fps, clip.start + first / cut.fps)


def _over_clips(name: str, values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    return float(np.median(there) if name in RATIOS else np.mean(there))


def normalised_folder(model: str | Path) -> Path:
    """The folder whose config.json says how a VAE's latents are normalised; no weight is read.

    Raises StditError for another family's VAE, whose is not ours to change, and for one without a config.json.
    """
    path = Path(model).expanduser()
    folder = path / "vae" if (path / "vae").is_dir() else path
    vae = vae_on_meta(folder)
    if not isinstance(vae, CausalVAE):
        raise StditError(f"{folder}: a {vae.config.name} has its normalisation from diffusers; it is not changed.")
    if find("vae", folder).config_path is None:
        raise StditError(
            f"{folder}: its normalisation has no place in an original release. `stdit weights convert` makes a "
            "diffusers folder of it."
        )
    return folder


def write_normalisation(model: str | Path, latents: dict[str, list[float]]) -> Path:
    """Puts `pooled_statistics` into the config of a model folder's VAE as latents_mean and latents_std.

    Everything that was made of its latents is then out of date: caches say so, a transformer has to be trained again.
    Returns the folder that was written. Raises as `normalised_folder`, and for a channel that never changes.
    """
    folder = normalised_folder(model)
    if dead := [channel for channel, std in enumerate(latents["std"]) if not std > 0]:
        raise StditError(f"latent channels {dead} never change on these clips: train the VAE.")
    vae = load_vae(folder)
    vae.config = replace(vae.config, latents_mean=tuple(latents["mean"]), latents_std=tuple(latents["std"]))
    save_vae(vae, folder)
    return folder
