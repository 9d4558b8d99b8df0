"""The transformer's objective: the error of its output along its weights' path from clip to noise."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, zip_longest
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.diffusion.noise_levels import NoiseLevelConfig, noise_levels
from stdit.diffusion.paths import FlowPath, Path, token_errors
from stdit.diffusion.solvers import dynamic_shift, path_of, unipc_config
from stdit.diffusion.tasks import Task, draw_task, frame_levels
from stdit.errors import error_context
from stdit.keyed import keyed_uniform
from stdit.keyed.stream import keyed_stream
from stdit.models.packing import TextPack, TokenPack, output_tokens, pack_clips, pack_texts, unpatchify
from stdit.models.routing import Routing
from stdit.models.sequence import SequenceGroup
from stdit.models.transformer import STDiT, cost_coefficients, transformer_flops
from stdit.pixels import to_video
from stdit.shapes import LatentShape, VideoShape
from stdit.text.encoders import TextEncoder
from stdit.training.engine.start import Numbers
from stdit.training.objectives.conditions import Conditions
from stdit.training.objectives.config import ObjectiveConfig
from stdit.training.objectives.levels import level_edges, level_names, sums_by_level
from stdit.training.objectives.loss_weights import LEVEL_WEIGHTS, clip_weight
from stdit.training.objectives.protocol import Batch, Objective, StepKey
from stdit.vae.autoencoder import CausalVAE
from stdit.weights.families import guided_by_null_text, on_meta

CAPTIONS_KEPT = 4096  # size of the caches of token ids and embeddings, in captions
EMBEDDED_BYTES = 2**34  # and at most, of embeddings: 4096 full ones of a T5-XXL in bf16, 167 of Cosmos-Reason1


@dataclass
class FlowBatch(Batch):
    """The input of `FlowModule`. If the text encoder trains along, there are token ids in place of embeddings.

    If ranks share packs, N counts the tokens that this rank holds, and the texts are those of its clips.
    """

    pack: TokenPack  # noisy tokens
    target: Tensor  # (N, pt·ph·pw·C) what the network should output
    token_weights: Tensor  # (N,) of the tokens' errors, 0 for known tokens
    clean: Tensor | None  # (N, pt·ph·pw·C) x_0, if a variance is learned
    text: TextPack | None
    text_ids: list[list[int]] | None  # of each caption
    routing: Routing | None  # the tokens that skip blocks, if any do
    level_edges: list[float]  # of the parts of the noise levels, for `by_level`


class FlowModule(nn.Module):
    """Everything that trains: the transformer, and the text encoder if it trains along."""

    def __init__(self, transformer: STDiT, text_encoder: TextEncoder | None, text_padding: int, path: Path) -> None:
        super().__init__()
        self.path = path
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.text_padding = text_padding

    def forward(self, batch: FlowBatch) -> Tensor:
        """Σ over tokens of weight · error."""
        text = self._text(batch)
        output = self.transformer(batch.pack, text, batch.routing).float()  # (N, pt·ph·pw·C_out)
        levels = batch.pack.levels[batch.pack.level_of]  # (N,)
        patch_volume = self.transformer.config.patch_volume
        errors = token_errors(self.path, output, batch.target, patch_volume, levels, batch.clean)  # (N,)
        weighted, weights = errors * batch.token_weights, batch.token_weights * batch.target.shape[1]
        batch.by_level = sums_by_level(torch.stack([weighted.detach(), weights]), levels, batch.level_edges)
        return weighted.sum()

    def _text(self, batch: FlowBatch) -> TextPack:
        if batch.text is not None:
            return batch.text
        assert self.text_encoder is not None and batch.text_ids is not None
        # `.forward`, past the hooks: ZeRO-3 counts the outputs of modules, and here their number varies by rank.
        return pack_texts(self.text_encoder.forward(batch.text_ids), self.text_padding)


class ClipTask(NamedTuple):
    """A clip's task, how many of its tokens are known by it, and the clip's weight in the loss."""

    task: Task
    known_tokens: int
    weight: float


class TrainingClip(NamedTuple):
    """A clip with its keyed draws. caption: empty if it is dropped."""

    example: Example
    item: PlanItem
    caption: str
    drawn: ClipTask


class NoisyClip(NamedTuple):
    """What a clip adds to a pack."""

    x0: Tensor  # (C, T', H', W') clean latents
    latents: Tensor  # (C, T', H', W'), known frames clean
    level: Tensor  # () or (T'/pt,), 0 where known
    target: Tensor  # (n, pt·ph·pw·C)
    token_weights: Tensor  # (n,)


class FlowObjective(Objective):
    """The error of the network's output for unknown tokens, along the path of its scheduler."""

    module: FlowModule

    def __init__(
        self,
        config: ObjectiveConfig,
        transformer: STDiT,
        vae: CausalVAE,
        text_encoder: TextEncoder,
        *,
        train_text: bool,
        text_padding: int,
        conditions: Conditions,
        remake: Callable[[], STDiT] | None = None,
        numbers: Numbers | None = None,
        scheduler: Mapping[str, Any] | None = None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        group: SequenceGroup | None = None,
    ) -> None:
        """
        remake: makes the transformer with its starting weights on the CPU. None if all of its weights train.
        numbers: the starting weights of a transformer that is on the meta device, by its own names.
        scheduler: the config of the scheduler that belongs to the weights. None: Wan's.
        dtype: of the transformer's input.
        group: the ranks that share every pack, of which `prepare` gives this rank's part. None: none do.
        """
        self.scheduler = dict(scheduler or unipc_config(config.flow.noise_levels.shift or 1.0))
        self.path = path_of(self.scheduler)
        self.noise_levels = config.flow.noise_levels
        if self.noise_levels.distribution == "own":
            self.noise_levels = replace(self.noise_levels, distribution=self.path.distribution)
        self.level_names = level_names(self.noise_levels)
        self.config, self.device, self.dtype, self.group = config, device, dtype, group
        self.tasks = config.flow.tasks or {"text_to_video": 1.0}
        if numbers is not None:
            self.numbers = lambda name, start, stop: numbers(name.removeprefix("transformer."), start, stop)
        self.remake = remake
        self.vae = vae.requires_grad_(False)
        self.conditions = conditions
        self.text_encoder = text_encoder
        self.train_text = train_text
        self.empty_text: Tensor | None = None  # (L, D) of "" from a cache, in its precision
        self.text_padding = text_padding
        self.module = FlowModule(transformer, text_encoder if train_text else None, text_padding, self.path)
        self.model_config, self.routed_blocks, share = transformer.config, range(0), 0.0
        if (routing := config.flow.routing) is not None:
            with error_context("objective.flow.routing"):
                self.routed_blocks, share = routing.blocks(transformer.config), routing.share
        self.cost = cost_coefficients(transformer.config, share, len(self.routed_blocks))
        self._ids = lru_cache(CAPTIONS_KEPT)(lambda caption: text_encoder.tokenize([caption])[0])
        largest = (text_padding or 512) * text_encoder.dim * dtype.itemsize
        kept = max(1, min(CAPTIONS_KEPT, EMBEDDED_BYTES // largest))
        self._embedding = lru_cache(kept)(lambda caption: text_encoder.encode([caption])[0].to("cpu", dtype))

    # ------------------------------------------------------------------------------------------------ clips to batches

    def prepare(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> FlowBatch:
        patch = self.model_config.patch
        clips = self.sorted_clips(examples, items, key)
        captions, beside = [clip.caption for clip in clips] or [""], [clip.example for clip in clips]
        if clips:
            levels = self.levels([clip.item for clip in clips], key)
            levels = self.path.trained_levels(levels, [example.shape for example in beside])  # t, (clips,)
            latents = self.latents(beside)
            held = self._held([clip.item.tokens for clip in clips])
            noisy = [self._add_noise(*one, key) for one in zip(clips, latents, levels, held)]
            conditions = self.conditions.of(beside, [clip.drawn.task for clip in clips])
        else:  # one token of weight 0: a rank without clips must run every module that the others run
            nothing, level = torch.zeros(self.model_config.latent_channels, *patch), torch.tensor(0.5).double()
            noisy = [NoisyClip(nothing, nothing, level, output_tokens(nothing, patch), torch.zeros(1))]
            conditions = [self.conditions.of_empty_clip()]
        pack = pack_clips([clip.latents for clip in noisy], [clip.level for clip in noisy], patch, conditions)
        pack, mine, my_clips = pack.to(self.device, self.dtype).part(self.group)
        inputs = {"latents": pack.tokens}
        text: TextPack | None = None
        ids: list[list[int]] | None = None
        if self.train_text:
            ids = [self._ids(caption) for caption in captions]
            text_lengths = tuple(len(row) + (len(row) < self.text_padding) for row in ids)  # padding is one token
            ids = ids[my_clips]
        else:
            text = self._text(captions, beside)
            text_lengths = text.segments.lengths
            text = text.part(my_clips)
            inputs["text embedding"] = text.tokens
        routing, lengths = self._routing(pack, clips, key), pack.segments.whole.lengths
        kept = routing.segments.whole.lengths if routing else lengths
        flops = 3 * transformer_flops(self.model_config, lengths, text_lengths, kept, len(self.routed_blocks))
        clean = self._clean_tokens([clip.x0 for clip in noisy])
        return FlowBatch(
            weight=self.weight(examples, key),
            flops=flops // (self.group.size if self.group else 1) if clips else 0,
            inputs=inputs,
            noise_level=max(float(clip.level.max()) for clip in noisy),
            pack=pack,
            target=torch.cat([clip.target for clip in noisy])[mine].float().to(self.device),
            token_weights=torch.cat([clip.token_weights for clip in noisy])[mine].to(self.device, non_blocking=True),
            clean=None if clean is None else clean[mine],
            text=text,
            text_ids=ids,
            routing=routing,
            level_edges=level_edges(self.noise_levels),
        )

    def sorted_clips(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> list[TrainingClip]:
        """Draws captions and tasks. Sorts, since attention runs equal token counts and text lengths side by side as one
        call."""
        clips = []
        for example, item in zip(examples, items):
            u = keyed_uniform(key.seed, "caption dropout", key.epoch, example.clip_id, example.occurrence)
            caption = "" if u < self.config.flow.caption_dropout else example.caption
            clips.append(TrainingClip(example, item, caption, self._draw_task(example, key)))
        return sorted(clips, key=lambda clip: (clip.item.tokens, len(self._ids(clip.caption))))

    def _draw_task(self, example: Example, key: StepKey) -> ClipTask:
        latent, patch = example.shape.latent(self.vae.config.stride), self.model_config.patch
        task = draw_task(
            self.tasks, latent.frames,
            seed=key.seed, epoch=key.epoch, clip_id=example.clip_id, occurrence=example.occurrence,
        )  # fmt: skip
        grid = latent.grid(patch)
        known = 0 if self.conditions.gives_latents else task.known_frames // patch[0] * grid.height * grid.width
        return ClipTask(task, known, clip_weight(example, grid.tokens - known, self.config.token_power))

    def levels(self, items: Sequence[PlanItem], key: StepKey) -> Tensor:
        """The noise level of each clip, (len(items),) fp64.

        If the scheduler shifts levels by a clip's size, training draws them shifted as much: for LTX-Video the
        logit-normal with its mean at log(shift) of Lightricks' trainer (ShiftedLogitNormalTimestepSampler).
        """
        tokens, shifts = [item.tokens for item in items], None
        if self.noise_levels.shift is None and self.scheduler.get("use_dynamic_shifting"):
            shifts = [dynamic_shift(count * self.model_config.patch_volume, self.scheduler) for count in tokens]
        return noise_levels(
            [item.position for item in items], key.clips, tokens, self.noise_levels,
            seed=key.seed, epoch=key.epoch, step=key.step, shifts=shifts,
        )  # fmt: skip

    def _held(self, tokens: Sequence[int]) -> list[range]:
        """Which of each clip's tokens this rank holds; of a pack that ranks share, there may be none."""
        total = sum(tokens)
        own = range(total) if self.group is None else self.group.own(total)
        ends = list(accumulate(tokens))
        starts = [end - count for end, count in zip(ends, tokens)]
        return [range(max(own.start, a) - a, min(own.stop, b) - a) for a, b in zip(starts, ends)]

    def _add_noise(self, clip: TrainingClip, x0: Tensor, t: Tensor, held: range, key: StepKey) -> NoisyClip:
        """x0: (C, T', H', W') clean latents. t: () noise level. held: the tokens that get noise."""
        example, (task, known, weight) = clip.example, clip.drawn
        noise = self._noise(example, x0, held, key)
        x, level = self.path.noisy(x0, noise, t), t
        if known:
            x[:, : task.known_frames] = x0[:, : task.known_frames]
            level = frame_levels(task.mask(x0.shape[1]), t, self.model_config.patch[0])
        target = output_tokens(self.path.target(x0, noise, t), self.model_config.patch)  # (n, pt·ph·pw·C)
        weight *= float(LEVEL_WEIGHTS[self.config.flow.level_weight](t, self.path))
        token_weights = torch.full((len(target),), weight / ((len(target) - known) * target.shape[1]))
        token_weights[:known] = 0  # the first tokens
        return NoisyClip(x0, x, level, target, token_weights)

    def _noise(self, example: Example, x0: Tensor, held: range, key: StepKey) -> Tensor:
        """Like x0, on its device; 0 but for the tokens in `held`, whose numbers are a range of the clip's stream."""
        patch, grid = self.model_config.patch, LatentShape(*x0.shape[1:]).grid(self.model_config.patch)
        each = x0.numel() // grid.tokens  # pt·ph·pw·C numbers
        stream = keyed_stream(key.seed, "noise", key.epoch, example.clip_id, example.occurrence)
        tokens = x0.new_zeros(grid.tokens, each)
        if held:
            numbers = stream.normal(held.start * each, held.stop * each, x0.device)
            tokens[held.start : held.stop] = numbers.view(-1, each)
        return unpatchify(tokens, grid, patch)

    def _routing(self, pack: TokenPack, clips: Sequence[TrainingClip], key: StepKey) -> Routing | None:
        if (config := self.config.flow.routing) is None or not clips:
            return None
        staying = [
            config.staying(tokens, clip.drawn.known_tokens, clip.example, key)
            for tokens, clip in zip(pack.segments.whole.lengths, clips)
        ]
        stays = torch.cat(staying)
        return None if stays.all() else Routing.of(pack, stays, self.routed_blocks)

    def _clean_tokens(self, latents: Sequence[Tensor]) -> Tensor | None:
        """x_0 as tokens, for the bound of a DDPM's learned variance."""
        if self.path.name != "ddpm" or self.model_config.out_channels <= self.model_config.latent_channels:
            return None
        return torch.cat([output_tokens(x0, self.model_config.patch) for x0 in latents]).to(self.device)

    @torch.no_grad()
    def latents(self, examples: Sequence[Example]) -> list[Tensor]:
        """(C, T', H', W') each, normalised: from the cache, or encoded now, equal shapes together."""
        latents: list[Tensor | None] = [None] * len(examples)
        missing: dict[VideoShape, list[int]] = {}
        for index, example in enumerate(examples):
            if example.latents is None:
                missing.setdefault(example.shape, []).append(index)
            else:
                latents[index] = example.latents.to(self.device, non_blocking=True).float()
        for indices in missing.values():
            clips = [clip for i in indices if (clip := examples[i].frames) is not None]
            moved = [clip.to(self.device, non_blocking=True) for clip in clips]  # as bytes
            video = torch.stack(list(map(to_video, moved)))
            for i, z in zip(indices, self.vae.encode(video.to(next(self.vae.parameters())))):
                latents[i] = z
        return [z.float() for z in latents if z is not None]

    def _text(self, captions: Sequence[str], examples: Sequence[Example]) -> TextPack:
        """Packed embeddings, from the cache or encoded now. examples: may be fewer: then of no clip."""
        texts = []
        for caption, example in zip_longest(captions, examples):
            if example is not None and example.text is not None and caption == example.caption:
                text = example.text
            elif example is not None and caption != example.caption and guided_by_null_text(self.model_config):
                text = self.module.transformer.get_buffer("null_text")[: len(self._ids(example.caption))]
            elif caption == "" and self.empty_text is not None:
                text = self.empty_text
            else:
                text = self._embedding(caption)
            texts.append(text.to(self.device, self.dtype, non_blocking=True))
        return pack_texts(texts, self.text_padding)

    # -------------------------------------------------------------------------------- for the planner and the exporter

    def tokens(self, shape: VideoShape) -> int:
        return shape.grid(self.vae.config.stride, self.model_config.patch).tokens

    def for_validation(self, levels: NoiseLevelConfig | None) -> FlowObjective:
        """The same objective, of the same weights, with captions never dropped, no routing, noise levels that count
        alike, the task text_to_video alone (if it is not trained: the trained ones), and packs that no ranks share.

        levels: of the noise. None: those of the training.
        """
        other = copy.copy(self)
        other.group = None
        flow = replace(self.config.flow, caption_dropout=0.0, level_weight="uniform", routing=None)
        other.config = replace(self.config, flow=flow)
        if self.tasks.get("text_to_video"):
            other.tasks = {"text_to_video": 1.0}
        if levels is not None:
            other.noise_levels = levels
            if isinstance(self.path, FlowPath):
                other.path = replace(self.path, by_shape=False)
        return other

    @property
    def flows(self) -> list[FlowObjective]:
        """One for every transformer."""
        return [self]

    def weight(self, examples: Sequence[Example], key: StepKey) -> float:
        return sum((self._draw_task(example, key).weight for example in examples), 0.0)

    def fresh(self, drawn: bool = True) -> FlowModule:
        with torch.random.fork_rng(devices=[]):
            encoder = None
            if self.train_text:
                inner = type(self.text_encoder.encoder)(self.text_encoder.encoder.config)
                encoder = TextEncoder(inner, self.text_encoder.tokenizer, self.text_encoder.max_length)
            return FlowModule(self._transformer(drawn), encoder, self.text_padding, self.path).eval()

    def _transformer(self, drawn: bool) -> STDiT:
        if self.remake is not None:
            return self.remake()
        if drawn or self.model_config.null_text:  # which is no parameter
            return STDiT(self.model_config)
        outlined = on_meta(self.model_config)
        assert isinstance(outlined, STDiT)
        return outlined.to(self.dtype).to_empty(device="cpu")

    def networks(self, module: nn.Module) -> tuple[STDiT, TextEncoder]:
        """What samples with a module of `fresh`: the transformer, and the text encoder, trained or frozen."""
        assert isinstance(module, FlowModule)
        return module.transformer, module.text_encoder or self.text_encoder
