"""From a scheduler's config, as diffusers writes it, to the path of the weights and to their solver.

Every option of a scheduler is obeyed or refused by name; keys that diffusers ignores are ignored. Some pipelines of
diffusers call their scheduler in a way of their own (LTX-Video's and Cosmos'); `_pipeline` in a config,
model_index.json's `_class_name`, says which is meant.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stdit.diffusion.paths import DdpmPath, EdmPath, FlowPath, Path, open_sora_shift
from stdit.diffusion.solvers.base import Solver
from stdit.diffusion.solvers.edm import EdmEuler
from stdit.diffusion.solvers.flow import (
    Euler,
    LtxCondition,
    OpenSora,
    UniPC,
    dynamic_shift,
    euler_sigmas,
    even_levels,
    karras_sigmas,
    linear_quadratic_levels,
    table_levels,
    unipc_karras_levels,
    unipc_levels,
)
from stdit.diffusion.solvers.vp import Ddim, DpmSolver, EulerAncestral, spaced, table
from stdit.diffusion.timesteps import shift_noise_level
from stdit.errors import StditError, nearest_name
from stdit.shapes import LatentShape, VideoShape

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Request:
    """What is to be solved: `shift` replaces the config's; shape and latent are the clip's, where a schedule asks."""

    steps: int
    shift: float | None
    shape: VideoShape | None
    latent: LatentShape | None


@dataclass(frozen=True)
class Scheduler:
    """How one of diffusers' schedulers is read.

    allowed: options and the values that are reproduced; a key left out of a file means the first of them, or what
    `absent` says. read: options of any value. shift: the option that holds the static shift, if there is one.
    """

    path: Callable[[Config], Path]
    make: Callable[[Config, Request], Solver]
    allowed: Mapping[str, tuple[Any, ...]]
    read: Iterable[str]
    absent: Mapping[str, Any] = field(default_factory=dict)
    shift: str = ""


def _pipeline(config: Config) -> str:
    return str(config.get("_pipeline", ""))


def _cosmos2(config: Config) -> bool:
    """Whether a flow is solved in Cosmos-Predict2's coordinates, σ = t/(1 − t): its pipelines do; without a pipeline's
    name, sigma_max tells it, since a flow's own levels end at 1."""
    pipeline, largest = _pipeline(config), config.get("sigma_max")
    return pipeline.startswith("Cosmos2") or (not pipeline and isinstance(largest, int | float) and largest > 1)


def _shift(config: Config, request: Request, name: str) -> float:
    return float(config.get(name, 1.0)) if request.shift is None else request.shift


def _euler(config: Config, request: Request) -> Solver:
    steps, pipeline = request.steps, _pipeline(config)
    if config.get("use_karras_sigmas") and _cosmos2(config):
        config = {"sigma_min": 0.002, "sigma_max": 80.0, "final_sigmas_type": "sigma_min", **config}  # its pipelines'
        sigmas = karras_sigmas(steps, config["sigma_min"], config["sigma_max"])
        return EdmEuler(FlowPath(), sigmas, config["final_sigmas_type"] == "zero", config["sigma_max"])
    if pipeline == "LTXConditionPipeline":
        if option := next((key for key in ("use_dynamic_shifting", "use_karras_sigmas") if config.get(key)), ""):
            raise StditError(f"{option}: LTXConditionPipeline gives its scheduler levels of its own. Set it to false.")
        levels, shift = linear_quadratic_levels(steps), float(config.get("shift", 1.0))
        if request.shift is not None:  # of ours, where steps begin as well
            levels, shift = shift_noise_level(levels, request.shift), 1.0
        return LtxCondition(levels, shift, config.get("shift_terminal"))
    shift = _shift(config, request, "shift")
    if config.get("use_dynamic_shifting") and request.shift is None:
        if request.latent is None:
            raise StditError("a scheduler with use_dynamic_shifting needs the clip's latent shape.")
        latent = request.latent
        shift = dynamic_shift(latent.frames * latent.height * latent.width, config)
    even = config.get("use_dynamic_shifting") or pipeline.startswith("LTX")
    return Euler(euler_sigmas(even_levels(steps) if even else table_levels(steps, shift), shift, config))


