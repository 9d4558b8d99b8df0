"""Every setting that shapes the network, the presets of stdit's own family (Wan's), and what a forward costs.

Which family of open weights uses which choice: docs/open-weights.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from stdit.errors import StditError, nearest_name

# Settings that choose among a few ways to build a part; the first is Wan's.
CHOICES: dict[str, dict[str, str]] = {
    "attention": {
        "full": "every token of a clip attends to every other",
        "spatial": "to those of its own frame: a clip is a row of images",
        "spatial_temporal": "spatial blocks, each followed by one over time, at one place of the frame, without text",
        "spatial_temporal_text": "the same, with text in both",
    },
    "norm": {"layer": "LayerNorm without affine before attention and MLP", "rms": "RMSNorm without affine there"},
    "cross_norm": {
        "affine": "LayerNorm with affine before cross-attention",
        "none": "no norm there",
        "modulated": "cross-attention is normed, modulated and gated as the other two branches are",
    },
    "qk_norm": {
        "across_heads": "RMSNorm of q and k over all heads at once",
        "per_head": "over each head, with one weight for all heads",
        "per_head_self": "the same in self-attention, nothing in cross-attention",
        "none": "q and k as they are",
    },
    "activation": {"gelu_tanh": "GELU of the MLP by its tanh approximation", "gelu": "by the error function"},
    "modulation": {
        "table": "an MLP of the noise level gives six rows, every block adds a table of its own",
        "low_rank": "every branch of every block has its own low-rank projection of the noise level, plus three rows",
    },
    "rotary": {
        "axes": "a third of each head for frame, row and column; positions divided by rope_scale",
        "axes_ntk": "the same, but rope_scale raises each axis' base as NTK-aware scaling does",
        "inner": "over the whole width, all axes at every frequency; positions in seconds and pixels over rope_scale",
        "inner_causal": "the same, with the first latent frame one frame long",
        "time": "in blocks over time, the whole head turns with the frame",
        "none": "no rotary positions",
    },
    "position": {
        "none": "no positions are added",
        "space": "sinusoids of row and column are added to the tokens",
        "space_time": "the same, and sinusoids of the frame before the first block over time",
        "space_resolution": "as space, but in units of the picture's size in pixels over position_base",
        "learned": "a learned frame, row and column, of unit mean square, are added before every block",
    },
    "text_embedding": {
        "mlp": "two layers with GELU (tanh) to the model's width",
        "gelu": "one layer with GELU to text_width",
        "none": "cross-attention takes the text as it is",
    },
    "network_time": {
        "level": "the network is told the noise level × time_scale",
        "log_sigma": "it is told log(σ)/4 of σ = t/(1 − t), as EDM's denoisers are (Karras et al. 2022)",
    },
    "level_condition": {
        "none": "the noise level alone modulates",
        "size": "the embeddings of the picture's height, width and their ratio are added to the noise level's",
        "fps": "the embedding of the frames per second is added",
    },
}


# No network is larger; sizes of tensors then fit into 64 bits, and no list of blocks fills the memory.
LARGEST_INTEGER = 2**24
MOST = {"layers": 1000, "in_channels": 65_536, "out_channels": 65_536, "rope_theta": 1e12}


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that shapes the network, and two things that it ignores: `text_padding` (512 or 0) is for who packs
    texts, `family` names the module of stdit/weights/families that knows how such weights are written elsewhere.

    The defaults are Wan's. Strings are choices, explained in CHOICES; `layers` counts pairs where attention is
    "spatial_temporal". What a choice does not use keeps its default.
    """

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    in_channels: int = 16  # of a token's patch, image_channels included
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    frequency_dim: int = 256
    eps: float = 1e-6
    qk_norm: str = "across_heads"
    cross_norm: str = "affine"
    text_padding: int = 512
    rope_theta: float = 10000.0
    rope_max: int = 1024  # Wan's table ends there; exported with the weights, no limit here

    family: str = "wan"
    attention: str = "full"
    norm: str = "layer"
    qk_eps: float | None = None  # of qk_norm, None: eps
    bias: bool = True  # of every linear outside the text embedding
    activation: str = "gelu_tanh"
    modulation: str = "table"
    modulation_rank: int = 256  # of "low_rank"
    network_time: str = "level"
    time_scale: float = 1000.0  # of "level"
    level_condition: str = "none"
    text_embedding: str = "mlp"
    text_width: int = 0  # of what "gelu" gives to cross-attention
    compressed: tuple[int, ...] = ()  # blocks whose self-attention has fewer keys: one of each square of a frame
    compression: int = 1  # side of that square, in tokens
    null_text: int = 0  # rows of a text for "no text" that some releases keep with the weights
    rotary: str = "axes"
    rope_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)  # of frame, row, column
    rope_stride: tuple[int, int, int] = (1, 1, 1)  # frames and pixels per latent position, of "inner"
    rope_fps: float = 0.0  # positions in time are as at this fps where a clip's is given; 0: they know no fps
    position: str = "none"
    position_base: int = 0  # "space": rows and columns are stretched to a grid of this many tokens a side
    position_stretch: float = 1.0  # and divided by this
    position_max: tuple[int, int, int] = (0, 0, 0)  # "learned": frames, rows and columns of tokens at most
    image_channels: int = 0  # of in_channels, those that the condition `image` gives
    blank_channels: int = 0  # beside in_channels, always zero: a padding mask where nothing is padded
    image_text_dim: int = 0  # width of the image embedding that cross-attention sees beside the text; 0: none
    image_text_positions: int = 0  # learned positions of that embedding; 0: none

    def __post_init__(self) -> None:
        for name in ("patch", "rope_scale", "rope_stride", "position_max", "compressed"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("dim", "heads", "layers", "ffn_dim", "in_channels", "out_channels", "text_dim", "frequency_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise StditError(f"transformer {name} is {value!r}; it must be a positive integer.")
        for name in (field.name for field in fields(self)):
            value, most = getattr(self, name), MOST.get(name, LARGEST_INTEGER)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, int | float) and not -most <= number <= most:
                    raise StditError(f"transformer {name} is {value!r}; it must be at most {most:,}.")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                raise StditError(
                    f"transformer {name} is {value!r}.{nearest_name(str(value), known)} Known: {', '.join(known)}."
                )
        if len(self.patch) != 3 or any(not isinstance(p, int) or p < 1 for p in self.patch):
            raise StditError(
                f"transformer patch is {self.patch}; write three positive integers: frames, height, width."
            )
        for name in ("rope_scale", "rope_stride", "position_max"):
            value, least = getattr(self, name), 0 if name == "position_max" else 1e-9
            if len(value) != 3 or any(type(n) not in (int, float) or not least <= n < math.inf for n in value):
                raise StditError(f"transformer {name} is {value}; write three numbers: frames, height, width.")
        for name in ("blank_channels", "null_text", "image_text_dim", "image_text_positions", "text_width"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise StditError(f"transformer {name} is {getattr(self, name)!r}; it must be 0 or a positive integer.")
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
        self._check_combinations()

    def _check_combinations(self) -> None:
        if not 0 <= self.image_channels < self.in_channels:
            raise StditError(f"transformer image_channels {self.image_channels} of in_channels {self.in_channels}.")
        if (self.text_embedding == "gelu") != (self.text_width > 0):
            raise StditError(
                f"transformer text_width {self.text_width} goes with text_embedding 'gelu', and only there."
            )
        if (self.modulation == "low_rank") != (self.cross_norm == "modulated"):
            raise StditError("transformer cross_norm 'modulated' goes with modulation 'low_rank', and only there.")
        if self.modulation == "low_rank" and (self.frequency_dim != self.dim or self.level_condition != "none"):
            raise StditError(
                f"transformer modulation 'low_rank' takes sinusoids of the width {self.dim} (frequency_dim is "
                f"{self.frequency_dim}) and no level_condition."
            )
        if self.position.startswith("space") and (self.position_base < 1 or self.dim % 4):
            raise StditError(f"transformer position {self.position!r} needs position_base, and a dim divisible by 4.")
        if self.position == "learned" and min(self.position_max) < 1:
            raise StditError(f"transformer position 'learned' needs position_max; it is {self.position_max}.")
        if self.level_condition == "size" and self.dim % 3:
            raise StditError(f"transformer level_condition 'size' needs a dim divisible by 3; it is {self.dim}.")
        if self.rotary.startswith("inner") and self.rope_fps <= 0:
            raise StditError(f"transformer rotary {self.rotary!r} needs rope_fps.")
        if any(not 0 <= block < self.layers for block in self.compressed) or (self.compression > 1) != bool(
            self.compressed
        ):
            raise StditError(
                f"transformer compressed {self.compressed} with compression {self.compression}: name blocks of the "
                f"{self.layers}, and a side of 2 tokens or more; or neither."
            )
        if self.compressed and self.attention != "spatial":
            raise StditError("transformer compressed keys go with attention 'spatial'.")
        through_time = self.attention.startswith("spatial_temporal")
        if (self.attention != "full" and self.rotary not in ("none", "time")) or (
            self.rotary == "time" and not through_time
        ):
            raise StditError(
                f"transformer rotary {self.rotary!r} does not go with attention {self.attention!r}: within frames "
                "there is rotary 'none', or 'time' in the blocks over time."
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
        """Width of the text as cross-attention takes it."""
        return {"mlp": self.dim, "gelu": self.text_width, "none": self.text_dim}[self.text_embedding]

    @property
    def conditions(self) -> tuple[str, ...]:
        """What `predict` takes beside the text."""
        takes = {
            "fps": self.rope_fps > 0 or self.level_condition == "fps",
            "size": self.level_condition == "size" or self.position == "space_resolution",
            "image": self.image_channels > 0,
            "image_text": self.image_text_dim > 0,
        }
        return tuple(name for name, taken in takes.items() if taken)

    def inflated(self) -> TransformerConfig:
        """The same with a block over time after every block of an image model, for `inflate`.

        Its attention knows the frame by rotary positions: Latte's sinusoids, which are added to the tokens, would
        change what the image model computes.
        """
        if self.attention != "spatial" or self.compressed:
            what = "compressed keys and values (PixArt-Σ 2K)" if self.compressed else f"attention {self.attention!r}"
            raise StditError(f"only a model of images can be inflated (PixArt); this one has {what}.")
        return replace(self, attention="spatial_temporal", rotary="time")

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


# Heads are 128 wide: programs that read Wan's weights take the number of heads from the width (ComfyUI: dim // 128).
# The toy is narrower than two such heads, so it opens in diffusers and stdit, which read its config, and not in those.
PRESETS = {
    "toy": TransformerConfig(dim=144, heads=6, layers=6, ffn_dim=576, text_dim=128),
    "small": TransformerConfig(dim=384, heads=3, layers=12, ffn_dim=1536),
    "base": TransformerConfig(dim=768, heads=6, layers=12, ffn_dim=3072),
    "large": TransformerConfig(dim=1024, heads=8, layers=24, ffn_dim=4096),
    "1.3B": TransformerConfig(dim=1536, heads=12, layers=30, ffn_dim=8960),
    "5B": TransformerConfig(dim=3072, heads=24, layers=30, ffn_dim=14336, in_channels=48, out_channels=48),
    "14B": TransformerConfig(dim=5120, heads=40, layers=40, ffn_dim=13824),
}


def transformer_flops(config: TransformerConfig, token_counts: Sequence[int], text_counts: Sequence[int]) -> int:
    """Forward FLOPs (2 per multiply-add) of the matrix products of clips of n tokens with texts of m tokens.

    Times 3 for a training step, times 4 with checkpointed blocks. text_counts are packed (padding is one token).
    """
    d = config.dim
    linear, quadratic = cost_coefficients(config)
    embedding = {"mlp": config.text_dim + d, "gelu": 0, "none": 0}[config.text_embedding] * 2 * d
    crosses = config.layers * (1 + (config.attention == "spatial_temporal_text"))
    text = embedding + 2 * config.text_dim * config.text_width + crosses * 4 * d * config.context_dim
    return sum(
        linear * n + quadratic * n * n + text * m + crosses * 4 * d * n * m for n, m in zip(token_counts, text_counts)
    )


def cost_coefficients(config: TransformerConfig) -> tuple[int, int]:
    """(per token, per token²) forward FLOPs of a clip without its text; exact integers, for the planner.

    Attention within frames or over time is counted as if it were full: more than it costs.
    """
    d = config.dim
    ends = 2 * d * (config.in_channels + config.blank_channels + config.out_channels) * config.patch_volume
    block, quadratic = 12 * d * d + 4 * d * config.ffn_dim, 4 * d
    if config.attention == "spatial_temporal":
        block, quadratic = block + 8 * d * d + 4 * d * config.ffn_dim, 2 * quadratic
    elif config.attention == "spatial_temporal_text":
        block, quadratic = 2 * block, 2 * quadratic
    return ends + config.layers * block, config.layers * quadratic
