"""Makes scheduler configs, and reads and writes the scheduler/ of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stdit.diffusion.solvers.schedulers import SCHEDULERS, Config, check_scheduler, path_of
from stdit.errors import StditError, nearest_name
from stdit.files import publish_text


def euler_config(shift: float = 1.0) -> dict[str, Any]:
    """A scheduler config that diffusers reads as its flow Euler with a static shift."""
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": float(shift)}


def unipc_config(shift: float = 1.0) -> dict[str, Any]:
    """A scheduler config that diffusers reads as UniPC for flows, as Wan's model folders have it."""
    return {
        "_class_name": "UniPCMultistepScheduler",
        "num_train_timesteps": 1000,
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": float(shift),
        "solver_order": 2,
        "solver_type": "bh2",
        "final_sigmas_type": "zero",
    }


def named_config(name: str, config: Config) -> dict[str, Any]:
    """The config of a solver by its short name, with the static shift or the betas of the model's config.

    name: "euler" or "unipc" for flows; "dpm++", "ddim" or "ancestral" for DDPMs.
    config: the model's; {} only checks the name.
    """
    flows = {"euler": euler_config, "unipc": unipc_config}
    names = {
        "dpm++": "DPMSolverMultistepScheduler",
        "ddim": "DDIMScheduler",
        "ancestral": "EulerAncestralDiscreteScheduler",
    }
    if name not in flows and name not in names:
        known = (*flows, *names)
        raise StditError(f"solver {name!r} is not known: {', '.join(known)}.{nearest_name(name, known)}")
    if config and path_of(config).name != ("flow" if name in flows else "ddpm"):
        raise StditError(f"solver {name!r} is for other weights: this model's scheduler is {config['_class_name']}.")
    if name in flows:
        return flows[name](static_shift(config))
    kept = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    made = {"_class_name": names[name], **{key: config[key] for key in kept if key in config}}
    return made | ({"clip_sample": False} if name == "ddim" else {})


def with_static_shift(config: Config, shift: float | None) -> dict[str, Any]:
    """A scheduler config with this static shift, which also replaces one by the clip's size.

    Unchanged if shift is None or the scheduler uses no shift.
    """
    scheduler, dynamic = SCHEDULERS[config["_class_name"]], bool(config.get("use_dynamic_shifting"))
    if shift is None or not scheduler.shift or config.get("use_karras_sigmas"):
        return dict(config)
    if not dynamic and static_shift(config) == shift:
        return dict(config)
    return {**config, scheduler.shift: float(shift)} | ({"use_dynamic_shifting": False} if dynamic else {})


def static_shift(config: Config) -> float:
    """The shift that a scheduler config holds for all clips alike; 1 if it holds none."""
    scheduler = SCHEDULERS.get(config.get("_class_name", ""))
    return float(config.get(scheduler.shift, 1.0)) if scheduler and scheduler.shift else 1.0


def read_scheduler(folder: str | Path, pipeline: str = "", caller: str = "") -> dict[str, Any]:
    """The config in a model folder's scheduler/, checked.

    pipeline: the class that model_index.json names.
    caller: how that pipeline calls its scheduler, a key of `schedulers.CALLERS`.
    """
    path = Path(folder) / "scheduler_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise StditError(f"{path} does not exist. A model folder's scheduler/ holds it.") from None
    except ValueError as error:
        raise StditError(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise StditError(f"{path} holds {type(config).__name__}; it must be a JSON object.")
    config |= ({"_pipeline": pipeline} if pipeline else {}) | ({"_caller": caller} if caller else {})
    check_scheduler(config, str(path))
    return config


def write_scheduler(config: Config, folder: str | Path) -> None:
    """Writes scheduler_config.json as diffusers reads it."""
    kept = {key: value for key, value in config.items() if key not in ("_pipeline", "_caller")}
    publish_text(Path(folder) / "scheduler_config.json", json.dumps(kept, indent=2, sort_keys=True) + "\n")
