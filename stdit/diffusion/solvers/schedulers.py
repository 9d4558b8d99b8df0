"""The configs of schedulers, as diffusers writes them: made, read, checked; the path of the weights; the solver.

Every option of a scheduler is obeyed or refused by name; keys that diffusers ignores are ignored. Some pipelines of
diffusers call their scheduler in a way of their own: `_caller` in a config, a key of `base.CALLERS`, says which is
meant. Paths are read without diffusers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
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
_STATIC: dict[str, tuple[Any, ...]] = {"num_train_timesteps": (1000,), "use_dynamic_shifting": (False,)}
# What the path of the weights depends on. The rest is diffusers' to obey or refuse.
_DDPM: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction"), "beta_schedule": ("linear", "scaled_linear"),
    "num_train_timesteps": (1000,), "rescale_betas_zero_snr": (False,),
}  # fmt: skip
_BETAS = {"beta_start": (0.0, 1.0), "beta_end": (0.0, 1.0)}
_BY_DIFFUSERS = Scheduler(DdpmPath.of, DiffusersSolver, _DDPM, _BETAS)
# Of flows: schedulers that integrate over flow levels if use_flow_sigmas says so, and those that only do flows.
_AS_FLOW = Scheduler(
    lambda config: FlowPath(),
    DiffusersSolver,
    {"prediction_type": ("flow_prediction",), "use_flow_sigmas": (True,), **_STATIC},
    {"flow_shift": _POSITIVE},
    absent={"prediction_type": "epsilon", "use_flow_sigmas": False},
    shift="flow_shift",
)
_FLOW_MATCH = Scheduler(
    lambda config: FlowPath(), DiffusersSolver, {**_STATIC, "invert_sigmas": (False,)}, {"shift": _POSITIVE},
    shift="shift",
)  # fmt: skip
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
    **dict.fromkeys(
        (
            "DDIMScheduler", "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler",
            "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler", "LCMScheduler",
            "LMSDiscreteScheduler", "PNDMScheduler", "TCDScheduler",
        ),
        _BY_DIFFUSERS,
    ),
    # diffusers would take a learned variance from the network's output, where there is none any more
    "DDPMScheduler": replace(
        _BY_DIFFUSERS,
        allowed={**_DDPM, "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")},
    ),
    # with another variance_type, diffusers would keep three channels of the network's
    **dict.fromkeys(
        ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "SASolverScheduler"),
        replace(_BY_DIFFUSERS, allowed={**_DDPM, "use_dynamic_shifting": (False,), "variance_type": (None,)}),
    ),
    "FlowMatchHeunDiscreteScheduler": _FLOW_MATCH,
    "FlowMatchLCMScheduler": _FLOW_MATCH,
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
# Those that do either, by their options. UniPC of a flow is in the table.
FLOWS_BY_OPTION = {
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
}
# All options of these schedulers. One that belongs to another scheduler is ignored, as by diffusers: from_config keeps
# them when it makes one scheduler from another's config.
_KNOWN = {key for scheduler in SCHEDULERS.values() for key in (*scheduler.allowed, *scheduler.numbers)}
_KNOWN |= {
    "algorithm_type", "clip_sample", "clip_sample_range", "disable_corrector", "dynamic_thresholding_ratio",
    "euler_at_final", "interpolation_type", "lambda_min_clipped", "sample_max_value", "set_alpha_to_one",
    "sigma_schedule", "skip_prk_steps", "steps_offset", "timestep_spacing", "timestep_type", "trained_betas",
    "use_lu_lambdas", "predictor_order", "corrector_order", "tau_func", "original_inference_steps",
    "timestep_scaling", "scale_factors", "upscale_mode", "num_sampling_steps", "cfg_scale", "sample_method",
    "loc", "scale", "transform_scale",
}  # fmt: skip


# Solvers by a short name: the class for flows, and for DDPMs; "" where there is none.
NAMES: dict[str, tuple[str, str]] = {
    "euler": ("FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler"),
    "unipc": ("UniPCMultistepScheduler", "UniPCMultistepScheduler"),
    "dpm++": ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler"),
    "heun": ("FlowMatchHeunDiscreteScheduler", "HeunDiscreteScheduler"),
    "lcm": ("FlowMatchLCMScheduler", "LCMScheduler"),
    "ddim": ("", "DDIMScheduler"),
    "ancestral": ("", "EulerAncestralDiscreteScheduler"),
}


def scheduler_of(config: Config) -> Scheduler:
    """How a config is read, by its class and by whether it is a flow's. Raises KeyError for an unknown class."""
    name = config["_class_name"]
    of_flow = bool(config.get("use_flow_sigmas"))
    if name == "UniPCMultistepScheduler" and not of_flow:
        return SCHEDULERS["DEISMultistepScheduler"]
    return _AS_FLOW if name in FLOWS_BY_OPTION and of_flow else SCHEDULERS[name]


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
    scheduler = scheduler_of(config)
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
        of_flow = " of a flow (use_flow_sigmas)" if scheduler is _AS_FLOW else ""
        raise StditError(f"{where}: {name}{of_flow} with {key} = {value!r} is not supported; only {runs}.")
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
    return scheduler_of(config).path(config)


