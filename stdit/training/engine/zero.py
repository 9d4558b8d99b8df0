"""ZeRO by DeepSpeed. This file alone imports it, and reads its JSONs."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stdit.errors import StditError, error_context
from stdit.shipped import DEEPSPEED, find_shipped
from stdit.training.engine.clipping import NormLimit
from stdit.training.engine.engine import PRECISIONS, Engine, ShardPiece, nan_if_not_finite
from stdit.training.engine.optimizer import SHARDED_MUON, OptimizerConfig, group_state, make_optimizer
from stdit.training.engine.parallel import World
from stdit.training.engine.start import KeptNumbers, Numbers, allocate, fill, fill_partitions
from stdit.weights.tensor_files import read_json

# Keys of a DeepSpeed JSON that a section or setting of the run's config decides.
OURS = {
    "plan": (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "managed_gradient_accumulation", "gradient_allreduce_op",
    ),
    "optimizer.clip": ("gradient_clipping",),
    "optimizer": ("optimizer",),
    "schedule": ("scheduler",),
    "run.precision": ("bf16", "fp16", "data_types", "amp", "torch_autocast"),
    "optimizer.name": ("zero_allow_untested_optimizer",),
}  # fmt: skip


class DeepSpeedEngine(Engine):
    """ZeRO stage 0 to 3.

    deepspeed_json: a path, or the name of a file in stdit/configs/deepspeed.
    numbers: of the parameters that are still on the meta device. They get them in the precision of the run: of stage 3
        each rank only its own, of the other stages all of them. Masters get their own in fp32.
    """

    def __init__(
        self,
        module: nn.Module,
        config: OptimizerConfig,
        deepspeed_json: str,
        precision: str,
        world: World,
        numbers: Numbers | None = None,
    ) -> None:
        settings, stage = _read_json(deepspeed_json, precision)
        deepspeed = _import_deepspeed(world)
        settings |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the boundary is set by hand: steps differ in their micro-steps
            "gradient_clipping": 0.0,  # `step` sets the limit
            "bf16": {"enabled": precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
        }
        allocated = allocate(module, PRECISIONS[precision])
        assert numbers is not None or not allocated, allocated[:3]
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._parameters: dict[str, Any] = dict(trained)  # DeepSpeed adds attributes to them
        self.shapes = {name: tuple(p.shape) for name, p in trained.items()}  # ZeRO-3 empties the parameters
        # By parameter, its fp32 numbers: DeepSpeed would make the masters of weights rounded to bf16.
        exact: dict[str, Callable[[int, int], Tensor]] = {}
        if precision == "bf16":
            for name, p in trained.items():
                if numbers is not None and name in allocated:
                    exact[name] = partial(numbers, name)
                else:
                    exact[name] = KeptNumbers.of(p, stage, world).numbers
        # DeepSpeed takes a step with some optimizers when it starts; at lr 0 that changes nothing.
        client = make_optimizer(trained, replace(config, lr=0.0))
        muon = None
        if stage > 0 and config.name in SHARDED_MUON:
            from stdit.training.engine.muon import ShardedMuon

            client = muon = ShardedMuon(client.param_groups, world)
        self._world, self.scale = world, world.size  # the engine averages over ranks, our loss is a sum
        self.stage = stage
        self.limit = NormLimit(config.clip, config.adaptive_clip)
        with _quiet():
            if allocated and numbers is not None:
                if stage == 3:
                    _partition(deepspeed, module, settings, PRECISIONS[precision])
                    fill_partitions(module, allocated, numbers, world)
                else:
                    fill(module, allocated, numbers)
            self._deepspeed, _, _, _ = deepspeed.initialize(model=module, optimizer=client, config=settings)
        self.module = self._deepspeed.module
        self.optimizer = client
        self.optimizer.state.clear()
        for group, kept in zip(self.optimizer.param_groups, group_state(self.optimizer)):
            for key in kept:
                del group[key]
        self.replicated = stage == 0
        self.differentiable = stage < 3  # stage 3 counts forwards and backwards
        self.flat_masters, self.pieces = self._find_pieces(self.shapes, world)
        if muon is not None:
            muon.attach(self.flat_masters, self.pieces)
        with torch.no_grad():
            for flat, pieces in zip(self.flat_masters, self.pieces):
                for piece in pieces if exact else []:
                    own = exact[piece.name](piece.offset, piece.offset + piece.numel)
                    flat.view(-1)[piece.start : piece.start + piece.numel] = own.to(flat)

    def _find_pieces(
        self, shapes: dict[str, tuple[int, ...]], world: World
    ) -> tuple[list[Tensor], list[list[ShardPiece]]]:
        zero = self._deepspeed.optimizer
        if self.stage == 0:
            items = self._parameters.items()
            return [p for _, p in items], [[ShardPiece(n, shapes[n], 0, 0, p.numel())] for n, p in items]
        if self.stage == 3:
            flat_masters = list(zero.fp32_partitioned_groups_flat)
        elif hasattr(zero, "single_partition_of_fp32_groups"):
            flat_masters = list(zero.single_partition_of_fp32_groups)
        else:  # bf16 with fp32 accumulation at stage 1
            flat_masters = list(zero.fp32_groups_flat_partition)
        pieces: list[list[ShardPiece]] = [[] for _ in flat_masters]
        for name, p in self._parameters.items():
            if self.stage == 3:
                flat, start, numel = zero.grad_position[zero.get_param_id(p)]
                offset = world.rank * numel
                numel = min(numel, math.prod(shapes[name]) - offset)  # the last rank's piece is padded
            elif (mapping := getattr(p, "_hp_mapping", None)) is None:  # lies on other ranks
                continue
            else:
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                flat, start, offset, numel = mapping.param_group_index, here.start, there.start, here.numel
            if numel > 0:
                pieces[flat].append(ShardPiece(name, shapes[name], offset, start, numel))
        return flat_masters, pieces

    @torch.no_grad()
    def copy_masters(self) -> None:
        own: dict[str, list[tuple[ShardPiece, Tensor]]] = {name: [] for name in self._parameters}
        for flat, pieces in zip(self.flat_masters, self.pieces):
            for piece in pieces:
                own[piece.name].append((piece, flat.detach().view(-1)[piece.start : piece.start + piece.numel]))
        for name, parameter in self._parameters.items():
            if self.stage == 3:
                for piece, numbers in own[name]:
                    parameter.ds_tensor.view(-1)[: piece.numel].copy_(numbers)
            elif self.stage > 0:
                whole = torch.zeros(parameter.numel(), dtype=torch.int32)  # as bits: a sum of floats turns -0 into 0
                for piece, numbers in own[name]:
                    whole.view(torch.float32)[piece.offset : piece.offset + piece.numel] = numbers
                parameter.view(-1).copy_(self._world.sum_(whole).view(torch.float32))

    def backward(self, batch: Any, scale: float, last: bool) -> Tensor:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        total = self._deepspeed(batch)
        self._deepspeed.backward(total * nan_if_not_finite(scale * self.scale, total))
        return total.detach()

    def forward(self, batch: Any) -> Tensor:
        return self._deepspeed(batch) if self.stage == 3 else self.module(batch)  # stage 3 gathers weights

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        limit = self.limit.value
        norm: Any = None
        if self.stage == 0:  # DeepSpeed measures the norm only if it clips
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
            if not torch.isfinite(norm):  # the other stages check that themselves
                self._deepspeed.zero_grad()
                return float(norm)
            if limit > 0:
                torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), limit, norm)
        else:
            self._deepspeed.optimizer.clip_grad = limit
        self._deepspeed.step()
        if not self._deepspeed.was_step_applied():  # it silently skips a step with infinite gradients
            return math.inf
        value = float(self._deepspeed.get_global_grad_norm() if norm is None else norm)
        self.limit.note(value)
        return value


def _partition(deepspeed: Any, module: nn.Module, settings: dict[str, Any], dtype: torch.dtype) -> None:
    """Cuts all parameters for stage 3, one after another: it holds one whole parameter at a time."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    for inner in reversed([*module.modules()]):  # those inside others first: DeepSpeed passes over what it has cut
        if any(True for _ in inner.parameters(recurse=False)):
            deepspeed.zero.Init(module=inner, config_dict_or_path=settings, dtype=dtype)


