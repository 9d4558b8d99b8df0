"""The whole transformer: a text-cross-attending DiT over packed tokens, Wan's unless its config says otherwise.

Module and parameter names are the original Wan release's. Mathematics and numbers agree with diffusers'
WanTransformer3DModel (0.42) and with Wan-Video/Wan2.1 `wan/modules/model.py`; what other families of open weights need
are choices in TransformerConfig, and each agrees with its own reference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from stdit.errors import StditError, nearest_name
from stdit.models.attention import segment_attention
from stdit.models.config import PRESETS, TransformerConfig, cost_coefficients, transformer_flops
from stdit.models.embeddings import (
    FpsEmbedding,
    ImageEmbedding,
    LearnedPositions,
    SizeEmbedding,
    frame_positions,
    rotary_of,
    space_positions,
)
from stdit.models.fused import gated_residual, modulated_norm
from stdit.models.layers import Compression, LayerNorm, Linear, LowRank, RMSNorm, Rotary, without_autocast
from stdit.models.packing import (
    LevelIndex,
    Segments,
    TextPack,
    TokenPack,
    level_clip_pairs,
    pack_inputs,
    pack_texts,
    spatial_segments,
    temporal_segments,
    unpack_clips,
)
from stdit.models.positions import network_time, sinusoids
from stdit.shapes import TokenGrid

__all__ = ["CONDITIONS", "PRESETS", "STDiT", "TransformerConfig", "cost_coefficients", "transformer_flops"]

CONDITIONS = ("fps", "size", "image", "image_text", "known")  # what some family takes beside text


@dataclass
class Surroundings:
    """What every block of one forward is given beside the tokens, their modulation and the text.

    c: (K, D) embeddings of the noise levels. cos, sin: (N, 1 or H, D_head/2). order, back: the tokens of `segments`
    among all, and the way back, None where they are in place. image: (I, D) embedded image tokens of image_segments.
    compressed: what is left of `segments` where keys are compressed; grids: of the clips.
    """

    c: Tensor
    levels: LevelIndex
    cos: Tensor | None
    sin: Tensor | None
    segments: Segments
    text_segments: Segments
    multiplicity: Tensor | None
    clips: Segments
    order: Tensor | None = None
    back: Tensor | None = None
    image: Tensor | None = None
    image_segments: Segments | None = None
    grids: tuple[TokenGrid, ...] = ()
    compressed: Segments | None = None


class Attention(nn.Module):
    """Multi-head attention among packed segments; self-attention turns q and k, cross-attention does not.

    Where the config has an image branch, cross-attention has keys and values of its own for image tokens, and adds
    their attention to the text's.
    """

    def __init__(self, config: TransformerConfig, cross: bool = False, compressed: bool = False) -> None:
        super().__init__()
        d, bias, context_dim = config.dim, config.bias, config.context_dim if cross else config.dim
        self.heads = config.heads
        self.q, self.k = Linear(d, d, bias), Linear(context_dim, d, bias)
        self.v, self.o = Linear(context_dim, d, bias), Linear(d, d, bias)
        self.norm_q, self.norm_k = self._norm(config, cross), self._norm(config, cross)
        if cross and config.image_text_dim:
            self.k_img, self.v_img, self.norm_k_img = Linear(d, d), Linear(d, d), self._norm(config, cross)
        self.compression = Compression(d, config.compression) if compressed else None
        self.backend = "auto"

    def _norm(self, config: TransformerConfig, cross: bool) -> nn.Module:
        if config.qk_norm == "none" or (config.qk_norm == "per_head_self" and cross):
            return Rotary(config.heads)
        eps = config.eps if config.qk_eps is None else config.qk_eps
        return RMSNorm(config.dim if config.qk_norm == "across_heads" else config.head_dim, eps)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        segments: Segments,
        y_segments: Segments,
        multiplicity: Tensor | None = None,
        image: Tensor | None = None,
        image_segments: Segments | None = None,
        grids: tuple[TokenGrid, ...] = (),
    ) -> Tensor:
        q = self.norm_q(self.q(x), cos, sin).unflatten(1, (self.heads, -1))  # (N, H, D_head)
        k, v = self.k(y), self.v(y)  # (M, D) each
        if self.compression is not None:
            k, v = self.compression(k, grids), self.compression(v, grids)
        k = self.norm_k(k, cos, sin).unflatten(1, (self.heads, -1))  # (M, H, D_head)
        v = v.unflatten(1, (self.heads, -1))  # (M, H, D_head)
        out = segment_attention(q, k, v, segments, y_segments, multiplicity, self.backend)
        if image is not None and image_segments is not None:
            k = self.norm_k_img(self.k_img(image)).unflatten(1, (self.heads, -1))  # (I, H, D_head)
            v = self.v_img(image).unflatten(1, (self.heads, -1))  # (I, H, D_head)
            out = out + segment_attention(q, k, v, segments, image_segments, None, self.backend)
        return self.o(out.flatten(1))  # (N, D)


class Block(nn.Module):
    """Self-attention, cross-attention to text (unless cross is False), MLP; modulated and gated by the noise level."""

    def __init__(self, config: TransformerConfig, cross: bool = True, compressed: bool = False) -> None:
        super().__init__()
        d, self.eps, self.rms = config.dim, config.eps, config.norm == "rms"
        self.self_attn = Attention(config, compressed=compressed)
        self.norm3 = LayerNorm(d, config.eps) if cross and config.cross_norm == "affine" else nn.Identity()
        self.cross_attn = Attention(config, cross=True) if cross else None
        self.ffn = nn.Sequential(
            Linear(d, config.ffn_dim, config.bias),
            nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none"),
            Linear(config.ffn_dim, d, config.bias),
        )
        if config.modulation == "table":
            self.modulation = nn.Parameter(torch.empty(1, 6, d))
        else:  # of self-attention, cross-attention, MLP
            self.low_rank = nn.ModuleList(LowRank(d, config.modulation_rank, 3 * d) for _ in range(3))

    def rows(self, modulation: Tensor, c: Tensor) -> list[Tensor]:
        """Shift, scale and gate of every modulated branch, (K, D) each, in order."""
        if hasattr(self, "low_rank"):
            table = torch.cat([branch(c).unflatten(1, (3, -1)) + modulation for branch in self.low_rank], dim=1)
        else:
            table = modulation + self.modulation.to(modulation.dtype)
        return list(table.unbind(1))

    def forward(self, x: Tensor, modulation: Tensor, y: Tensor, at: Surroundings) -> Tensor:
        """x: (N, D). modulation: (K, 6 or 3, D). y: (M, D_context) text. Returns (N, D)."""
        shift1, scale1, gate1, *cross, shift2, scale2, gate2 = self.rows(modulation, at.c)  # (K, D) each
        h = modulated_norm(x, shift1, scale1, at.levels, self.eps, self.rms)  # (N, D)
        h = h if at.order is None else h[at.order]
        keys = at.segments if at.compressed is None or self.self_attn.compression is None else at.compressed
        h = self.self_attn(h, h, at.cos, at.sin, at.segments, keys, grids=at.grids)  # (N, D)
        h = h if at.back is None else h[at.back]
        x = gated_residual(x, h, gate1, at.levels)  # (N, D)
        if self.cross_attn is not None:
            text = (y, None, None, at.clips, at.text_segments, at.multiplicity, at.image, at.image_segments)
            if cross:
                shift, scale, gate = cross
                h = modulated_norm(x, shift, scale, at.levels, self.eps, self.rms)  # (N, D)
                x = gated_residual(x, self.cross_attn(h, *text), gate, at.levels)  # (N, D)
            else:
                x = x + self.cross_attn(self.norm3(x), *text)  # (N, D)
        h = self.ffn(modulated_norm(x, shift2, scale2, at.levels, self.eps, self.rms))  # (N, D)
        return gated_residual(x, h, gate2, at.levels)  # (N, D)


class Head(nn.Module):
    """The last norm, modulated by the time embedding itself, and the projection to a patch of the output."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        d, self.eps = config.dim, config.eps
        self.head = Linear(d, config.out_channels * config.patch_volume, config.bias)
        if config.modulation == "table":
            self.modulation = nn.Parameter(torch.empty(1, 2, d))
        else:
            self.low_rank = LowRank(d, config.modulation_rank, 2 * d)

    def forward(self, x: Tensor, c: Tensor, modulation: Tensor, levels: LevelIndex) -> Tensor:
        """x: (N, D). c: (K, D). modulation: the blocks'. Returns (N, pt·ph·pw·C_out)."""
        if hasattr(self, "low_rank"):
            table = self.low_rank(c).unflatten(1, (2, -1)) + modulation[:, :2]
        else:
            table = c[:, None] + self.modulation.to(c.dtype)
        shift, scale = table.unbind(1)  # (K, D) each
        return self.head(modulated_norm(x, shift, scale, levels, self.eps))


