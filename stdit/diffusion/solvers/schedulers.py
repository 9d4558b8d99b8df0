"""The configs of schedulers, as diffusers writes them: made, read, checked; the path of the weights; the solver.

Every option of a scheduler is obeyed or refused by name; keys that diffusers ignores are ignored. Some pipelines of
diffusers call their scheduler in a way of their own: `_caller` in a config, a key of `base.CALLERS`, says which is
meant. Paths are read without diffusers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stdit.diffusion import paths
from stdit.diffusion.paths import DdpmPath, EdmPath, FlowPath
from stdit.diffusion.solvers.base import Config, Schedule, Solver
from stdit.diffusion.solvers.diffusers_schedulers import DiffusersSolver
from stdit.diffusion.solvers.euler import OpenSoraEuler, flow_euler, in_cosmos_coordinates
from stdit.diffusion.solvers.unipc import UniPC
from stdit.errors import StditError, nearest_name
from stdit.files import publish_text
from stdit.shapes import LatentShape, VideoShape


@dataclass(frozen=True)
class Scheduler:
    """How one scheduler's config is read.

    allowed: options, and the values that are obeyed. A key left out of a file means the first of them.
    numbers: options that are numbers, and the range of each: more than `low`, less than `high`.
    absent: the meaning of keys of `allowed` left out of a file, if not the first value.
    shift: the option that holds the static shift; "" if there is none.
    """

    path: Callable[[Config], paths.Path]
    solver: Callable[[Config, Schedule], Solver]
    allowed: Mapping[str, tuple[Any, ...]]
    numbers: Mapping[str, tuple[float, float]]
    absent: Mapping[str, Any] = field(default_factory=dict)
    shift: str = ""


def _edm_path(config: Config) -> EdmPath:
    sign = 1 if config.get("prediction_type", "epsilon") == "epsilon" else -1
    return EdmPath(float(config.get("sigma_data", 0.5)), sign)


def _open_sora_path(config: Config) -> FlowPath:
    return FlowPath(reverse=True, by_shape=bool(config.get("use_timestep_transform", False)))


_POSITIVE, _ANY = (0.0, 1e9), (-1e9, 1e9)
_FLOW = {
    "use_karras_sigmas": (False, None, True), "use_exponential_sigmas": (False, None), "use_beta_sigmas": (False, None),
    "num_train_timesteps": (1000,),  # the networks' own
}  # fmt: skip
# What the path of the weights depends on. The rest is diffusers' to obey or refuse.
_DDPM: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"), "beta_schedule": ("linear", "scaled_linear"),
    "num_train_timesteps": (1000,), "rescale_betas_zero_snr": (False,),
}  # fmt: skip
_BETAS = {"beta_start": (0.0, 1.0), "beta_end": (0.0, 1.0)}
SCHEDULERS: dict[str, Scheduler] = {
    "FlowMatchEulerDiscreteScheduler": Scheduler(
        lambda config: FlowPath(),
        flow_euler,
        {
            **_FLOW, "use_dynamic_shifting": (False, True), "time_shift_type": ("exponential", "linear"),
            "invert_sigmas": (False,), "stochastic_sampling": (False,), "final_sigmas_type": ("zero", "sigma_min"),
            "sigma_data": (1.0,),
        },
        {
            "shift": _POSITIVE, "shift_terminal": (-1e-9, 1.0), "sigma_min": _POSITIVE, "sigma_max": _POSITIVE,
            "base_shift": _ANY, "max_shift": _ANY, "base_image_seq_len": _ANY, "max_image_seq_len": _ANY,
        },
        shift="shift",
    ),
    "UniPCMultistepScheduler": Scheduler(
        lambda config: FlowPath(),
        UniPC,
        {
            **_FLOW, "prediction_type": ("flow_prediction",), "use_flow_sigmas": (True,), "predict_x0": (True,),
            "final_sigmas_type": ("zero",), "lower_order_final": (True,), "solver_order": (2, 1, 3),
            # diffusers reads the last three as bh2; its bh1 ends in NaN
            "solver_type": ("bh2", "midpoint", "heun", "logrho"), "thresholding": (False,), "solver_p": (None,),
            "use_dynamic_shifting": (False,), "shift_terminal": (None, 0), "rescale_betas_zero_snr": (False,),
        },
        {"flow_shift": _POSITIVE, "sigma_min": _POSITIVE, "sigma_max": _POSITIVE},
        absent={"prediction_type": "epsilon", "use_flow_sigmas": False},
        shift="flow_shift",
    ),
    "DPMSolverMultistepScheduler": Scheduler(
        DdpmPath.of,
        DiffusersSolver,
        # with another variance_type, diffusers would keep three channels of the network's
        {**_DDPM, "use_flow_sigmas": (False,), "use_dynamic_shifting": (False,), "variance_type": (None,)},
        _BETAS,
    ),
    "DDIMScheduler": Scheduler(DdpmPath.of, DiffusersSolver, _DDPM, _BETAS),
    "EulerAncestralDiscreteScheduler": Scheduler(DdpmPath.of, DiffusersSolver, _DDPM, _BETAS),
    "EDMEulerScheduler": Scheduler(
        _edm_path,
        DiffusersSolver,
        {"prediction_type": ("epsilon", "v_prediction")},
        {"sigma_min": _POSITIVE, "sigma_max": _POSITIVE, "sigma_data": _POSITIVE, "rho": _POSITIVE},
    ),
    "RFLOW": Scheduler(
        _open_sora_path,
        OpenSoraEuler,
        {"use_timestep_transform": (False, True), "use_discrete_timesteps": (False,), "num_timesteps": (1000,)},
        {},
    ),
}  # fmt: skip
# All options of these schedulers. One that belongs to another scheduler is ignored, as by diffusers: from_config keeps
# them when it makes one scheduler from another's config.
_KNOWN = {key for scheduler in SCHEDULERS.values() for key in (*scheduler.allowed, *scheduler.numbers)}
_KNOWN |= {
    "algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio",
    "euler_at_final", "interpolation_type", "lambda_min_clipped", "sample_max_value", "set_alpha_to_one",
    "sigma_schedule", "skip_prk_steps", "steps_offset", "timestep_spacing", "timestep_type", "trained_betas",
    "use_lu_lambdas", "num_sampling_steps", "cfg_scale", "sample_method", "loc", "scale", "transform_scale",
}  # fmt: skip


def check_scheduler(config: Config, where: str = "scheduler") -> Config:
    """The config without its nulls, which are as if absent. Raises StditError if it asks for what is not reproduced.

    where: names the config in errors.
    """
    config = {key: value for key, value in config.items() if value is not None}
    name = str(config.get("_class_name", ""))
    if name not in SCHEDULERS:
        raise StditError(
            f"{where}: the scheduler {name!r} is not supported. Supported: {', '.join(SCHEDULERS)}."
            f"{nearest_name(name, SCHEDULERS)}"
        )
    scheduler = SCHEDULERS[name]
    for key, allowed in scheduler.allowed.items():
        value = config.get(key, scheduler.absent.get(key, allowed[0]))
        if value in allowed:
            continue
        if key == "use_dynamic_shifting":
            raise StditError(
                f"{where}: {name} with use_dynamic_shifting needs a shift for every size, which WanPipeline cannot "
                f"pass either. Set it to false and give a static {scheduler.shift or 'shift'}."
            )
        runs = " or ".join(map(repr, allowed))
        raise StditError(f"{where}: {name} with {key} = {value!r} is not supported; only {runs}.")
    for key, (low, high) in scheduler.numbers.items():
        value = config.get(key)
        if value is not None and not (type(value) in (int, float) and low < value < high):
            raise StditError(f"{where}: {name} with {key} = {value!r}; it must be between {low:g} and {high:g}.")
    limits = [config.get(key) for key in ("sigma_min", "sigma_max")]
    karras = config.get("use_karras_sigmas")
    if scheduler.solver is UniPC and karras and None in limits:
        raise StditError(f"{where}: {name} with use_karras_sigmas needs sigma_min and sigma_max.")
    own = scheduler.solver is flow_euler and not in_cosmos_coordinates(config)
    if own and karras and any(limit is not None and limit > 1 for limit in limits):
        raise StditError(f"{where}: {name} with use_karras_sigmas takes sigma_min and sigma_max up to 1: {limits}.")
    steps = config.get("disable_corrector", [])
    if scheduler.solver is UniPC and not (isinstance(steps, list) and all(type(n) is int for n in steps)):
        raise StditError(f"{where}: {name} with disable_corrector = {steps!r}; it must be a list of steps.")
    for key, value in config.items():
        if key.startswith("_") or key in _KNOWN or value is False:
            continue  # an option of a later diffusers that is off changes nothing
        hint = nearest_name(key, {*scheduler.allowed, *scheduler.numbers})
        warnings.warn(
            f"{where}: {name} has no option {key}: {value!r} is ignored, as by diffusers.{hint}", stacklevel=2
        )
    return config


def path_of(config: Config, where: str = "scheduler") -> paths.Path:
    """The path of the weights beside this scheduler config."""
    config = check_scheduler(config, where)
    return SCHEDULERS[config["_class_name"]].path(config)


def make_solver(
    config: Config,
    steps: int,
    shift: float | None = None,
    where: str = "scheduler",
    *,
    shape: VideoShape | None = None,
    latent: LatentShape | None = None,
) -> Solver:
    """The solver that a scheduler config names.

    shift: replaces the config's static shift, or the one that the config computes for the clip.
    where: names the config in errors.
    shape, latent: the clip's, in pixels and latents; needed where the levels depend on them.
    """
    config = check_scheduler(config, where)
    name = config["_class_name"]
    path = SCHEDULERS[name].path(config)
    if not 1 <= steps <= 1000:
        raise StditError(f"steps must be between 1 and 1000, not {steps}.")
    if shift is not None and shift <= 0:
        raise StditError(f"shift must be positive, not {shift}.")
    if shift is not None and (path.name != "flow" or config.get("use_karras_sigmas")):
        raise StditError(f"{where}: {name} knows no shift of the noise levels; leave shift out.")
    return SCHEDULERS[name].solver(config, Schedule(steps, shift, shape, latent, where))


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

    An empty config only checks the name: "euler" or "unipc" for flows; "dpm++", "ddim" or "ancestral" for DDPMs.
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

    pipeline: the class that model_index.json names, which calls its scheduler as `base.CALLERS[caller]` says.
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