def zero_stage(path: str | None) -> int:
    """The ZeRO stage of a DeepSpeed JSON; 0 without one."""
    return 0 if path is None else _read_json(path, "fp32")[1]


@dataclass(frozen=True)
class ZeroMemory:
    """What a DeepSpeed JSON says that decides memory, with DeepSpeed's own defaults (0.19, `zero/config.py`)."""

    stage: int = 0
    deepspeed: bool = False  # or plain torch
    bucket: int = 0  # numbers in a buffer of gradients that are being reduced
    buckets: int = 0  # such buffers
    live: int = 0  # numbers of gathered weights at most, under stage 3
    state_on_host: bool = False  # masters, moments, average and gradients (ZeRO-Offload)
    weights_on_host: bool = False


def zero_memory(path: str | None) -> ZeroMemory:
    """path: `parallel.deepspeed`. Raises StditError if it is no such JSON."""
    if path is None:
        return ZeroMemory()
    settings, stage = _read_json(path, "fp32")
    zero = settings["zero_optimization"]

    def on_host(name: str) -> bool:
        return bool(zero.get(name, {}).get("device", "none") == "cpu")

    overlap = stage == 3 if zero.get("overlap_comm") is None else zero["overlap_comm"]
    contiguous = zero.get("contiguous_gradients", True) or on_host("offload_optimizer")
    return ZeroMemory(
        stage=stage,
        deepspeed=True,
        bucket=int(zero.get("reduce_bucket_size", 5e8)),
        buckets=contiguous * (2 if overlap and stage < 3 else 1) if stage else 0,
        live=int(zero.get("stage3_max_live_parameters", 1e9)) if stage == 3 else 0,
        state_on_host=on_host("offload_optimizer"),
        weights_on_host=on_host("offload_param"),
    )


