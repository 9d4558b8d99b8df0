"""From a scheduler's config, as diffusers writes it, to the path of the weights and to their solver.

Every option of a scheduler is obeyed or refused by name; keys that diffusers ignores are ignored. Some pipelines of
diffusers call their scheduler in a way of their own: `_caller` in a config, a key of CALLERS, says which is meant.
Paths are read without diffusers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stdit.diffusion.noise_levels import shift_noise_level
from stdit.diffusion.paths import DdpmPath, EdmPath, FlowPath, Path, open_sora_shift
from stdit.diffusion.solvers.base import Solver
from stdit.diffusion.solvers.diffusers_schedulers import DiffusersSolver, import_diffusers
from stdit.diffusion.solvers.euler import (
    CosmosEuler,
    Euler,
    LtxConditionEuler,
    dynamic_shift,
    euler_sigmas,
    even_levels,
    karras_sigmas,
    table_levels,
)
from stdit.diffusion.solvers.open_sora import OpenSora
from stdit.diffusion.solvers.unipc import UniPC, unipc_karras_levels, unipc_levels
from stdit.errors import StditError, nearest_name
from stdit.shapes import LatentShape, VideoShape

Config = Mapping[str, Any]
CALLERS = {
    "": "not known; sigma_max tells whether a flow is solved in Cosmos-Predict2's coordinates",
    "plain": "as the scheduler's own set_timesteps does it",
    "ltx": "LTX-Video: evenly spaced levels",
    "ltx condition": "LTX-Video's LTXConditionPipeline: linear, then quadratic levels",
    "cosmos2": "Cosmos-Predict2: σ = t/(1 − t)",
    "cosmos2.5": "Cosmos-Predict2.5: the same, and the network is told the levels themselves",
}


@dataclass(frozen=True)
class Schedule:
    """What a solver's levels depend on besides the scheduler's config.

    steps: number of steps.
    shift: replaces the config's.
    shape, latent: the clip's, in pixels and latents; needed where the levels depend on them.
    where: names the config in errors.
    """

    steps: int
    shift: float | None
    shape: VideoShape | None
    latent: LatentShape | None
    where: str


@dataclass(frozen=True)
class Scheduler:
    """How one scheduler's config is read.

    path: of the weights.
    solver: makes the solver.
    allowed: options, and the values that are obeyed. A key left out of a file means the first of them.
    numbers: options that are numbers, and the range of each: more than `low`, less than `high`.
    absent: the meaning of keys of `allowed` left out of a file, if not the first value.
    shift: the option that holds the static shift, if there is one.
    """

    path: Callable[[Config], Path]
    solver: Callable[[Config, Schedule], Solver]
    allowed: Mapping[str, tuple[Any, ...]]
    numbers: Mapping[str, tuple[float, float]]
    absent: Mapping[str, Any] = field(default_factory=dict)
    shift: str = ""


def _caller(config: Config) -> str:
    caller = str(config.get("_caller", ""))
    assert caller in CALLERS, caller
    return caller


def _in_cosmos_coordinates(config: Config) -> bool:
    """Whether a flow is solved in σ = t/(1 − t). If the caller is not known, sigma_max tells: a flow's own levels end
    at 1."""
    caller = _caller(config)
    return caller in ("cosmos2", "cosmos2.5") or (not caller and config.get("sigma_max", 0.0) > 1)


def _euler(config: Config, schedule: Schedule) -> Solver:
    steps, caller = schedule.steps, _caller(config)
    if config.get("use_karras_sigmas") and _in_cosmos_coordinates(config):
        config = {"sigma_min": 0.002, "sigma_max": 80.0, "final_sigmas_type": "sigma_min", **config}  # its pipelines'
        sigmas = karras_sigmas(steps, config["sigma_min"], config["sigma_max"])
        return CosmosEuler(sigmas, config["final_sigmas_type"] == "zero", config["sigma_max"])
    if caller == "ltx condition":
        return _ltx_condition(config, schedule)
    shift = float(config.get("shift", 1.0)) if schedule.shift is None else schedule.shift
    if config.get("use_dynamic_shifting") and schedule.shift is None:
        if schedule.latent is None:
            raise StditError("a scheduler with use_dynamic_shifting needs the clip's latent shape.")
        latent = schedule.latent
        shift = dynamic_shift(latent.frames * latent.height * latent.width, config)
    even = config.get("use_dynamic_shifting") or caller == "ltx"
    return Euler(euler_sigmas(even_levels(steps) if even else table_levels(steps, shift), shift, config))


def _ltx_condition(config: Config, schedule: Schedule) -> Solver:
    if option := next((key for key in ("use_dynamic_shifting", "use_karras_sigmas") if config.get(key)), ""):
        raise StditError(f"{option}: LTXConditionPipeline gives its scheduler levels of its own. Set it to false.")
    module = import_diffusers(
        "diffusers.pipelines.ltx.pipeline_ltx_condition", "LTXConditionPipeline's schedule", schedule.where
    )
    levels, shift = module.linear_quadratic_schedule(schedule.steps).double().numpy(), float(config.get("shift", 1.0))
    if schedule.shift is not None:  # ours moves where steps begin as well
        levels, shift = shift_noise_level(levels, schedule.shift), 1.0
    return LtxConditionEuler(levels, shift, config.get("shift_terminal"))


def _unipc(config: Config, schedule: Schedule) -> Solver:
    if config.get("use_karras_sigmas"):
        levels, sigmas = unipc_karras_levels(schedule.steps, config["sigma_min"], config["sigma_max"])
        if _caller(config) != "cosmos2.5":
            levels = [int(level * 1000) / 1000 for level in levels]
    else:
        shift = float(config.get("flow_shift", 1.0)) if schedule.shift is None else schedule.shift
        levels, sigmas = unipc_levels(schedule.steps, shift)
    return UniPC(levels, sigmas, int(config.get("solver_order", 2)), config.get("disable_corrector") or ())


def _edm_path(config: Config) -> EdmPath:
    sign = 1 if config.get("prediction_type", "epsilon") == "epsilon" else -1
    return EdmPath(float(config.get("sigma_data", 0.5)), sign)


def _diffusers(config: Config, schedule: Schedule) -> Solver:
    path = SCHEDULERS[config["_class_name"]].path(config)
    assert isinstance(path, DdpmPath | EdmPath)
    return DiffusersSolver(config, path, schedule.steps, schedule.where)


def _open_sora_path(config: Config) -> FlowPath:
    return FlowPath(reverse=True, by_shape=bool(config.get("use_timestep_transform", False)))


def _open_sora(config: Config, schedule: Schedule) -> Solver:
    shift = 1.0 if schedule.shift is None else schedule.shift
    if schedule.shift is None and config.get("use_timestep_transform", False):
        if schedule.shape is None:
            raise StditError("Open-Sora's noise levels need the clip's shape in pixels.")
        shift = open_sora_shift(schedule.shape)
    return OpenSora(schedule.steps, shift)


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
        _euler,
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
        _unipc,
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
        _diffusers,
        # with another variance_type, diffusers would keep three channels of the network's
        {**_DDPM, "use_flow_sigmas": (False,), "use_dynamic_shifting": (False,), "variance_type": (None,)},
        _BETAS,
    ),
    "DDIMScheduler": Scheduler(DdpmPath.of, _diffusers, _DDPM, _BETAS),
    "EulerAncestralDiscreteScheduler": Scheduler(DdpmPath.of, _diffusers, _DDPM, _BETAS),
    "EDMEulerScheduler": Scheduler(
        _edm_path,
        _diffusers,
        {"prediction_type": ("epsilon", "v_prediction")},
        {"sigma_min": _POSITIVE, "sigma_max": _POSITIVE, "sigma_data": _POSITIVE, "rho": _POSITIVE},
    ),
    "RFLOW": Scheduler(
        _open_sora_path,
        _open_sora,
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


def _without_nulls(config: Config) -> dict[str, Any]:
    """diffusers takes options that are null as if they were absent."""
    return {key: value for key, value in config.items() if value is not None}


def check_scheduler(config: Config, where: str = "scheduler") -> None:
    """Raises StditError if a scheduler config asks for something that is not reproduced; `where` names the config."""
    config = _without_nulls(config)
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
    if scheduler.solver is _unipc and karras and None in limits:
        raise StditError(f"{where}: {name} with use_karras_sigmas needs sigma_min and sigma_max.")
    own = scheduler.solver is _euler and not _in_cosmos_coordinates(config)
    if own and karras and any(limit is not None and limit > 1 for limit in limits):
        raise StditError(f"{where}: {name} with use_karras_sigmas takes sigma_min and sigma_max up to 1: {limits}.")
    steps = config.get("disable_corrector", [])
    if scheduler.solver is _unipc and not (isinstance(steps, list) and all(type(n) is int for n in steps)):
        raise StditError(f"{where}: {name} with disable_corrector = {steps!r}; it must be a list of steps.")
    for key, value in config.items():
        if key.startswith("_") or key in _KNOWN or value is False:
            continue  # an option of a later diffusers that is off changes nothing
        hint = nearest_name(key, {*scheduler.allowed, *scheduler.numbers})
        warnings.warn(
            f"{where}: {name} has no option {key}: {value!r} is ignored, as by diffusers.{hint}", stacklevel=2
        )


def path_of(config: Config, where: str = "scheduler") -> Path:
    """The path of the weights beside this scheduler config."""
    check_scheduler(config, where)
    return SCHEDULERS[config["_class_name"]].path(_without_nulls(config))


def make_solver(
    config: Config,
    steps: int,
    shift: float | None = None,
    where: str = "scheduler",
    *,
    shape: VideoShape | None = None,
    latent: LatentShape | None = None,
) -> Solver:
    """The solver that a scheduler config names. See `Schedule` for the arguments.

    shift replaces the config's static shift, or the one that the config computes for the clip.
    """
    path = path_of(config, where)
    config = _without_nulls(config)
    name = config["_class_name"]
    if not 1 <= steps <= 1000:
        raise StditError(f"steps must be between 1 and 1000, not {steps}.")
    if shift is not None and shift <= 0:
        raise StditError(f"shift must be positive, not {shift}.")
    if shift is not None and (path.name != "flow" or config.get("use_karras_sigmas")):
        raise StditError(f"{where}: {name} knows no shift of the noise levels; leave shift out.")
    return SCHEDULERS[name].solver(config, Schedule(steps, shift, shape, latent, where))
