"""Evaluates a run with its averaged weights: a VAE's PSNR; a transformer's held-out loss, samples and toy captions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from stdit.data.decode.write import write_video
from stdit.errors import StditError
from stdit.evaluation.harness import reconstruct, toy_shares
from stdit.evaluation.metrics import mean_psnr
from stdit.files import publish_text
from stdit.sampling.pipeline import Pipeline
from stdit.shapes import VideoShape
from stdit.training.config import EvalSettings
from stdit.training.engine.parallel import World
from stdit.training.outputs.export import Weights, make_pipeline, trained_module, trained_vae
from stdit.training.outputs.held_out import held_out_loss
from stdit.training.outputs.spread import spread_clips
from stdit.training.setup.build import RunComponents
from stdit.vae.autoencoder import CausalVAE


def evaluate(components: RunComponents, weights: Weights, world: World, step: int) -> dict[str, Any]:
    """The values of an `eval` line of metrics, as `eval` asks for them; empty if it asks a transformer for nothing.

    Runs on rank 0, which holds the weights; so the result is the same for any ranks and ZeRO stage.
    """
    settings = components.config.eval
    if components.config.objective.kind == "vae":
        return {"psnr": vae_psnr(trained_vae(components, weights, world), components)}
    if not settings.asks_a_transformer:
        return {}
    module = trained_module(components, weights, world)
    found: dict[str, Any] = {}
    if settings.manifest is not None:
        found |= held_out_loss(module, components)
    pipeline = make_pipeline(components, module)
    if settings.toy is not None:
        shapes = [VideoShape.parse(shape) for shape in settings.toy.shapes] or components.sampled_shapes[:1]
        found["toy"] = toy_shares(
            pipeline, settings.toy.captions, shapes, settings.steps, settings.guidance, settings.seed
        )
    if settings.prompts:
        found["samples"] = sample(pipeline, settings, components.config.data.fps, components.config.run.path, step)
    return found


def described(values: dict[str, Any]) -> str:
    """The numbers of an `eval` line for the terminal; "" if there are none."""
    parts = [f"PSNR {values['psnr']:.2f} dB"] if "psnr" in values else []
    parts += [f"held-out loss {values['loss']:.4f}"] if "loss" in values else []
    for shape, shares in values.get("toy", {}).items():
        parts.append(f"{shape} right: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return "; ".join(parts)


def vae_psnr(vae: CausalVAE, components: RunComponents) -> float:
    """Mean PSNR in dB of reconstructed clips: of eval.manifest (held out) if set, else of training clips."""
    settings, found = components.config.eval, []
    for clip in spread_clips(components, settings.manifest, settings.clips):
        assert clip.example.frames is not None
        frames = [clip.example.frames.numpy()]
        found.append(mean_psnr(reconstruct(vae, frames), frames))
    if not found:
        raise StditError(f"{settings.manifest or components.manifest.source}: no clip to measure could be read.")
    return sum(found) / len(found)


def sample(pipeline: Pipeline, settings: EvalSettings, fps: float, run: str, step: int) -> list[str]:
    """Writes the validation prompts' clips to run/samples/step-N/; returns their paths within the run folder."""
    shape = VideoShape.parse(settings.size) if settings.size else None
    clips = pipeline(
        settings.prompts, size=(shape.width, shape.height) if shape else None, frames=settings.frames,
        steps=settings.steps, guidance=settings.guidance, seed=settings.seed,
    )  # fmt: skip
    folder = Path(run) / "samples" / f"step-{step:08d}"
    samples = []
    for index, (prompt, frames) in enumerate(zip(settings.prompts, clips)):
        words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40]
        path = folder / f"{index:02d}-{words}.mp4"
        write_video(path, frames, fps)
        samples.append({"file": str(path.relative_to(run)), "prompt": prompt})
    publish_text(folder / "samples.json", json.dumps({"step": step, "samples": samples}, indent=1, ensure_ascii=False))
    return [sample["file"] for sample in samples]
