"""The loss of a transformer on held-out clips at fixed noise: it changes by what was learned alone."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from stdit.data.load.cache import text_key
from stdit.data.load.loader import Example
from stdit.diffusion.noise_levels import NoiseLevelConfig
from stdit.errors import StditError
from stdit.training.objectives.loss_weights import LEVEL_WEIGHTS
from stdit.training.objectives.protocol import StepKey
from stdit.training.objectives.two_experts import TransformerObjective
from stdit.training.outputs.spread import spread_clips
from stdit.training.setup.build import RunComponents

BINS = 4  # equal parts of the noise levels, for `loss_by_level`


@torch.no_grad()
def held_out_loss(module: nn.Module, components: RunComponents) -> dict[str, Any]:
    """{"loss": …, "loss_by_level": {"LOWEST-HIGHEST": …}} over clips of eval.manifest.

    loss: the training's loss on these clips in one step: the same weights, and the same distribution of noise levels,
        stratified over the clips. Captions are not dropped, and no frame is known (`FlowObjective.for_validation`).
    loss_by_level: the same clips' error with a noise level in each of BINS equal parts, uniform within the part and
        stratified over the clips, without `objective.flow.level_weight`. So it compares runs that draw or weigh noise
        levels differently.

    A clip's noise is keyed by (eval.seed, clip), its levels by (eval.seed, place among the clips). Clips run one by
    one, so that nothing depends on how they are packed.

    module: of `objective.fresh()`, with trained weights.
    """
    objective, settings = components.objective, components.config.eval
    assert isinstance(objective, TransformerObjective)
    parts = level_parts(objective.flows[0].noise_levels)
    own, by_part = objective.for_validation(None), {name: objective.for_validation(parts[name]) for name in parts}
    level_weight, path = LEVEL_WEIGHTS[components.config.objective.flow.level_weight], objective.flows[0].path
    weights, loss, errors = 0.0, 0.0, dict.fromkeys(parts, 0.0)
    for item, example, total in spread_clips(components, settings.manifest, settings.clips):
        example = _prepared(example, components, objective)
        key = StepKey(settings.seed, epoch=0, step=0, clips=total)
        batch = own.prepare([example], [item], key)
        assert batch.noise_level is not None
        factor = level_weight(torch.tensor(batch.noise_level, dtype=torch.float64), path)
        weights += batch.weight
        loss += float(factor) * float(module(batch))
        for name, part in by_part.items():
            errors[name] += float(module(part.prepare([example], [item], key)))
    if not weights:
        raise StditError(f"eval.manifest={settings.manifest}: no clip to measure could be read.")
    return {"loss": loss / weights, "loss_by_level": {name: error / weights for name, error in errors.items()}}


def level_parts(levels: NoiseLevelConfig) -> dict[str, NoiseLevelConfig]:
    """BINS equal parts of the range of noise levels, by name, such as "0.25-0.5"; each to be drawn from uniformly."""
    low, high = levels.range or (0.0, 1.0)
    edges = [low + (high - low) * part / BINS for part in range(BINS + 1)]
    uniform = NoiseLevelConfig(distribution="uniform", shift=1.0)
    return {f"{a:.4g}-{b:.4g}": replace(uniform, range=(a, b)) for a, b in pairwise(edges)}


def _prepared(example: Example, components: RunComponents, objective: TransformerObjective) -> Example:
    """The example with its latents, encoded once for all noise levels, and its text's embedding if that is cached."""
    text: Tensor | None = None
    if (cache := components.loader.text_cache) is not None:
        position = cache.position(text_key(example.caption))
        text = cache.tensor(position) if position >= 0 else None
    (latents,) = objective.flows[0].latents([example])
    return replace(example, latents=latents, text=text)