def _read_json(given: str, precision: str) -> tuple[dict[str, Any], int]:
    with error_context("parallel.deepspeed"):
        path = find_shipped(given, DEEPSPEED, ".json")
        settings = read_json(path)
    for owner, keys in OURS.items():
        if found := next((key for key in keys if key in settings), None):
            raise StditError(f"{path} sets {found!r}, which the run's config owns ({owner}). Take it out of the JSON.")
    zero = _section(settings, "zero_optimization", path)
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (0, 1, 2, 3):
        raise StditError(f"{path}: zero_optimization.stage is {stage!r}; it is 0, 1, 2 or 3.")
    if stage == 0 and precision == "bf16":
        raise StditError(f"{path}: ZeRO stage 0 in bf16 keeps no fp32 masters. Use stage 1 or precision fp32.")
    for name in ("offload_optimizer", "offload_param"):
        if _section(zero, name, path).get("device") == "nvme":
            raise StditError(f"{path}: {name} to nvme is not supported; cpu is.")
    return settings, stage


def _section(settings: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    """An object in a JSON object. Removes a null, which DeepSpeed does not accept everywhere."""
    if settings.get(name) is None:
        settings.pop(name, None)
    found = settings.get(name, {})
    if not isinstance(found, dict):
        raise StditError(f"{path}: {name} is {found!r}; it must be a JSON object, or left out.")
    return found


def _import_deepspeed(world: World) -> Any:
    # DeepSpeed compiles with ninja. In a virtual environment that is not activated, only python's folder has it.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    try:
        import deepspeed
    except ImportError as error:
        raise StditError(f"parallel.deepspeed needs DeepSpeed: pip install 'stdit[train]' ({error}).") from error
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed would compile this kernel (inference on CPUs) at the first start: most of a minute, behind a lock file
    # that a killed process leaves behind, for which every later start waits.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # torch 2.14 deprecates collectives that DeepSpeed 0.19 calls at every step, on every rank
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if world.size == 1:
        stand_alone()
    with _quiet():
        deepspeed.init_distributed(dist_init_required=None)
    return deepspeed


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps DeepSpeed's start-up prints out of the log, unless it fails."""
    said = io.StringIO()
    compiler = logging.getLogger("torch.utils.cpp_extension")  # warns on machines that have nvcc and no GPU
    level = compiler.level
    compiler.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said):
            yield
    except BaseException:
        print(said.getvalue(), file=sys.stderr)
        raise
    finally:
        compiler.setLevel(level)


def stand_alone() -> None:
    """Sets the environment of a single rank if no launcher has: DeepSpeed would look for MPI."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
