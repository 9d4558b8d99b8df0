"""Evaluates a run's weights: samples of the validation prompts, or the PSNR of a VAE's reconstructions."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from stdit.data.decode.write import write_video
from stdit.data.load.loader import Example, Loader
from stdit.data.manifest import read_manifest
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.diffusion.solvers import with_static_shift
from stdit.errors import StditError
from stdit.evaluation.harness import reconstruct
from stdit.evaluation.metrics import mean_psnr
from stdit.files import publish_text
from stdit.sampling.model_folder import FolderSettings
from stdit.sampling.pipeline import Pipeline
from stdit.shapes import VideoShape
from stdit.training.engine.parallel import World
from stdit.training.objectives.two_experts import TransformerObjective
from stdit.training.objectives.vae import VaeModule
from stdit.training.outputs.weights import with_weights
from stdit.training.setup.build import RunComponents
from stdit.vae.autoencoder import CausalVAE


def evaluate(components: RunComponents, weights: dict[str, Tensor] | None, world: World, step: int) -> dict[str, Any]:
    """The values of an `eval` line of metrics: psnr, or samples; empty for a transformer without prompts.

    weights: of `averaged_weights`, so on rank 0.
    """
    assert weights is not None
    if components.config.objective.kind == "vae":
        return {"psnr": vae_psnr(trained_vae(components, weights, world), components)}
    if not components.config.eval.prompts:
        return {}
    return {"samples": sample(make_pipeline(components, weights, world), components, step)}


def trained_vae(components: RunComponents, weights: dict[str, Tensor], world: World) -> CausalVAE:
    module = with_weights(components.objective.fresh(), weights)
    assert isinstance(module, VaeModule)
    return module.vae.to(world.device)


def vae_psnr(vae: CausalVAE, components: RunComponents) -> float:
    """Mean PSNR in dB of reconstructed clips: of eval.manifest (held out) if set, else of training clips."""
    settings, found = components.config.eval, []
    for example in spread_clips(components, settings.manifest, settings.clips):  # one at a time in memory
        assert example.frames is not None
        frames = [example.frames.numpy()]
        found.append(mean_psnr(reconstruct(vae, frames), frames))
    if not found:
        raise StditError(f"{settings.manifest or components.manifest.source}: no clip to measure could be read.")
    return sum(found) / len(found)


def make_pipeline(components: RunComponents, weights: dict[str, Tensor], world: World) -> Pipeline:
    """A pipeline with these weights, in the run's precision on this rank's device."""
    objective = components.objective
    assert isinstance(objective, TransformerObjective)
    module = with_weights(objective.fresh(), weights).to(world.device, objective.dtype)
    transformer, text_encoder = objective.networks(module)
    scheduler = with_static_shift(objective.scheduler, components.config.objective.flow.noise_levels.shift)
    return Pipeline(transformer, objective.vae, text_encoder, scheduler, folder_settings(components))


def folder_settings(components: RunComponents) -> FolderSettings:
    """How the exported model folder is sampled by default."""
    config, shapes = components.config, tuple(map(str, components.sampled_shapes))
    return FolderSettings(config.data.fps, shapes, config.text.padding, config.objective.flow.noise_levels.shift_tokens)


def sample(pipeline: Pipeline, components: RunComponents, step: int) -> list[str]:
    """Writes the validation prompts' clips to samples/step-N/; returns their paths within the run folder."""
    settings, run = components.config.eval, Path(components.config.run.path)
    size = None
    if settings.size:
        shape = VideoShape.parse(settings.size)
        size = (shape.width, shape.height)
    clips = pipeline(
        settings.prompts, size=size, frames=settings.frames,
        steps=settings.steps, guidance=settings.guidance, seed=settings.seed,
    )  # fmt: skip
    folder = run / "samples" / f"step-{step:08d}"
    samples = []
    for index, (prompt, frames) in enumerate(zip(settings.prompts, clips)):
        words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40]
        path = folder / f"{index:02d}-{words}.mp4"
        write_video(path, frames, components.config.data.fps)
        samples.append({"file": str(path.relative_to(run)), "prompt": prompt})
    publish_text(folder / "samples.json", json.dumps({"step": step, "samples": samples}, indent=1, ensure_ascii=False))
    return [sample["file"] for sample in samples]


def spread_clips(components: RunComponents, manifest_path: str | None, count: int) -> Iterator[Example]:
    """Up to `count` clips spread over a manifest, or over the run's; each cut to its shape from start and centre."""
    data = components.config.data.fixed()
    manifest, assignment = components.manifest, components.assignment
    if manifest_path is not None:
        manifest = read_manifest(manifest_path)
        assignment = assign(manifest, data)
    rows = [int(row) for row in (assignment.bucket >= 0).nonzero()[0]]
    rows = rows[:: max(1, len(rows) // count)][:count]
    loader = Loader(manifest, assignment, data, seed=0)
    batches = [[PlanItem(row, 0, int(assignment.bucket[row]), 0, 0, 0)] for row in rows]
    for (example,) in loader.iterate(batches, epoch=0):
        if example.failure is None:
            yield example
