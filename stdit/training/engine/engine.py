"""How a module is trained: gradients, the optimizer step, and who holds which piece of the fp32 state.

Two engines with one interface. `TorchEngine` is plain PyTorch on one rank. `DeepSpeedEngine` shards over ranks with
ZeRO; this file is the only one that imports DeepSpeed. Both train fp32 masters; with precision bf16 the module computes
in bf16 copies of them.

The fp32 state of a rank is a list of `flat_masters`, tensors that the optimizer updates in place, and of the pieces of
parameters that lie in each. Checkpoints and the moving average need to know no more than that.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stdit.errors import StditError, error_context
from stdit.shipped import DEEPSPEED, find_shipped
from stdit.training.engine.optimizer import ELEMENTWISE, OptimizerConfig, group_state, make_optimizer
from stdit.training.engine.parallel import World
from stdit.weights.tensor_files import read_json

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# What the run's config decides, and a DeepSpeed JSON therefore must not.
OURS = {
    "train_batch_size": "plan",
    "train_micro_batch_size_per_gpu": "plan",
    "gradient_accumulation_steps": "plan",
    "managed_gradient_accumulation": "plan",
    "gradient_allreduce_op": "plan",
    "gradient_clipping": "optimizer.clip",
    "optimizer": "optimizer",
    "scheduler": "schedule",
    "bf16": "run.precision",
    "fp16": "run.precision",
    "data_types": "run.precision",
    "amp": "run.precision",
    "torch_autocast": "run.precision",
    "zero_allow_untested_optimizer": "optimizer.name",
}


@dataclass
class ParallelConfig:
    """How ranks share a run.

    deepspeed: a DeepSpeed JSON, or zero1, zero2, zero3 or zero3_offload. Required on more than one rank.
    sequence_parallel: ranks that share a clip; only 1 is supported so far.
    """

    deepspeed: str | None = None
    sequence_parallel: int = 1

    def __post_init__(self) -> None:
        if self.sequence_parallel != 1:
            raise StditError(f"sequence_parallel {self.sequence_parallel}: only 1 is supported so far.")


@dataclass(frozen=True)
class ShardPiece:
    """`numel` numbers of the parameter `name` (flattened) from `offset` on, which lie in a flat from `start` on."""

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    numel: int


class Engine:
    """What both engines are: see `TorchEngine` for each method's meaning."""

    module: nn.Module
    optimizer: torch.optim.Optimizer  # its state is keyed by flat_masters
    flat_masters: list[Tensor]
    pieces: list[list[ShardPiece]]  # of each flat
    replicated = False  # every rank holds all pieces
    differentiable = True  # whether `forward` takes a backward that is none of the training's

    def backward(self, batch: Any, scale: float, last: bool) -> Tensor:
        raise NotImplementedError

    def forward(self, batch: Any) -> Tensor:
        """module(batch) outside training; all ranks call it together."""
        return self.module(batch)

    def step(self, lr: float) -> float:
        raise NotImplementedError

    def gradients(self) -> dict[str, Tensor]:
        raise NotImplementedError


