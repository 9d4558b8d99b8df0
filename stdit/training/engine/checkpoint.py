"""Checkpoints: fp32 masters, moments and averages as safetensors shards that any number of ranks can read.

    checkpoints/step-00000200/manifest.json           format, state of the run and of parameter groups, shapes
    checkpoints/step-00000200/rank-00000.safetensors  "master/blocks.0.ffn.0.weight@0", "exp_avg/…", "ema/…", …

A tensor holds the numbers of the flattened parameter from `@offset` on. A checkpoint is written under a hidden name,
synced, and renamed, so a killed process leaves the earlier checkpoint and a stray folder.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.files import DiskError, disk_trouble, heal_folder, make_folder, publish_folder, remove_folder, sync, writing
from stdit.training.engine.engine import Engine
from stdit.training.engine.optimizer import group_state
from stdit.training.engine.parallel import World
from stdit.weights.tensor_files import open_safetensors, read_json

FORMAT = 1


@dataclass
class CheckpointConfig:
    """When checkpoints are written. The last step and a signal always write one.

    every: steps between checkpoints.
    keep: how many of the newest stay; 0: all.
    """

    every: PositiveInt = 500
    keep: NonNegativeInt = 2


def save(folder: Path, step: int, engines: Sequence[Engine], state: dict[str, Any], keep: int, world: World) -> Path:
    """Publishes `checkpoints/step-N` of a run folder, then removes all but the last `keep`. Called on every rank.

    state: what else the run needs to go on, as JSON.
    Raises StditError on a full disk, and keeps the earlier checkpoints.
    """
    replicated = engines[0].replicated
    folder = folder / "checkpoints"
    final, temporary = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}"
    with _kept_on_errors(folder, temporary):
        with world.together():
            if world.is_main:
                remove_folder(temporary)
                make_folder(temporary)
        with world.together():
            if world.is_main or not replicated:
                shard = temporary / f"rank-{world.rank:05d}.safetensors"
                make_folder(temporary)  # on a network disk a rank may not see rank 0's yet
                tensors = {key: part for engine in engines for key, part in _tensors(engine)}
                with writing(shard):
                    save_file(tensors, shard)
                    sync(shard)  # by its own rank: another machine's disk cache is not rank 0's
        groups = [
            {name: _number(name, value) for name, value in group.items()}
            for engine in engines
            for group in group_state(engine.optimizer)
        ]
        all_pieces = [piece for engine in engines for pieces in engine.pieces for piece in pieces]
        shapes = world.gather({piece.name: piece.shape for piece in all_pieces})
        with world.together():
            if world.is_main:
                parameters = {name: list(shape) for rank in shapes for name, shape in rank.items()}
                files = 1 if replicated else world.size
                about = {
                    "format": FORMAT, "step": step, "shards": files, "parameters": parameters, "groups": groups,
                    "state": state,
                }  # fmt: skip
                with writing(temporary / "manifest.json"):
                    (temporary / "manifest.json").write_text(json.dumps(about, indent=1))
                publish_folder(temporary, final)
    if world.is_main and keep > 0:
        for old in published(folder.parent)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def published(folder: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted((path for path in found if (path / "manifest.json").exists()), key=lambda path: int(path.name[5:]))


def remove_strays(folder: Path) -> None:
    """Cleans up after a killed process: a folder put aside gets its name back, half-written ones are removed."""
    for aside in [folder / ".model.old", *(folder / "checkpoints").glob(".step-*.old")]:
        heal_folder(aside.with_name(aside.name[1:-4]))
    for path in [folder / ".tmp-model", *(folder / "checkpoints").glob(".tmp-step-*")]:
        with suppress(OSError):  # it does no harm
            remove_folder(path)


class Checkpoint:
    """A published checkpoint, read piece by piece."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = read_json(path / "manifest.json")
        if self.about.get("format") != FORMAT:
            raise StditError(f"{path} has checkpoint format {self.about.get('format')}; this stdit reads {FORMAT}.")
        self.step: int = self.about["step"]
        self.state: dict[str, Any] = self.about["state"]

    @classmethod
    def latest(cls, folder: Path) -> Checkpoint | None:
        found = published(folder)
        return cls(found[-1]) if found else None

    @cached_property
    def _index(self) -> dict[str, list[tuple[int, int, Path]]]:
        """By key without offset: (offset, numel, file) of every shard that has part of it."""
        index: dict[str, list[tuple[int, int, Path]]] = {}
        for rank in range(self.about["shards"]):
            file = self.path / f"rank-{rank:05d}.safetensors"
            if not file.exists():
                raise StditError(f"{self.path} lacks {file.name}. Remove the folder to go on from the one before.")
            try:
                entries = open_safetensors(file).entries
            except StditError as error:
                raise StditError(f"{error} Remove {self.path} to go on from the checkpoint before.") from error
            for key, entry in entries.items():
                name, _, offset = key.rpartition("@")
                index.setdefault(name, []).append((int(offset), math.prod(entry.shape), file))
        return index

    def read(self, key: str, offset: int, numel: int) -> Tensor:
        """`numel` numbers from `offset` on of a flattened tensor such as "master/head.head.weight"."""
        result: Tensor | None = None
        found = 0
        for begin, length, file in self._index.get(key, []):
            low, high = max(offset, begin), min(offset + numel, begin + length)
            if low >= high:
                continue
            with safe_open(file, "pt") as shard:
                part = shard.get_slice(f"{key}@{begin}")[low - begin : high - begin]
            if result is None:
                result = torch.empty(numel, dtype=part.dtype)
            result[low - offset : high - offset] = part
            found += high - low
        if result is None or found != numel:
            raise StditError(f"{self.path} has {found} of the {numel} numbers of {key} from {offset} on.")
        return result

    def weights(self, kind: str = "master") -> dict[str, Tensor]:
        """All parameters in fp32. kind: "master" or "ema"."""
        return {
            name: self.read(f"{kind}/{name}", 0, math.prod(shape)).reshape(shape)
            for name, shape in self.about["parameters"].items()
        }

    @torch.no_grad()
    def load_weights(self, *modules: nn.Module) -> None:
        """Into all modules that train, before their engines are made; names and shapes must match."""
        parameters = {name: p for module in modules for name, p in module.named_parameters() if p.requires_grad}
        found, saved = {name: list(p.shape) for name, p in parameters.items()}, self.about["parameters"]
        if wrong := sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name)):
            raise StditError(f"{self.path} does not fit the model: {', '.join(wrong[:5])} differ.")
        for name, weight in self.weights().items():
            parameters[name].copy_(weight)

    @torch.no_grad()
    def load_state(self, engines: Sequence[Engine]) -> None:
        """Masters, averages and the optimizers' state, into this rank's pieces."""
        for engine in engines:
            self._load_pieces(engine)
        groups = [group for engine in engines for group in engine.optimizer.param_groups]
        for group, kept in zip(groups, self.about.get("groups", [])):
            for name, (value, dtype) in kept.items():
                group[name] = value if dtype is None else torch.tensor(value, dtype=getattr(torch, dtype))

    def _load_pieces(self, engine: Engine) -> None:
        kinds = {key.split("/", 1)[0] for key in self._index}
        cut = {kind for kind in kinds if "." not in kind} - {"master", "ema"}  # the optimizer's, shaped as the masters
        group = engine.optimizer.param_groups[0]
        on_device = bool(group.get("fused") or group.get("capturable"))  # where these keep their step counters
        for index, (flat, pieces) in enumerate(zip(engine.flat_masters, engine.pieces)):
            targets = {"master": flat.detach()}
            if engine.ema is not None:
                targets["ema"] = engine.ema.averages[index]
            for kind in cut:
                if any(f"{kind}/{piece.name}" in self._index for piece in pieces):
                    targets[kind] = engine.optimizer.state[flat][kind] = torch.zeros_like(flat, requires_grad=False)
            for piece in pieces:
                for kind, target in targets.items():
                    numbers = self.read(f"{kind}/{piece.name}", piece.offset, piece.numel)
                    target.view(-1)[piece.start : piece.start + piece.numel].copy_(numbers)
            for kind in kinds - cut - {"master", "ema"}:
                if not pieces or (key := f"{kind}/{pieces[0].name}") not in self._index:
                    continue
                offset, _, file = self._index[key][0]  # every shard has the same
                with safe_open(file, "pt") as shard:
                    value = shard.get_tensor(f"{key}@{offset}")
                value = value.to(flat.device) if on_device else value
                kept, _, name = kind.partition(".")
                engine.optimizer.state[flat][name] = value.item() if kept == "number" else value


