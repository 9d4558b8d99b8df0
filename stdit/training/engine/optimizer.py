"""What updates the weights: optimizers by name, the learning rate over a run, and the moving average."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from stdit.errors import StditError, nearest_name
from stdit.settings import Share
from stdit.training.engine.clipping import AdaptiveClipConfig

# Optimizers that ZeRO may cut anywhere: the update of one number needs no other number of its tensor. adan is not among
# them: it counts steps by group, and ZeRO-3 updates one group after the other, which would count each as a step.
ELEMENTWISE = {"sgd", "momentum", "nesterov", "adam", "adamw", "nadam", "nadamw", "radam", "adamax", "adabelief"}
ELEMENTWISE |= {"lion", "adopt", "adoptw", "laprop", "rmsprop", "rmsproptf", "adagrad"}

# timm's names of its Muon, and those of them that muon.py can shard: adamuon measures whole updates once more.
MUON = {"muon", "nmuon", "adamuon", "nadamuon"}
SHARDED_MUON = {"muon", "nmuon"}

# Optimizers of timm that a run could not train with or not resume, by the start of their names.
REFUSED = {"kron": "no checkpoint holds its preconditioners", "adahessian": "it needs second derivatives"}

# Arguments of an optimizer that other settings decide.
OWN = {
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "params": "model.trainable, which says what trains",
    "opt": "optimizer.name",
    "opt_name": "optimizer.name",
    "model_or_params": "model.trainable, which says what trains",
    "filter_bias_and_bn": "optimizer.weight_decay, which acts on matrices only",
    "layer_decay": "one optimizer.lr for all layers",
    "adamw_lr": "optimizer.options.fallback_lr_scale, a factor on optimizer.lr",
}


@dataclass
class EmaConfig:
    """The moving average of the weights, which is what a run exports.

    decay: of the average, per step; 0 keeps no average.
    warmup: the decay is at most (1 + step) / (warmup + step), so that the first steps count less.
    """

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    warmup: PositiveInt = 10


class Ema:
    """Averages of `flat_masters`, fp32 tensors that an optimizer updates in place."""

    def __init__(self, flat_masters: Sequence[Tensor], config: EmaConfig) -> None:
        self.config = config
        self.flat_masters = [flat.detach() for flat in flat_masters]
        self.averages = [flat.clone() for flat in self.flat_masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (the first is 1)."""
        decay = min(self.config.decay, (1 + step) / (self.config.warmup + step))
        torch._foreach_lerp_(self.averages, self.flat_masters, 1 - decay)


@dataclass
class OptimizerConfig:
    """The optimizer: torch's AdamW or one of timm's.

    name: adamw (torch's) or any of timm's (sgd, lion, muon, …).
    lr: the learning rate after the warm-up; see `schedule`.
    betas: decay of the first and of the second moment.
    weight_decay: acts on matrices only, not on biases, norms and modulation tables.
    clip: largest global norm of the gradient; 0: no clipping.
    adaptive_clip: also clips a gradient whose norm is far above those of the last steps; unset: not.
    max_skipped_steps: a step whose loss or gradient is not finite updates nothing. After so many in a row, the next
        such step stops the run.
    ema: the moving average of the weights.
    options: further arguments of the optimizer, by its own names. For Muon also fallback_list: patterns of the names of
        parameters that its AdamW takes, such as "*.head.head.*", besides what is no matrix.
    """

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0, le=1000)] = 1e-4
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.01
    clip: NonNegativeFloat = 1.0
    adaptive_clip: AdaptiveClipConfig | None = None
    max_skipped_steps: NonNegativeInt = 3
    ema: EmaConfig = field(default_factory=EmaConfig)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.options:
            if name in OWN:
                raise StditError(f"options.{name} has no effect: set {OWN[name]}.")
        patterns = self.options.get("fallback_list", [])
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise StditError(
                f"options.fallback_list is {patterns!r}; it must be a list of parameters' names or patterns."
            )
        if patterns and self.name not in MUON:
            raise StditError(f"options.fallback_list is for {', '.join(sorted(MUON))}; optimizer.name is {self.name}.")


