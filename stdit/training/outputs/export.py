"""Exports the trained weights as the run's model folder, run/model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from stdit.diffusion.solvers import with_static_shift, write_scheduler
from stdit.errors import StditError
from stdit.files import check_copyable, copy_folder, publish_folder, publish_text, remove_folder, within, writing
from stdit.sampling.base_weights import BaseWeights
from stdit.sampling.model_folder import FolderSettings
from stdit.training.config import RunConfig
from stdit.training.engine.parallel import World
from stdit.training.objectives.two_experts import TransformerObjective
from stdit.training.outputs.evaluate import folder_settings, make_pipeline, spread_clips, trained_vae
from stdit.training.outputs.weights import with_weights
from stdit.training.setup.build import RunComponents
from stdit.training.setup.frozen import check_unchanged
from stdit.training.setup.lora import export_adapters
from stdit.vae.autoencoder import measure_latents
from stdit.weights.expert_folders import expert_folders
from stdit.weights.io import save_transformer, save_vae
from stdit.weights.tensor_files import read_json

FORMAT = 1  # of export.json
VAE_CLIPS = 256  # to measure the latents' mean and deviation on, at most


def export(components: RunComponents, weights: dict[str, Tensor] | None, world: World, step: int) -> None:
    """Publishes run/model. weights: of `averaged_weights`, so on rank 0."""
    assert weights is not None
    write = write_vae if components.config.objective.kind == "vae" else write_model
    publish_model(Path(components.config.run.path), step, partial(write, components, weights, world))


def write_vae(components: RunComponents, weights: dict[str, Tensor], world: World, folder: Path) -> None:
    """Writes a VAE's folder. If its encoder trained, measures the latents' mean and deviation anew."""
    vae = trained_vae(components, weights, world)
    if components.config.objective.vae.train != "decoder":
        videos = (example.video[None].to(world.device) for example in spread_clips(components, None, VAE_CLIPS))
        mean, std = measure_latents(vae, videos)
        vae.config = replace(vae.config, latents_mean=mean, latents_std=std)
    save_vae(vae, folder / "vae")
    FolderSettings(components.config.data.fps, tuple(map(str, components.shapes)), None).write(folder)


def write_model(components: RunComponents, weights: dict[str, Tensor], world: World, folder: Path) -> None:
    """Writes a model folder: a copy of model.init's with the trained transformers, if all else comes from there too.

    A run with adapters writes their files and where the base model is, or if asked the base model with them merged.
    """
    config, objective = components.config, components.objective
    assert isinstance(objective, TransformerObjective)
    if (lora := config.model.lora) is not None:
        export_adapters(weights, folder, objective.model_config, lora, config.model.expert)
        if not lora.merged:
            return write_base(components, folder)
    init = _copied_from(config)
    if init is None:
        return make_pipeline(components, weights, world).save(folder)
    transformers = objective.transformers(with_weights(objective.fresh(), weights))
    names = _trained_names(config, len(transformers))
    for path in _copied(init, names):
        copy_folder(path, folder / path.name)
    for name, transformer in zip(names, transformers):
        save_transformer(transformer.to(objective.dtype), folder / name)
    index = read_json(init / "model_index.json")
    if config.model.inflate:
        index[names[0]] = ["stdit", "STDiT"]  # so that no other program takes it for an image model
    publish_text(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        described = read_json(scheduler)
        if (moved := with_static_shift(described, config.objective.flow.noise_levels.shift)) != described:
            write_scheduler(moved, scheduler.parent)
    folder_settings(components).write(folder)


def write_base(components: RunComponents, folder: Path) -> None:
    """Makes a model folder of an adapter alone: where its base model is, and how to sample it.

    Raises StditError if the base model's files have changed since the run began.
    """
    config, objective = components.config, components.objective
    assert isinstance(objective, TransformerObjective)
    check_unchanged(config, components.frozen)
    given = (config.model.init, config.vae.path, config.text.path)
    transformer, vae, text_encoder = (str(Path(path or "").expanduser().resolve()) for path in given)
    pipeline = objective.scheduler.get("_pipeline", "WanPipeline")
    base = BaseWeights(transformer, vae, text_encoder, pipeline)
    replace(base, content=base.contents()).write(folder)
    scheduler = with_static_shift(objective.scheduler, config.objective.flow.noise_levels.shift)
    write_scheduler(scheduler, folder / "scheduler")
    folder_settings(components).write(folder)


def _copied_from(config: RunConfig) -> Path | None:
    """The model folder to copy the other parts from: model.init's, if the VAE and the text encoder are its own."""
    init = Path(config.model.init or "").expanduser()
    whole = config.model.init and (init / "model_index.json").is_file()
    return init if whole and {config.vae.path, config.text.path} == {str(init)} else None


def _trained_names(config: RunConfig, transformers: int) -> list[str]:
    """The names of the exported transformers' folders."""
    names = list(expert_folders("diffusers").values())
    return names if transformers > 1 else [names[config.model.expert == "low"]]


def _copied(init: Path, trained: list[str]) -> list[Path]:
    """The folders of a model folder that an export copies."""
    index = read_json(init / "model_index.json")
    listed = [part for part, value in index.items() if isinstance(value, list) and any(value)]
    parts = listed or ("vae", "text_encoder", "tokenizer", "scheduler")  # a gathered folder's index lists none
    return [
        init / part for part in parts if part not in trained and ((init / part).is_dir() or (init / part).is_symlink())
    ]


def check_export(config: RunConfig) -> None:
    """Raises StditError before training for what would make the export fail or destroy something.

    That is a file that cannot be copied (a dangling link), or a run/model that is an input of the run or that no run
    wrote.
    """
    final = Path(config.run.path) / "model"
    inputs = {"model.init": config.model.init, "vae.path": config.vae.path, "text.path": config.text.path}
    for name, given in inputs.items():
        if given and within(Path(given).expanduser(), final):
            raise StditError(f"{name} is {given}, in {final}, which the run would replace. Choose another run=PATH.")
    is_empty = final.is_dir() and not any(final.iterdir())
    if os.path.lexists(final) and not (final / "export.json").is_file() and not is_empty:
        raise StditError(f"{final}: is there already, and no training wrote it. Rename it, or choose another run=PATH.")
    adapter_alone = config.model.lora is not None and not config.model.lora.merged
    init = _copied_from(config)
    if config.objective.kind == "flow" and init is not None and not adapter_alone:
        for path in _copied(init, _trained_names(config, 2 if config.model.expert == "both" else 1)):
            check_copyable(path)


def publish_model(run: Path, step: int, write: Callable[[Path], None]) -> None:
    """Makes run/model of what `write` puts into a folder, whole or not at all, and records the step."""
    final, temporary = run / "model", run / ".tmp-model"
    remove_folder(temporary)
    try:
        with writing(temporary):
            write(temporary)
            (temporary / "export.json").write_text(json.dumps({"format": FORMAT, "step": step}) + "\n")
            publish_folder(temporary, final)
    finally:  # frees a full disk
        with suppress(OSError):
            remove_folder(temporary)


def exported_step(run: Path) -> int | None:
    """The step whose weights are in run/model; None if there is no whole export."""
    try:
        return int(json.loads((run / "model" / "export.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
