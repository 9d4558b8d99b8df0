"""The loss of a transformer on held-out clips at fixed noise: it changes by what was learned alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stdit.data.load.cache import text_key
from stdit.data.load.loader import Example
from stdit.diffusion.noise_levels import NoiseLevelConfig
from stdit.errors import StditError
from stdit.training.engine.parallel import World
from stdit.training.objectives.levels import level_edges, level_names
from stdit.training.objectives.loss_weights import LEVEL_WEIGHTS
from stdit.training.objectives.protocol import StepKey
from stdit.training.objectives.two_experts import TransformerObjective
from stdit.training.outputs.spread import SpreadClip, share_clips
from stdit.training.setup.build import RunComponents


class ClipLoss(NamedTuple):
    """Of one clip, summed with its weight. errors: by part of the noise levels."""

    shape: str
    weight: float
    loss: float
    errors: dict[str, float]


def held_out_loss(module: nn.Module, components: RunComponents, world: World) -> dict[str, Any]:
    """{"loss": …, "loss_by_level": {"LOWEST-HIGHEST": …}, "loss_by_shape": {"WxHxT": {"LOWEST-HIGHEST": …}}} over clips
    of eval.manifest, the same for any number of ranks.

    loss: the training's loss on these clips in one step: the same weights, and the same distribution of noise levels,
        stratified over the clips. Captions are not dropped, and no frame is known (`FlowObjective.for_validation`).
    loss_by_level: the same clips' error with a noise level in each of PARTS equal parts, uniform within the part and
        stratified over the clips, without `objective.flow.level_weight`. So it compares runs that draw or weigh noise
        levels differently.
    loss_by_shape: the same, of the clips of each shape.

    A clip's noise is keyed by (eval.seed, clip), its levels by (eval.seed, place among the clips). Clips run one by
    one, so that nothing depends on how they are packed.

    module: of `objective.fresh()`, with trained weights, on every rank.
    """
    objective, settings = components.objective, components.config.eval
    assert isinstance(objective, TransformerObjective)
    parts = level_parts(objective.flows[0].noise_levels)
    own, by_part = objective.for_validation(None), {name: objective.for_validation(parts[name]) for name in parts}
    level_weight, path = LEVEL_WEIGHTS[components.config.objective.flow.level_weight], objective.flows[0].path

    @torch.no_grad()
    def measure(clip: SpreadClip) -> ClipLoss:
        examples, items = [_prepared(clip.example, components, objective)], [clip.item]
        key = StepKey(settings.seed, epoch=0, step=0, clips=clip.total)
        batch = own.prepare(examples, items, key)
        assert batch.noise_level is not None
        factor = level_weight(torch.tensor(batch.noise_level, dtype=torch.float64), path)
        loss = float(factor) * float(module(batch))
        errors = {name: float(module(part.prepare(examples, items, key))) for name, part in by_part.items()}
        return ClipLoss(str(clip.example.shape), batch.weight, loss, errors)

    clips = share_clips(components, settings.manifest, settings.clips, world, measure)
    if not sum(clip.weight for clip in clips):
        raise StditError(f"eval.manifest={settings.manifest}: no clip to measure could be read.")
    by_shape: dict[str, list[ClipLoss]] = {}
    for clip in clips:
        by_shape.setdefault(clip.shape, []).append(clip)
    return {
        "loss": sum(clip.loss for clip in clips) / sum(clip.weight for clip in clips),
        "loss_by_level": _by_level(clips),
        "loss_by_shape": {shape: _by_level(alike) for shape, alike in by_shape.items()},
    }


def _by_level(clips: Sequence[ClipLoss]) -> dict[str, float]:
    weight = sum(clip.weight for clip in clips)
    return {name: sum(clip.errors[name] for clip in clips) / weight for name in clips[0].errors}


def level_parts(levels: NoiseLevelConfig) -> dict[str, NoiseLevelConfig]:
    """PARTS equal parts of the range of noise levels, by name, such as "0.25-0.5"; each to be drawn from uniformly."""
    uniform = NoiseLevelConfig(distribution="uniform", shift=1.0)
    ranges = pairwise(level_edges(levels))
    return {name: replace(uniform, range=between) for name, between in zip(level_names(levels), ranges)}


def _prepared(example: Example, components: RunComponents, objective: TransformerObjective) -> Example:
    """The example with its latents, encoded once for all noise levels, and its text's embedding if that is cached."""
    text: Tensor | None = None
    if (cache := components.loader.text_cache) is not None:
        position = cache.position(text_key(example.caption))
        text = cache.tensor(position) if position >= 0 else None
    (latents,) = objective.flows[0].latents([example])
    return replace(example, latents=latents, text=text)
