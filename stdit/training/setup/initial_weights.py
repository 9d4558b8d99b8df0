"""What a run starts from: the weights of `model.init`, and what follows from them where its config says nothing."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from stdit.diffusion.solvers import static_shift
from stdit.errors import StditError, error_context, nearest_name
from stdit.models.config import TransformerConfig
from stdit.models.transformer import TEMPORAL_BLOCKS, STDiT
from stdit.sampling.pipeline import FolderSettings
from stdit.training.config import ModelSettings, RunConfig
from stdit.weights.expert_folders import boundary_of, expert_places
from stdit.weights.layouts import check_layout
from stdit.weights.schedulers import scheduler_of
from stdit.weights.sources import find


def check_vae(path: str) -> None:
    """Raises where nothing is at `vae.path`: who trains from nothing has a VAE to train first."""
    if not Path(path).expanduser().exists():
        raise StditError(
            f"vae.path: {path}: no such file or folder. Train a VAE first (stdit train pretrain_vae), or name the "
            f"folder of one, such as Wan2.1-T2V-1.3B-Diffusers."
        )


def follow_init(config: RunConfig) -> RunConfig:
    """The config with its open settings filled in: from the folder that `model.init` names, or as for fresh weights.

    A model folder gives the VAE, the text encoder, the text padding, the shift of the noise levels (it stays unset
    where the scheduler has one for every size) and, for one of two experts, their range. Settings that are set stay.
    """
    settings, levels = config.model, config.objective.flow.noise_levels
    vae, text, padding, described = config.vae, config.text, 512, FolderSettings()
    shift: float | None = 1.0
    tokens, span, task = levels.shift_tokens, (0.0, 1.0), "text_to_video"
    if settings.init is not None and config.objective.kind == "flow":
        folder = Path(settings.init).expanduser()
        with error_context("model.init"):
            described = FolderSettings.read(folder)
            found: TransformerConfig = find("transformer", transformer_path(settings)).config
        task = "image_to_video" if found.image_channels > 1 else task
        task = "first_last_to_video" if found.image_text_positions else task
        padding = found.text_padding if described.text_padding is None else described.text_padding
        if vae.path is None and (folder / "vae").is_dir():
            vae = replace(vae, path=str(folder))
        if text.path is None and text.trained is None and (folder / "text_encoder").is_dir():
            text = replace(text, path=str(folder))
        if levels.shift is None:
            scheduler = scheduler_of(folder, found)
            by_size = tokens is None and scheduler.get("use_dynamic_shifting")
            shift = None if by_size else static_shift(scheduler)
            tokens = described.shift_tokens if tokens is None else tokens
        if settings.expert is not None and levels.range is None:
            boundary = boundary_of(folder, found.image_channels > 0)
            span = {"high": (boundary, 1.0), "low": (0.0, boundary), "both": span}[settings.expert]
    levels = replace(
        levels,
        shift=shift if levels.shift is None else levels.shift,
        shift_tokens=tokens,
        range=span if levels.range is None else levels.range,
    )
    flow = replace(config.objective.flow, noise_levels=levels, tasks=config.objective.flow.tasks or {task: 1.0})
    objective = replace(config.objective, flow=flow)
    text = replace(text, padding=padding if text.padding is None else text.padding)
    return replace(config, vae=vae, text=text, objective=objective)


def transformer_path(settings: ModelSettings) -> Path:
    """The folder or file of `model.init` that holds the transformer to train."""
    assert settings.init is not None
    folder = Path(settings.init).expanduser()
    places = expert_places(folder)
    if places is None and settings.expert is None:
        return folder
    if places is None:
        raise StditError(f"{folder}: holds no two experts for model.expert={settings.expert}. Leave it out.")
    if settings.expert is None:
        raise StditError(f"{folder}: holds two experts. Set model.expert: high, low or both.")
    return places["high" if settings.expert == "both" else settings.expert]


def transformer_paths(settings: ModelSettings) -> list[Path]:
    """The folders or files of `model.init` that hold what is trained, or trained over: both experts', if both are."""
    path = transformer_path(settings)
    places = expert_places(path.parent) if settings.expert == "both" else None
    return list(places.values()) if places else [path]


def select_trainable(model: STDiT, settings: ModelSettings) -> None:
    """Lets train what `model.trainable` and `model.freeze` say."""
    patterns = [TEMPORAL_BLOCKS] if settings.freeze else settings.trainable
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise StditError(
                f"model.trainable: {pattern!r} is no parameter's name.{nearest_name(pattern, parameters)} Patterns are "
                f"such as 'blocks.*.self_attn.*'."
            )
    for name, parameter in parameters.items():
        parameter.requires_grad_(not patterns or any(fnmatchcase(name, pattern) for pattern in patterns))


def check_export(settings: ModelSettings, model: TransformerConfig) -> None:
    """Raises StditError that names a setting which the exported model folder cannot hold."""
    if settings.lora is None or settings.lora.merged:
        with error_context("model, as run/model will hold it"):
            check_layout(model, "diffusers")