def _unipc(config: Config, request: Request) -> Solver:
    if config.get("use_karras_sigmas"):
        levels, sigmas = unipc_karras_levels(request.steps, config["sigma_min"], config["sigma_max"])
        if not _pipeline(config).startswith("Cosmos2_5"):
            levels = [int(level * 1000) / 1000 for level in levels]
    else:
        levels, sigmas = unipc_levels(request.steps, _shift(config, request, "flow_shift"))
    return UniPC(levels, sigmas, int(config.get("solver_order", 2)), config.get("disable_corrector") or ())


def _indices(config: Config, steps: int, default: str, one_more: bool = False) -> list[int]:
    spacing, offset = config.get("timestep_spacing", default), int(config.get("steps_offset", 0))
    return [int(index) for index in spaced(steps, spacing, offset, one_more).round()]


def _dpm(config: Config, request: Request) -> Solver:
    path = DdpmPath.of(config)
    last = 0.0 if config.get("final_sigmas_type", "zero") == "zero" else float(table(path)[0])
    return DpmSolver(
        path,
        _indices(config, request.steps, "linspace", one_more=True),
        int(config.get("solver_order", 2)),
        bool(config.get("lower_order_final", True)),
        bool(config.get("euler_at_final", False)),
        last,
    )


def _ddim(config: Config, request: Request) -> Solver:
    path = DdpmPath.of(config)
    end = 1.0 if config.get("set_alpha_to_one", True) else float(path.alphas[0])
    return Ddim(path, _indices(config, request.steps, "leading"), end)


def _ancestral(config: Config, request: Request) -> Solver:
    spacing = config.get("timestep_spacing", "linspace")
    timesteps = spaced(request.steps, spacing, int(config.get("steps_offset", 0)))
    return EulerAncestral(DdpmPath.of(config), timesteps, widest=spacing == "leading")


def _edm_path(config: Config) -> EdmPath:
    sign = 1 if config.get("prediction_type", "epsilon") == "epsilon" else -1
    return EdmPath(float(config.get("sigma_data", 0.5)), sign)


def _edm(config: Config, request: Request) -> Solver:
    largest = float(config.get("sigma_max", 80.0))
    sigmas = karras_sigmas(request.steps, config.get("sigma_min", 0.002), largest, config.get("rho", 7.0))
    return EdmEuler(_edm_path(config), sigmas, config.get("final_sigmas_type", "zero") == "zero", largest)


def _open_sora_path(config: Config) -> FlowPath:
    return FlowPath(reverse=True, by_shape=bool(config.get("use_timestep_transform", False)))


def _open_sora(config: Config, request: Request) -> Solver:
    shift = 1.0 if request.shift is None else request.shift
    if request.shift is None and config.get("use_timestep_transform", False):
        if request.shape is None:
            raise StditError("Open-Sora's noise levels need the clip's shape in pixels.")
        shift = open_sora_shift(request.shape)
    return OpenSora(request.steps, shift)


