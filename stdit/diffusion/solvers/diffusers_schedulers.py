"""diffusers' own schedulers as solvers."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor

from stdit.diffusion.solvers.base import CALLERS, Config, Schedule, Solver, caller_of
from stdit.errors import StditError


def import_diffusers(module: str, needed_by: str, where: str) -> Any:
    """A module of diffusers. Raises StditError, naming the extra to install, if diffusers is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise StditError(
            f"{where}: {needed_by} is run by diffusers, which is not installed: pip install 'stdit[vaes]'."
        ) from None


class DiffusersSolver(Solver):
    """Drives a scheduler of diffusers as its pipelines do.

    The config's `_class_name` names the class. An EDM's sample is σ_d·x_0 + σ·ε and starts at σ_max, as in Cosmos'
    pipeline.
    """

    def __init__(self, config: Config, schedule: Schedule) -> None:
        name, steps, where = config["_class_name"], schedule.steps, schedule.where
        scheduler_class = getattr(import_diffusers("diffusers", name, where), name)
        options = _options(scheduler_class, config, where)
        if schedule.shift is not None:
            options["flow_shift" if "flow_shift" in inspect.signature(scheduler_class).parameters else "shift"] = (
                schedule.shift
            )
        given = _given_levels(scheduler_class, config, schedule)
        try:
            self.scheduler = scheduler_class(**options)
            self.scheduler.set_timesteps(**given)
        except Exception as error:  # it raises whatever its arithmetic does
            raise StditError(f"{where}: diffusers' {name} refuses {options} with {steps} steps: {error}") from error
        if hasattr(self.scheduler, "set_begin_index"):  # all but DDIM count their steps
            self.scheduler.set_begin_index(0)
        if name == "EDMEulerScheduler":
            sigmas = self.scheduler.sigmas[:-1].double()
            self.levels = (sigmas / (sigmas + 1)).tolist()
            self.start_scale = float(self.scheduler.config.sigma_max)
            self.end_scale = float(self.scheduler.config.sigma_data)
        else:
            self.levels = (self.scheduler.timesteps.double() / 1000).tolist()
            self.start_scale, self.end_scale = float(getattr(self.scheduler, "init_noise_sigma", 1.0)), 1.0
        is_flow = "FlowMatch" in name or bool(options.get("use_flow_sigmas"))
        if not all(0 <= level < 1 or (is_flow and level == 1) for level in self.levels):
            raise StditError(
                f"{where}: {name} with {options} and {steps} steps begins beyond the last of 1000 noise levels."
            )
        self.per_step = int(getattr(self.scheduler, "order", 1))
        takes = inspect.signature(scheduler_class.step).parameters
        self.draws = "generator" in takes
        self.of_pipelines = {"eta": 0.0} if "eta" in takes else {}  # as those of DDPMs call it

    def start(self, noise: Tensor) -> Tensor:
        return noise * self.start_scale

    def begin(self, index: int, latents: Tensor, noise: Tensor) -> Tensor:
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(index)
        at, clean = self.scheduler.timesteps[index : index + 1].repeat(len(latents)), latents * self.end_scale
        if hasattr(self.scheduler, "add_noise"):
            return self.scheduler.add_noise(clean, noise, at)
        return self.scheduler.scale_noise(clean, at, noise)

    def network_input(self, index: int, x: Tensor) -> Tensor:
        scale = getattr(self.scheduler, "scale_model_input", None)  # which a flow's have no need of
        return x if scale is None else scale(x, self.scheduler.timesteps[index])

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        random = {"generator": list(generators)} if self.draws else {}
        t, more = self.scheduler.timesteps[index], self.of_pipelines
        return self.scheduler.step(output, t, x, return_dict=False, **random, **more)[0]

    def finish(self, x: Tensor) -> Tensor:
        return x / self.end_scale


def _given_levels(scheduler_class: Any, config: Config, schedule: Schedule) -> dict[str, Any]:
    """The arguments of `set_timesteps`. Raises StditError if the scheduler cannot take the levels that are given."""
    name, caller = config["_class_name"], caller_of(config)
    if caller not in ("", "plain") and name != "EDMEulerScheduler":
        raise StditError(
            f"{schedule.where}: {name} is not supported here: {CALLERS[caller]}, which it is not given. Use the model "
            "folder's own solver."
        )
    if schedule.levels is None:
        return {"num_inference_steps": schedule.steps}
    if "FlowMatch" not in name or "sigmas" not in inspect.signature(scheduler_class.set_timesteps).parameters:
        raise StditError(f"{schedule.where}: {name} has noise levels of its own; leave levels out, or use euler.")
    return {"num_inference_steps": schedule.steps, "sigmas": list(schedule.levels)}


def _options(scheduler_class: Any, config: Config, where: str) -> dict[str, Any]:
    """The options of the class that a config has, each of the type that the class expects."""
    kept = {}
    for option in inspect.signature(scheduler_class).parameters.values():
        # num_train_timesteps is 1000 for a DDPM; an EDM ignores it, but allocates as many.
        if option.name not in config or option.name == "num_train_timesteps":
            continue
        value, default = config[option.name], option.default
        is_number = type(default) is float and type(value) is int
        if default is not None and type(value) is not type(default) and not is_number:
            raise StditError(
                f"{where}: {config['_class_name']} with {option.name} = {value!r}; it must be a value like {default!r}."
            )
        kept[option.name] = value
    return kept
