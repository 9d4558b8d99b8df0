"""Writes checkpoints while the steps go on.

`Saver.start` copies a rank's state to host memory; a thread writes, hashes and syncs the rank's shard. Threads call no
collectives: a rank's flag (`is_ready`) travels with the sums of every step, and when all ranks' shards are written, all
ranks call `go_on` in the same step. Rank 0 then writes the manifest and gives the folder its name, in a thread too. So
an error of a writer stops all ranks at the same step, and a killed process leaves the earlier checkpoint and a stray
folder.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.files import DiskError, disk_trouble, make_folder, publish_folder, remove_folder, sync, writing
from stdit.heartbeat import HEARTBEAT
from stdit.training.engine.checkpoint import (
    FORMAT,
    MANIFEST,
    CheckpointConfig,
    checksum,
    prune,
    shard_name,
    step_name,
)
from stdit.training.engine.engine import Engine, ShardPiece
from stdit.training.engine.optimizer import group_state
from stdit.training.engine.parallel import World
from stdit.weights.tensor_files import tensor_bytes

LAG = 60.0  # seconds after which every machine sees what another one wrote to a network disk (NFS's acdirmax)
T = TypeVar("T")


@dataclass(frozen=True)
class FlatState:
    """The state of a flat master by kind: what is shaped as the master, and all other, which each piece has whole."""

    cut: dict[str, Tensor]
    whole: dict[str, Tensor]

    @classmethod
    def of(cls, engine: Engine, index: int) -> FlatState:
        flat = engine.flat_masters[index]
        found = cls({"master": flat}, {})
        if engine.ema is not None:
            found.cut["ema"] = engine.ema.averages[index]
        for kind, value in engine.optimizer.state.get(flat, {}).items():
            if isinstance(value, Tensor) and value.shape == flat.shape and value.ndim:
                found.cut[kind] = value
            elif isinstance(value, Tensor):
                found.whole[f"tensor.{kind}"] = value
            elif isinstance(value, int | float):
                dtype = torch.float64 if isinstance(value, float) else None
                found.whole[f"number.{kind}"] = torch.tensor(value, dtype=dtype)
            elif value is not None:
                raise StditError(f"the optimizer keeps {kind} as {type(value).__name__}, which no checkpoint holds.")
        return found


@dataclass(frozen=True)
class Snapshot:
    """A rank's state in host memory: tensors by their keys in the shard, and its kinds by flat master."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Shard:
    """What a rank wrote."""

    sha256: str
    size: int
    kinds: list[list[str]]


@dataclass(frozen=True)
class Holder:
    """The first rank that has a piece of a parameter, and the index of the flat master that it lies in."""

    rank: int
    flat: int


@dataclass(frozen=True)
class Layout:
    """Which shard holds which pieces of which parameter: "shape" and "pieces" of the manifest, by parameter."""

    parameters: dict[str, dict[str, Any]]
    holders: dict[str, Holder]


@dataclass
class Write:
    """A checkpoint under way. All ranks have one, or none has. about: the manifest so far, on rank 0."""

    step: int
    about: dict[str, Any]
    work: Future[Any]
    is_published_next: bool = False


