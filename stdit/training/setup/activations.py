"""Measures the activations of a training step, without data: the objective runs on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stdit.data.load.loader import Example
from stdit.data.plan.split import PlanItem
from stdit.models.operators import Recompute
from stdit.shapes import VideoShape
from stdit.training.config import RunConfig
from stdit.training.engine.engine import PRECISIONS
from stdit.training.objectives.flow import FlowBatch, FlowObjective
from stdit.training.objectives.protocol import Batch, Objective, StepKey
from stdit.training.objectives.vae import VaeObjective

NOWHERE = torch.device("meta")
CLIPS = 4  # clips per pack that is measured


def activations(
    config: RunConfig, objective: Objective, shape: VideoShape, tokens: int, recompute: Recompute | None = None
) -> int:
    """The peak of encoding, forward and backward of a pack, in bytes, beyond weights and gradients; see `MetaStep`."""
    return MetaStep(config, objective, shape, tokens).peak(recompute)


class MetaStep:
    """A micro-step on meta tensors, which have sizes and no data.

    It has up to CLIPS clips of a shape and a few blocks. More tokens are taken in proportion, and more blocks of a kind
    by what one more of them adds.

    objective: from `build_on_meta`; it is modified.
    tokens: of the pack.
    """

    def __init__(self, config: RunConfig, objective: Objective, shape: VideoShape, tokens: int) -> None:
        self.objective, self.tokens, each = objective, tokens, objective.tokens(shape)
        count = min(max(1, tokens // each), CLIPS)
        self._scale = tokens / (count * each)
        critic = objective.critic
        self._modules = [objective.module, *([critic.module] if critic else [])]
        for module in self._modules:
            module.to(PRECISIONS[config.run.precision]).train()
            for p in module.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(_drop_gradient)  # it goes to the engine's, which is counted
        frames = torch.empty(count, shape.frames, shape.height, shape.width, 3, dtype=torch.uint8, device=NOWHERE)
        latents: Sequence[Tensor | None] = [None] * count
        if isinstance(objective, FlowObjective) and config.data.cache is not None:
            size = (objective.model_config.latent_channels, *shape.latent(objective.vae.config.stride).sizes)
            latents = [torch.empty(size, device=NOWHERE) for _ in range(count)]
        examples = [Example(str(n), n, 0, 0, shape, 1.0, "", frames[n], latents[n]) for n in range(count)]
        items = [PlanItem(n, 0, 0, each, 1, n) for n in range(count)]
        networks = [*self._modules, *frozen_networks(objective)]  # views of their tensors are no activations either
        there = [tensor for one in networks for tensor in (*one.parameters(), *one.buffers())]
        watch = _Peak({tensor.untyped_storage()._cdata: 0 for tensor in [*there, frames]})
        with watch:
            self._batch = objective.prepare(examples, items, StepKey(0, 0, 0, count, critic.start if critic else 0))
        self.encoding = round(watch.most * self._scale)
        # What is there by now must stay: another storage at the address of one that is gone would not be counted.
        self._alive = (examples, there)
        self._held, self._held_bytes = dict(watch.sizes), watch.live
        self._peaks: dict[Recompute, int] = {}

    def peak(self, recompute: Recompute | None = None, group: int = 1, tokens: int | None = None) -> int:
        """Bytes on a rank at most.

        recompute: None: as the transformer of the objective is set.
        group: ranks that share the pack (`parallel.sequence_parallel`); each encodes it whole, and runs forward and
            backward on an equal share of its tokens.
        tokens: of the pack, if another one is asked for.
        """
        if tokens is not None and tokens != self.tokens:
            return round(self.peak(recompute, group) * tokens / self.tokens)
        if not isinstance(self.objective, FlowObjective):
            return max(self.encoding, self._training_peak(self._batch))
        recompute = recompute or self.objective.module.transformer.recompute
        if recompute not in self._peaks:
            self._peaks[recompute] = self._peak_of_all_blocks(self.objective, recompute)
        return max(self.encoding, -(-self._peaks[recompute] // group))

    def _peak_of_all_blocks(self, objective: FlowObjective, recompute: Recompute) -> int:
        skipped = len(objective.routed_blocks)
        whole, period = objective.model_config.layers - skipped, max(1, recompute.every)
        few, few_skipped = (min(count, 2 * period + count % period) for count in (whole, skipped))
        objective.module.transformer.recompute = recompute
        total = start = self._peak_with(few, few_skipped)
        if whole > few:
            total += (whole - few) // period * (self._peak_with(few + period, few_skipped) - start)
        if skipped > few_skipped:
            total += (skipped - few_skipped) // period * (self._peak_with(few, few_skipped + period) - start)
        return total

    def _peak_with(self, whole: int, skipped: int) -> int:
        """With so many blocks that all tokens run, and so many that routed tokens skip."""
        assert isinstance(self.objective, FlowObjective) and isinstance(self._batch, FlowBatch)
        model, routed, routing = self.objective.module.transformer, self.objective.routed_blocks, self._batch.routing
        held = {name: blocks for name, blocks in model.named_children() if isinstance(blocks, nn.ModuleList)}
        after = min(whole, self.objective.model_config.layers - routed.stop, 1) if routed else 0
        for name, blocks in held.items():
            setattr(model, name, blocks[: whole + skipped])
        if routing is not None:
            routing = replace(routing, blocks=range(whole - after, whole - after + skipped)) if skipped else None
        try:
            return self._training_peak(replace(self._batch, routing=routing))
        finally:
            for name, blocks in held.items():
                setattr(model, name, blocks)

    def _training_peak(self, batch: Batch) -> int:
        with _Peak(dict(self._held), self._held_bytes) as watch:
            for module in self._modules:
                module(batch).backward()
        return round(watch.most * self._scale)


def frozen_networks(objective: Objective) -> list[nn.Module]:
    """The networks that run on the clips and do not train: the VAE, or the LPIPS of a VAE's training."""
    if isinstance(objective, VaeObjective):
        return [] if objective.lpips is None else [objective.lpips]
    return [objective.vae]


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Peak(TorchDispatchMode):
    """Tracks the bytes of live storages that operators allocate on the meta device.

    sizes: of the storages that are there already, by their addresses, as far as they count. live: their sum.
    """

    def __init__(self, sizes: dict[int, int], live: int = 0) -> None:
        super().__init__()
        self.sizes, self.live, self.most = sizes, live, live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.device == NOWHERE:
                self._note(value.untyped_storage())
        self.most = max(self.most, self.live)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self.sizes.pop(key, 0)