_NO_OTHER_SIGMAS: dict[str, tuple[Any, ...]] = {
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}
_DDPM: dict[str, tuple[Any, ...]] = {
    **_NO_OTHER_SIGMAS,
    "prediction_type": ("epsilon", "v_prediction"),
    "beta_schedule": ("linear", "scaled_linear"),
    "num_train_timesteps": (1000,),
    "rescale_betas_zero_snr": (False,),
    "thresholding": (False,),
}
_DDPM_READ = ("beta_start", "beta_end", "trained_betas", "steps_offset", "timestep_spacing")
SCHEDULERS: dict[str, Scheduler] = {
    "FlowMatchEulerDiscreteScheduler": Scheduler(
        lambda config: FlowPath(),
        _euler,
        {
            **_NO_OTHER_SIGMAS,
            "use_karras_sigmas": (False, None, True),
            "use_dynamic_shifting": (False, True),
            "time_shift_type": ("exponential", "linear"),
            "invert_sigmas": (False,),
            "stochastic_sampling": (False,),
            "num_train_timesteps": (1000,),  # the networks' own
            "final_sigmas_type": ("zero", "sigma_min"),
            "sigma_data": (1.0,),
        },
        (
            "shift",
            "shift_terminal",
            "base_shift",
            "max_shift",
            "base_image_seq_len",
            "max_image_seq_len",
            "sigma_min",
            "sigma_max",
        ),
        shift="shift",
    ),
    "UniPCMultistepScheduler": Scheduler(
        lambda config: FlowPath(),
        _unipc,
        {
            **_NO_OTHER_SIGMAS,
            "use_karras_sigmas": (False, None, True),
            "prediction_type": ("flow_prediction",),
            "use_flow_sigmas": (True,),
            "predict_x0": (True,),
            "final_sigmas_type": ("zero",),
            "lower_order_final": (True,),
            # diffusers reads the last three as bh2; its bh1 ends in NaN
            "solver_type": ("bh2", "midpoint", "heun", "logrho"),
            "solver_order": (2, 1, 3),
            "thresholding": (False,),
            "solver_p": (None,),
            "use_dynamic_shifting": (False,),
            "shift_terminal": (None, 0),
            "rescale_betas_zero_snr": (False,),
            "num_train_timesteps": (1000,),
        },
        ("flow_shift", "disable_corrector", "sigma_min", "sigma_max"),
        absent={"prediction_type": "epsilon", "use_flow_sigmas": False},
        shift="flow_shift",
    ),
    "DPMSolverMultistepScheduler": Scheduler(
        DdpmPath.of,
        _dpm,
        {
            **_DDPM,
            "algorithm_type": ("dpmsolver++",),
            "solver_order": (2, 1),
            "solver_type": ("midpoint", "logrho", "bh1", "bh2"),  # as diffusers reads them
            "lower_order_final": (True, False),
            "euler_at_final": (False, True),
            "final_sigmas_type": ("zero", "sigma_min"),
            "lambda_min_clipped": (-math.inf,),
            "use_lu_lambdas": (False,),
            "use_flow_sigmas": (False,),
            "use_dynamic_shifting": (False,),
            "variance_type": (None,),  # with another, diffusers would keep three channels of the network's
        },
        (*_DDPM_READ, "flow_shift"),
    ),
    "DDIMScheduler": Scheduler(
        DdpmPath.of,
        _ddim,
        {
            **_DDPM,
            "clip_sample": (False,),
            "set_alpha_to_one": (True, False),
            "variance_type": (None, "learned", "learned_range", "fixed_small", "fixed_large"),  # without effect
        },
        _DDPM_READ,
        absent={"clip_sample": True},
    ),
    "EulerAncestralDiscreteScheduler": Scheduler(DdpmPath.of, _ancestral, _DDPM, _DDPM_READ),
    "EDMEulerScheduler": Scheduler(
        _edm_path,
        _edm,
        {
            "sigma_schedule": ("karras",),
            "prediction_type": ("epsilon", "v_prediction"),
            "final_sigmas_type": ("zero", "sigma_min"),
        },
        ("sigma_min", "sigma_max", "sigma_data", "rho", "num_train_timesteps"),
    ),
    # Open-Sora's own, which diffusers has not.
    "RFLOW": Scheduler(
        _open_sora_path,
        _open_sora,
        {"use_timestep_transform": (False, True), "use_discrete_timesteps": (False,), "num_timesteps": (1000,)},
        ("num_sampling_steps", "cfg_scale", "sample_method", "loc", "scale", "transform_scale"),
    ),
}
# Options that are read and are no numbers; those that are must be finite, and these positive.
_NO_NUMBERS = {"timestep_spacing", "sample_method", "disable_corrector", "trained_betas"}
_POSITIVE = {"num_train_timesteps", "shift", "flow_shift", "sigma_min", "sigma_max", "sigma_data", "rho"}
# Options of other schedulers, which from_config keeps when it makes one scheduler of another's config: diffusers
# ignores them, and so does stdit. Those of a scheduler's own are in its `allowed` or `read`.
_LEFTOVERS = {key for scheduler in SCHEDULERS.values() for key in (*scheduler.allowed, *scheduler.read)}
_LEFTOVERS |= {"dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range"}  # of options that must be off
_LEFTOVERS |= {"skip_prk_steps", "interpolation_type", "timestep_type", "sigma_schedule", "steps_offset"}


