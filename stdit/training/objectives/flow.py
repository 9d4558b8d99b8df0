"""The transformer's objective: the error of its output along its weights' path from clip to noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.diffusion.noise_levels import noise_levels
from stdit.diffusion.paths import Path, token_errors
from stdit.diffusion.solvers import dynamic_shift, path_of, unipc_config
from stdit.diffusion.tasks import Task, draw_task, frame_levels
from stdit.keyed import keyed_generator, keyed_uniform
from stdit.models.packing import TextPack, TokenPack, output_tokens, pack_inputs, pack_texts
from stdit.models.transformer import STDiT, cost_coefficients, transformer_flops
from stdit.pixels import to_video
from stdit.shapes import VideoShape
from stdit.text.encoders import TextEncoder
from stdit.training.objectives.conditions import Conditions
from stdit.training.objectives.config import ObjectiveConfig
from stdit.training.objectives.protocol import StepKey
from stdit.vae.autoencoder import CausalVAE
from stdit.weights.families import guided_by_null_text

CAPTIONS_KEPT = 4096  # tokenised or embedded, so that they need not be again
EMBEDDED_BYTES = 2**34  # of embeddings kept at most: 4096 whole ones of a T5-XXL in bf16, 167 of Cosmos-Reason1


@dataclass
class FlowBatch:
    """pack: noisy tokens; target: (N, pt·ph·pw·C) what the network is to put out; token_weights: (N,), 0 where known.

    clean: (N, pt·ph·pw·C) x_0 where a variance is learned, else None.
    text: packed embeddings, or None where `text_ids` (token ids a clip) go through an encoder that trains along.
    """

    pack: TokenPack
    target: Tensor
    token_weights: Tensor
    clean: Tensor | None
    text: TextPack | None
    text_ids: list[list[int]] | None
    weight: float
    flops: int

    @property
    def inputs(self) -> dict[str, Tensor]:
        text = {} if self.text is None else {"text embedding": self.text.tokens}
        return {"latents": self.pack.tokens, **text}

    @property
    def noise_level(self) -> float | None:
        return float(self.pack.levels.max())


class FlowModule(nn.Module):
    """Everything that trains: the transformer, and the text encoder if it trains along."""

    def __init__(self, transformer: STDiT, text_encoder: TextEncoder | None, text_padding: int, path: Path) -> None:
        super().__init__()
        self.path = path
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.text_padding = text_padding

    def forward(self, batch: FlowBatch) -> Tensor:
        text = batch.text
        if text is None:
            assert self.text_encoder is not None and batch.text_ids is not None
            # `.forward`, past the hooks: ZeRO-3 counts outputs of modules, and here a rank has as many as clips.
            text = pack_texts(self.text_encoder.forward(batch.text_ids), self.text_padding)
        output = self.transformer(batch.pack, text).float()  # (N, pt·ph·pw·C_out)
        places = self.transformer.config.patch_volume
        levels = batch.pack.levels[batch.pack.level_of]
        errors = token_errors(self.path, output, batch.target, places, levels, batch.clean)  # (N,)
        return (errors * batch.token_weights).sum()


class FlowObjective:
    """The error of what the network puts out for the unknown tokens, along the path that its scheduler says."""

    critic = None

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
        scheduler: Mapping[str, Any] | None = None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """remake: gives the transformer as it starts, on the CPU; None where all of its weights train.

        scheduler: the config of the one that belongs to the weights; None: Wan's.
        """
        self.scheduler = dict(scheduler or unipc_config(config.flow.noise_levels.shift or 1.0))
        self.path = path_of(self.scheduler)
        self.noise_levels = config.flow.noise_levels
        if self.noise_levels.distribution == "own":
            self.noise_levels = replace(self.noise_levels, distribution=self.path.distribution)
        self.config, self.device, self.dtype = config, device, dtype
        self.remake = remake or (lambda: STDiT(self.model_config))
        self.vae = vae.requires_grad_(False)
        self.conditions = conditions
        self.text_encoder = text_encoder
        self.train_text = train_text
        self.empty_text: Tensor | None = None  # (L, D) of "" from a cache, in its precision
        self.text_padding = text_padding
        self.module = FlowModule(transformer, text_encoder if train_text else None, text_padding, self.path)
        self.model_config = transformer.config
        self._ids = lru_cache(CAPTIONS_KEPT)(lambda caption: text_encoder.tokenize([caption])[0])
        largest = (text_padding or 512) * text_encoder.dim * dtype.itemsize
        kept = max(1, min(CAPTIONS_KEPT, EMBEDDED_BYTES // largest))
        self._embedding = lru_cache(kept)(lambda caption: text_encoder.encode([caption])[0].to("cpu", dtype))

    def tokens(self, shape: VideoShape) -> int:
        return shape.grid(self.vae.config.stride, self.model_config.patch).tokens

    @property
    def cost(self) -> tuple[int, int]:
        return cost_coefficients(self.model_config)

    def weight(self, examples: Sequence[Example], key: StepKey) -> float:
        return sum((self._task(example, key)[2] for example in examples), 0.0)

    def _task(self, example: Example, key: StepKey) -> tuple[Task, int, float]:
        """A clip's task, how many of its tokens are known by it, and the clip's weight in the loss."""
        latent, patch = example.shape.latent(self.vae.config.stride), self.model_config.patch
        task = draw_task(
            self.config.flow.tasks or {"text_to_video": 1.0}, latent.frames,
            seed=key.seed, epoch=key.epoch, clip_id=example.clip_id, occurrence=example.occurrence,
        )  # fmt: skip
        grid = latent.grid(patch)
        known = task.known_frames // patch[0] * grid.height * grid.width
        if self.conditions.gives_latents:
            known = 0
        return task, known, example.weight * (grid.tokens - known) ** self.config.token_power

    def levels(self, items: Sequence[PlanItem], key: StepKey) -> Tensor:
        """The noise level of each clip, (len(items),) fp64.

        Where a scheduler moves them by the clip's size, training draws them moved as much: for LTX-Video the
        logit-normal with its mean at log(shift) of Lightricks' trainer (ShiftedLogitNormalTimestepSampler).
        """
        tokens, shifts = [item.tokens for item in items], None
        if self.noise_levels.shift is None and self.scheduler.get("use_dynamic_shifting"):
            shifts = [dynamic_shift(count * self.model_config.patch_volume, self.scheduler) for count in tokens]
        return noise_levels(
            [item.position for item in items], key.clips, tokens, self.noise_levels,
            seed=key.seed, epoch=key.epoch, step=key.step, shifts=shifts,
        )  # fmt: skip

    def prepare(self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey) -> FlowBatch:
        if not examples:
            return self._nothing()
        patch = self.model_config.patch
        examples, items, captions = self.ordered(examples, items, key)
        latents = self._latents(examples)
        levels = self.path.trained_levels(self.levels(items, key), [example.shape for example in examples])
        noisy, clip_levels, targets, token_weights, tasks = [], [], [], [], []
        for example, x0, t in zip(examples, latents, levels):
            about = (key.epoch, example.clip_id, example.occurrence)
            generator = keyed_generator(key.seed, "noise", *about)
            noise = torch.randn(x0.shape, generator=generator).to(x0.device)
            task, known, weight = self._task(example, key)
            level = frame_levels(task.mask(x0.shape[1]), t, patch[0]) if known else t
            tasks.append(task)
            x = self.path.noisy(x0, noise, t)
            if known:
                x[:, : task.known_frames] = x0[:, : task.known_frames]
            noisy.append(x)
            clip_levels.append(level)
            target = output_tokens(self.path.target(x0, noise, t), patch)  # (n, pt·ph·pw·C)
            targets.append(target)

            each = torch.full((len(target),), weight / ((len(target) - known) * target.shape[1]))
            each[:known] = 0  # the first tokens
            token_weights.append(each)
        pack = pack_inputs(noisy, clip_levels, patch, self.conditions.of(examples, tasks))
        pack = pack.to(self.device, self.dtype)
        clean = None
        if self.path.name == "ddpm" and self.model_config.out_channels > self.model_config.latent_channels:
            clean = torch.cat([output_tokens(x0, patch) for x0 in latents]).to(self.device)
        text, ids = self._text(captions, examples)
        if text is not None:
            lengths = text.segments.lengths
        else:  # padding is one token
            lengths = tuple(len(one) + (len(one) < self.text_padding) for one in ids or [])
        flops = 3 * transformer_flops(self.model_config, pack.segments.lengths, lengths)
        return FlowBatch(
            pack,
            torch.cat(targets).float().to(self.device),
            torch.cat(token_weights).to(self.device),
            clean,
            text,
            ids,
            self.weight(examples, key),
            flops,
        )

    def ordered(
        self, examples: Sequence[Example], items: Sequence[PlanItem], key: StepKey
    ) -> tuple[list[Example], list[PlanItem], list[str]]:
        """Clips of equal token counts and text lengths side by side, so that attention takes them as one view; and
        their captions, some of them dropped."""

        def caption(example: Example) -> str:
            about = (key.epoch, example.clip_id, example.occurrence)
            dropped = keyed_uniform(key.seed, "caption dropout", *about) < self.config.flow.caption_dropout
            return "" if dropped else example.caption

        clips = [(example, item, caption(example)) for example, item in zip(examples, items)]
        clips.sort(key=lambda clip: (clip[1].tokens, len(self._ids(clip[2]))))
        return [clip[0] for clip in clips], [clip[1] for clip in clips], [clip[2] for clip in clips]

    def fresh(self) -> FlowModule:
        with torch.random.fork_rng(devices=[]):
            encoder = None
            if self.train_text:
                inner = type(self.text_encoder.encoder)(self.text_encoder.encoder.config)
                encoder = TextEncoder(inner, self.text_encoder.tokenizer, self.text_encoder.max_length)
            return FlowModule(self.remake(), encoder, self.text_padding, self.path).eval()

    def transformers(self, module: nn.Module) -> list[STDiT]:
        """The transformers in a module of `fresh`."""
        assert isinstance(module, FlowModule)
        return [module.transformer]

    def networks(self, module: nn.Module) -> tuple[STDiT, TextEncoder]:
        """What samples with a module of `fresh`: the transformer, and the text encoder, trained or frozen."""
        assert isinstance(module, FlowModule)
        return module.transformer, module.text_encoder or self.text_encoder

    def _nothing(self) -> FlowBatch:
        """One token of weight 0: a rank without clips runs every module that the others run."""
        patch = self.model_config.patch
        clip = torch.zeros(self.model_config.latent_channels, *patch)
        level = torch.full((), 0.5, dtype=torch.float64)
        pack = pack_inputs([clip], [level], patch, [self.conditions.nothing()]).to(self.device, self.dtype)
        text, ids = self._text([""], [None])
        zeros = output_tokens(clip, patch).to(self.device)
        weights = torch.zeros(1, device=self.device)
        return FlowBatch(pack, zeros, weights, zeros, text, ids, 0.0, 0)

    @torch.no_grad()
    def _latents(self, examples: Sequence[Example]) -> list[Tensor]:
        """(C, T', H', W') each, normalised: from the cache, or encoded now, equal shapes together."""
        latents = [z if (z := example.latents) is None else self._moved(z).float() for example in examples]
        missing: dict[VideoShape, list[int]] = {}
        for index, (example, found) in enumerate(zip(examples, latents)):
            if found is None:
                missing.setdefault(example.shape, []).append(index)
        for indices in missing.values():
            # frames go as bytes, a quarter of what the VAE takes
            frames = [examples[i].frames for i in indices]
            video = torch.stack([to_video(self._moved(one)) for one in frames if one is not None])
            video = video.to(next(self.vae.parameters()))
            for i, z in zip(indices, self.vae.encode(video)):
                latents[i] = z
        return [z.float() for z in latents if z is not None]

    def _moved(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)

    def _text(self, captions: Sequence[str], examples: Sequence[Example | None]) -> tuple[TextPack | None, list | None]:
        """Packed embeddings, or the token ids of an encoder that trains along."""
        if self.train_text:
            return None, [self._ids(caption) for caption in captions]
        texts = []
        for caption, example in zip(captions, examples):
            if example is not None and example.text is not None and caption == example.caption:
                text = example.text
            elif example is not None and caption != example.caption and guided_by_null_text(self.model_config):
                text = self.module.transformer.get_buffer("null_text")[: len(self._ids(example.caption))]
            elif caption == "" and self.empty_text is not None:
                text = self.empty_text
            else:
                text = self._embedding(caption)
            texts.append(text.to(self.device, self.dtype))
        return pack_texts(texts, self.text_padding), None