def _number(name: str, value: Any) -> tuple[int | float, str | None]:
    """A number that a group keeps, and the dtype if it is a tensor."""
    if isinstance(value, int | float):
        return value, None
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item(), str(value.dtype).removeprefix("torch.")
    raise StditError(f"the optimizer keeps {name} as {type(value).__name__}, which no checkpoint holds.")


def _tensors(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """What a rank writes: of every piece its share of what is shaped as the masters, and all other state whole."""
    for index, (flat, pieces) in enumerate(zip(engine.flat_masters, engine.pieces)):
        cut: dict[str, Tensor] = {"master": flat}
        if engine.ema is not None:
            cut["ema"] = engine.ema.averages[index]
        whole: dict[str, Tensor] = {}
        for kind, value in engine.optimizer.state.get(flat, {}).items():
            if isinstance(value, Tensor) and value.shape == flat.shape and value.ndim:
                cut[kind] = value
            elif isinstance(value, Tensor):
                whole[f"tensor.{kind}"] = value
            elif isinstance(value, int | float):
                whole[f"number.{kind}"] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
            elif value is not None:
                raise StditError(f"the optimizer keeps {kind} as {type(value).__name__}, which no checkpoint holds.")
        for piece in pieces:
            place = f"{piece.name}@{piece.offset}"
            for kind, value in cut.items():
                numbers = value.detach().reshape(-1)[piece.start : piece.start + piece.numel]
                yield f"{kind}/{place}", numbers.cpu().clone()
            for kind, value in whole.items():
                yield f"{kind}/{place}", value.detach().cpu().clone()


@contextmanager
def _kept_on_errors(folder: Path, temporary: Path) -> Iterator[None]:
    """On a full disk or at a limit of the system: removes what is half-written, and says what is kept."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DiskError) or disk_trouble(error):
            with suppress(OSError):
                remove_folder(temporary)
            said = str(error) if isinstance(error, StditError) else f"{temporary}: {disk_trouble(error)}"
            raise StditError(f"{said} This checkpoint was not written, earlier ones in {folder} are kept.") from error
        raise