def _given(config: Config) -> dict[str, Any]:
    """Without the options that are null, which diffusers takes as if they were not there."""
    return {key: value for key, value in config.items() if value is not None}


def check_scheduler(config: Config, where: str = "scheduler") -> None:
    """Raises where a scheduler config asks for something that is not reproduced; `where` names it in the error."""
    config = _given(config)
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
                f"pass either. Set it to false and give a static {scheduler.shift}."
            )
        runs = " or ".join(map(repr, allowed))
        raise StditError(f"{where}: {name} with {key} = {value!r} is not supported; only {runs}.")
    limits = [config.get(key) for key in ("sigma_min", "sigma_max")]
    if config.get("use_karras_sigmas") and name == "UniPCMultistepScheduler" and None in limits:
        raise StditError(f"{where}: {name} with use_karras_sigmas needs sigma_min and sigma_max.")
    flow = name == "FlowMatchEulerDiscreteScheduler" and config.get("use_karras_sigmas") and not _cosmos2(config)
    if flow and any(isinstance(limit, int | float) and limit > 1 for limit in limits):
        raise StditError(f"{where}: {name} with use_karras_sigmas takes sigma_min and sigma_max up to 1: {limits}.")
    for key in scheduler.read:
        value = config.get(key, 1)
        number = type(value) in (int, float) and abs(value) <= 1e9  # levels are fp32
        if key not in _NO_NUMBERS and not (number and (value > 0 or key not in _POSITIVE)):
            kind = "a positive number" if key in _POSITIVE else "a number"
            raise StditError(f"{where}: {name} with {key} = {value!r}; it must be {kind}, at most 1e9.")
    steps = config.get("disable_corrector", [])
    if "disable_corrector" in scheduler.read and not (isinstance(steps, list) and all(type(n) is int for n in steps)):
        raise StditError(f"{where}: {name} with disable_corrector = {steps!r}; it must be a list of steps.")
    if "shift_terminal" in scheduler.read and not 0 <= config.get("shift_terminal", 0) < 1:
        raise StditError(f"{where}: {name} with shift_terminal = {config['shift_terminal']!r}; it must be in [0, 1).")
    known = {*scheduler.allowed, *scheduler.read}
    for key, value in config.items():
        if key.startswith("_") or key in known or key in _LEFTOVERS or value is False:
            continue  # an option of a later diffusers that is off changes nothing
        hint = nearest_name(key, known)
        warnings.warn(
            f"{where}: {name} has no option {key}: {value!r} is ignored, as by diffusers.{hint}", stacklevel=2
        )


def path_of(config: Config, where: str = "scheduler") -> Path:
    """The path that weights beside this scheduler config are for."""
    check_scheduler(config, where)
    return SCHEDULERS[config["_class_name"]].path(_given(config))


def make_solver(
    config: Config,
    steps: int,
    shift: float | None = None,
    where: str = "scheduler",
    *,
    shape: VideoShape | None = None,
    latent: LatentShape | None = None,
) -> Solver:
    """The solver a scheduler config names, over `steps` steps.

    shift: of a flow's noise levels, in place of the config's static shift or of the one that it has for the clip.
    shape, latent: the clip's, in pixels and latents; asked for where the levels depend on them.
    """
    check_scheduler(config, where)
    config = _given(config)
    name = config["_class_name"]
    if not 1 <= steps <= 1000:
        raise StditError(f"steps must be between 1 and 1000, not {steps}.")
    if shift is not None and shift <= 0:
        raise StditError(f"shift must be positive, not {shift}.")
    if shift is not None and (path_of(config).name != "flow" or config.get("use_karras_sigmas")):
        raise StditError(f"{where}: {name} knows no shift of the noise levels; leave shift out.")
    return SCHEDULERS[name].make(config, Request(steps, shift, shape, latent))