class TorchEngine(Engine):
    """Plain PyTorch on one rank."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, precision: str, world: World) -> None:
        if world.size > 1:
            raise StditError(
                f"{world.size} ranks need DeepSpeed: set parallel.deepspeed=zero1 (or zero2, zero3) and "
                f"`pip install stdit[train]`."
            )
        self.clip = config.clip
        names = [name for name, p in module.named_parameters() if p.requires_grad]
        self.module = module.to(world.device)
        masters = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        self._copies: list[nn.Parameter] = []
        if PRECISIONS[precision] is not torch.float32:
            masters = {name: nn.Parameter(p.detach().float().clone()) for name, p in masters.items()}
            self.module.to(PRECISIONS[precision])
            trained = dict(self.module.named_parameters())
            self._copies = [trained[name] for name in names]
        self.flat_masters = [masters[name] for name in names]
        self.pieces = [[ShardPiece(name, tuple(p.shape), 0, 0, p.numel())] for name, p in masters.items()]
        self.optimizer = make_optimizer(masters, config)
        self._groups = [list(group["params"]) for group in self.optimizer.param_groups]

    def backward(self, batch: Any, scale: float, last: bool) -> Tensor:
        """Adds the gradient of scale · module(batch) to the step's. last: the step's last micro-step.

        The module returns a sum over clips, scale is 1 / the step's total weight over all ranks. Returns the sum.
        """
        total = self.module(batch)
        (total * _with_fault(scale, total)).backward()
        for master, copy in zip(self.flat_masters, self._copies):  # gradients add up in fp32
            if copy.grad is not None:
                master.grad = copy.grad.float() if master.grad is None else master.grad.add_(copy.grad)
                copy.grad = None
        return total.detach()

    def gradients(self) -> dict[str, Tensor]:
        """The step's whole gradients by parameter in fp32, before clipping; after the last micro-step's backward."""
        found = {}
        for flat, (piece,) in zip(self.flat_masters, self.pieces):
            found[piece.name] = torch.zeros_like(flat) if flat.grad is None else flat.grad.detach().clone()
        return found

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clips, updates masters and weights, forgets the gradients. Returns the norm before clipping; where that is
        not finite, on any rank, nothing was updated on any."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        gradients = [flat.grad for flat in self.flat_masters if flat.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if math.isfinite(value := float(norm)):
            if self.clip > 0:
                torch.nn.utils.clip_grads_with_norm_(self.flat_masters, self.clip, norm)
            self.optimizer.step()
            if self._copies:
                torch._foreach_copy_([copy.data for copy in self._copies], self.flat_masters)
        self.optimizer.zero_grad(set_to_none=True)
        return value


class DeepSpeedEngine(Engine):
    """ZeRO stage 0 to 3 by a DeepSpeed JSON."""

    def __init__(
        self, module: nn.Module, config: OptimizerConfig, parallel: ParallelConfig, precision: str, world: World
    ) -> None:
        assert parallel.deepspeed is not None
        settings, stage = _read_json(parallel.deepspeed, precision)
        deepspeed = _import_deepspeed(world)
        settings |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the boundary is set by hand: steps differ in their micro-steps
            "gradient_clipping": config.clip,
            "bf16": {"enabled": precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_allow_untested_optimizer": True,
        }
        names = {id(p): name for name, p in module.named_parameters()}
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        exact = {}  # DeepSpeed would take the masters from weights rounded to bf16
        if precision == "bf16":
            exact = {name: p.detach().float().flatten().clone() for name, p in trained.items()}
        # Some of DeepSpeed's optimizers take a step when they are made: at lr 0 it changes nothing.
        client = make_optimizer(trained, config, lr=0.0)
        self.scale = world.size  # the engine averages over ranks, our loss is a sum
        self.stage = stage
        with _quiet():
            self._deepspeed, _, _, _ = deepspeed.initialize(model=module, optimizer=client, config=settings)
        self.module = self._deepspeed.module
        self.optimizer = client
        self.optimizer.state.clear()
        for group, kept in zip(self.optimizer.param_groups, group_state(self.optimizer)):
            for key in kept:
                del group[key]
        self.replicated = stage == 0
        self.differentiable = stage < 3  # which counts forwards and backwards
        self._parameters = {names[id(p)]: p for p in self.module.parameters() if p.requires_grad}
        self.flat_masters, self.pieces = self._find_pieces(shapes, world)
        with torch.no_grad():
            for flat, pieces in zip(self.flat_masters, self.pieces):
                for piece in pieces if exact else []:
                    numbers = exact[piece.name][piece.offset : piece.offset + piece.numel]
                    flat.view(-1)[piece.start : piece.start + piece.numel] = numbers.to(flat)
        self._safe_get_full_grad = deepspeed.utils.safe_get_full_grad

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

    def backward(self, batch: Any, scale: float, last: bool) -> Tensor:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        total = self._deepspeed(batch)
        self._deepspeed.backward(total * _with_fault(scale * self.scale, total))
        return total.detach()

    def forward(self, batch: Any) -> Tensor:
        return self._deepspeed(batch) if self.stage == 3 else self.module(batch)  # stage 3 gathers weights

    def gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, p in self._parameters.items():
            gradient = self._safe_get_full_grad(p)
            assert gradient is not None, f"no gradient of {name}"
            found[name] = gradient.detach().float().cpu().clone()
        return found

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm: Any = None
        if self.stage == 0:  # DeepSpeed measures only what it clips
            norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
            if not torch.isfinite(norm):  # the other stages see to that themselves
                self._deepspeed.zero_grad()
                return float(norm)
        self._deepspeed.step()
        if not self._deepspeed.was_step_applied():  # it leaves a step with infinite gradients out, and says nothing
            return math.inf
        return float(self._deepspeed.get_global_grad_norm() if norm is None else norm)


def _with_fault(scale: float, total: Tensor) -> Tensor:
    """scale, or nan where the loss is not finite: then the gradient is not finite either, and no rank updates."""
    value = total.detach()
    return value - value + scale


def make_engine(
    module: nn.Module, optimizer: OptimizerConfig, parallel: ParallelConfig, precision: str, world: World
) -> Engine:
    """The engine that the config asks for. The module holds its starting weights, in fp32."""
    check_engine(optimizer, parallel, world.device)
    if parallel.deepspeed is None:
        return TorchEngine(module, optimizer, precision, world)
    return DeepSpeedEngine(module, optimizer, parallel, precision, world)


def check_engine(config: OptimizerConfig, parallel: ParallelConfig, device: torch.device) -> None:
    """Raises for what no engine can be made of, before anything large is."""
    stage = zero_stage(parallel.deepspeed)
    if stage > 0 and config.name not in ELEMENTWISE:
        raise StditError(
            f"optimizer.name={config.name} looks at whole matrices or groups, and ZeRO stage {stage} cuts them. "
            f"Use one of {', '.join(sorted(ELEMENTWISE))}, or one rank without parallel.deepspeed."
        )
    sizes = {"a.weight": (4, 4), "a.bias": (4,)}
    make_optimizer({name: nn.Parameter(torch.zeros(size, device=device)) for name, size in sizes.items()}, config)


def zero_stage(path: str | None) -> int:
    """The ZeRO stage of a DeepSpeed JSON; 0 without one."""
    return 0 if path is None else _read_json(path, "fp32")[1]


def _read_json(given: str, precision: str) -> tuple[dict[str, Any], int]:
    with error_context("parallel.deepspeed"):
        path = find_shipped(given, DEEPSPEED, ".json")
        settings = read_json(path)
    for key, owner in OURS.items():
        if key in settings:
            raise StditError(f"{path} sets {key!r}, which the run's config owns ({owner}). Take it out of the JSON.")
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
    """An object in a JSON object; null is taken out, which DeepSpeed does not read everywhere."""
    if settings.get(name) is None:
        settings.pop(name, None)
    found = settings.get(name, {})
    if not isinstance(found, dict):
        raise StditError(f"{path}: {name} is {found!r}; it must be a JSON object, or left out.")
    return found


def _import_deepspeed(world: World) -> Any:
    # DeepSpeed compiles with ninja, which lies beside python in a virtual environment that nobody activated.
    beside = str(Path(sys.executable).parent)
    if beside not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    try:
        import deepspeed
    except ImportError as error:
        raise StditError(f"parallel.deepspeed needs DeepSpeed: pip install 'stdit[train]' ({error}).") from error
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # A kernel for inference on CPUs, which DeepSpeed would compile at the first start: most of a minute, behind a lock
    # file that a killed process, or another version of torch, leaves there for every later start to wait for.
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
    """Keeps DeepSpeed's start-up prints (its memory, what it compiled) out of the log, unless it fails."""
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
    """Tells DeepSpeed that there is one rank where no launcher has: it would look for MPI."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
