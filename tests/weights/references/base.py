"""What every reference has: how it is made, called, and read from other dialects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Converter = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Every weight, bias, norm and table random, none of them near 0 or 1 only."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + ("norm" in name))
    return model.float().eval()


class _Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()

        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*map(wide, args), **{key: wide(value) for key, value in (kwargs or {}).items()})


@contextmanager
def in_fp64() -> Iterator[None]:
    """Whatever is made and called in here computes in fp64, where its code says fp32 too (norms, tables, angles)."""
    torch.set_default_dtype(torch.float64)
    try:
        with _Doubled():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Family:
    """name: of the class in diffusers. configs: five small ones. released: name: (config, parameters).

    call(model, latents, t, text, mask, given): what the reference computes, (B, C, T, H, W). converters: for dialects
    that diffusers can read, its own function from a dialect's tensors to its names ("ComfyUI" is an original's with a
    prefix). per: of which t may be, beside a clip. given(config): conditions for `predict`.
    """

    name: str
    configs: tuple[dict[str, Any], ...]
    released: Mapping[str, dict[str, Any]]
    call: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
    grids: tuple[tuple[int, int, int], ...]  # of latents, one for each config
    converters: Mapping[str, Converter] = field(default_factory=dict)
    per: tuple[str, ...] = ("clip",)
    given: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    text_tokens: int = 6
    masks: bool = True  # whether positions of the text may be dropped
    kept: tuple[str, ...] = ()  # of its config, what does not shape the network and is not written back

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        import diffusers

        return getattr(diffusers, self.name)(**config)


def sizes(heads: int, head_dim: int, channels: tuple[int, int], **more: Any) -> dict[str, Any]:
    """A small config, in the names that all classes of diffusers share; two blocks."""
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels[0],
        "out_channels": channels[1],
        "num_layers": 2,
        **more,
    }


def captioned(heads: int, head_dim: int, channels: tuple[int, int], **more: Any) -> dict[str, Any]:
    """The same of models that project their text, to the width of the model."""
    return sizes(heads, head_dim, channels, **{"cross_attention_dim": heads * head_dim, "caption_channels": 19, **more})
