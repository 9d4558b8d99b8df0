"""Fills in the settings that a config leaves open. The commands do this once, and hand the result down."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from stdit.diffusion.solvers import static_shift
from stdit.errors import StditError, error_context
from stdit.models.config import TransformerConfig
from stdit.sampling.model_folder import FolderSettings
from stdit.training.config import ModelSettings, RunConfig
from stdit.weights.expert_folders import boundary_of, expert_places
from stdit.weights.schedulers import scheduler_of
from stdit.weights.sources import Source, find


@dataclass(frozen=True)
class InitialModel:
    """What the headers at `model.init` say, read once.

    sources: the transformers to start from, by expert; None: the only one.
    settings: of stdit.json, or Wan's.
    scheduler: the config of the scheduler beside the weights, or their family's.
    boundary: the noise level between two experts, if the run needs it.
    """

    folder: Path
    sources: dict[str | None, Source]
    settings: FolderSettings
    scheduler: dict[str, Any]
    boundary: float | None

    @property
    def config(self) -> TransformerConfig:
        """The same for both experts."""
        config: TransformerConfig = next(iter(self.sources.values())).config
        return config


@dataclass
class ResolvedConfig(RunConfig):
    """A run's config without open settings. `initial` is None for fresh weights and for a VAE's training."""

    initial: InitialModel | None = field(default=None, metadata={"derived": True})  # no setting


def resolve(config: RunConfig) -> ResolvedConfig:
    """Fills in open settings from the model folder that `model.init` names, or with those of fresh weights.

    A model folder gives the VAE, the text encoder, the text padding, the shift of the noise levels (which stays open if
    the scheduler has one for every size) and, for one of two experts, their range. Settings that are set stay.
    """
    initial = None
    if config.model.init is not None and config.objective.kind == "flow":
        with error_context("model.init"):
            initial = _read(config, Path(config.model.init).expanduser())
    levels, tasks = config.objective.flow.noise_levels, config.objective.flow.tasks or {_task(initial): 1.0}
    shift, tokens = _shift(config, initial)
    span = (0.0, 1.0) if levels.range is None else levels.range
    if initial is not None and initial.boundary is not None and levels.range is None:
        span = {"high": (initial.boundary, 1.0), "low": (0.0, initial.boundary)}.get(config.model.expert or "", span)
    levels = replace(levels, shift=shift, shift_tokens=tokens, range=span)
    flow = replace(config.objective.flow, noise_levels=levels, tasks=tasks)
    vae, text, padding = config.vae, config.text, 512
    if initial is not None:
        padding = (
            initial.config.text_padding if initial.settings.text_padding is None else initial.settings.text_padding
        )
        if vae.path is None and (initial.folder / "vae").is_dir():
            vae = replace(vae, path=str(initial.folder))
        if text.path is None and text.trained is None and (initial.folder / "text_encoder").is_dir():
            text = replace(text, path=str(initial.folder))
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


def _task(initial: InitialModel | None) -> str:
    """The only task that weights can do which are given an image in every call."""
    if initial is not None and initial.config.image_text_positions:
        return "first_last_to_video"
    return "image_to_video" if initial is not None and initial.config.image_channels > 1 else "text_to_video"


def _shift(config: RunConfig, initial: InitialModel | None) -> tuple[float | None, int | None]:
    """`shift` and `shift_tokens` of the noise levels."""
    levels = config.objective.flow.noise_levels
    if levels.shift is not None or initial is None:
        return 1.0 if levels.shift is None else levels.shift, levels.shift_tokens
    if levels.shift_tokens is None and initial.scheduler.get("use_dynamic_shifting"):
        return None, initial.settings.shift_tokens
    tokens = initial.settings.shift_tokens if levels.shift_tokens is None else levels.shift_tokens
    return static_shift(initial.scheduler), tokens
