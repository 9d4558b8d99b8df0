"""Which scheduler goes with weights: that of their model folder, or else the one that their family was released with.

It says the path of the weights, so how they are trained and sampled (`stdit.diffusion.solvers.path_of`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stdit.diffusion.solvers import euler_config, path_of, read_scheduler, unipc_config
from stdit.models.config import TransformerConfig
from stdit.weights.files import read_json

_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
_LTX = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
DDPMS: dict[str, dict[str, Any]] = {
    "pixart": {"_class_name": "DPMSolverMultistepScheduler", **_BETAS, "algorithm_type": "dpmsolver++"},
    "latte": {"_class_name": "DDIMScheduler", **_BETAS, "clip_sample": False},
    "allegro": {"_class_name": "EulerAncestralDiscreteScheduler", **_BETAS},
}


def default_scheduler(config: TransformerConfig) -> dict[str, Any]:
    """The config of the scheduler that a family was released with."""
    if config.family in DDPMS:
        return dict(DDPMS[config.family])
    if config.family == "stdit3":
        return {"_class_name": "RFLOW", "use_timestep_transform": True, "_pipeline": "OpenSoraPipeline"}
    if config.family == "ltx":
        return {
            **euler_config(),
            **_LTX,
            "use_dynamic_shifting": True,
            "shift_terminal": 0.1,
            "_pipeline": "LTXPipeline",
        }
    if config.family != "cosmos":
        return unipc_config()
    if config.network_time == "log_sigma":  # Cosmos-Predict1
        sigmas = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "final_sigmas_type": "sigma_min"}
        return {"_class_name": "EDMEulerScheduler", **sigmas, "_pipeline": "CosmosTextToWorldPipeline"}
    if config.text_embedding == "gelu":  # 2.5
        karras = {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
        return {**unipc_config(), **karras, "_pipeline": "Cosmos2_5_PredictBasePipeline"}
    return {**euler_config(), "use_karras_sigmas": True, "_pipeline": "Cosmos2TextToImagePipeline"}


def scheduler_of(path: str | Path, config: TransformerConfig) -> dict[str, Any]:
    """The config of the scheduler beside weights in a model folder, or their family's."""
    folder = Path(path).expanduser()
    if not (folder / "scheduler" / "scheduler_config.json").is_file():
        return default_scheduler(config)
    index = folder / "model_index.json"
    pipeline = read_json(index).get("_class_name", "") if index.is_file() else ""
    return read_scheduler(folder / "scheduler", pipeline)


def objective_of(config: TransformerConfig) -> str:
    """What weights of a family were trained to put out, in words."""
    learned = config.out_channels == 2 * config.latent_channels
    return {
        "flow": "rectified flow (velocity)",
        "ddpm": "DDPM (noise and learned variance)" if learned else "DDPM (noise)",
        "edm": "EDM (denoiser, preconditioned)",
    }[path_of(default_scheduler(config)).name]
