"""Clips of the plan as tensors, from files or from the cache; the same for any number of workers, ranks, restarts."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Protocol, TypeVar

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from stdit.data.config import DataConfig
from stdit.data.decode.checks import CHANGED, Limits, VideoError, check_content
from stdit.data.decode.video import read_frames
from stdit.data.load.cache import Cache, latent_key, text_key
from stdit.data.manifest import Clip, Manifest
from stdit.data.plan.buckets import Assignment, slack
from stdit.data.remote.paths import file_of, is_remote, split_member
from stdit.data.remote.retries import FILE_REASONS, StorageError
from stdit.data.remote.storage import STORAGE, Storage
from stdit.data.workers.pool import READER
from stdit.errors import StditError
from stdit.keyed import keyed_uniform
from stdit.pixels import to_video
from stdit.shapes import VideoShape

Wanted = TypeVar("Wanted")
Result = TypeVar("Result")


class Item(Protocol):
    """What the loader reads of the planner's PlanItem."""

    @property
    def row(self) -> int: ...
    @property
    def occurrence(self) -> int: ...
    @property
    def bucket(self) -> int: ...


@dataclass(frozen=True)
class Example:
    """One clip, cut to its shape.

    weight: 1, or 0 where the clip could not be read; its tensors are then zeros, `failure` says why and `reason` in one
        word (see `VideoError`; "not_encoded" for a clip that the cache has a failure of).
    frames: (T, H, W, 3) uint8, or None where latents come from the cache.
    latents: (C, T', H', W') normalised fp32, from the cache.
    text: (L, D) embedding of the caption, where the cache has text.
    """

    clip_id: str
    row: int
    occurrence: int
    epoch: int
    shape: VideoShape
    weight: float
    caption: str
    frames: Tensor | None = None
    latents: Tensor | None = None
    text: Tensor | None = None
    failure: str | None = None
    reason: str | None = None

    @property
    def video(self) -> Tensor:
        """(3, T, H, W) fp32 in [−1, 1], what the VAE takes."""
        assert self.frames is not None, "latents came from the cache"
        return to_video(self.frames)


class Loader:
    """Reads the clips of batches.

    Start, crop, mirroring and caption are keyed by (seed, epoch, clip id, occurrence). A clip that cannot be read keeps
    its place with weight 0; storage that cannot be reached, after all tries, stops the run. Each worker decodes in a
    process of its own, which may crash or hang; with none, decoding is done here. `reader` takes the place of both.
    latent_size: (C, T', H', W') of a shape's latents, for clips that the cache has a failure of. pin: puts tensors
    into page-locked memory, from where a GPU takes them while it computes.
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
        self._room = int(config.keep_gb * 1e9)
        self._lock = Lock()
        if cache is not None:
            self._check_policies(cache)
            self.positions = [self._positions(cache, stage) for stage in assignment.stages]

    def fetch(self, items: Sequence[Item], epoch: int) -> list[Example]:
        """The examples of one batch, in its order."""
        return [self._example(item, epoch) for item in items]

    def iterate(self, batches: Iterable[Sequence[Item]], epoch: int) -> Iterator[list[Example]]:
        """The examples of each batch in order; `config.prefetch` batches are read ahead by the workers."""
        yield from read_ahead(partial(self._example, epoch=epoch), batches, self.workers, self.config.prefetch)

    def _example(self, item: Item, epoch: int) -> Example:
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
            frames, latents, text = (None if one is None else one.pin_memory() for one in (frames, latents, text))
        weight = 0.0 if failure else 1.0
        return Example(
            clip.id, item.row, item.occurrence, epoch, shape, weight, caption, frames, latents, text, failure, reason
        )

    def _read(self, item: Item, clip: Clip, key: tuple[int, str, int]) -> np.ndarray:
        """A clip's frames (T, H, W, 3) as this epoch cuts and mirrors them."""
        bucket, frames = self._kept.get(item.row, (-1, None))
        if frames is None or bucket != item.bucket:  # of an earlier stage
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
                try:
                    return self.reader(path, shape.frames, size, self.config.fps, start, crop, self.limits, sha256)
                except VideoError as error:
                    if error.reason != "unreachable":
                        raise
                    raise OSError(error.message) from error  # of the disk, and so perhaps of all clips

            return self.storage.retried_on_os_error(clip.path, read)

    def _latents(self, item: Item, key: tuple[int, str, int]) -> tuple[Tensor, str | None]:
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
                "data.mirror cannot be had from latents of one cut: set data.mirror=false or encode with --crops 2."
            )

    def _positions(self, cache: Cache, assignment: Assignment) -> np.ndarray:
        """(rows, crops) where the cache has each clip's latents; those of every clip that has a shape must be there."""
        crops = self.config.crops
        positions = np.full((len(self.manifest), crops), -1, np.int64)
        for index, shape in enumerate(assignment.shapes):
            rows = np.flatnonzero(assignment.bucket == index)
            ids = self.manifest.ids.take(rows).combine_chunks()
            for cut in range(crops):  # without a Python object a clip: there may be ten million
                keys = pc.binary_join_element_wise(ids, latent_key("", shape, cut if crops > 1 else None), "")
                positions[rows, cut] = cache.find(keys)
        wanted = assignment.bucket >= 0
        missing = int((positions[wanted] < 0).any(1).sum())
        if missing:
            more = f" --crops {crops}" if crops > 1 else ""
            raise StditError(
                f"{cache.folder} lacks the latents of {missing} of {int(wanted.sum())} clips. Run "
                f"`stdit data encode {self.manifest.source} --config CFG{more} --out {os.path.dirname(cache.folder)}`."
            )
        return positions