class STDiT(nn.Module):
    """Velocity (or whatever the weights were trained for) of packed clips, given their noise levels and texts.

    checkpoint_blocks: recompute each block in backward instead of keeping its activations.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        d, f, bias = config.dim, config.frequency_dim, config.bias
        self.patch_embedding = Linear((config.in_channels + config.blank_channels) * config.patch_volume, d, bias)
        text: dict[str, tuple[nn.Module, ...]] = {"none": ()}
        if config.text_embedding == "mlp":
            text["mlp"] = (Linear(config.text_dim, d), nn.GELU(approximate="tanh"), Linear(d, d))
        elif config.text_embedding == "gelu":
            text["gelu"] = (Linear(config.text_dim, config.text_width), nn.GELU())
        self.text_embedding = nn.Sequential(*text[config.text_embedding])
        if config.modulation == "table":
            self.time_embedding = nn.Sequential(Linear(f, d), nn.SiLU(), Linear(d, d))
            self.time_projection = nn.Sequential(nn.SiLU(), Linear(d, 6 * d))
        else:
            self.time_embedding = nn.Sequential(RMSNorm(d, 1e-6))
            self.time_projection = nn.Sequential(Linear(d, d, bias=False), nn.SiLU(), Linear(d, 3 * d, bias=False))
        if config.level_condition != "none":
            kinds: dict[str, type[SizeEmbedding] | type[FpsEmbedding]] = {"size": SizeEmbedding, "fps": FpsEmbedding}
            self.clip_embedding = kinds[config.level_condition](config)
        if config.position == "learned":
            self.position = LearnedPositions(config)
        if config.image_text_dim:
            self.img_emb = ImageEmbedding(config)
        if config.null_text:
            self.register_buffer("null_text", torch.zeros(config.null_text, config.text_dim))
        self.blocks = nn.ModuleList(Block(config, compressed=n in config.compressed) for n in range(config.layers))
        if config.attention.startswith("spatial_temporal"):
            cross = config.attention == "spatial_temporal_text"
            self.temporal_blocks = nn.ModuleList(Block(config, cross) for _ in range(config.layers))
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
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Block | Head) and hasattr(module, "modulation"):
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
        config, wide = self.config, torch.promote_types(self.dtype, torch.float32)
        tokens = pack.tokens.to(self.dtype)
        if config.blank_channels:
            tokens = F.pad(tokens, (0, config.blank_channels * config.patch_volume))
        x = self.patch_embedding(tokens)  # (N, D)
        if config.position.startswith("space"):
            x = x + space_positions(pack, config).to(x.dtype)
        c, modulation, levels = self.embed_levels(pack, wide)  # (K, D), (K, 6 or 3, D) of K distinct noise levels
        y = self.text_embedding(text.tokens.to(self.dtype))  # (M, D_context)
        cos, sin = rotary_of(pack, config, wide)  # (N, 1 or H, D_head/2)
        clips = pack.segments
        segments = clips if config.attention == "full" else spatial_segments(pack)
        turn = (None, None) if config.rotary == "time" else (cos, sin)
        at = Surroundings(c, levels, *turn, segments, text.segments, text.multiplicity, clips)
        if config.compressed:
            at.grids, at.compressed = pack.grids, spatial_segments(pack, config.compression)
        if config.image_text_dim:
            if (image := pack.conditions.image_text) is None:
                raise StditError("these weights see an image encoder's tokens beside the text: give `image_text`.")
            at.image = self.img_emb(image.tokens.to(self.dtype), image.segments.lengths)  # (I, D)
            at.image_segments = image.segments
        if config.attention.startswith("spatial_temporal"):
            order, back, through_time = temporal_segments(pack)
            turn = (None, None) if cos is None or sin is None else (cos[order], sin[order])
            over_time = replace(at, cos=turn[0], sin=turn[1], segments=through_time, order=order, back=back)
        position = self.position(pack, wide).to(x.dtype) if config.position == "learned" else None
        for number, block in enumerate(self.blocks):
            x = x if position is None else x + position
            x = self.run(block, x, modulation, y, at)
            if config.attention.startswith("spatial_temporal"):
                if number == 0 and config.position == "space_time":
                    x = x + frame_positions(pack, config).to(x.dtype)
                x = self.run(self.temporal_blocks[number], x, modulation, y, over_time)
        return self.head(x, c, modulation, levels)

    def embed_levels(self, pack: TokenPack, wide: torch.dtype) -> tuple[Tensor, Tensor, LevelIndex]:
        """The embeddings (K, D) of K distinct noise levels, the rows (K, 6 or 3, D) that they give to all blocks, and
        which of them every token has."""
        config, levels, index = self.config, pack.levels, pack.level_index
        if config.level_condition != "none":
            of_level, of_clip, index = level_clip_pairs(pack)
            levels = levels[of_level]
        with without_autocast(pack.tokens.device):
            times = network_time(levels, config.network_time, config.time_scale)
            waves = sinusoids(times, config.frequency_dim).to(wide)
            c = self.time_embedding(waves)
            if config.level_condition != "none":
                c = c + self.clip_embedding.of_clips(pack, wide)[of_clip]
            modulation = self.time_projection(c if config.modulation == "table" else waves)
        return c, modulation.unflatten(1, (-1, config.dim)), index

    def run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return cast(Tensor, checkpoint(block, *arguments, use_reentrant=False))
        return block(*arguments)

    def predict(
        self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None, **conditions: Any
    ) -> Tensor:
        """The raw network output for a batch of clips of one shape.

        latents: (B, C, T, H, W). t: noise levels in [0, 1], fp32 or fp64: (B,), (B, T/pt) per patch frame or (B, n)
        per token. They are those of the family's path: a flow's t, a DDPM's index / 1000, EDM's σ/(σ + 1) < 1
        (Cosmos-Predict1); what the network is told of them, config.network_time says. text: (B, L, D_text), attended as
        given: nothing pads. text_mask: (B, L) bool, False drops a position. Returns (B, C_out, T, H, W) in the latents'
        dtype.

        conditions, those of `config.conditions` only: fps, a number or (B,); size, (width, height) in pixels or
        (B, 2); image, (B, image_channels, T, H, W) beside the latents; image_text, (B, I, image_text_dim), the
        tokens of an image encoder.
        """
        given = self._conditions(conditions, latents)
        self._check(latents, t, text, text_mask)
        if ("image" in given) != (self.config.image_channels > 0):
            raise StditError(f"these weights take `image`, (B, {self.config.image_channels}, T, H, W), in every call.")
        texts = list(text) if text_mask is None else [row[keep] for row, keep in zip(text, text_mask.bool())]
        of_clips = [{name: value[index] for name, value in given.items()} for index in range(len(latents))]
        pack = pack_inputs(list(latents), list(t), self.config.patch, of_clips)
        out = self(pack, pack_texts(texts, padding=0))
        return torch.stack(unpack_clips(out, pack, self.config.patch)).to(latents.dtype)

    def _conditions(self, conditions: dict[str, Any], latents: Tensor) -> dict[str, Any]:
        """What was given, checked, one row a clip."""
        takes, found = self.config.conditions, {}
        shapes = {
            "fps": (),
            "size": (2,),
            "image": (self.config.image_channels, *latents.shape[2:]),
            "image_text": (None, self.config.image_text_dim),
        }
        for name, value in conditions.items():
            if name not in CONDITIONS:
                raise StditError(f"unknown condition {name!r}.{nearest_name(name, CONDITIONS)}")
            if value is None:
                continue
            if name not in takes:
                raise StditError(f"condition {name!r}: these weights take {' and '.join(('text', *takes))} only.")
            wanted = shapes[name]
            value = torch.as_tensor(value, device=latents.device)
            if value.ndim == len(wanted) and name in ("fps", "size"):  # one for all clips
                value = value.expand(len(latents), *value.shape)
            if (
                value.ndim != 1 + len(wanted)
                or len(value) != len(latents)
                or any(size not in (None, has) for size, has in zip(wanted, value.shape[1:]))
            ):
                raise StditError(f"condition {name!r} is {tuple(value.shape)}; wanted {(len(latents), *wanted)}.")
            found[name] = value
        return found

    def _check(self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None) -> None:
        config = self.config
        if latents.ndim != 5 or latents.shape[1] != config.latent_channels:
            raise StditError(f"latents are {tuple(latents.shape)}; wanted (B, {config.latent_channels}, T, H, W).")
        if text.ndim != 3 or text.shape[2] != config.text_dim or len(text) != len(latents):
            raise StditError(f"text is {tuple(text.shape)}; wanted ({len(latents)}, L, {config.text_dim}).")
        if t.ndim not in (1, 2) or len(t) != len(latents):
            raise StditError(f"t is {tuple(t.shape)}; wanted ({len(latents)},), with frames or tokens as second size.")
        if config.network_time == "log_sigma" and (t >= 1).any():
            raise StditError(
                "t of 1 is σ = t/(1 − t) = ∞, of which these weights (EDM) cannot be told: give a lower one."
            )
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise StditError(f"text_mask is {tuple(text_mask.shape)}; wanted {tuple(text.shape[:2])}.")


def count_parameters(config: TransformerConfig) -> int:
    """The number of parameters of a transformer, counted on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in STDiT(config).parameters())
