"""The settings that shape the network, the presets of stdit's own family (Wan's), and the cost of a forward.

docs/open-weights.md says which family of open weights uses which choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from pydantic import Field

from stdit.errors import StditError, nearest_name
from stdit.settings import check

# The settings that are a choice among a few. The first of each is Wan's: who reads Wan can ignore all others.
CHOICES: dict[str, dict[str, str]] = {
    "attention": {
        "full": "each token attends to all tokens of its clip",
        "spatial": "each token attends to its own frame: a clip is a row of images (PixArt)",
        "spatial_temporal": "spatial blocks alternate with blocks over time, which do not attend to text (Latte)",
        "spatial_temporal_text": "the same, but blocks over time attend to text too (STDiT3)",
    },
    "norm": {
        "layer": "LayerNorm without affine before attention and MLP",
        "rms": "RMSNorm without affine before attention and MLP (LTX-Video)",
    },
    "cross_norm": {
        "affine": "LayerNorm with affine before cross-attention",
        "none": "no norm before cross-attention",
        "modulated": "cross-attention is normed, modulated and gated like self-attention and MLP (Cosmos)",
    },
    "qk_norm": {
        "across_heads": "RMSNorm of q and k over all heads at once",
        "per_head": "RMSNorm of each head of q and k, one weight for all heads",
        "per_head_self": "the same in self-attention, no norm in cross-attention",
        "none": "no norm of q and k",
    },
    "activation": {
        "gelu_tanh": "GELU of the MLP by its tanh approximation",
        "gelu": "GELU of the MLP by the error function",
    },
    "modulation": {
        "table": "an MLP of the noise level gives six rows, to which each block adds a table of its own",
        "low_rank": "an MLP gives three rows, to which each branch adds its low-rank projection of the level (Cosmos)",
    },
    "rotary": {
        "axes": "a third of each head turns with the frame, the row and the column; rope_scale divides positions",
        "axes_ntk": "the same, but rope_scale raises the base of each axis (NTK-aware scaling; Cosmos)",
        "inner": "all axes turn at each frequency, over the whole width; seconds, pixels over rope_scale (LTX-Video)",
        "inner_causal": "the same, where the first latent frame is one frame long",
        "time": "the whole head turns with the frame, in blocks over time only (STDiT3)",
        "none": "no rotary positions",
    },
    "position": {
        "none": "no positions are added to the tokens",
        "space": "sinusoids of row and column are added before the first block (PixArt)",
        "space_time": "the same, and sinusoids of the frame before the first block over time (Latte)",
        "space_resolution": "as space, but in units of the picture's size in pixels over position_base (STDiT3)",
        "learned": "a learned frame, row and column, of unit mean square, are added before each block (Cosmos)",
    },
    "text_embedding": {
        "mlp": "two layers with GELU (tanh) embed the text in the model's width",
        "gelu": "one layer with GELU embeds the text in text_width",
        "none": "cross-attention takes the text as it is",
    },
    "network_time": {
        "level": "the network is given the noise level × time_scale",
        "log_sigma": "the network is given log(σ)/4 of σ = t/(1 − t), as EDM's denoisers are (Karras et al. 2022)",
    },
    "level_condition": {
        "none": "modulation depends on the noise level only",
        "size": "embeddings of the picture's height, width and their ratio are added to the noise level's (PixArt-α)",
        "fps": "an embedding of the frames per second is added to the noise level's (STDiT3)",
    },
}


LARGEST = 2**24  # No network is larger. Tensor sizes then fit into 64 bits.
Size = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Channels = Annotated[int, Field(ge=1, le=65_536)]
Scale = Annotated[float, Field(ge=1e-9, le=LARGEST)]
Epsilon = Annotated[float, Field(gt=0, le=LARGEST)]


@dataclass(frozen=True)
class TransformerConfig:
    """The settings that shape the network. Defaults are Wan's; what a choice does not use keeps its default.

    dim: width of the tokens, D.
    heads: number of attention heads, H.
    layers: number of blocks; of pairs of blocks where attention alternates between space and time.
    ffn_dim: inner width of the MLP.
    in_channels: channels of a token's patch, image_channels included.
    out_channels: channels of the output.
    patch: latent frames, rows and columns per token.
    text_dim: width of the text encoder's output.
    frequency_dim: number of sinusoids that embed the noise level.
    eps: ε of all norms.
    qk_norm: norm of q and k, see CHOICES.
    cross_norm: norm before cross-attention, see CHOICES.
    text_padding: positions that texts are padded to, 0 for none. Read by the text packer, ignored by the network.
    rope_theta: base of the rotary frequencies.
    rope_max: length of Wan's rotary table, exported with the weights. No limit here.
    family: module of stdit/weights/families that knows how such weights are stored elsewhere; ignored by the network.

    Wan keeps the defaults of all that follows, but for image_channels and image_text_*, which its image-to-video
    weights set:

    attention: which tokens attend to each other, see CHOICES.
    norm: norm before self-attention and MLP, see CHOICES.
    qk_eps: ε of qk_norm, null for eps.
    bias: whether linear layers outside the text embedding have a bias.
    activation: activation of the MLP, see CHOICES.
    modulation: how the noise level modulates the blocks, see CHOICES.
    modulation_rank: rank of modulation "low_rank".
    network_time: what the network is given of the noise level, see CHOICES.
    time_scale: factor of network_time "level".
    level_condition: condition that joins the noise level in modulation, see CHOICES.
    text_embedding: layers that embed the text, see CHOICES.
    text_width: width of the text after text_embedding "gelu".
    compressed: indices of the blocks whose self-attention compresses its keys (PixArt-Σ 2K).
    compression: side of the square of tokens that becomes one key there.
    null_text: rows of a stored embedding of "no text", 0 for none.
    rotary: rotary positions, see CHOICES.
    rope_scale: scale of frames, rows and columns, see rotary in CHOICES.
    rope_stride: frames, rows and columns of pixels per latent position, for rotary "inner".
    rope_fps: frames per second at which rotary "axes" counts frames of clips whose fps is given; 0: fps is ignored.
    position: positions added to the tokens, see CHOICES.
    position_base: tokens per side of the grid that position "space" stretches all grids to.
    position_stretch: divisor of the positions of position "space".
    position_max: largest grid of position "learned": frames, rows and columns of tokens.
    image_channels: those of in_channels that the condition `image` provides.
    blank_channels: channels beyond in_channels that are always zero (Cosmos' padding mask).
    image_text_dim: width of the image tokens that cross-attention sees besides the text, 0 for none.
    image_text_positions: learned positions of the image tokens, 0 for none.
    """

    dim: Size
    heads: Size
    layers: Annotated[int, Field(ge=1, le=1000)]
    ffn_dim: Size
    in_channels: Channels = 16
    out_channels: Channels = 16
    patch: tuple[Size, Size, Size] = (1, 2, 2)
    text_dim: Size = 4096
    frequency_dim: Size = 256
    eps: Epsilon = 1e-6
    qk_norm: str = "across_heads"
    cross_norm: str = "affine"
    text_padding: Count = 512
    rope_theta: Annotated[float, Field(gt=0, le=1e12)] = 10000.0
    rope_max: Count = 1024
    family: str = "wan"

    attention: str = "full"
    norm: str = "layer"
    qk_eps: Epsilon | None = None
    bias: bool = True
    activation: str = "gelu_tanh"
    modulation: str = "table"
    modulation_rank: Count = 256
    network_time: str = "level"
    time_scale: Annotated[float, Field(ge=0, le=LARGEST)] = 1000.0
    level_condition: str = "none"
    text_embedding: str = "mlp"
    text_width: Count = 0
    compressed: tuple[Count, ...] = ()
    compression: Count = 1
    null_text: Count = 0
    rotary: str = "axes"
    rope_scale: tuple[Scale, Scale, Scale] = (1.0, 1.0, 1.0)
    rope_stride: tuple[Size, Size, Size] = (1, 1, 1)
    rope_fps: Annotated[float, Field(ge=0, le=LARGEST)] = 0.0
    position: str = "none"
    position_base: Count = 0
    position_stretch: Scale = 1.0
    position_max: tuple[Count, Count, Count] = (0, 0, 0)
    image_channels: Count = 0
    blank_channels: Count = 0
    image_text_dim: Count = 0
    image_text_positions: Count = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # of YAML and JSON
                object.__setattr__(self, name, tuple(value))
        check(self, "transformer")
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                nearest = nearest_name(value, known)
                raise StditError(f"transformer {name} is {value!r}.{nearest} Known: {', '.join(known)}.")
        for conflict in self._conflicts():
            raise StditError(f"transformer {conflict}.")

    def _conflicts(self) -> Iterator[str]:
        """What is wrong with settings that are right each for itself."""
        d, f, low_rank = self.dim, self.frequency_dim, self.modulation == "low_rank"
        if d % self.heads:
            yield f"dim {d} is not divisible by heads {self.heads}"
        if self.head_dim % 2:
            yield f"dim {d} / heads {self.heads} is not even; rotary pairs need that"
        if f % 2:
            yield f"frequency_dim {f} is not even; it counts cosines and sines"
        if self.image_channels >= self.in_channels:
            yield f"image_channels {self.image_channels} of in_channels {self.in_channels} must leave some for latents"
        if (self.text_embedding == "gelu") != (self.text_width > 0):
            yield f"text_width {self.text_width} goes with text_embedding 'gelu', and only with it"
        if low_rank != (self.cross_norm == "modulated"):
            yield "cross_norm 'modulated' goes with modulation 'low_rank', and only with it"
        if low_rank and (f != d or self.level_condition != "none"):
            yield f"modulation 'low_rank' takes sinusoids of the width {d} (frequency_dim: {f}) and no level_condition"
        if self.position.startswith("space") and (self.position_base == 0 or d % 4):
            yield f"position {self.position!r} needs position_base, and a dim divisible by 4"
        if self.position == "learned" and min(self.position_max) == 0:
            yield f"position 'learned' needs position_max; it is {self.position_max}"
        if self.level_condition == "size" and d % 3:
            yield f"level_condition 'size' needs a dim divisible by 3; it is {d}"
        if self.rotary.startswith("inner") and self.rope_fps == 0:
            yield f"rotary {self.rotary!r} needs rope_fps"
        if any(block >= self.layers for block in self.compressed) or (self.compression > 1) != bool(self.compressed):
            yield (
                f"compressed {self.compressed} with compression {self.compression}: name some of the {self.layers} "
                "blocks and a side of 2 tokens or more, or neither"
            )
        if self.compressed and self.attention != "spatial":
            yield "compressed keys go with attention 'spatial'"
        within, over_time = self.attention != "full", self.rotary == "time"
        if self.rotary != "none" and (self.attention == "spatial" or within != over_time):
            yield (
                f"rotary {self.rotary!r} does not go with attention {self.attention!r}: within frames there is rotary "
                "'none', or 'time' in the blocks over time"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def patch_volume(self) -> int:
        return math.prod(self.patch)

    @property
    def latent_channels(self) -> int:
        """Channels of the noisy latents."""
        return self.in_channels - self.image_channels

    @property
    def context_dim(self) -> int:
        """Width of the text that cross-attention sees."""
        return {"mlp": self.dim, "gelu": self.text_width, "none": self.text_dim}[self.text_embedding]

    @property
    def conditions(self) -> tuple[str, ...]:
        """The conditions that `predict` takes besides the text."""
        takes = {
            "fps": self.rope_fps > 0 or self.level_condition == "fps",
            "size": self.level_condition == "size" or self.position == "space_resolution",
            "image": self.image_channels > 0,
            "image_text": self.image_text_dim > 0,
        }
        return tuple(name for name, taken in takes.items() if taken)

    def inflated(self) -> TransformerConfig:
        """The config of a video model made of this image model (`inflate`), with a block over time after each block.

        Blocks over time know the frame by rotary positions. Sinusoids added to the tokens, as Latte has them, would
        change what the image model computes.
        """
        if self.attention != "spatial" or self.compressed:
            what = "compressed keys and values (PixArt-Σ 2K)" if self.compressed else f"attention {self.attention!r}"
            raise StditError(f"only a model of images can be inflated (PixArt); this one has {what}.")
        return replace(self, attention="spatial_temporal", rotary="time")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> TransformerConfig:
        """A preset with some settings changed."""
        if name not in PRESETS:
            raise StditError(
                f"no transformer preset {name!r}.{nearest_name(name, PRESETS)} Known: {', '.join(PRESETS)}."
            )
        known = [field.name for field in fields(cls)]
        for key in changes:
            if key not in known:
                raise StditError(f"the transformer has no setting {key!r}.{nearest_name(key, known)}")
        return replace(PRESETS[name], **changes)


# Heads are 128 wide, since other programs that read Wan's weights derive their number from the width (ComfyUI:
# dim // 128). The toy is too narrow for that: it opens only in stdit and diffusers, which read the config.
PRESETS = {
    "toy": TransformerConfig(dim=144, heads=6, layers=6, ffn_dim=576, text_dim=128),
    "small": TransformerConfig(dim=384, heads=3, layers=12, ffn_dim=1536),
    "base": TransformerConfig(dim=768, heads=6, layers=12, ffn_dim=3072),
    "large": TransformerConfig(dim=1024, heads=8, layers=24, ffn_dim=4096),
    "1.3B": TransformerConfig(dim=1536, heads=12, layers=30, ffn_dim=8960),
    "5B": TransformerConfig(dim=3072, heads=24, layers=30, ffn_dim=14336, in_channels=48, out_channels=48),
    "14B": TransformerConfig(dim=5120, heads=40, layers=40, ffn_dim=13824),
}


def transformer_flops(
    config: TransformerConfig,
    token_counts: Sequence[int],
    text_counts: Sequence[int],
    kept_counts: Sequence[int] | None = None,
    routed_blocks: int = 0,
) -> int:
    """FLOPs (2 per multiply-add) of the matrix products in a forward of clips of n tokens with texts of m tokens.

    A training step takes 3 times as many, 4 times with checkpointed blocks. In text_counts padding is one token.

    kept_counts: how many of each clip's tokens do not skip the `routed_blocks` (token routing).
    """
    d = config.dim
    linear, quadratic = _block_cost(config)
    embedding = {"mlp": config.text_dim + d, "gelu": 0, "none": 0}[config.text_embedding] * 2 * d
    crosses = 1 + (config.attention == "spatial_temporal_text")  # of a block
    text = embedding + 2 * config.text_dim * config.text_width + config.layers * crosses * 4 * d * config.context_dim

    def block(n: int, m: int) -> int:
        return linear * n + quadratic * n * n + crosses * 4 * d * n * m

    return sum(
        _ends_cost(config) * n
        + text * m
        + (config.layers - routed_blocks) * block(n, m)
        + routed_blocks * block(kept, m)
        for n, m, kept in zip(token_counts, text_counts, token_counts if kept_counts is None else kept_counts)
    )


def cost_coefficients(config: TransformerConfig, share: float = 0.0, routed_blocks: int = 0) -> tuple[int, int]:
    """Forward FLOPs of a clip without its text, per token and per token²; exact integers, for the planner.

    Spatial and temporal attention are counted as full attention, which costs more.

    share: of the tokens that skip `routed_blocks` of the blocks (token routing).
    """
    linear, quadratic = _block_cost(config)
    whole, stay = config.layers - routed_blocks, 1 - share
    return (
        _ends_cost(config) + whole * linear + round(routed_blocks * linear * stay),
        whole * quadratic + round(routed_blocks * quadratic * stay**2),
    )


def _ends_cost(config: TransformerConfig) -> int:
    """FLOPs per token of the patch embedding and the head."""
    return 2 * config.dim * (config.in_channels + config.blank_channels + config.out_channels) * config.patch_volume


def _block_cost(config: TransformerConfig) -> tuple[int, int]:
    """FLOPs of a block (or a pair of them, in space and time) per token and per token²."""
    d = config.dim
    block, quadratic = 12 * d * d + 4 * d * config.ffn_dim, 4 * d
    if config.attention == "spatial_temporal":
        return block + 8 * d * d + 4 * d * config.ffn_dim, 2 * quadratic
    if config.attention == "spatial_temporal_text":
        return 2 * block, 2 * quadratic
    return block, quadratic
