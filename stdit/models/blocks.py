"""Wan's block and head: self-attention, cross-attention to text, MLP, each modulated by the noise level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stdit.models.attention import segment_attention
from stdit.models.config import TransformerConfig
from stdit.models.fused import gated_residual, modulated_norm
from stdit.models.layers import Compression, LayerNorm, Linear, RMSNorm, Rotary
from stdit.models.packing import LevelIndex, Segments, TextPack
from stdit.shapes import TokenGrid


@dataclass
class BlockInputs:
    """What every block of a forward reads besides the tokens x, their modulation and the text.

    c: (K, D) embeddings of the pack's K distinct noise levels.
    levels: which of the K levels each token has.
    cos, sin: (N, 1 or H, D_head/2) rotary turns of q and k, None for no turn.
    segments: the tokens that attend to each other; Wan's are the clips.
    clips: the tokens that attend to each text.
    text: the text tokens of each clip, before they are embedded; only its segments and multiplicity are read.

    Only other families, and Wan's image-to-video weights, set the rest:
    image: embedded image tokens (I, D), which cross-attention sees besides the text.
    added: (N, D), added to the tokens before the block.
    order, inverse_order: (N,) token order for self-attention, and the way back, where segments are not contiguous.
    grids: token grid of each clip, for blocks that compress keys.
    compressed: segments of the compressed keys.
    """

    c: Tensor
    levels: LevelIndex
    cos: Tensor | None
    sin: Tensor | None
    segments: Segments
    clips: Segments
    text: TextPack
    image: TextPack | None = None
    added: Tensor | None = None
    order: Tensor | None = None
    inverse_order: Tensor | None = None
    grids: tuple[TokenGrid, ...] = ()
    compressed: Segments | None = None


class Attention(nn.Module):
    """The projections and norms of multi-head attention. `backend` is a name of `attention.BACKENDS`, or "auto"."""

    def __init__(self, config: TransformerConfig, context_dim: int, norm: str) -> None:
        super().__init__()
        d, bias, self.heads, self.backend = config.dim, config.bias, config.heads, "auto"
        self.q, self.k = Linear(d, d, bias), Linear(context_dim, d, bias)
        self.v, self.o = Linear(context_dim, d, bias), Linear(d, d, bias)
        self.norm_q, self.norm_k = qk_norm(config, norm), qk_norm(config, norm)

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))  # (N, D) to (N, H, D_head)


def qk_norm(config: TransformerConfig, kind: str) -> nn.Module:
    """The norm of q or k, with the rotary turn. kind: across_heads, per_head or none."""
    if kind == "none":
        return Rotary()
    eps = config.eps if config.qk_eps is None else config.qk_eps
    return RMSNorm(config.dim if kind == "across_heads" else config.head_dim, eps)


class SelfAttention(Attention):
    """Attention among the tokens of each segment. q and k are turned by their positions."""

    def __init__(self, config: TransformerConfig, compressed: bool = False) -> None:
        super().__init__(config, config.dim, "per_head" if config.qk_norm == "per_head_self" else config.qk_norm)
        self.compression = Compression(config.dim, config.compression) if compressed else None

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        x = x if inputs.order is None else x[inputs.order]  # (N, D)
        q, k, v, key_segments = self.q(x), self.k(x), self.v(x), inputs.segments  # (N, D) each
        if self.compression is not None and inputs.compressed is not None:
            k, v, key_segments = self.compression(k, inputs.grids), self.compression(v, inputs.grids), inputs.compressed
        q = self.split_heads(self.norm_q(q, inputs.cos, inputs.sin))  # (N, H, D_head)
        k = self.split_heads(self.norm_k(k, inputs.cos, inputs.sin))  # (N, H, D_head)
        v = self.split_heads(v)  # (N, H, D_head)
        out = segment_attention(q, k, v, inputs.segments, key_segments, backend=self.backend)
        out = self.o(out.flatten(1))  # (N, D)
        return out if inputs.inverse_order is None else out[inputs.inverse_order]


class CrossAttention(Attention):
    """Attention of each clip's tokens to its text, and to its image tokens where the weights have keys for them."""

    def __init__(self, config: TransformerConfig) -> None:
        norm = "none" if config.qk_norm == "per_head_self" else config.qk_norm
        super().__init__(config, config.context_dim, norm)
        if config.image_text_dim:
            d = config.dim
            self.k_img, self.v_img, self.norm_k_img = Linear(d, d), Linear(d, d), qk_norm(config, norm)

    def forward(self, x: Tensor, y: Tensor, inputs: BlockInputs) -> Tensor:
        """x: (N, D). y: (M, D_context). Returns (N, D)."""
        q = self.split_heads(self.norm_q(self.q(x)))  # (N, H, D_head)
        k, v = self.split_heads(self.norm_k(self.k(y))), self.split_heads(self.v(y))  # (M, H, D_head) each
        clips, text = inputs.clips, inputs.text
        out = segment_attention(q, k, v, clips, text.segments, text.multiplicity, self.backend)
        if inputs.image is not None:
            tokens = inputs.image.tokens
            k, v = self.split_heads(self.norm_k_img(self.k_img(tokens))), self.split_heads(self.v_img(tokens))
            out = out + segment_attention(q, k, v, clips, inputs.image.segments, backend=self.backend)
        return self.o(out.flatten(1))  # (N, D)


