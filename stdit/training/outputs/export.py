"""What comes out of a run while it goes and at its end: averaged weights, validation samples, the model folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stdit.data.decode.write import write_video
from stdit.data.load.loader import Example, Loader
from stdit.data.manifest import read_manifest
from stdit.data.plan.buckets import assign
from stdit.data.plan.split import PlanItem
from stdit.diffusion.solvers import with_static_shift, write_scheduler
from stdit.errors import StditError
from stdit.evaluation.harness import reconstruct
from stdit.evaluation.metrics import mean_psnr
from stdit.files import check_copyable, copy_folder, publish_folder, publish_text, remove_folder, within, writing
from stdit.models.experts import Experts
from stdit.models.transformer import STDiT
from stdit.sampling.model_folder import Base, FolderSettings
from stdit.sampling.pipeline import Pipeline
from stdit.shapes import VideoShape
from stdit.training.config import RunConfig
from stdit.training.engine.ema import Ema
from stdit.training.engine.engine import Engine
from stdit.training.engine.parallel import World
from stdit.training.objectives.flow import FlowModule, FlowObjective
from stdit.training.objectives.two_experts import ExpertsModule, ExpertsObjective
from stdit.training.objectives.vae import VaeModule
from stdit.training.setup.build import RunComponents
from stdit.training.setup.frozen import check_unchanged
from stdit.training.setup.lora import export_adapters, merge_lora
from stdit.vae.autoencoder import CausalVAE, measure_latents
from stdit.vae.training.trainable_parts import join_split_kernels
from stdit.weights.expert_folders import expert_folders
from stdit.weights.io import save_transformer, save_vae
from stdit.weights.tensor_files import read_json

FORMAT = 1  # of export.json
VAE_CLIPS = 256  # at most as many measure the latents' mean and deviation


def averaged_weights(engine: Engine, ema: Ema | None, world: World) -> dict[str, Tensor] | None:
    """All averaged weights (without an average: the masters) in fp32 on rank 0's CPU, None elsewhere."""
    weights: dict[str, Tensor] = {}
    for flat, pieces in zip(ema.averages if ema is not None else engine.flat_masters, engine.pieces):
        numbers = flat.detach().reshape(-1)
        mine = [(piece, numbers[piece.start : piece.start + piece.numel].cpu()) for piece in pieces]
        gathered = [mine] if engine.replicated else world.gather_on_main(mine)
        for piece, part in (one for rank in gathered or [] for one in rank):
            if piece.name not in weights:
                weights[piece.name] = torch.empty(piece.shape)
            weights[piece.name].view(-1)[piece.offset : piece.offset + piece.numel] = part
    return weights if world.is_main else None


