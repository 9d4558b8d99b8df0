"""What the scripts of this folder and the tests share: weights that need no keeping, and stand-ins for imports."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights of every name, norms and tables too, the same wherever they are made."""
    found = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        values = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
        found[name] = values * spread + ("_norm." in name)
    return found


def gradient_sum(name: str, gradient: torch.Tensor) -> float:
    """A gradient as one number: its product with a random one."""
    return float((gradient.double() * weights({f"probe of {name}": tuple(gradient.shape)})[f"probe of {name}"]).sum())


def shapes_of(lines: np.ndarray) -> dict[str, tuple[int, ...]]:
    """Names and shapes out of the lines that `described` made of them."""
    return {name: tuple(int(n) for n in sizes.split(",") if n) for name, sizes in (line.split(":") for line in lines)}


def described(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    return np.array([f"{name}:{','.join(map(str, tensor.shape))}" for name, tensor in tensors.items()])


def gradients_kept(named: Mapping[str, torch.Tensor], key: str) -> dict[str, np.ndarray]:
    return {
        f"{key}names": np.array(list(named)),
        f"{key}sums": np.array([gradient_sum(name, gradient) for name, gradient in named.items()]),
        f"{key}norms": np.array([float(gradient.norm()) for gradient in named.values()]),
    }


def gradient_errors(found: Mapping[str, torch.Tensor], kept: Mapping[str, np.ndarray], key: str) -> dict[str, float]:
    """How far gradients are from those kept, each relative to its norm; of a key's bias, whose gradient is 0 but for
    rounding, to the norm of its weight's."""
    names, errors = [str(name) for name in kept[f"{key}names"]], {}
    norms = dict(zip(names, kept[f"{key}norms"]))
    for name, wanted in zip(names, kept[f"{key}sums"]):
        size = max(norms[name], norms[name.replace("to_k.bias", "to_k.weight")], 1e-30)
        errors[name] = abs(gradient_sum(name, found[name]) - wanted) / size
        errors[f"norm of {name}"] = abs(float(found[name].norm()) - norms[name]) / size
    return errors


def relative(found: torch.Tensor, wanted: torch.Tensor | np.ndarray) -> float:
    wanted = torch.as_tensor(wanted)
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


@dataclass(frozen=True)
class Run:
    """One call of `predict`: what it takes, a probe of what it gives, and which of that counts (1: all)."""

    key: str  # of what is kept of the reference's answer, after the config's number
    arguments: dict[str, Any]
    probe: torch.Tensor
    counts: torch.Tensor | int = 1


@dataclass(frozen=True)
class Golden:
    """A family's own code: what is kept of it in `file`, and how stdit is asked the same.

    family: its module of stdit.weights.families. computed: tensors that its state dict has and that are no weights.
    config_json(number), runs(number): of each of its `count` configs.
    """

    name: str
    family: str
    file: Path
    count: int
    config_json: Callable[[int], dict[str, Any]]
    runs: Callable[[int], list[Run]]
    computed: tuple[str, ...] = ()


def random_weights(model: nn.Module, golden: Golden, number: int) -> dict[str, np.ndarray]:
    """Loads `weights` into a model, all but what is computed, and gives what is to be kept of its state dict."""
    state = model.state_dict()
    own = {name: state[name].clone() for name in golden.computed}
    shapes = {name: tensor for name, tensor in state.items() if name not in own}
    model.load_state_dict(weights({name: tuple(tensor.shape) for name, tensor in shapes.items()}) | own)
    return {
        f"{number}.shapes": described(shapes),
        f"{number}.computed": np.array([f"{name} {hash_of(tensor)}" for name, tensor in own.items()]),
    }


def answers(model: nn.Module, golden: Golden, number: int, call: Callable[..., torch.Tensor]) -> dict[str, np.ndarray]:
    """Outputs and gradients of every run. call(model, run's key, **its arguments): the output, shaped as its probe."""
    kept: dict[str, np.ndarray] = {}
    for run in golden.runs(number):
        model.zero_grad()
        latents = run.arguments["latents"].clone().requires_grad_()
        out = call(model, run.key, **{**run.arguments, "latents": latents}) * run.counts
        (out * run.probe).sum().backward()
        key = f"{number}.{run.key}"
        kept |= {f"{key}output": out.detach().numpy(), f"{key}latents": latents.grad.numpy()}
        kept |= gradients_kept({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, key)
    return kept


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """A model without its memory; what its constructor counts out has values, which some constructors ask for."""
    for name in ("linspace", "arange"):
        setattr(torch, name, partial(getattr(torch, name), device="cpu"))
    with torch.device("meta"):
        return build()


def released(build: Callable[[], nn.Module], golden: Golden) -> dict[str, np.ndarray]:
    """Names, shapes and parameters of the released size."""
    model = on_meta(build)
    count = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in golden.computed)
    return {"released": described(model.state_dict()), "parameters": np.array(count)}


def hash_of(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def stand_in(name: str, **members: object) -> None:
    """A module of this name for what is imported and not needed."""
    vars(sys.modules.setdefault(name, ModuleType(name))).update(members)


class Registry:
    def register_module(self, *_):
        return lambda one: one


def checkpoint_nothing(function, *arguments, **more):
    return function(*arguments, **more)


def open_sora(build_module: Callable[..., nn.Module] | None = None) -> None:
    """What Open-Sora imports for many GPUs, and its packages without what they import."""
    xformers()
    stand_in("opensora.acceleration.checkpoint", auto_grad_checkpoint=checkpoint_nothing)
    names = ("all_to_all", "split_forward_gather_backward", "gather_forward_split_backward")
    stand_in("opensora.acceleration.communications", **dict.fromkeys(names))
    stand_in("opensora.acceleration.parallel_states", get_sequence_parallel_group=None)
    stand_in("opensora.registry", MODELS=Registry(), SCHEDULERS=Registry(), build_module=build_module)
    stand_in("opensora.utils.ckpt_utils", load_checkpoint=None)
    packages = ("models", "models/layers", "models/stdit", "models/vae", "models/text_encoder", "schedulers")
    for name in (*packages, "schedulers/iddpm"):
        places = [str(Path(place) / "opensora" / name) for place in sys.path]
        stand_in(f"opensora.{name.replace('/', '.')}", __path__=places)


def xformers() -> None:
    """Its attention, of a batch or of packed segments, by torch's."""

    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(queries, keys):
            return list(queries), [int(n) for n in keys]

    def attention(q, k, v, p=0.0, attn_bias=None):
        if attn_bias is None:
            return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
        queries, keys = attn_bias
        parts = zip(*(tensor[0].split(lengths) for tensor, lengths in ((q, queries), (k, keys), (v, keys))))
        heads = [F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part)).transpose(0, 1) for part in parts]
        return torch.cat(heads)[None]

    stand_in("xformers")
    stand_in("xformers.ops", memory_efficient_attention=attention)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]
    sys.modules["xformers.ops"].fmha = type("fmha", (), {"BlockDiagonalMask": BlockDiagonalMask})
