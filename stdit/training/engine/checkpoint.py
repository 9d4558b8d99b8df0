"""Checkpoints: fp32 masters, moments and averages as safetensors shards that any number of ranks can read.

    checkpoints/step-00000200/manifest.json           the run's state; SHA-256 and size of each shard; where pieces lie
    checkpoints/step-00000200/rank-00000.safetensors  "master/blocks.0.ffn.0.weight@0", "exp_avg/…", "ema/…", …

A tensor holds the numbers of the flattened parameter from `@offset` on. The manifest lists a parameter's pieces in runs
[offset, numel, shard, count]: `count` pieces of `numel` numbers, one after another from `offset` on, in the shards
`shard`, `shard + 1`, …. ZeRO 3 cuts every parameter for every rank, in one or two runs. So a rank finds its pieces in
the manifest alone, and opens only the shards that hold them.

`saver` writes checkpoints; `agreement` chooses the one that all ranks resume, and verifies it.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeInt, PositiveInt
from safetensors import safe_open
from torch import Tensor, nn

from stdit.errors import StditError
from stdit.files import heal_folder, remove_folder, sha256_of
from stdit.training.engine.engine import Engine
from stdit.training.engine.parallel import World
from stdit.weights.tensor_files import read_json

FORMAT = 2
MANIFEST = "manifest.json"


@dataclass
class CheckpointConfig:
    """When checkpoints are written. The last step and a signal always write one.

    every: steps between checkpoints.
    keep: how many of the newest stay; 0: all.
    keep_every: a checkpoint of every so many steps stays for good; 0: none does.
    background: copies the state to host memory, and writes while the steps go on; host memory holds a rank's state once
        more. Without it, the steps wait for the disk.
    """

    every: PositiveInt = 500
    keep: NonNegativeInt = 2
    keep_every: NonNegativeInt = 0
    background: bool = True


class DamagedCheckpoint(StditError):
    """A checkpoint that is not as it was written. The message names the file."""


@dataclass(frozen=True)
class Part:
    """Numbers [offset, offset + numel) of a flattened parameter, in the piece of `shard` that begins at `piece`."""

    shard: int
    piece: int
    offset: int
    numel: int


@dataclass(frozen=True)
class Wanted:
    """Numbers from `offset` on of the flattened parameter `name`, of one kind of state, to be copied to `target`."""

    kind: str
    name: str
    offset: int
    target: Tensor  # 1-D


@dataclass(frozen=True)
class _Copy:
    """Numbers from `start` on of a tensor in a shard, to be copied to `target`."""

    key: str
    start: int
    target: Tensor  # 1-D


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def shard_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def candidates(folder: Path) -> list[Path]:
    """All checkpoints of a run folder, damaged ones too, oldest first."""
    found = [path for path in (folder / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=step_of)


def published(folder: Path) -> list[Path]:
    """The checkpoints of a run folder that have a manifest, oldest first."""
    return [path for path in candidates(folder) if (path / MANIFEST).exists()]


def prune(folder: Path, step: int, keep: int, keep_every: int) -> None:
    """Removes checkpoints before `step`, except the last `keep` (that of `step` is one) and every `keep_every` steps.

    Later ones are left: they were refused, and are replaced when their step comes.
    """
    found = [path for path in published(folder) if step_of(path) <= step]
    for old in found[:-keep] if keep else []:
        if not keep_every or step_of(old) % keep_every:
            hidden = old.with_name(f".tmp-{old.name}")  # first, so that no half of it is left under its name
            with suppress(OSError):
                remove_folder(hidden)
                old.rename(hidden)
                shutil.rmtree(hidden)


def remove_strays(folder: Path) -> None:
    """Cleans up after a killed process: a folder put aside gets its name back, half-written ones are removed."""
    for aside in [folder / ".model.old", *(folder / "checkpoints").glob(".step-*.old")]:
        heal_folder(aside.with_name(aside.name[1:-4]))
    for path in [folder / ".tmp-model", *(folder / "checkpoints").glob(".tmp-step-*"), *folder.glob(".shared-*")]:
        with suppress(OSError):  # it does no harm
            remove_folder(path)


def checksum(about: dict[str, Any]) -> str:
    """SHA-256 of a manifest's content, apart from the checksum in it."""
    content = {key: value for key, value in about.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Checkpoint:
    """A published checkpoint. Opening it reads the manifest alone.

    Raises DamagedCheckpoint if the manifest is not as it was written, StditError if it has another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about = _read_manifest(path)
        self.step: int = self.about["step"]
        self.state: dict[str, Any] = self.about["state"]
        self.sha256: str = self.about["sha256"]  # covers the shards, whose hashes are in the manifest
        self.parameters: dict[str, Any] = self.about["parameters"]

    @classmethod
    def latest(cls, folder: Path) -> Checkpoint | None:
        """The newest one. Its shards are not verified; see `agreement.agree`."""
        found = published(folder)
        return cls(found[-1]) if found else None

    def find_damage(self, rank: int = 0, ranks: int = 1) -> str:
        """Hashes the shards that fall to this rank, a share of all. Returns what is wrong with one, or ""."""
        for number in range(rank, len(self.about["shards"]), ranks):
            file, wanted = self.path / shard_name(number), self.about["shards"][number]
            try:
                if (size := file.stat().st_size) != wanted["size"]:
                    return f"{file} has {size:,} bytes, not {wanted['size']:,}"
                with open(file, "rb") as opened:
                    if sha256_of(opened) != wanted["sha256"]:
                        return f"{file} does not have the SHA-256 that it was written with"
            except FileNotFoundError:
                return f"{file} is missing"
            except OSError as error:
                return f"{file} cannot be read ({error.strerror})"
        return ""

    def parts(self, name: str, offset: int, numel: int) -> Iterator[Part]:
        """The pieces that hold numbers [offset, offset + numel) of a parameter. Raises DamagedCheckpoint if some are
        missing."""
        stop = found = offset
        stop += numel
        for begin, each, shard, count in self.parameters[name]["pieces"]:
            first, last = max(0, (offset - begin) // each), min(count, -(-(stop - begin) // each))
            for number in range(first, last):
                piece = begin + number * each
                low, high = max(offset, piece), min(stop, piece + each)
                yield Part(shard + number, piece, low, high - low)
                found += high - low
        if found != stop:
            raise DamagedCheckpoint(f"{self.path} has {found - offset} of {numel} numbers of {name} from {offset} on.")

    def weights(self, kind: str = "master") -> dict[str, Tensor]:
        """All parameters in fp32. kind: "master" or "ema"."""
        found = {name: torch.empty(about["shape"]) for name, about in self.parameters.items()}
        self._read(Wanted(kind, name, 0, tensor.view(-1)) for name, tensor in found.items())
        return found

    @torch.no_grad()
    def load_weights(self, *modules: nn.Module, world: World | None = None) -> None:
        """Into all modules that train, before their engines are made; names and shapes must match.

        Those on the meta device are left out: their engine gets masters (`load_state`), and copies them.

        world: its ranks call this together; each shard is then read by one of them, and sent to the others one
        parameter at a time.
        """
        parameters = {name: p for module in modules for name, p in module.named_parameters() if p.requires_grad}
        found = {name: list(p.shape) for name, p in parameters.items()}
        saved = {name: about["shape"] for name, about in self.parameters.items()}
        if wrong := sorted(name for name in found.keys() | saved.keys() if found.get(name) != saved.get(name)):
            raise StditError(f"{self.path} does not fit the model: {', '.join(wrong[:5])} differ.")
        parameters = {name: p for name, p in parameters.items() if not p.is_meta}
        if world is None or world.size == 1:
            direct = {name: p.dtype == torch.float32 and p.is_contiguous() for name, p in parameters.items()}
            whole = {name: p.detach() if direct[name] else torch.empty(p.shape) for name, p in parameters.items()}
            self._read(Wanted("master", name, 0, tensor.view(-1)) for name, tensor in whole.items())
            for name, parameter in parameters.items():
                if not direct[name]:
                    parameter.copy_(whole[name])
            return
        shards = range(world.rank, len(self.about["shards"]), world.size)
        with world.together():  # an error before the first sum is everybody's
            opened = {number: self._open(number) for number in shards}
        for name, parameter in parameters.items():
            bits = torch.zeros(parameter.numel(), dtype=torch.int32)  # a sum of floats would turn -0 into 0
            for part in self.parts(name, 0, parameter.numel()):
                if part.shard in opened:
                    start = part.offset - part.piece
                    numbers = opened[part.shard].get_slice(f"master/{name}@{part.piece}")[start : start + part.numel]
                    bits.view(torch.float32)[part.offset : part.offset + part.numel] = numbers
            parameter.copy_(world.sum_(bits).view(torch.float32).view(parameter.shape))

    @torch.no_grad()
    def load_state(self, engines: Sequence[Engine]) -> None:
        """Masters, averages and the optimizers' state, into this rank's pieces."""
        self._read(wanted for engine in engines for wanted in self._wanted(engine))
        for engine in engines:
            self._load_whole_state(engine)
        groups = [group for engine in engines for group in engine.optimizer.param_groups]
        for group, kept in zip(groups, self.about["groups"]):
            for name, (value, dtype) in kept.items():
                group[name] = value if dtype is None else torch.tensor(value, dtype=getattr(torch, dtype))

    def _wanted(self, engine: Engine) -> Iterator[Wanted]:
        """What is shaped as the masters. The optimizer's tensors are made."""
        for index, (flat, pieces) in enumerate(zip(engine.flat_masters, engine.pieces)):
            targets = {"master": flat.detach()}
            if engine.ema is not None:
                targets["ema"] = engine.ema.averages[index]
            for kind in self._kinds(piece.name for piece in pieces):
                if "." not in kind and kind not in ("master", "ema"):
                    targets[kind] = engine.optimizer.state[flat][kind] = torch.zeros_like(flat, requires_grad=False)
            for piece in pieces:
                for kind, target in targets.items():
                    here = target.view(-1)[piece.start : piece.start + piece.numel]
                    yield Wanted(kind, piece.name, piece.offset, here)

    def _load_whole_state(self, engine: Engine) -> None:
        """What every piece has a copy of, such as the optimizer's step."""
        group = engine.optimizer.param_groups[0]
        on_device = bool(group.get("fused") or group.get("capturable"))  # where these keep their step counters
        shards: dict[int, Any] = {}
        for flat, pieces in zip(engine.flat_masters, engine.pieces):
            kinds = [kind for kind in self._kinds(piece.name for piece in pieces[:1]) if "." in kind]
            for kind in kinds:
                piece = pieces[0]
                part = next(self.parts(piece.name, piece.offset, piece.numel))  # in a shard that is read anyway
                if part.shard not in shards:
                    shards[part.shard] = self._open(part.shard)
                value = shards[part.shard].get_tensor(f"{kind}/{piece.name}@{part.piece}")
                value = value.to(flat.device) if on_device else value
                kept, _, name = kind.partition(".")
                engine.optimizer.state[flat][name] = value.item() if kept == "number" else value

    def _kinds(self, names: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(kind for name in names for kind in self.parameters[name]["kinds"]))

    def _read(self, wanted: Iterable[Wanted]) -> None:
        """Fills all targets, and opens each shard once, however many pieces it has."""
        copies: dict[int, list[_Copy]] = defaultdict(list)
        for one in wanted:
            if one.kind not in self.parameters[one.name]["kinds"]:
                raise StditError(f"{self.path} has no {one.kind} of {one.name}.")
            for part in self.parts(one.name, one.offset, one.target.numel()):
                target = one.target[part.offset - one.offset :][: part.numel]
                copies[part.shard].append(
                    _Copy(f"{one.kind}/{one.name}@{part.piece}", part.offset - part.piece, target)
                )
        for number, several in sorted(copies.items()):
            shard = self._open(number)
            for copy in several:
                copy.target.copy_(shard.get_slice(copy.key)[copy.start : copy.start + copy.target.numel()])

    def _open(self, number: int) -> Any:
        file = self.path / shard_name(number)
        try:
            return safe_open(file, "pt")
        except Exception as error:  # safetensors has its own for damage
            raise DamagedCheckpoint(f"{file} cannot be read: {error}") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.exists():
        raise DamagedCheckpoint(f"{file} is missing")
    try:
        about = read_json(file)
    except StditError as error:
        raise DamagedCheckpoint(str(error).rstrip(".")) from None
    found = about.get("format")
    is_early = found == 1 and "sha256" not in about
    if not is_early and about.get("sha256") != checksum(about):
        raise DamagedCheckpoint(f"{file} does not have the SHA-256 that it was written with")
    if found != FORMAT:
        raise StditError(
            f"{path} has checkpoint format {found}, this stdit reads {FORMAT}: another version wrote it, which draws "
            f"other random numbers. Resume with that version, or train on from the run's exported model: model.init "
            f"(vae.path) and another run=PATH."
        )
    return about