def read_ahead(
    read: Callable[[Wanted], Result], batches: Iterable[Sequence[Wanted]], workers: int, ahead: int
) -> Iterator[list[Result]]:
    """What `read` makes of the members of each batch, in order; threads read `ahead` batches beyond the present one.

    With no workers it is read here, when it is asked for.
    """
    if workers == 0:
        for batch in batches:
            yield [read(one) for one in batch]
        return
    waiting: deque[list[Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="stdit-loader")
    try:
        for batch in batches:
            waiting.append([pool.submit(read, one) for one in batch])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def local_file(clip: Clip, storage: Storage = STORAGE) -> Iterator[str]:
    """A local path of a clip's file, while the context is open; what is wrong with this file is a VideoError: also that
    it is another one than was scanned."""
    try:
        with storage.local(clip.path) as path:
            if clip.state and not _is_as_scanned(clip, storage):
                check_content(path, clip.sha256)  # it may have been copied or touched, and be the same
            yield path
    except VideoError as error:  # which may name a local copy
        raise VideoError(clip.path, error.reason, error.message) from error
    except StorageError as error:
        if error.reason in FILE_REASONS:
            raise VideoError(clip.path, error.reason, error.message) from error
        raise  # of the storage, and so perhaps of all clips: the run stops


def check_files(manifest: Manifest) -> None:
    """Raises where none of a few clips' files is there: the manifest or the videos were moved, and all would fail."""
    files = [file_of(manifest[row].path) for row in range(0, len(manifest), max(1, len(manifest) // 8))]
    if files and not any(is_remote(file) or os.path.lexists(file) for file in files):
        raise StditError(
            f"{manifest.source}: the files that it lists are not there, such as {files[0]}. Were it or they moved? "
            "Paths in a manifest are counted from its own folder: put it back, or scan again."
        )


def _is_as_scanned(clip: Clip, storage: Storage) -> bool:
    """Whether a file's size and time, or what its storage tells of it, are those of its scan.

    Raises VideoError where it is longer or shorter now, and so another one.
    """
    member = split_member(clip.path)
    file = member.tar if member else clip.path.removeprefix("file://")
    try:
        then = json.loads(clip.state)
        assert isinstance(then, list)
    except (ValueError, AssertionError):
        return False  # of another program's making
    try:
        now = storage.state(file) if is_remote(file) else [(found := os.stat(file)).st_size, found.st_mtime_ns]
    except OSError:
        return True  # the reader says what is wrong
    pairs = [(a, b) for a, b in zip(then, now) if a is not None and b is not None]  # a list of a store has less
    if pairs and member is None and then[0] is not None and now[0] is not None and str(then[0]) != str(now[0]):
        message = f"{CHANGED} ({now[0]} bytes, {then[0]} then). Scan again: stdit data scan."
        raise VideoError(clip.path, "changed", message)
    return all(str(a) == str(b) for a, b in pairs)


def choose_caption(clip: Clip, uniform: float) -> str:
    """One of the clip's captions by weight; `uniform` in [0, 1) decides. "" for a clip without any."""
    if not clip.captions:
        return ""
    ends = np.cumsum([caption.weight for caption in clip.captions])
    return clip.captions[min(int(np.searchsorted(ends, uniform * ends[-1], "right")), len(ends) - 1)].text


def embedding(cache: Cache, text: str) -> Tensor:
    """The cached embedding (L, D) of a text; "" is always there."""
    position = cache.position(text_key(text))
    if position < 0:
        raise StditError(f"{cache.folder} has no embedding of the caption {text!r}. Run `stdit data encode` again.")
    return cache.tensor(position)