def make_solver(
    config: Config,
    steps: int,
    shift: float | None = None,
    where: str = "scheduler",
    *,
    levels: Sequence[float] | None = None,
    shape: VideoShape | None = None,
    latent: LatentShape | None = None,
) -> Solver:
    """The solver that a scheduler config names.

    shift: replaces the config's static shift, or the one that the config computes for the clip.
    where: names the config in errors.
    levels: the noise levels of the steps, in place of those that the config makes; `steps` is their number.
    shape, latent: the clip's, in pixels and latents; needed where the levels depend on them.
    """
    config = check_scheduler(config, where)
    name = config["_class_name"]
    scheduler = scheduler_of(config)
    path = scheduler.path(config)
    if levels is not None:
        check_levels(levels)
    elif not 1 <= steps <= 1000:
        raise StditError(f"steps must be between 1 and 1000, not {steps}.")
    if shift is not None and shift <= 0:
        raise StditError(f"shift must be positive, not {shift}.")
    if shift is not None and (path.name != "flow" or config.get("use_karras_sigmas")):
        raise StditError(f"{where}: {name} knows no shift of the noise levels; leave shift out.")
    if levels is not None:
        if shift is not None:
            raise StditError(f"shift {shift:g}: the levels are given, and nothing shifts them. Leave one of them out.")
        config = {**config, "use_dynamic_shifting": False} | ({scheduler.shift: 1.0} if scheduler.shift else {})
    return scheduler.solver(config, Schedule(steps, shift, shape, latent, where, levels))


def check_levels(levels: Sequence[float]) -> None:
    """Raises StditError unless noise levels fall from 1 at most, and stay above 0."""
    falling = all(before > after for before, after in pairwise(levels))
    if not levels or not falling or not 0 < levels[-1] <= levels[0] <= 1:
        told = ", ".join(f"{level:g}" for level in levels)
        raise StditError(f"noise levels {told}: they must fall, from 1 at most, and end above 0.")


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
    """The config of a solver by a name of `NAMES` or by its class in diffusers, with the static shift or the betas of
    the model's config. An empty config only checks the name.
    """
    if name not in NAMES and name not in SCHEDULERS:
        raise StditError(
            f"solver {name!r} is not known: {', '.join(NAMES)}, or a class of diffusers' schedulers: "
            f"{', '.join(sorted(SCHEDULERS))}.{nearest_name(name, [*NAMES, *SCHEDULERS])}"
        )
    if not config:
        return {}
    kind = path_of(config).name
    made: dict[str, Any] = {"_class_name": NAMES[name][kind != "flow"] if name in NAMES else name}
    if kind == "flow" and made["_class_name"] in (*FLOWS_BY_OPTION, "UniPCMultistepScheduler"):
        made |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    if kind == "edm" or not made["_class_name"] or scheduler_of(made).path(made).name != kind or name == "RFLOW":
        raise StditError(f"solver {name!r} is for other weights: this model's scheduler is {config['_class_name']}.")
    if kind == "flow":
        if made["_class_name"] == "UniPCMultistepScheduler":
            return unipc_config(static_shift(config))
        return {**made, "num_train_timesteps": 1000, scheduler_of(made).shift: static_shift(config)}
    kept = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
    return {**made, **{key: config[key] for key in kept if key in config}, "clip_sample": False}


def with_static_shift(config: Config, shift: float | None) -> dict[str, Any]:
    """A scheduler config with this static shift, which also replaces one by the clip's size.

    Unchanged if shift is None or the scheduler uses no shift.
    """
    scheduler, dynamic = scheduler_of(config), bool(config.get("use_dynamic_shifting"))
    if shift is None or not scheduler.shift or config.get("use_karras_sigmas"):
        return dict(config)
    if not dynamic and static_shift(config) == shift:
        return dict(config)
    return {**config, scheduler.shift: float(shift)} | ({"use_dynamic_shifting": False} if dynamic else {})


def static_shift(config: Config) -> float:
    """The shift that a scheduler config holds for all clips alike; 1 if it holds none."""
    option = scheduler_of(config).shift if config.get("_class_name") in SCHEDULERS else ""
    return float(config.get(option, 1.0)) if option else 1.0


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
