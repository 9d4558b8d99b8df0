"""Fills in the settings that a config leaves open. The commands do this once, and hand the result down."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from stdit.diffusion.solvers import static_shift
from stdit.errors import StditError, error_context
from stdit.models.config import TransformerConfig
from stdit.sampling.model_folder import FolderSettings
from stdit.training.config import ModelSettings, RunConfig
from stdit.weights.families import scheduler_of
from stdit.weights.sources import Source, boundary_of, expert_places, find


@dataclass(frozen=True)
class InitialModel:
    """What the headers at `model.init` say, read once."""

    folder: Path
    sources: dict[str | None, Source]  # the transformers to start from, by expert; None: the only one
    settings: FolderSettings  # of stdit.json, or Wan's
    scheduler: dict[str, Any]  # the config of the scheduler beside the weights, or their family's
    boundary: float | None  # the noise level between two experts, if the run needs it

    @property
    def config(self) -> TransformerConfig:
        """The same for both experts."""
        config: TransformerConfig = next(iter(self.sources.values())).config
        return config


@dataclass
class ResolvedConfig(RunConfig):
    """A run's config without open settings. `initial` is None for fresh weights and for a VAE's training."""

    initial: InitialModel | None = None


def resolve(config: RunConfig) -> ResolvedConfig:
    """Fills in open settings from the model folder that `model.init` names, or with those of fresh weights.

    A model folder gives the VAE, the text encoder, the text padding, the shift of the noise levels (which stays open if
    the scheduler has one for every size) and, for one of two experts, their range. Settings that are set stay.
    """
    initial: InitialModel | None = None
    vae, text, flow = config.vae, config.text, config.objective.flow
    levels, padding, span, task = flow.noise_levels, 512, (0.0, 1.0), "text_to_video"
    shift, tokens = levels.shift, levels.shift_tokens
    if config.model.init is not None and config.objective.kind == "flow":
        with error_context("model.init"):
            initial = _read(config, Path(config.model.init).expanduser())
        model, folder, settings = initial.config, initial.folder, initial.settings
        if vae.path is None and (folder / "vae").is_dir():
            vae = replace(vae, path=str(folder))
        if text.path is None and text.trained is None and (folder / "text_encoder").is_dir():
            text = replace(text, path=str(folder))
        padding = model.text_padding if settings.text_padding is None else settings.text_padding
        if initial.boundary is not None:
            spans = {"high": (initial.boundary, 1.0), "low": (0.0, initial.boundary)}
            span = spans.get(config.model.expert or "", span)
        if model.image_channels > 1 or model.image_text_positions:  # such weights can do one task alone
            task = "first_last_to_video" if model.image_text_positions else "image_to_video"
        if shift is None:
            if tokens is not None or not initial.scheduler.get("use_dynamic_shifting"):
                shift = static_shift(initial.scheduler)
            tokens = settings.shift_tokens if tokens is None else tokens
    elif shift is None:
        shift = 1.0
    span = span if levels.range is None else levels.range
    levels = replace(levels, shift=shift, shift_tokens=tokens, range=span)
    flow = replace(flow, noise_levels=levels, tasks=flow.tasks or {task: 1.0})
    text = replace(text, padding=padding if text.padding is None else text.padding)
    sections = {section.name: getattr(config, section.name) for section in fields(RunConfig)}
    sections |= {"vae": vae, "text": text, "objective": replace(config.objective, flow=flow)}
    return ResolvedConfig(**sections, initial=initial)


def _read(config: RunConfig, folder: Path) -> InitialModel:
    settings = FolderSettings.read(folder)
    sources = {expert: find("transformer", place) for expert, place in _places(config.model, folder).items()}
    found: TransformerConfig = next(iter(sources.values())).config
    expert, span = config.model.expert, config.objective.flow.noise_levels.range
    experts = expert == "both" or (expert is not None and span is None)
    boundary = boundary_of(folder, found.image_channels > 0) if experts else None
    return InitialModel(folder, sources, settings, scheduler_of(folder, found), boundary)


def _places(settings: ModelSettings, folder: Path) -> dict[str | None, Path]:
    """The folders or files of the transformers to start from, by expert."""
    places = expert_places(folder)
    if places is None and settings.expert is None:
        return {None: folder}
    if places is None:
        raise StditError(f"{folder}: holds no two experts for model.expert={settings.expert}. Leave it out.")
    if settings.expert is None:
        raise StditError(f"{folder}: holds two experts. Set model.expert: high, low or both.")
    return {name: place for name, place in places.items() if settings.expert in (name, "both")}