def make_optimizer(parameters: dict[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer, over groups with weight decay and without; Muon's are either all matrices or `use_fallback`."""
    groups: list[dict[str, Any]] = []
    for decayed, matrix in product((True, False), repeat=2):
        chosen = [
            p
            for name, p in parameters.items()
            if decays(name, p) == decayed and orthogonalised(name, p, config) == matrix
        ]
        if chosen:
            groups.append({"params": chosen, "weight_decay": config.weight_decay if decayed else 0.0})
            if config.name in MUON:
                groups[-1]["use_fallback"] = not matrix
    kind: Callable[..., Any] = torch.optim.AdamW
    make: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, groups, lr=config.lr, fused=True)
    if config.name != "adamw":
        import timm.optim

        known = [str(name) for name in timm.optim.list_optimizers()]
        if config.name not in known:
            raise StditError(f"optimizer.name {config.name!r} is not known.{nearest_name(config.name, known)}")
        for start, reason in REFUSED.items():
            if config.name.startswith(start):
                raise StditError(f"optimizer.name={config.name} is not supported: {reason}. Try adamw or muon.")
        kind = timm.optim.get_optimizer_class(config.name, bind_defaults=False)
        make = partial(timm.optim.create_optimizer_v2, groups, opt=config.name, lr=config.lr)
    options, takes = config.options, inspect.signature(kind).parameters
    if "betas" in takes:
        usual, betas = takes["betas"].default, options.get("betas", config.betas)
        if usual is not None and (not isinstance(betas, list | tuple) or len(betas) != len(usual)):
            raise StditError(
                f"optimizer.name={config.name} takes {len(usual)} betas, not {betas}: set optimizer.options.betas, "
                f"such as {list(usual)}."
            )
        options = options | {"betas": betas}
    try:
        return make(**options)
    except Exception as error:  # each checks its arguments in its own way, and some need what is not installed
        raise StditError(f"optimizer.name={config.name} with optimizer.options={config.options}: {error}") from error


def orthogonalised(name: str, parameter: Tensor, config: OptimizerConfig) -> bool:
    """Whether the optimizer is Muon and takes a parameter as a matrix: by timm's rule, but not what options say."""
    if config.name not in MUON:
        return False
    from timm.optim.muon import _is_suitable_for_muon

    patterns = config.options.get("fallback_list", ())
    return bool(_is_suitable_for_muon(parameter)) and not any(fnmatchcase(name, pattern) for pattern in patterns)


def shardable(config: OptimizerConfig) -> bool:
    """Whether ZeRO may shard the optimizer's state."""
    if config.name in SHARDED_MUON:
        return config.options.get("algo", "muon") == "muon"
    return config.name in ELEMENTWISE


class Kept(NamedTuple):
    """Numbers that an optimizer keeps beside each number of a parameter."""

    of_matrices: float  # that Muon orthogonalises; else as the others
    of_others: float


def kept_numbers(config: OptimizerConfig) -> Kept:
    """What the optimizer keeps, found by a step on small parameters. Factored states (Adafactor) count as on them."""
    parameters = {"a.weight": nn.Parameter(torch.zeros(64, 64)), "a.bias": nn.Parameter(torch.zeros(64))}
    optimizer = make_optimizer(parameters, config)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    def share(parameter: nn.Parameter) -> float:
        state = optimizer.state[parameter].values()
        return sum(value.numel() for value in state if isinstance(value, Tensor) and value.ndim) / parameter.numel()

    matrix, other = map(share, parameters.values())
    return Kept(matrix, other if config.name in MUON else matrix)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: matrices and kernels, not biases, norms and modulation tables."""
    return parameter.ndim >= 2 and name.endswith("weight")


def group_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps for each group of parameters beside its settings: the step, for timm's lamb and adan."""
    settings = optimizer.defaults.keys() | {"params", "use_fallback"}
    return [{key: value for key, value in group.items() if key not in settings} for group in optimizer.param_groups]


@dataclass
class ScheduleConfig:
    """The length of a run and its learning rate.

    A resumed run may have other steps. A decay then ends at the new last step: its whole curve moves, and the learning
    rate jumps (up, if steps were raised). The run says from what to what. Without decay nothing moves.

    steps: optimizer steps of the whole run.
    warmup: steps in which the learning rate rises linearly.
    decay: the curve after the warm-up.
    final: where the decay ends, as a share of optimizer.lr.
    """

    steps: PositiveInt = 1000
    warmup: NonNegativeInt = 0
    decay: Literal["constant", "cosine", "linear"] = "constant"
    final: Share = 0.0

    def factor(self, step: int) -> float:
        """The factor on the learning rate in step 0, 1, …; in the last step it is not quite `final` yet."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.decay == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        left = 1 - done if self.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final + (1 - self.final) * left

    def jump(self, steps_before: int, step: int, lr: float) -> str | None:
        """Says how a change of `steps` on resume moves the decay and with it the learning rate of `step`; else None."""
        before, now = (lr * one.factor(step) for one in (replace(self, steps=steps_before), self))
        if before == now:
            return None
        return (
            f"schedule.steps was {steps_before} and is {self.steps}: the {self.decay} decay ends there now, so the "
            f"learning rate of step {step} is {now:.3g} where it was {before:.3g}. For a rate that does not jump, "
            "train on from the exported model: model.init (vae.path) and another run=PATH."
        )