@torch.no_grad()
def with_weights(module: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A module of `Objective.fresh` filled with all weights that train; adapters and split kernels are joined again."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert parameters.keys() == weights.keys(), parameters.keys() ^ weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
    merge_lora(module)
    join_split_kernels(module)
    return module


def make_pipeline(parts: RunComponents, weights: dict[str, Tensor], world: World) -> Pipeline:
    """What samples with these weights, at the run's precision on this rank's device."""
    objective = parts.objective
    assert isinstance(objective, FlowObjective | ExpertsObjective)
    module = with_weights(objective.fresh(), weights).to(world.device, objective.dtype)
    transformer: STDiT | Experts
    if isinstance(objective, ExpertsObjective):
        assert isinstance(module, ExpertsModule)
        transformer = Experts(module.high.transformer, module.low.transformer, objective.boundary)
        text_encoder = objective.text_encoder  # frozen: it is the folder's own
    else:
        assert isinstance(module, FlowModule)
        transformer, text_encoder = module.transformer, module.text_encoder or objective.text_encoder
    scheduler = with_static_shift(objective.scheduler, parts.config.objective.flow.noise_levels.shift)
    return Pipeline(transformer, objective.vae, text_encoder, scheduler, _settings(parts))


def _settings(parts: RunComponents) -> FolderSettings:
    config, shapes = parts.config, tuple(map(str, parts.sampled_shapes))
    shift_tokens = config.objective.flow.noise_levels.shift_tokens
    return FolderSettings(config.data.fps, shapes, config.text.padding, shift_tokens)


def write_model(parts: RunComponents, weights: dict[str, Tensor], world: World, folder: Path) -> None:
    """Writes the model folder: that of `model.init` with what trained in its place, where all else is of there too.

    Of a run with adapters it is their files and where the rest is, or if asked for the rest with them merged."""
    config, objective = parts.config, parts.objective
    assert isinstance(objective, FlowObjective | ExpertsObjective)
    if (lora := config.model.lora) is not None:
        export_adapters(weights, folder, objective.model_config, lora, config.model.expert)
        if not lora.merged:
            return write_base(parts, folder)
    init = _copied_from(config)
    if init is None:
        return make_pipeline(parts, weights, world).save(folder)
    module = with_weights(objective.fresh(), weights)
    flows = [module.high, module.low] if isinstance(module, ExpertsModule) else [module]
    names = _trained_names(config, len(flows))
    index = read_json(init / "model_index.json")
    for place in _copied(init, names):
        copy_folder(place, folder / place.name)
    for name, flow in zip(names, flows):
        assert isinstance(flow, FlowModule)
        save_transformer(flow.transformer.to(objective.dtype), folder / name)
    if config.model.inflate:
        index[names[0]] = ["stdit", "STDiT"]  # so that no other program takes it for an image model
    publish_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        described = read_json(scheduler)
        if (moved := with_static_shift(described, config.objective.flow.noise_levels.shift)) != described:
            write_scheduler(moved, scheduler.parent)
    _settings(parts).write(folder)


def _copied_from(config: RunConfig) -> Path | None:
    """The model folder whose other parts an export takes as they are: that of `model.init`, if all is of there."""
    init = Path(config.model.init or "").expanduser()
    whole = config.model.init and (init / "model_index.json").is_file()
    return init if whole and {config.vae.path, config.text.path} == {str(init)} else None


def _trained_names(config: RunConfig, models: int) -> list[str]:
    """The folders that an export writes its transformers to."""
    names = list(expert_folders("diffusers").values())
    return names if models > 1 else [names[config.model.expert == "low"]]


def _copied(init: Path, trained: list[str]) -> list[Path]:
    """The folders of a model folder that an export copies."""
    index = read_json(init / "model_index.json")
    listed = [part for part, value in index.items() if isinstance(value, list) and any(value)]
    parts = listed or ("vae", "text_encoder", "tokenizer", "scheduler")  # a gathered folder's index lists none
    return [
        init / part for part in parts if part not in trained and ((init / part).is_dir() or (init / part).is_symlink())
    ]


def check_export(config: RunConfig) -> None:
    """Raises StditError before training for what an export would fail on or destroy in the end.

    config: with what follows from `model.init` filled in. That is a file that cannot be copied (a dangling link), a
    run/model that is an input of the run, or that no run wrote.
    """
    final = Path(config.run.path) / "model"
    for name, given in (
        ("model.init", config.model.init),
        ("vae.path", config.vae.path),
        ("text.path", config.text.path),
    ):
        if given and within(Path(given).expanduser(), final):
            raise StditError(f"{name} is {given}, in {final}, which the run would replace. Choose another run=PATH.")
    if (
        os.path.lexists(final)
        and not (final / "export.json").is_file()
        and not (final.is_dir() and not any(final.iterdir()))
    ):
        raise StditError(f"{final}: is there already, and no training wrote it. Rename it, or choose another run=PATH.")
    adapter = config.model.lora is not None and not config.model.lora.merged
    init = _copied_from(config)
    if config.objective.kind == "flow" and init is not None and not adapter:
        for place in _copied(init, _trained_names(config, 2 if config.model.expert == "both" else 1)):
            check_copyable(place)


def write_base(parts: RunComponents, folder: Path) -> None:
    """What makes a model folder of an adapter alone: where the weights below it are, and how they are sampled.

    Raises StditError where they are no longer those that the run began with.
    """
    config, objective = parts.config, parts.objective
    assert isinstance(objective, FlowObjective | ExpertsObjective)
    check_unchanged(config, parts.frozen)
    given = (config.model.init, config.vae.path, config.text.path)
    transformer, vae, text_encoder = (str(Path(place or "").expanduser().resolve()) for place in given)
    pipeline = objective.scheduler.get("_pipeline", "WanPipeline")
    base = Base(transformer, vae, text_encoder, pipeline)
    replace(base, content=base.contents()).write(folder)
    scheduler = with_static_shift(objective.scheduler, config.objective.flow.noise_levels.shift)
    write_scheduler(scheduler, folder / "scheduler")
    _settings(parts).write(folder)


def sample(pipeline: Pipeline, parts: RunComponents, step: int) -> list[str]:
    """Writes the validation prompts' clips to samples/step-N/; returns their paths within the run folder."""
    settings, run = parts.config.eval, Path(parts.config.run.path)
    size = None
    if settings.size:
        shape = VideoShape.parse(settings.size)
        size = (shape.width, shape.height)
    clips = pipeline(
        settings.prompts, size=size, frames=settings.frames,
        steps=settings.steps, guidance=settings.guidance, seed=settings.seed,
    )  # fmt: skip
    folder = run / "samples" / f"step-{step:08d}"
    about = []
    for index, (prompt, frames) in enumerate(zip(settings.prompts, clips)):
        words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")[:40]
        path = folder / f"{index:02d}-{words}.mp4"
        write_video(path, frames, parts.config.data.fps)
        about.append({"file": str(path.relative_to(run)), "prompt": prompt})
    publish_text(folder / "samples.json", json.dumps({"step": step, "samples": about}, indent=1, ensure_ascii=False))
    return [one["file"] for one in about]


def vae_psnr(vae: CausalVAE, parts: RunComponents) -> float:
    """Mean PSNR in dB of reconstructed clips: of eval.manifest (held out) if set, else of training clips."""
    found = []
    for example in _clips(parts, parts.config.eval.manifest, parts.config.eval.clips):  # one at a time in memory
        assert example.frames is not None
        frames = [example.frames.numpy()]
        found.append(mean_psnr(reconstruct(vae, frames), frames))
    if not found:
        raise StditError(f"{parts.config.eval.manifest or parts.manifest.source}: no clip to measure could be read.")
    return sum(found) / len(found)


def export_vae(parts: RunComponents, weights: dict[str, Tensor], step: int, world: World) -> dict[str, float]:
    """Measures the mean and deviation of the VAE's latents and publishes it. Returns its PSNR.

    Where only the decoder trained, the latents and with them the numbers that normalise them are what they were.
    """
    module = with_weights(parts.objective.fresh(), weights)
    assert isinstance(module, VaeModule)
    vae = module.vae.to(world.device)
    if parts.config.objective.vae.train != "decoder":
        videos = (one.video[None].to(world.device) for one in _clips(parts, None, VAE_CLIPS))
        mean, std = measure_latents(vae, videos)
        vae.config = replace(vae.config, latents_mean=mean, latents_std=std)

    def write(folder: Path) -> None:
        save_vae(vae, folder / "vae")
        FolderSettings(parts.config.data.fps, tuple(map(str, parts.shapes)), None).write(folder)

    measured = {"psnr": vae_psnr(vae, parts)}
    publish_model(Path(parts.config.run.path), step, write)
    return measured


def publish_model(run: Path, step: int, write: Callable[[Path], None]) -> None:
    """What `write` puts into a folder becomes run/model, whole or not at all, and says which step it is of."""
    final, temporary = run / "model", run / ".tmp-model"
    remove_folder(temporary)
    try:
        with writing(temporary):
            write(temporary)
            (temporary / "export.json").write_text(json.dumps({"format": FORMAT, "step": step}) + "\n")
            publish_folder(temporary, final)
    finally:  # a disk that is full gets its room back
        with suppress(OSError):
            remove_folder(temporary)


def exported_step(run: Path) -> int | None:
    """The step whose weights lie in run/model; None where there is no whole export."""
    try:
        return int(json.loads((run / "model" / "export.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _clips(parts: RunComponents, manifest_path: str | None, count: int) -> Iterator[Example]:
    """Up to `count` clips spread over a manifest, each cut to its shape from the start and the centre."""
    data = parts.config.data.fixed()
    manifest, assignment = parts.manifest, parts.assignment
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
