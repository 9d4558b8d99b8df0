"""Checks the paths and weights that a run starts from, and chooses which parameters train."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

from stdit.errors import StditError, error_context, nearest_name
from stdit.models.config import TransformerConfig
from stdit.models.transformer import TEMPORAL_BLOCKS, STDiT
from stdit.training.config import ModelSettings
from stdit.weights.layouts import check_layout


def check_vae(path: str) -> None:
    """Raises StditError if nothing is at `vae.path`: a new user may have to train a VAE first."""
    if not Path(path).expanduser().exists():
        raise StditError(
            f"vae.path: {path}: no such file or folder. Train a VAE first (stdit train pretrain_vae), or name the "
            f"folder of one, such as Wan2.1-T2V-1.3B-Diffusers."
        )


def select_trainable(model: STDiT, settings: ModelSettings) -> None:
    """Freezes all parameters but those that `model.trainable` or `model.freeze` chooses."""
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
    """Raises StditError for a setting that the exported model folder cannot hold."""
    if settings.lora is None or settings.lora.merged:
        with error_context("model, as run/model will hold it"):
            check_layout(model, "diffusers")