class Block(nn.Module):
    """Wan's block. cross: whether it attends to text. compressed: whether self-attention compresses its keys."""

    def __init__(self, config: TransformerConfig, cross: bool = True, compressed: bool = False) -> None:
        super().__init__()
        d, self.eps, self.rms = config.dim, config.eps, config.norm == "rms"
        self.self_attn = SelfAttention(config, compressed)
        self.norm3 = LayerNorm(d, config.eps) if cross and config.cross_norm == "affine" else nn.Identity()
        self.cross_attn = CrossAttention(config) if cross else None
        self.ffn = nn.Sequential(
            Linear(d, config.ffn_dim, config.bias),
            nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none"),
            Linear(config.ffn_dim, d, config.bias),
        )
        self.modulation: nn.Parameter | None = nn.Parameter(torch.empty(1, 6, d))

    def forward(self, x: Tensor, modulation: Tensor, y: Tensor, inputs: BlockInputs) -> Tensor:
        """x: (N, D). modulation: (K, 6, D). y: (M, D_context) text. Returns (N, D)."""
        assert self.modulation is not None
        rows = modulation + self.modulation.to(modulation.dtype)  # (K, 6, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = rows.unbind(1)  # (K, D) each
        x = x if inputs.added is None else x + inputs.added  # (N, D)
        h = modulated_norm(x, shift1, scale1, inputs.levels, self.eps, self.rms)  # (N, D)
        x = gated_residual(x, self.self_attn(h, inputs), gate1, inputs.levels)  # (N, D)
        if self.cross_attn is not None:
            x = x + self.cross_attn(self.norm3(x), y, inputs)  # (N, D)
        h = self.ffn(modulated_norm(x, shift2, scale2, inputs.levels, self.eps, self.rms))  # (N, D)
        return gated_residual(x, h, gate2, inputs.levels)  # (N, D)


class Head(nn.Module):
    """The last norm, modulated by the noise level's embedding, and the projection to patches of the output."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, self.eps = config.dim, config.eps
        self.head = Linear(d, config.out_channels * config.patch_volume, config.bias)
        self.modulation: nn.Parameter | None = nn.Parameter(torch.empty(1, 2, d))

    def rows(self, c: Tensor, modulation: Tensor) -> Tensor:
        """Shift and scale: (K, 2, D)."""
        assert self.modulation is not None
        return c[:, None] + self.modulation.to(c.dtype)

    def forward(self, x: Tensor, c: Tensor, modulation: Tensor, levels: LevelIndex) -> Tensor:
        """x: (N, D). c: (K, D). modulation: (K, 6, D), that of the blocks. Returns (N, pt·ph·pw·C_out)."""
        shift, scale = self.rows(c, modulation).unbind(1)  # (K, D) each
        return self.head(modulated_norm(x, shift, scale, levels, self.eps))
