"""Loads the plan's clips as tensors, from files or from the cache; the same for any number of workers and ranks.
Checks that files are those that were scanned."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from stdit.data.config import DataConfig
from stdit.data.decode.checks import CHANGED, Limits, VideoError, check_content, disk_failures, reading
from stdit.data.decode.video import read_frames
from stdit.data.load.cache import Cache, latent_key, text_key
from stdit.data.load.index import ClipIds
from stdit.data.manifest import Clip, Manifest
from stdit.data.plan.buckets import Assignment, slack
from stdit.data.plan.split import PlanItem
from stdit.data.read_ahead import read_ahead
from stdit.data.remote.failures import FILE_REASONS, DiskFailure, StorageError
from stdit.data.remote.paths import file_of, is_remote, split_member
from stdit.data.remote.storage import STORAGE, Storage
from stdit.data.workers.pool import READER
from stdit.errors import StditError
from stdit.keyed import keyed_uniform
from stdit.pixels import to_video
from stdit.shapes import VideoShape


@dataclass(frozen=True)
class Example:
    """One clip, cut to its shape."""

    clip_id: str
    row: int
    occurrence: int
    epoch: int
    shape: VideoShape
    weight: float  # 1; or 0 for a clip that could not be read, whose tensors are zeros
    caption: str
    frames: Tensor | None = None  # (T, H, W, 3) uint8; None if latents come from the cache
    latents: Tensor | None = None  # (C, T', H', W') normalised fp32, from the cache
    text: Tensor | None = None  # (L, D) embedding of the caption, from the text cache
    failure: str | None = None  # why the clip could not be read
    reason: str | None = None  # the same in one word (see `VideoError`); "not_encoded" if the cache has a failure

    @property
    def video(self) -> Tensor:
        """(3, T, H, W) fp32 in [−1, 1], as the VAE expects."""
        assert self.frames is not None, "latents came from the cache"
        return to_video(self.frames)


class Loader:
    """Reads the clips of batches.

    workers: threads, each with a decoder process of its own, which may crash or hang; 0: decode here. None:
        config.workers.
    reader: replaces both ways of decoding.
    latent_size: (C, T', H', W') of a shape's latents, for clips whose encoding failed.
    pin: put tensors into page-locked memory, from which a GPU copies while it computes.

    Start, crop, mirroring and caption are keyed by (seed, epoch, clip id, occurrence). A clip that cannot be read keeps
    its place with weight 0. Storage that stays unreachable after all tries stops the run.
    """

    def __init__(
        self,
        manifest: Manifest,
        assignment: Assignment,
        config: DataConfig,
        seed: int,
        cache: Cache | None = None,
        text_cache: Cache | None = None,
        workers: int | None = None,
        reader: Callable[..., np.ndarray] | None = None,
        storage: Storage = STORAGE,
        latent_size: Callable[[VideoShape], tuple[int, ...]] | None = None,
        pin: bool = False,
    ) -> None:
        self.manifest, self.assignment, self.config, self.seed = manifest, assignment, config, seed
        self.cache, self.text_cache, self.latent_size = cache, text_cache, latent_size
        self.workers = config.workers if workers is None else workers
        self.reader = reader or (READER if self.workers else read_frames)
        self.limits, self.storage, self.pin = Limits(seconds=config.timeout), storage, pin
        self._kept: dict[int, tuple[int, np.ndarray]] = {}  # bucket and frames by row, up to config.keep_gb
        self._room = int(config.keep_gb * 1e9)  # bytes
        self._lock = Lock()
        if cache is not None:
            self._check_policies(cache)
            ids = ClipIds(manifest.ids)
            self.positions = [self._positions(cache, ids, stage) for stage in assignment.stages]

    def fetch(self, items: Sequence[PlanItem], epoch: int) -> list[Example]:
        """The examples of one batch, in order."""
        return [self._example(item, epoch) for item in items]

    def iterate(self, batches: Iterable[tuple[int, Sequence[PlanItem]]]) -> Generator[list[Example], None, None]:
        """The examples of each batch of (epoch, items), in order. Workers read `config.prefetch` batches ahead."""
        reads = ([(item, epoch) for item in items] for epoch, items in batches)
        return read_ahead(lambda read: self._example(*read), reads, self.workers, self.config.prefetch)

    def _example(self, item: PlanItem, epoch: int) -> Example:
        clip = self.manifest[item.row]
        shape = self.assignment.shapes[item.bucket]
        key = (epoch, clip.id, item.occurrence)
        caption = choose_caption(clip, keyed_uniform(self.seed, "caption", *key))
        text = None if self.text_cache is None else embedding(self.text_cache, caption)
        frames = latents = failure = reason = None
        if self.cache is not None:
            latents, failure = self._latents(item, key)
            reason = failure and "not_encoded"
        else:
            try:
                frames = torch.from_numpy(self._read(item, clip, key))
            except VideoError as error:
                failure, reason = str(error), error.reason
                frames = torch.zeros(shape.frames, shape.height, shape.width, 3, dtype=torch.uint8)
        if self.pin:
            frames, latents, text = (t if t is None else t.pin_memory() for t in (frames, latents, text))
        weight = 0.0 if failure else 1.0
        return Example(
            clip.id, item.row, item.occurrence, epoch, shape, weight, caption, frames, latents, text, failure, reason
        )

    def _read(self, item: PlanItem, clip: Clip, key: tuple[int, str, int]) -> np.ndarray:
        """A clip's frames (T, H, W, 3), cut and mirrored as keyed."""
        bucket, frames = self._kept.get(item.row, (-1, None))
        if frames is None or bucket != item.bucket:  # kept frames may be of an earlier stage's bucket
            frames = self._decode(clip, self.assignment.shapes[item.bucket], key)
            with self._lock:
                if item.row in self._kept:
                    self._room += self._kept.pop(item.row)[1].nbytes
                if frames.nbytes <= self._room:
                    self._room -= frames.nbytes
                    self._kept[item.row] = (item.bucket, frames)
        if self.config.mirror and keyed_uniform(self.seed, "mirror", *key) < 0.5:
            frames = np.ascontiguousarray(frames[:, :, ::-1])
        return frames

    def _decode(self, clip: Clip, shape: VideoShape, key: tuple[int, str, int]) -> np.ndarray:
        start = clip.start
        if self.config.start == "random" and not clip.image:
            room = max(0.0, float(slack(clip.start, clip.end, clip.fps, shape.frames, self.config.fps)))
            start += keyed_uniform(self.seed, "start", *key) * room
        crop = (0.5, 0.5)
        if self.config.crop == "random":
            crop = (keyed_uniform(self.seed, "crop x", *key), keyed_uniform(self.seed, "crop y", *key))
        size = (shape.width, shape.height)
        sha256 = clip.sha256 if self.config.verify else None
        with local_file(clip, self.storage) as path:

            def read() -> np.ndarray:
                with disk_failures():
                    return self.reader(path, shape.frames, size, self.config.fps, start, crop, self.limits, sha256)

            return self.storage.retried(clip.path, read, retry_on=DiskFailure)

    def _latents(self, item: PlanItem, key: tuple[int, str, int]) -> tuple[Tensor, str | None]:
        assert self.cache is not None
        cut = int(keyed_uniform(self.seed, "cut", *key) * self.config.crops)
        stages = zip(self.assignment.stages, self.positions)
        positions = next(found for stage, found in stages if stage.bucket[item.row] == item.bucket)
        position = int(positions[item.row, cut])
        failure = self.cache.failure(position)
        if failure is None:
            return self.cache.tensor(position), None
        assert self.latent_size is not None
        return torch.zeros(self.latent_size(self.assignment.shapes[item.bucket])), failure

    def _check_policies(self, cache: Cache) -> None:
        for name in ("start", "crop", "fps"):
            wanted, held = getattr(self.config, name), cache.settings[name]
            if wanted != held:
                raise StditError(
                    f"data.{name} is {wanted}, but the cache was encoded with {held}: set data.{name}={held}."
                )
        if self.config.mirror and not cache.settings.get("mirror"):
            raise StditError(
                "data.mirror is not possible with latents of a single cut: set data.mirror=false or encode with "
                "--crops 2."
            )

    def _positions(self, cache: Cache, ids: ClipIds, assignment: Assignment) -> np.ndarray:
        """(rows, crops) cache positions of each clip's latents. Raises StditError if a clip with a shape has none."""
        crops = self.config.crops
        positions = np.full((len(self.manifest), crops), -1, np.int64)
        order = np.argsort(assignment.bucket, kind="stable")
        ends = np.searchsorted(assignment.bucket[order], np.arange(len(assignment.shapes) + 1))
        for shape, first, end in zip(assignment.shapes, ends, ends[1:]):
            rows = order[first:end]
            for cut in range(crops):
                rest = latent_key("", shape, cut if crops > 1 else None).removeprefix("/")
                positions[rows, cut] = cache.find(ids.keys(rows, rest))
        wanted = assignment.bucket >= 0
        missing = int((positions[wanted] < 0).any(1).sum())
        if missing:
            more = f" --crops {crops}" if crops > 1 else ""
            raise StditError(
                f"{cache.folder} lacks the latents of {missing} of {int(wanted.sum())} clips. Run "
                f"`stdit data encode {self.manifest.source} --config CFG{more} --out {os.path.dirname(cache.folder)}`."
            )
        return positions


def choose_caption(clip: Clip, uniform: float) -> str:
    """Draws one of the clip's captions by weight; "" for a clip without any. uniform: a random number in [0, 1)."""
    if not clip.captions:
        return ""
    ends = np.cumsum([caption.weight for caption in clip.captions])
    return clip.captions[min(int(np.searchsorted(ends, uniform * ends[-1], "right")), len(ends) - 1)].text


def embedding(cache: Cache, text: str) -> Tensor:
    """The cached embedding (L, D) of a text; "" always has one."""
    position = cache.position(text_key(text))
    if position < 0:
        raise StditError(f"{cache.folder} has no embedding of the caption {text!r}. Run `stdit data encode` again.")
    return cache.tensor(position)


@contextmanager
def local_file(clip: Clip, storage: Storage = STORAGE) -> Iterator[str]:
    """A local path to a clip's file while the context is open.

    Raises VideoError if this file is the problem, also if it is not the one that was scanned, else StorageError.
    """
    try:
        with storage.local(clip.path) as path:
            if clip.state and not _is_as_scanned(clip, storage):  # a file that was copied or touched may be the same
                storage.retried(clip.path, partial(_check_content, path, clip.sha256), retry_on=DiskFailure)
            yield path
    except VideoError as error:  # it may name a local copy
        raise VideoError(clip.path, error.reason, error.message) from error
    except StorageError as error:
        if error.reason in FILE_REASONS:
            raise VideoError(clip.path, error.reason, error.message) from error
        raise


def _check_content(path: str, sha256: str) -> None:
    with disk_failures(), reading(path):
        check_content(path, sha256)


def check_files(manifest: Manifest) -> None:
    """Raises StditError if none of a few clips' files exists: the manifest or the videos were moved."""
    files = [file_of(manifest[row].path) for row in range(0, len(manifest), max(1, len(manifest) // 8))]
    if files and not any(is_remote(file) or os.path.lexists(file) for file in files):
        raise StditError(
            f"{manifest.source}: its files do not exist, such as {files[0]}. Were it or they moved? Paths in a "
            "manifest are relative to its own folder: move it back, or scan again."
        )


def _is_as_scanned(clip: Clip, storage: Storage) -> bool:
    """Whether a file's size and time are the same as when it was scanned. Raises VideoError if its size differs."""
    file = file_of(clip.path).removeprefix("file://")
    try:
        then = json.loads(clip.state)
    except ValueError:
        then = None
    if not isinstance(then, list):
        return False  # written by another program
    try:
        now = storage.state(file) if is_remote(file) else [(found := os.stat(file)).st_size, found.st_mtime_ns]
    except OSError:
        return True  # reading it will tell what is wrong
    # listings have fewer fields
    same = {field: str(a) == str(b) for field, (a, b) in enumerate(zip(then, now)) if None not in (a, b)}
    if not same.get(0, True) and split_member(clip.path) is None:
        message = f"{CHANGED} ({now[0]} bytes, {then[0]} then). Scan again: stdit data scan."
        raise VideoError(clip.path, "changed", message)
    return all(same.values())
