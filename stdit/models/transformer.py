"""The whole transformer: Wan's text-cross-attending DiT over packed tokens.

Module and parameter names are the original Wan release's. Mathematics and numbers agree with diffusers'
WanTransformer3DModel (0.42) and with Wan-Video/Wan2.1 `wan/modules/model.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stdit.errors import StditError, nearest_name
from stdit.models.attention import segment_attention
from stdit.models.fused import gated_residual, modulated_norm, rms_norm_rotary, widen
from stdit.models.packing import LevelIndex, Segments, TextPack, TokenPack, pack_clips, pack_texts, unpack_clips
from stdit.models.positions import apply_rotary, level_sinusoids, rotary_table

CONDITIONS = ("fps", "size", "image", "image_text", "known")  # what some family takes beside text


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that shapes the network. `text_padding` (512 or 0) is for who packs texts; the network ignores it."""

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    frequency_dim: int = 256
    eps: float = 1e-6
    qk_norm: bool = True
    cross_norm: bool = True
    text_padding: int = 512
    rope_theta: float = 10000.0
    rope_max: int = 1024  # Wan's table ends there; exported with the weights, no limit here

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", tuple(self.patch))
        for name in ("dim", "heads", "layers", "ffn_dim", "in_channels", "out_channels", "text_dim", "frequency_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise StditError(f"transformer {name} is {value!r}; it must be a positive integer.")
        if len(self.patch) != 3 or any(not isinstance(p, int) or p < 1 for p in self.patch):
            raise StditError(
                f"transformer patch is {self.patch}; write three positive integers: frames, height, width."
            )
        if self.dim % self.heads:
            raise StditError(f"transformer dim {self.dim} is not divisible by heads {self.heads}.")
        if self.head_dim % 2:
            raise StditError(f"dim {self.dim} / heads {self.heads} = {self.head_dim}; rotary pairs need an even one.")
        if self.frequency_dim % 2:
            raise StditError(f"transformer frequency_dim {self.frequency_dim} must be even (cosines and sines).")
        if self.text_padding < 0 or self.eps <= 0 or self.rope_theta <= 0:
            raise StditError(
                f"transformer text_padding {self.text_padding}, eps {self.eps} or rope_theta {self.rope_theta} "
                "is out of range: text_padding is 0 or more, the others positive."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def patch_volume(self) -> int:
        return math.prod(self.patch)

    @property
    def n_parameters(self) -> int:
        """In closed form, equal to the sum over the modules."""
        d = self.dim
        attention = 4 * (d * d + d) + 2 * d * self.qk_norm
        block = 2 * attention + 2 * d * self.ffn_dim + self.ffn_dim + d + 2 * d * self.cross_norm + 6 * d
        embeddings = (self.in_channels * self.patch_volume + self.text_dim + self.frequency_dim) * d + 3 * d
        embeddings += 2 * (d * d + d) + 6 * (d * d + d)
        head = (d + 1) * self.out_channels * self.patch_volume + 2 * d
        return embeddings + self.layers * block + head

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TransformerConfig:
        """A preset by name with fields changed."""
        if name not in PRESETS:
            raise StditError(
                f"no transformer preset {name!r}.{nearest_name(name, PRESETS)} Known: {', '.join(PRESETS)}."
            )
        known = [field.name for field in fields(cls)]
        for key in changes:
            if key not in known:
                raise StditError(f"the transformer has no setting {key!r}.{nearest_name(key, known)}")
        return replace(PRESETS[name], **changes)


PRESETS = {
    "toy": TransformerConfig(dim=144, heads=6, layers=6, ffn_dim=576, text_dim=128),
    "small": TransformerConfig(dim=384, heads=6, layers=12, ffn_dim=1536),
    "base": TransformerConfig(dim=768, heads=12, layers=12, ffn_dim=3072),
    "large": TransformerConfig(dim=1024, heads=16, layers=24, ffn_dim=4096),
    "1.3B": TransformerConfig(dim=1536, heads=12, layers=30, ffn_dim=8960),
    "5B": TransformerConfig(dim=3072, heads=24, layers=30, ffn_dim=14336, in_channels=48, out_channels=48),
    "14B": TransformerConfig(dim=5120, heads=40, layers=40, ffn_dim=13824),
}


class Linear(nn.Linear):
    """Computes in its input's dtype whatever its own, so that weights keep the dtype they were stored in."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm with affine, in fp32 (fp64 for fp64), returned in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """RMSNorm across all heads in fp32 (fp64 for fp64), with the rotary turn that follows it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        return rms_norm_rotary(x, self.weight, cos, sin, self.eps)


class Rotary(nn.Module):
    """The rotary turn alone, in the place of RMSNorm where qk_norm is off."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, x: Tensor, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
        if cos is None or sin is None:
            return x
        return apply_rotary(x.unflatten(1, (self.heads, -1)), cos, sin).flatten(1)


class Attention(nn.Module):
    """Multi-head attention among packed segments; self-attention turns q and k, cross-attention does not."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d = config.dim
        self.heads = config.heads
        self.q, self.k, self.v, self.o = Linear(d, d), Linear(d, d), Linear(d, d), Linear(d, d)
        self.norm_q = RMSNorm(d, config.eps) if config.qk_norm else Rotary(config.heads)
        self.norm_k = RMSNorm(d, config.eps) if config.qk_norm else Rotary(config.heads)
        self.backend = "auto"

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        segments: Segments,
        y_segments: Segments,
        multiplicity: Tensor | None = None,
    ) -> Tensor:
        q = self.norm_q(self.q(x), cos, sin).unflatten(1, (self.heads, -1))  # (N, H, D_head)
        k = self.norm_k(self.k(y), cos, sin).unflatten(1, (self.heads, -1))  # (M, H, D_head)
        v = self.v(y).unflatten(1, (self.heads, -1))  # (M, H, D_head)
        out = segment_attention(q, k, v, segments, y_segments, multiplicity, self.backend)
        return self.o(out.flatten(1))  # (N, D)


class Block(nn.Module):
    """Self-attention, cross-attention to text, MLP; the first and the last modulated and gated by the noise level."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, self.eps = config.dim, config.eps
        self.self_attn = Attention(config)
        self.norm3 = LayerNorm(d, config.eps) if config.cross_norm else nn.Identity()
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(Linear(d, config.ffn_dim), nn.GELU(approximate="tanh"), Linear(config.ffn_dim, d))
        self.modulation = nn.Parameter(torch.empty(1, 6, d))

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        levels: LevelIndex,
        y: Tensor,
        cos: Tensor,
        sin: Tensor,
        segments: Segments,
        text_segments: Segments,
        multiplicity: Tensor | None,
    ) -> Tensor:
        """x: (N, D). modulation: (K, 6, D). y: (M, D) text. cos, sin: (N, 1, D_head/2). Returns (N, D)."""
        table = modulation + self.modulation.to(modulation.dtype)  # (K, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = table.unbind(1)  # (K, D) each
        h = modulated_norm(x, shift1, scale1, levels, self.eps)  # (N, D)
        h = self.self_attn(h, h, cos, sin, segments, segments)  # (N, D)
        x = gated_residual(x, h, gate1, levels)  # (N, D)
        x = x + self.cross_attn(self.norm3(x), y, None, None, segments, text_segments, multiplicity)  # (N, D)
        h = self.ffn(modulated_norm(x, shift2, scale2, levels, self.eps))  # (N, D)
        return gated_residual(x, h, gate2, levels)  # (N, D)


class Head(nn.Module):
    """The last norm, modulated by the time embedding itself, and the projection to a patch of the output."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, config.out_channels * config.patch_volume)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, c: Tensor, levels: LevelIndex) -> Tensor:
        """x: (N, D). c: (K, D). Returns (N, pt·ph·pw·C_out)."""
        shift, scale = (c[:, None] + self.modulation.to(c.dtype)).unbind(1)  # (K, D) each
        return self.head(modulated_norm(x, shift, scale, levels, self.eps))


class STDiT(nn.Module):
    """Velocity (or whatever the weights were trained for) of packed clips, given their noise levels and texts.

    checkpoint_blocks: recompute each block in backward instead of keeping its activations.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.dim
        self.patch_embedding = Linear(config.in_channels * config.patch_volume, d)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, d), nn.GELU(approximate="tanh"), Linear(d, d))
        self.time_embedding = nn.Sequential(Linear(config.frequency_dim, d), nn.SiLU(), Linear(d, d))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(d, 6 * d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        self.checkpoint_blocks = False
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Wan's initialisation: Xavier for linears, a head of zeros. Wan draws the text and time embeddings with 0.02.

        That is Xavier too at Wan's widths (4096 to 1536: 0.019), but at a width of 144 it makes texts a fortieth of the
        signal, and what they say of motion is not learned in thousands of steps (docs/log.md).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Block | Head):
                nn.init.normal_(module.modulation, std=self.config.dim**-0.5)
        nn.init.zeros_(self.head.head.weight)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations: the blocks' own."""
        return cast(Block, self.blocks[0]).self_attn.q.weight.dtype

    @property
    def attention_backend(self) -> str:
        return cast(Block, self.blocks[0]).self_attn.backend

    @attention_backend.setter
    def attention_backend(self, name: str) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = name

    def forward(self, pack: TokenPack, text: TextPack) -> Tensor:
        """Returns (N, pt·ph·pw·C_out) in the activations' dtype; `unpack_clips` cuts it into clips."""
        if len(pack.segments.lengths) != len(text.segments.lengths):
            raise StditError(f"{len(pack.segments.lengths)} clips came with {len(text.segments.lengths)} texts.")
        wide = torch.promote_types(self.dtype, torch.float32)
        x = self.patch_embedding(pack.tokens.to(self.dtype))  # (N, D)
        with torch.autocast(x.device.type, enabled=False):
            sinusoids = level_sinusoids(pack.levels, self.config.frequency_dim).to(wide)  # (K, frequency_dim)
            c = self.time_embedding(sinusoids)  # (K, D), K distinct noise levels in the pack
            modulation = self.time_projection(c).unflatten(1, (6, -1))  # (K, 6, D)
        y = self.text_embedding(text.tokens.to(self.dtype))  # (M, D)
        cos, sin = rotary_table(pack.positions, self.config.head_dim, self.config.rope_theta, wide)  # (N, 1, D_head/2)
        for block in self.blocks:
            arguments = (x, modulation, pack.level_index, y, cos, sin, pack.segments, text.segments, text.multiplicity)
            if self.checkpoint_blocks and torch.is_grad_enabled():
                x = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.head(x, c, pack.level_index)

    def predict(
        self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None, **conditions: Any
    ) -> Tensor:
        """The raw network output for a batch of clips of one shape.

        latents: (B, C, T, H, W). t: noise levels in [0, 1], fp32 or fp64: (B,), (B, T/pt) per patch frame or (B, n)
        per token. text: (B, L, D_text), attended as given: nothing pads. text_mask: (B, L) bool, False drops a
        position. conditions: none that these weights take. Returns (B, C_out, T, H, W) in the latents' dtype.
        """
        for name, value in conditions.items():
            if name not in CONDITIONS:
                raise StditError(f"unknown condition {name!r}.{nearest_name(name, CONDITIONS)}")
            if value is not None:
                raise StditError(f"condition {name!r}: these weights take text only.")
        self._check(latents, t, text, text_mask)
        texts = list(text) if text_mask is None else [row[keep] for row, keep in zip(text, text_mask.bool())]
        pack = pack_clips(list(latents), list(t), self.config.patch)
        out = self(pack, pack_texts(texts, padding=0))
        return torch.stack(unpack_clips(out, pack, self.config.patch)).to(latents.dtype)

    def _check(self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None) -> None:
        config = self.config
        if latents.ndim != 5 or latents.shape[1] != config.in_channels:
            raise StditError(f"latents are {tuple(latents.shape)}; wanted (B, {config.in_channels}, T, H, W).")
        if text.ndim != 3 or text.shape[2] != config.text_dim or len(text) != len(latents):
            raise StditError(f"text is {tuple(text.shape)}; wanted ({len(latents)}, L, {config.text_dim}).")
        if t.ndim not in (1, 2) or len(t) != len(latents):
            raise StditError(f"t is {tuple(t.shape)}; wanted ({len(latents)},), with frames or tokens as second size.")
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise StditError(f"text_mask is {tuple(text_mask.shape)}; wanted {tuple(text.shape[:2])}.")


def transformer_flops(config: TransformerConfig, token_counts: Sequence[int], text_counts: Sequence[int]) -> int:
    """Forward FLOPs (2 per multiply-add) of the matrix products of clips of n tokens with texts of m tokens.

    Times 3 for a training step, times 4 with checkpointed blocks. text_counts are packed (padding is one token).
    """
    d, layers = config.dim, config.layers
    linear, quadratic = cost_coefficients(config)
    text = 2 * d * (config.text_dim + d) + layers * 4 * d * d
    return sum(
        linear * n + quadratic * n * n + text * m + layers * 4 * d * n * m for n, m in zip(token_counts, text_counts)
    )


def cost_coefficients(config: TransformerConfig) -> tuple[int, int]:
    """(per token, per token²) forward FLOPs of a clip without its text; exact integers, for the planner."""
    d = config.dim
    ends = 2 * d * (config.in_channels + config.out_channels) * config.patch_volume
    return ends + config.layers * (12 * d * d + 4 * d * config.ffn_dim), config.layers * 4 * d
