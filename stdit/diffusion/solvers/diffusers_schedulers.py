"""diffusers' own schedulers as solvers: DPM-Solver++, DDIM, Euler ancestral and EDM Euler."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor

from stdit.diffusion.solvers.base import Config, Schedule, Solver
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
        try:
            self.scheduler = scheduler_class(**options)
            self.scheduler.set_timesteps(steps)
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
            self.start_scale, self.end_scale = float(self.scheduler.init_noise_sigma), 1.0
        if not all(0 <= level < 1 for level in self.levels):
            raise StditError(
                f"{where}: {name} with {options} and {steps} steps begins beyond the last of 1000 noise levels."
            )
        self.draws = "Ancestral" in name or str(options.get("algorithm_type", "")).startswith("sde")

    def start(self, noise: Tensor) -> Tensor:
        return noise * self.start_scale

    def network_input(self, index: int, x: Tensor) -> Tensor:
        return self.scheduler.scale_model_input(x, self.scheduler.timesteps[index])

    def step(self, index: int, output: Tensor, x: Tensor, generators: Sequence[Generator] = ()) -> Tensor:
        random = {"generator": list(generators)} if self.draws else {}
        return self.scheduler.step(output, self.scheduler.timesteps[index], x, return_dict=False, **random)[0]

    def finish(self, x: Tensor) -> Tensor:
        return x / self.end_scale


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
