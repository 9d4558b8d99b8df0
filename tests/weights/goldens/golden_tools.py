"""What the scripts of this folder and the tests share: weights that need no keeping, and stand-ins for imports."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
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
    return {name: tuple(map(int, sizes.split(","))) for name, sizes in (line.split(":") for line in lines)}


def described(tensors: Mapping[str, torch.Tensor]) -> np.ndarray:
    return np.array([f"{name}:{','.join(map(str, tensor.shape))}" for name, tensor in tensors.items()])


def gradients_kept(named: Mapping[str, torch.Tensor], key: str) -> dict[str, np.ndarray]:
    return {
        f"{key}names": np.array(list(named)),
        f"{key}sums": np.array([gradient_sum(name, gradient) for name, gradient in named.items()]),
        f"{key}norms": np.array([float(gradient.norm()) for gradient in named.values()]),
    }


def gradient_errors(found: Mapping[str, torch.Tensor], kept: Mapping[str, np.ndarray], key: str) -> dict[str, float]:
    """How far gradients are from those kept, each relative to its norm."""
    errors = {}
    for name, wanted, norm in zip(kept[f"{key}names"], kept[f"{key}sums"], kept[f"{key}norms"]):
        errors[str(name)] = abs(gradient_sum(str(name), found[str(name)]) - wanted) / max(norm, 1e-30)
        errors[f"norm of {name}"] = abs(float(found[str(name)].norm()) - norm) / max(norm, 1e-30)
    return errors


def relative(found: torch.Tensor, wanted: torch.Tensor | np.ndarray) -> float:
    wanted = torch.as_tensor(wanted)
    return ((found - wanted).norm() / wanted.norm()).item()


def check_released(module: Any, config: Any, kept: Mapping[str, np.ndarray], computed: str) -> None:
    """A released size lacks no key and has none too many, but for what is computed, and counts as many parameters."""
    from stdit.models.transformer import STDiT

    shapes = shapes_of(kept["released"])
    with torch.device("meta"):
        ours = STDiT(config)
    table = module.keymap(config, "original").table({n: tuple(t.shape) for n, t in ours.state_dict().items()})
    assert not table.differences(shapes) and set(shapes) - set(table.foreign_shapes) == {computed}
    count = sum(parameter.numel() for parameter in ours.parameters())
    print(f"{module.FAMILY}: {count:,} parameters")
    assert count == int(kept["parameters"])


def check_round_trip(first: Path, again: Path, computed: str) -> None:
    """original → stdit → original gives back every tensor bit for bit, but for what is computed."""
    from safetensors.torch import load_file

    import stdit

    ours, wanted = stdit.load_transformer(first), load_file(first / "model.safetensors")
    stdit.save_transformer(ours, again, "original")
    found = load_file(next(again.glob("*.safetensors")))
    assert stdit.load_transformer(again).config == ours.config
    assert found.keys() == wanted.keys() - {computed}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


def stand_in(name: str, **members: object) -> None:
    """A module of this name for what is imported and not needed."""
    vars(sys.modules.setdefault(name, ModuleType(name))).update(members)


class Registry:
    def register_module(self, *_):
        return lambda one: one


def checkpoint_nothing(function, *arguments, **more):
    return function(*arguments, **more)


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
