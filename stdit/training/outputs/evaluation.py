"""Evaluates a run with its averaged weights: a VAE's PSNR; a transformer's held-out loss, samples and toy captions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from stdit.data.decode.write import write_video
from stdit.errors import StditError
from stdit.evaluation.harness import reconstruct, toy_shares
from stdit.evaluation.metrics import mean_psnr
from stdit.files import publish_text
from stdit.sampling.pipeline import Pipeline
from stdit.shapes import VideoShape
from stdit.training.config import EvalSettings
from stdit.training.engine.parallel import World
from stdit.training.objectives.vae import VaeModule
from stdit.training.outputs.export import make_pipeline
from stdit.training.outputs.held_out import held_out_loss
from stdit.training.outputs.spread import SpreadClip, share_clips
from stdit.training.setup.build import RunComponents
from stdit.vae.autoencoder import CausalVAE


def evaluate(components: RunComponents, module: nn.Module, world: World, step: int) -> dict[str, Any]:
    """The values of an `eval` line of metrics, as `eval` asks for them.

    All ranks call it together and share clips and prompts (`World.share_out`). The result is the same for any number
    of ranks and any ZeRO stage.

    module: of `export.trained_module`.
    """
    settings = components.config.eval
    if isinstance(module, VaeModule):
        return {"psnr": vae_psnr(module.vae, components, world)}
    found: dict[str, Any] = {}
    if settings.manifest is not None:
        found |= held_out_loss(module, components, world)
    pipeline = make_pipeline(components, module)
    if settings.toy is not None:
        shapes = [VideoShape.parse(shape) for shape in settings.toy.shapes] or components.sampled_shapes[:1]
        found["toy"] = toy_shares(
            pipeline, settings.toy.captions, shapes, settings.steps, settings.guidance, settings.seed, world.share_out
        )
    if settings.prompts:
        run, fps = Path(components.config.run.path), components.config.data.fps
        found["samples"] = sample(pipeline, settings, fps, run, step, world)
    return found


def described(values: dict[str, Any]) -> str:
    """The numbers of an `eval` line for the terminal; "" if there are none."""
    parts = [f"PSNR {values['psnr']:.2f} dB"] if "psnr" in values else []
    parts += [f"held-out loss {values['loss']:.4f}"] if "loss" in values else []
    for shape, shares in values.get("toy", {}).items():
        parts.append(f"{shape} right: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    return "; ".join(parts)


def vae_psnr(vae: CausalVAE, components: RunComponents, world: World) -> float:
    """Mean PSNR in dB of reconstructed clips: of eval.manifest (held out) if set, else of training clips."""
    settings = components.config.eval

    def measure(clip: SpreadClip) -> float:
        assert clip.example.frames is not None
        frames = [clip.example.frames.numpy()]
        return mean_psnr(reconstruct(vae, frames), frames)

    found = share_clips(components, settings.manifest, settings.clips, world, measure)
    if not found:
        raise StditError(f"{settings.manifest or components.manifest.source}: no clip to measure could be read.")
    return sum(found) / len(found)


def sample(pipeline: Pipeline, settings: EvalSettings, fps: float, run: Path, step: int, world: World) -> list[str]:
    """Writes the validation prompts' clips to run/samples/step-N/; returns their paths within the run folder."""
    shape = VideoShape.parse(settings.size) if settings.size else None
    folder = run / "samples" / f"step-{step:08d}"

    def write(index: int) -> dict[str, str]:
        prompt = settings.prompts[index]
        (frames,) = pipeline(
            [prompt], size=(shape.width, shape.height) if shape else None, frames=settings.frames,
            steps=settings.steps, guidance=settings.guidance, seed=settings.seed, indices=[index],
        )  # fmt: skip
        words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40]
        path = folder / f"{index:02d}-{words}.mp4"
        write_video(path, frames, fps)
        return {"file": str(path.relative_to(run)), "prompt": prompt}

    samples = world.share_out(range(len(settings.prompts)), write)
    if world.is_main:
        content = {"step": step, "samples": samples}
        publish_text(folder / "samples.json", json.dumps(content, indent=1, ensure_ascii=False))
    return [sample["file"] for sample in samples]
