"""The transformer: a text-cross-attending DiT over packed tokens.

It is Wan's unless its config says otherwise. Module and parameter names are those of the original Wan release, and the
numbers agree with diffusers' WanTransformer3DModel (0.42) and with Wan-Video/Wan2.1 `wan/modules/model.py`. What other
families of open weights need is in variants.py; each agrees with its own reference.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stdit.errors import StditError, nearest_name
from stdit.keyed import random_seed
from stdit.keyed.weights import ONE, ZERO, Start, StartingWeights
from stdit.models import variants
from stdit.models.blocks import Attention, Block, BlockInputs, Head, LayerNorm, Linear, RMSNorm, without_autocast
from stdit.models.config import PRESETS, TransformerConfig, cost_coefficients, transformer_flops
from stdit.models.operators import Recompute
from stdit.models.packing import LevelIndex, TextPack, TokenPack, pack_clips, pack_texts, unpack_clips
from stdit.models.positions import network_time, sinusoids
from stdit.models.routing import Routing

__all__ = ["CONDITIONS", "PRESETS", "STDiT", "TransformerConfig", "cost_coefficients", "transformer_flops"]

CONDITIONS = ("fps", "size", "image", "image_text", "known")  # what some family takes besides text
TEMPORAL_BLOCKS = "temporal_blocks.*"  # the parameters that `inflate` adds, as a pattern of their names


class STDiT(nn.Module):
    """Predicts the velocity (or whatever the weights were trained for) of packed clips.

    seed: of the starting weights (`starting_weights`). None: one from torch's global generator. On the meta device
        nothing is drawn; after `to_empty`, `initialise` makes the same weights.
    recompute: which blocks are recomputed in backward instead of keeping their activations.
    """

    def __init__(self, config: TransformerConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        d, f, low_rank = config.dim, config.frequency_dim, config.modulation == "low_rank"
        self.blank_features = config.blank_channels * config.patch_volume
        self.patch_embedding = Linear(config.in_channels * config.patch_volume + self.blank_features, d, config.bias)
        self.text_embedding = nn.Sequential(*variants.text_layers(config))
        if low_rank:
            self.time_embedding = nn.Sequential(RMSNorm(d, 1e-6))
            self.time_projection = nn.Sequential(Linear(d, d, bias=False), nn.SiLU(), Linear(d, 3 * d, bias=False))
        else:
            self.time_embedding = nn.Sequential(Linear(f, d), nn.SiLU(), Linear(d, d))
            self.time_projection = nn.Sequential(nn.SiLU(), Linear(d, 6 * d))
        self.projects_sinusoids = low_rank  # Cosmos projects the sinusoids of the level, Wan their embedding
        self.clip_embedding = variants.LEVEL_CONDITIONS[config.level_condition](config)
        self.position = variants.POSITIONS[config.position](config)
        self.rotary = variants.ROTARY[config.rotary]
        self.layout = variants.LAYOUTS[config.attention]
        self.img_emb = variants.ImageEmbedding(config) if config.image_text_dim else variants.no_image
        if config.null_text:
            self.register_buffer("null_text", torch.zeros(config.null_text, config.text_dim))
        block, head = (variants.LowRankBlock, variants.LowRankHead) if low_rank else (Block, Head)
        self.blocks = nn.ModuleList(block(config, compressed=n in config.compressed) for n in range(config.layers))
        temporal = config.layers if config.attention.startswith("spatial_temporal") else 0
        cross = config.attention == "spatial_temporal_text"
        self.temporal_blocks = nn.ModuleList(block(config, cross) for _ in range(temporal))
        self.head = head(config)
        self.recompute = Recompute()
        if not self.head.head.weight.is_meta:
            self.initialise(random_seed() if seed is None else seed)

    def initialise(self, seed: int) -> STDiT:
        """Fills all parameters and buffers with starting weights."""
        self.starting_weights(seed).fill(self)
        for buffer in self.buffers():
            buffer.zero_()
        return self

    def starting_weights(self, seed: int) -> StartingWeights:
        """Wan's: Xavier for linear layers, zeros for the head.

        Wan draws the text and time embeddings with a standard deviation of 0.02. At Wan's widths that is Xavier's too
        (4096 to 1536: 0.019). At a width of 144 it would shrink texts 40 times, and motion is not learned from them
        (docs/log.md).
        """
        found: dict[str, Start] = {}
        for place, module in self.named_modules():
            for name, _ in module.named_parameters(place, recurse=False):
                if name.endswith("bias") or module is self.head.head or isinstance(module, variants.ADDED):
                    found[name] = ZERO
                elif isinstance(module, nn.Linear):
                    xavier = math.sqrt(6 / (module.in_features + module.out_features))  # Glorot & Bengio 2010
                    found[name] = Start("uniform", xavier)
                elif isinstance(module, Block | Head):  # its modulation
                    found[name] = Start("normal", self.config.dim**-0.5)
                elif isinstance(module, nn.Conv2d):  # of `Compression`: the mean of a square
                    found[name] = Start("constant", 1 / module.weight[0].numel())
                else:
                    assert isinstance(module, RMSNorm | LayerNorm), name
                    found[name] = ONE
        return StartingWeights(found, "transformer", seed)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the activations: that of the blocks."""
        return cast(Block, self.blocks[0]).self_attn.q.weight.dtype

    @property
    def attention_backend(self) -> str:
        return cast(Block, self.blocks[0]).self_attn.backend

    @attention_backend.setter
    def attention_backend(self, name: str) -> None:
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = name

    def forward(
        self, pack: TokenPack, text: TextPack, routing: Routing | None = None, skip: Collection[int] = ()
    ) -> Tensor:
        """Returns (N, pt·ph·pw·C_out) in the activations' dtype; `unpack_clips` cuts it into clips.

        routing: while training, which tokens skip some of the blocks.
        skip: the numbers of blocks that do not run (skip-layer guidance).
        """
        if len(pack.segments.lengths) != len(text.segments.lengths):
            raise StditError(f"{len(pack.segments.lengths)} clips came with {len(text.segments.lengths)} texts.")
        wide = torch.promote_types(self.dtype, torch.float32)
        x = self.patch_embedding(F.pad(pack.tokens.to(self.dtype), (0, self.blank_features)))  # (N, D)
        x = self.position(x, pack)  # (N, D)
        c, modulation, levels = self.embed_levels(pack, wide)  # (K, D), (K, 6, D) of K distinct noise levels
        y = self.text_embedding(text.tokens.to(self.dtype))  # (M, D_context)
        cos, sin = self.rotary(pack, self.config, wide)  # (N, 1 or H, D_head/2) each
        shared = BlockInputs(c, levels, cos, sin, pack.segments, pack.segments, text)
        shared.image = self.img_emb(pack, self.dtype)  # (I, D)
        shared.added = self.position.before_each_block(x, pack)  # (N, D)
        steps = self.layout(self.config, x, pack, shared)
        steps = steps if routing is None else routing.narrowed(steps, shared)
        for number, (block, inputs) in enumerate(zip(self.blocks_in_order(), steps)):
            if routing is not None and number == routing.blocks[0]:
                before, x = x, x.index_select(0, routing.kept)  # (N, D), (N', D)
            if number in skip:
                continue
            x = self.recompute.run(number, block, x, modulation, y, inputs)  # (N, D), or (N', D) of those that stay
            if routing is not None and number == routing.blocks[-1]:
                x = before.index_copy(0, routing.kept, x)  # (N, D)
        return self.head(x, c, modulation, levels)

    def embed_levels(self, pack: TokenPack, wide: torch.dtype) -> tuple[Tensor, Tensor, LevelIndex]:
        """Embeds the K distinct noise levels, in fp32 or fp64 whatever autocast says.

        Returns their embeddings (K, D), the rows that modulate all blocks (K, 6, D), and the row of each token.
        """
        t, row_of_token, wave_count = pack.levels, pack.level_index, self.config.frequency_dim
        if self.clip_embedding is not None:  # modulation depends on the clip too: a row per pair of level and clip
            level_of_row, clip_of_row, row_of_token = pack.level_clip_pairs()
            t = t[level_of_row]
        with without_autocast(pack.tokens.device):
            waves = sinusoids(network_time(t, self.config.network_time, self.config.time_scale), wave_count).to(wide)
            c = self.time_embedding(waves)  # (K, D)
            if self.clip_embedding is not None:
                c = c + self.clip_embedding.of_clips(pack, wide)[clip_of_row]
            modulation = self.time_projection(waves if self.projects_sinusoids else c)
        return c, modulation.unflatten(1, (-1, self.config.dim)), row_of_token

    def blocks_in_order(self) -> Iterable[nn.Module]:
        """The blocks as they run: each within frames is followed by one over time, if there are any."""
        return chain.from_iterable(zip(self.blocks, self.temporal_blocks)) if self.temporal_blocks else self.blocks

    def predict(
        self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None, **conditions: Any
    ) -> Tensor:
        """The raw network output for a batch of clips of one shape.

        latents: (B, C, T, H, W).
        t: noise levels in [0, 1] of the family's path, fp32 or fp64: (B,), (B, T/pt) per patch frame or (B, n) per
            token. A flow's t, a DDPM's index/1000, or EDM's σ/(σ + 1) < 1 (Cosmos-Predict1).
        text: (B, L, D_text), attended to as given, without padding.
        text_mask: (B, L) bool, False drops a position.
        conditions: only those in `config.conditions`:
            fps: a number, or (B,).
            size: (width, height) in pixels, or (B, 2).
            image: (B, image_channels, T, H, W), concatenated to the latents.
            image_text: (B, I, image_text_dim), tokens of an image encoder.
        Returns (B, C_out, T, H, W) in the dtype of the latents.
        """
        given = self.checked_conditions(conditions, latents, t, text, text_mask)
        texts = list(text) if text_mask is None else [row[keep] for row, keep in zip(text, text_mask.bool())]
        of_clips = [{name: value[index] for name, value in given.items()} for index in range(len(latents))]
        pack = pack_clips(list(latents), list(t), self.config.patch, of_clips)
        out = self(pack, pack_texts(texts, padding=0))
        return torch.stack(unpack_clips(out, pack, self.config.patch)).to(latents.dtype)

    def checked_conditions(
        self, conditions: dict[str, Any], latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None
    ) -> dict[str, Tensor]:
        """Checks the arguments of `predict`. Returns the conditions that are given, with a row per clip."""
        config, clips, found = self.config, len(latents), dict[str, Tensor]()
        if latents.ndim != 5 or latents.shape[1] != config.latent_channels:
            raise StditError(f"latents are {tuple(latents.shape)}; wanted (B, {config.latent_channels}, T, H, W).")
        if text.ndim != 3 or text.shape[2] != config.text_dim or len(text) != clips:
            raise StditError(f"text is {tuple(text.shape)}; wanted ({clips}, L, {config.text_dim}).")
        if t.ndim not in (1, 2) or len(t) != clips:
            raise StditError(f"t is {tuple(t.shape)}; wanted ({clips},), with frames or tokens as second size.")
        if config.network_time == "log_sigma" and (t >= 1).any():
            raise StditError("t of 1 is σ = t/(1 − t) = ∞, which these weights (EDM) cannot be given: use a smaller t.")
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise StditError(f"text_mask is {tuple(text_mask.shape)}; wanted {tuple(text.shape[:2])}.")
        shapes = {
            "fps": (),
            "size": (2,),
            "image": (config.image_channels, *latents.shape[2:]),
            "image_text": (None, config.image_text_dim),
        }
        for name, value in conditions.items():
            if name not in CONDITIONS:
                raise StditError(f"unknown condition {name!r}.{nearest_name(name, CONDITIONS)}")
            if value is None:
                continue
            if name not in config.conditions:
                takes = " and ".join(("text", *config.conditions))
                raise StditError(f"condition {name!r}: these weights take {takes} only.")
            value, wanted = torch.as_tensor(value, device=latents.device), (clips, *shapes[name])
            if value.ndim == len(wanted) - 1 and name in ("fps", "size"):  # the same for all clips
                value = value.expand(clips, *value.shape)
            if value.ndim != len(wanted) or any(n not in (None, has) for n, has in zip(wanted, value.shape)):
                raise StditError(f"condition {name!r} is {tuple(value.shape)}; wanted {wanted}.")
            found[name] = value
        if ("image" in found) != (config.image_channels > 0):
            raise StditError(f"these weights take `image`, (B, {config.image_channels}, T, H, W), in every call.")
        return found


