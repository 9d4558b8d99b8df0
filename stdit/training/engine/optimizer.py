"""Torch's AdamW and timm's optimizers by name: which a run can train with, and what they keep."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn

from stdit.errors import StditError, nearest_name
from stdit.training.engine.ema import EmaConfig

# What ZeRO may cut anywhere: optimizers whose update of one number needs no other number of the tensor. Not adan, which
# counts steps by groups: ZeRO-3 updates the groups one after the other, and each time all would count.
ELEMENTWISE = {"sgd", "momentum", "nesterov", "adam", "adamw", "nadam", "nadamw", "radam", "adamax", "adabelief"}
ELEMENTWISE |= {"lion", "adopt", "adoptw", "laprop", "rmsprop", "rmsproptf", "adagrad"}

# Optimizers of timm, by how their names start, that a run could not train with or not go on with.
REFUSED = {
    "kron": "no checkpoint holds its preconditioners",
    "adahessian": "it needs second derivatives",
}

# Arguments of an optimizer that the config sets itself.
OWN = {
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "params": "model.trainable, which says what trains",
    "opt": "optimizer.name",
    "opt_name": "optimizer.name",
    "model_or_params": "model.trainable, which says what trains",
    "filter_bias_and_bn": "optimizer.weight_decay, which acts on matrices only",
    "layer_decay": "one optimizer.lr for all layers",
}


@dataclass
class OptimizerConfig:
    """The optimizer: torch's AdamW or one of timm's.

    name: adamw (torch's) or any of timm's (sgd, lion, muon, …).
    lr: the learning rate after the warm-up; see `schedule`.
    betas: decay of the first and of the second moment.
    weight_decay: acts on matrices only, not on biases, norms and modulation tables.
    clip: largest global norm of the gradient; 0: no clipping.
    max_skipped_steps: a step whose loss or gradient is not finite updates nothing. After so many in a row, the next
        such step stops the run.
    ema: the moving average of the weights.
    options: further arguments of the optimizer, by its own names.
    """

    name: str = "adamw"
    lr: Annotated[float, Field(gt=0, le=1000)] = 1e-4
    betas: tuple[NonNegativeFloat, NonNegativeFloat] = (0.9, 0.95)
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.01
    clip: NonNegativeFloat = 1.0
    max_skipped_steps: NonNegativeInt = 3
    ema: EmaConfig = field(default_factory=EmaConfig)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.options:
            if name in OWN:
                raise StditError(f"options.{name} has no effect: set {OWN[name]}.")


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: OptimizerConfig, lr: float | None = None
) -> torch.optim.Optimizer:
    """Torch's AdamW, or timm's optimizer of that name, over two groups: with weight decay and without."""
    decayed = [p for name, p in parameters.items() if decays(name, p)]
    plain = [p for name, p in parameters.items() if not decays(name, p)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr = config.lr if lr is None else lr
    if config.name == "adamw":
        kind: Callable[..., Any] = torch.optim.AdamW
        make: Callable[..., torch.optim.Optimizer] = partial(torch.optim.AdamW, groups, lr=lr)
        arguments: dict[str, Any] = {"fused": True}
    else:
        import timm.optim

        known = [str(name) for name in timm.optim.list_optimizers()]
        if config.name not in known:
            raise StditError(f"optimizer.name {config.name!r} is not known.{nearest_name(config.name, known)}")
        for start, reason in REFUSED.items():
            if config.name.startswith(start):
                raise StditError(f"optimizer.name={config.name} is not supported: {reason}. Try adamw or muon.")
        kind = timm.optim.get_optimizer_class(config.name, bind_defaults=False)
        make = partial(timm.optim.create_optimizer_v2, groups, opt=config.name, lr=lr)
        arguments = {}
    takes = inspect.signature(kind).parameters
    if "betas" in takes:
        usual = takes["betas"].default
        betas = config.options.get("betas", config.betas)
        if usual is not None and (not isinstance(betas, list | tuple) or len(betas) != len(usual)):
            raise StditError(
                f"optimizer.name={config.name} takes {len(usual)} betas, not {betas}: set optimizer.options.betas, "
                f"such as {list(usual)}."
            )
        arguments["betas"] = betas
    try:
        return make(**(arguments | config.options))
    except Exception as error:  # each checks its arguments in its own way, and some need what is not installed
        raise StditError(f"optimizer.name={config.name} with optimizer.options={config.options}: {error}") from error


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: matrices and kernels, not biases, norms and modulation tables."""
    return parameter.ndim >= 2 and name.endswith("weight")


def group_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What an optimizer keeps for a whole group of parameters (timm's lamb and adan: the step), beside its settings."""
    settings = optimizer.defaults.keys() | {"params"}
    return [{key: value for key, value in group.items() if key not in settings} for group in optimizer.param_groups]