class Saver:
    """Saves a run's checkpoints, one at a time. All ranks call every method together, at the same step."""

    def __init__(self, run: Path, config: CheckpointConfig, world: World) -> None:
        self.folder, self.config, self.world = run / "checkpoints", config, world
        self._write: Write | None = None
        self._layout: Layout | None = None  # on rank 0, from the first save on: pieces stay where they are
        self._buffers: dict[str, Tensor] = {}  # host memory, used again by the next save

    def start(self, step: int, engines: Sequence[Engine], state: dict[str, Any]) -> None:
        """Begins to write `checkpoints/step-N` of the run folder. Waits for the last write, if it is still under way.

        state: what else the run needs to go on, as JSON.
        Raises StditError if the last write failed; earlier checkpoints are kept.
        """
        self.finish()
        if self._layout is None:
            self._layout = self._find_layout(engines)
        about: dict[str, Any] = {}
        if self.world.is_main:
            groups = [
                {name: _number(name, value) for name, value in group.items()}
                for engine in engines
                for group in group_state(engine.optimizer)
            ]
            # as text: the run changes its state from here on
            about = json.loads(json.dumps({"format": FORMAT, "step": step, "groups": groups, "state": state}))
        write: Callable[[], Shard | None] = _nothing
        if self.world.is_main or not engines[0].replicated:
            write = partial(self._write_shard, self._temporary(step), self._snapshot(engines))
        self._write = Write(step, about, _in_thread(write))
        if not self.config.background:
            self.finish()

    @property
    def is_ready(self) -> bool:
        """Whether this rank's part is done, or has failed. If that is so on all ranks, they call `go_on`."""
        return self._write is not None and self._write.work.done()

    def go_on(self) -> None:
        """Publishes the checkpoint that all ranks have written. Raises StditError on every rank if one has failed."""
        write = self._write
        assert write is not None
        try:
            with self._kept_on_errors(write.step):
                with self.world.together():
                    done = write.work.result()
                if write.is_published_next:
                    self._write = None
                    return
                shards = self.world.gather_on_main(done)
                publish: Callable[[], None] = _nothing
                if shards is not None:
                    publish = partial(self._publish, write, [shard for shard in shards if shard is not None])
                write.work, write.is_published_next = _in_thread(publish), True
        except BaseException:
            self._write = None
            raise

    def finish(self) -> None:
        """Waits until the write under way, if there is one, is published. Raises StditError if it failed."""
        while self._write is not None:
            HEARTBEAT.doing(f"waiting for the checkpoint of step {self._write.step}")
            self.go_on()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Publishes what is under way also if the work within fails, on a rank alone: others may be gone."""
        try:
            yield
        except Exception:
            if self.world.size == 1:
                with suppress(Exception):  # the first error is told
                    self.finish()
            raise

    # ------------------------------------------------------------------------------------------------- the rank's part

    def _snapshot(self, engines: Sequence[Engine]) -> Snapshot:
        found = Snapshot()
        for number, engine in enumerate(engines):
            for index, pieces in enumerate(engine.pieces):
                state = FlatState.of(engine, index)
                found.kinds.append([*state.cut, *state.whole])
                if not pieces:
                    continue
                cut = {kind: self._on_host(f"{number}/{index}/{kind}", value) for kind, value in state.cut.items()}
                whole = {kind: value.detach().cpu().clone() for kind, value in state.whole.items()}
                for piece in pieces:
                    place = f"{piece.name}@{piece.offset}"
                    for kind, value in cut.items():
                        found.tensors[f"{kind}/{place}"] = value[piece.start : piece.start + piece.numel]
                    for kind, value in whole.items():
                        found.tensors[f"{kind}/{place}"] = value
        if self.config.background and self.world.device.type == "cuda":
            torch.cuda.current_stream(self.world.device).synchronize()  # the copies
        return found

    def _on_host(self, place: str, value: Tensor) -> Tensor:
        """A copy of the flattened tensor in host memory; without background the tensor itself, where it is."""
        flat = value.detach().reshape(-1)
        if not self.config.background:
            return flat
        buffer = self._buffers.get(place)
        if buffer is None or (buffer.shape, buffer.dtype) != (flat.shape, flat.dtype):
            buffer = self._buffers[place] = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=flat.is_cuda)
        return buffer.copy_(flat, non_blocking=True)

    def _write_shard(self, folder: Path, state: Snapshot) -> Shard:
        path = folder / shard_name(self.world.rank)
        hashed, size = hashlib.sha256(), 0
        with writing(path):
            make_folder(folder)
            with open(path, "wb") as file:
                for block in tensor_bytes(state.tensors, state.tensors.__getitem__, {}):
                    hashed.update(block)
                    file.write(block)
                    size += len(block)
            sync(path)  # by its own rank: another machine's disk cache is not rank 0's
        return Shard(hashed.hexdigest(), size, state.kinds)

    # ---------------------------------------------------------------------------------------------------- rank 0's part

    def _find_layout(self, engines: Sequence[Engine]) -> Layout:
        mine = [pieces for engine in engines for pieces in engine.pieces]
        ranks = [mine] if engines[0].replicated else self.world.gather_on_main(mine)
        return find_layout(ranks or [])

    def _publish(self, write: Write, shards: Sequence[Shard]) -> None:
        temporary = self._temporary(write.step)
        for rank, shard in enumerate(shards):
            _wait_for(temporary / shard_name(rank), shard.size, rank)
        assert self._layout is not None
        parameters = {}
        for name, holder in self._layout.holders.items():
            parameters[name] = self._layout.parameters[name] | {"kinds": shards[holder.rank].kinds[holder.flat]}
        files = [{"sha256": shard.sha256, "size": shard.size} for shard in shards]
        about = write.about | {"shards": files, "parameters": parameters}
        manifest = temporary / MANIFEST
        with writing(manifest):
            with open(manifest, "wb") as file:
                file.write(json.dumps(about | {"sha256": checksum(about)}).encode())
            publish_folder(temporary, self.folder / step_name(write.step), unsynced=[manifest])
            for folder in (self.folder.parent, self.folder.parent.parent):
                sync(folder)  # this may be the run's first checkpoint
        prune(self.folder.parent, write.step, self.config.keep, self.config.keep_every)

    def _temporary(self, step: int) -> Path:
        return self.folder / f".tmp-{step_name(step)}"

    @contextmanager
    def _kept_on_errors(self, step: int) -> Iterator[None]:
        """On a full disk or at a limit of the system: removes what is half-written, and says what is kept."""
        try:
            yield
        except Exception as error:
            if isinstance(error, DiskError) or disk_trouble(error):
                temporary = self._temporary(step)
                with suppress(OSError):
                    remove_folder(temporary)
                said = str(error) if isinstance(error, StditError) else f"{temporary}: {disk_trouble(error)}"
                kept = f"This checkpoint was not written, earlier ones in {self.folder} are kept."
                raise StditError(f"{said} {kept}") from error
            raise


def find_layout(ranks: Sequence[Sequence[Sequence[ShardPiece]]]) -> Layout:
    """ranks: the pieces, by rank and flat master."""
    found = Layout({}, {})
    for rank, flats in enumerate(ranks):
        for index, pieces in enumerate(flats):
            for piece in pieces:
                if piece.name not in found.holders:
                    found.holders[piece.name] = Holder(rank, index)
                    found.parameters[piece.name] = {"shape": list(piece.shape), "pieces": []}
                if piece.numel:
                    found.parameters[piece.name]["pieces"].append([piece.offset, piece.numel, rank, 1])
    for parameter in found.parameters.values():
        runs: list[list[int]] = []
        for offset, numel, shard, _ in sorted(parameter["pieces"]):
            if runs:
                begin, each, first, count = runs[-1]
                if (offset, numel, shard) == (begin + each * count, each, first + count):
                    runs[-1][3] += 1
                    continue
            runs.append([offset, numel, shard, 1])
        parameter["pieces"] = runs
    return found


def _number(name: str, value: Any) -> tuple[int | float, str | None]:
    """A number that a group keeps, and the dtype if it is a tensor."""
    if isinstance(value, int | float):
        return value, None
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item(), str(value.dtype).removeprefix("torch.")
    raise StditError(f"the optimizer keeps {name} as {type(value).__name__}, which no checkpoint holds.")


def _nothing() -> None:
    pass


def _wait_for(path: Path, size: int, rank: int) -> None:
    """Until rank 0's machine sees a shard. Raises StditError if it does not."""
    end = time.monotonic() + LAG
    while True:
        with suppress(OSError):
            if path.stat().st_size == size:
                return
        if time.monotonic() > end:
            raise StditError(
                f"{path}: rank {rank} wrote it, and rank 0 does not see it. All machines must share the run folder: "
                "put run=PATH on a disk that they share. This checkpoint is not published."
            )
        time.sleep(0.2)


def _in_thread(work: Callable[[], T]) -> Future[T]:
    """A daemon, so that a second Ctrl-C need not wait for it."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="stdit-checkpoint", daemon=True).start()
    return future