class Experts(nn.Module):
    """Two transformers that act as one (Wan 2.2 A14B): `high` at noise levels of `boundary` or more, `low` below.

    The level of a clip is the highest of its tokens', since known tokens are always at 0.
    """

    def __init__(self, high: STDiT, low: STDiT, boundary: float) -> None:
        super().__init__()
        if high.config != low.config:
            raise StditError("two experts must have one config: only their weights differ.")
        if not 0 < boundary < 1:
            raise StditError(f"the experts' boundary is {boundary!r}; it must be a noise level between 0 and 1.")
        self.high, self.low, self.boundary = high, low, float(boundary)

    @property
    def config(self) -> TransformerConfig:
        """The config of either expert: they have the same."""
        return self.high.config

    @property
    def dtype(self) -> torch.dtype:
        return self.high.dtype

    def at(self, level: float) -> STDiT:
        """The expert for a noise level."""
        return self.high if level >= self.boundary else self.low

    def forward(self, pack: TokenPack, text: TextPack, skip: Collection[int] = ()) -> Tensor:
        """Like STDiT.forward, for clips on one side of the boundary."""
        of_token = pack.levels[pack.level_of].split(pack.segments.lengths)
        levels = [float(clip.max()) for clip in of_token]
        chosen = {self.at(level) for level in levels}
        if len(chosen) > 1:
            raise StditError(
                f"a pack has clips at noise levels {min(levels):g} to {max(levels):g}, on both sides of the experts' "
                f"boundary {self.boundary:g}: pack the clips of each expert separately."
            )
        return chosen.pop()(pack, text, skip=skip)

    def predict(
        self, latents: Tensor, t: Tensor, text: Tensor, text_mask: Tensor | None = None, **conditions: Any
    ) -> Tensor:
        """Like STDiT.predict, with the expert for the noise level of each clip."""
        given = self.high.checked_conditions(conditions, latents, t, text, text_mask)
        high = t.reshape(len(t), -1).amax(1) >= self.boundary  # (B,)
        out = latents.new_empty(len(latents), self.config.out_channels, *latents.shape[2:])
        for expert, mine in ((self.high, high), (self.low, ~high)):
            if rows := mine.nonzero().flatten().tolist():
                mask = None if text_mask is None else text_mask[rows]
                of_mine = {name: value[rows] for name, value in given.items()}
                out[rows] = expert.predict(latents[rows], t[rows], text[rows], mask, **of_mine)
        return out


def count_parameters(config: TransformerConfig) -> int:
    """Counts the parameters of a transformer on the meta device."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in STDiT(config).parameters())


@torch.no_grad()
def inflate(model: STDiT) -> STDiT:
    """Makes a video model of an image model (Make-A-Video, Singer et al. 2022; Video LDM, Blattmann et al. 2023).

    Until it is trained, it computes for each frame exactly what the image model does: a block over time starts as a
    copy of the block before it, without cross-attention, and the outputs of its attention and MLP are zero. The video
    model takes the image model's tensors without copying them.
    """
    with torch.device("meta"):
        video = STDiT(model.config.inflated())
    state = model.state_dict()
    for name in video.state_dict():
        if name not in state:  # temporal_blocks.N.… of blocks.N.…
            state[name] = state[name.removeprefix("temporal_")].clone()
    video.load_state_dict(state, strict=True, assign=True)
    for block in cast("list[Block]", video.temporal_blocks):
        for linear in cast("tuple[nn.Linear, ...]", (block.self_attn.o, block.ffn[2])):
            for parameter in linear.parameters():
                nn.init.zeros_(parameter)
    return video
