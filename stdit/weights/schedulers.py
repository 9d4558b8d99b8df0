"""The scheduler of weights: their model folder's, else the one that their family was released with.

It decides the path of the weights, and so how they are trained and sampled (`stdit.diffusion.solvers.path_of`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stdit.diffusion.solvers import path_of, read_scheduler
from stdit.models.config import TransformerConfig
from stdit.weights.families import family_of, pipelines
from stdit.weights.tensor_files import read_json


def scheduler_of(path: str | Path, config: TransformerConfig) -> dict[str, Any]:
    """The scheduler config of the model folder at `path`, else the family's."""
    folder = Path(path).expanduser()
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        return family_of(config).scheduler(config)
    index = folder / "model_index.json"
    if not index.is_file():
        return read_scheduler(folder / "scheduler")
    pipeline = str(read_json(index).get("_class_name", ""))
    kind = pipelines().get(pipeline)
    return read_scheduler(folder / "scheduler", pipeline, kind.caller if kind else "plain")


def objective_of(config: TransformerConfig) -> str:
    """The training objective of a config's family, in words."""
    learned = config.out_channels == 2 * config.latent_channels
    return {
        "flow": "rectified flow (velocity)",
        "ddpm": "DDPM (noise and learned variance)" if learned else "DDPM (noise)",
        "edm": "EDM (denoiser, preconditioned)",
    }[path_of(family_of(config).scheduler(config)).name]
