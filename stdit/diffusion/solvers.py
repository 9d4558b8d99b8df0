"""Solvers: from noise to clip along the velocity the network predicts, as a model folder's scheduler says.

Two of diffusers' schedulers are reproduced for flows, quirks included, since weights are published and judged with
them (diffusers 0.42, `schedulers/scheduling_flow_match_euler_discrete.py` and `scheduling_unipc_multistep.py`):

- FlowMatchEulerDiscreteScheduler applies a static shift twice: once to its table of 1000 levels, whose ends it then
  spaces evenly, and once more to the result.
- UniPCMultistepScheduler starts at 1 − 1e-6, and gives the network timesteps truncated to integers (999, 964, …) while
  it integrates over the levels themselves.

A solver's own arithmetic is fp64 on the host, over levels rounded to fp32 as theirs are; the sample keeps its dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from stdit.errors import StditError, nearest_name
from stdit.files import publish_text


class Solver(Protocol):
    """Takes `steps` steps from noise (level near 1) to the clip (level 0), in order and once."""

    levels: list[float]  # what the network is told at each step, in [0, 1]

    def step(self, index: int, v: Tensor, x: Tensor) -> Tensor:
        """The sample after step `index`, from the velocity at its start. v, x: (…,), the same shape and dtype."""
        ...


class Euler:
    """x ← x + (σ_{i+1} − σ_i)·v over the levels of diffusers' FlowMatchEulerDiscreteScheduler.

    shift: static; the schedule applies it twice (10 steps, shift 3: the last σ is 0.009 where the formula gives 0.25).
    """

    def __init__(self, steps: int, shift: float = 1.0, train_steps: int = 1000) -> None:
        self.sigmas = euler_sigmas(steps, shift, train_steps)
        # Their timesteps are fp32(σ)·1000 in fp32; the division gives them back as noise levels.
        self.levels = [float(np.float32(sigma) * np.float32(train_steps)) / train_steps for sigma in self.sigmas[:-1]]

    def step(self, index: int, v: Tensor, x: Tensor) -> Tensor:
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * v


def euler_sigmas(steps: int, shift: float, train_steps: int = 1000) -> list[float]:
    """σ_0 … σ_steps of diffusers' flow Euler: the shifted table's ends, evenly between, shifted again, then 0."""
    ends = np.array([train_steps, 1], dtype=np.float32) / np.float32(train_steps)
    ends = (shift * ends / (1 + (shift - 1) * ends)).astype(np.float32).astype(np.float64)
    sigmas = np.linspace(ends[0], ends[1], steps)
    sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return [*(float(sigma) for sigma in sigmas.astype(np.float32)), 0.0]


class UniPC:
    """UniPC on data predictions (Zhao et al. 2023, with B(h) = e^h − 1) over diffusers' flow levels.

    With λ = log((1 − σ)/σ) and h = λ_{i+1} − λ_i, the predictor of order p extrapolates x_0 through the last p
    predictions; the corrector then redoes the step just taken with the prediction at its end. It keeps state.
    """

    def __init__(
        self,
        steps: int,
        shift: float = 1.0,
        order: int = 2,
        disable_corrector: tuple[int, ...] = (),
        train_steps: int = 1000,
    ) -> None:
        sigmas = np.linspace(1, 1 / train_steps, steps + 1)[:-1]
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
        if abs(sigmas[0] - 1) < 1e-6:
            sigmas[0] -= 1e-6  # λ is −∞ at σ = 1
        self.levels = [int(sigma * train_steps) / train_steps for sigma in sigmas]
        self.sigmas = [*(float(sigma) for sigma in sigmas.astype(np.float32)), 0.0]
        self.steps, self.order, self.disable_corrector = steps, order, set(disable_corrector)
        self.clean: list[Tensor] = []  # the last `order` predictions of x_0, newest last
        self.start: Tensor | None = None  # the sample the last predictor step started from
        self.last_order = 0

    def step(self, index: int, v: Tensor, x: Tensor) -> Tensor:
        if index == 0:
            self.clean, self.start, self.last_order = [], None, 0
        x0 = x - self.sigmas[index] * v
        if self.start is not None and index - 1 not in self.disable_corrector:
            x = self._advance(index - 1, self.start, self.last_order, x0)
        self.clean = [*self.clean, x0][-self.order :]
        self.start = x
        self.last_order = min(self.order, self.steps - index, len(self.clean))  # the last steps at lower order
        return self._advance(index, x, self.last_order, None)

    def _lambda(self, index: int) -> float:
        sigma = self.sigmas[index]
        return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)

    def _advance(self, index: int, x: Tensor, order: int, x0_end: Tensor | None) -> Tensor:
        """From σ_index to σ_{index+1}: the predictor, or the corrector where x_0 at the end is known."""
        sigma, sigma_end = self.sigmas[index], self.sigmas[index + 1]
        h = self._lambda(index + 1) - self._lambda(index)
        growth = math.expm1(-h)  # e^{−h} − 1, and B(h)
        newest = self.clean[-1]
        ratios = [(self._lambda(index - i) - self._lambda(index)) / h for i in range(1, order)]
        differences = [(self.clean[-(i + 1)] - newest) / r for i, r in zip(range(1, order), ratios)]
        if x0_end is not None:
            differences.append(x0_end - newest)
            weights = [0.5] if order == 1 else _weights([*ratios, 1.0], h)
        elif order == 2:
            weights = [0.5]
        else:
            weights = _weights(ratios, h)
        x = sigma_end / sigma * x - (1 - sigma_end) * growth * newest
        for weight, difference in zip(weights, differences):
            x = x - (1 - sigma_end) * growth * weight * difference
        return x


def _weights(ratios: list[float], h: float) -> list[float]:
    """Solves Σ_m ρ_m r_m^{n−1} = n!·φ_{n+1}(−h)·(−h) / B(h) for ρ (UniPC's eq. 5 for data prediction)."""
    if not ratios:
        return []
    growth, factorial, right = math.expm1(-h), 1, []
    phi = growth / -h - 1
    for n in range(1, len(ratios) + 1):
        right.append(phi * factorial / growth)
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    matrix = np.array([[r**power for r in ratios] for power in range(len(ratios))])
    return np.linalg.solve(matrix, np.array(right)).tolist()


# ---- the scheduler/ of a model folder ----

# What each scheduler's config may say for the flow solvers above; keys left out of a file take the default (first).
_EULER_FIXED: dict[str, tuple[Any, ...]] = {
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "shift_terminal": (None, 0),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "stochastic_sampling": (False,),
}
_UNIPC_FIXED: dict[str, tuple[Any, ...]] = {
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "predict_x0": (True,),
    "final_sigmas_type": ("zero",),
    "lower_order_final": (True,),
    "solver_type": ("bh2", "midpoint", "heun", "logrho"),  # diffusers reads the last three as bh2; its bh1 ends in NaN
    "thresholding": (False,),
    "solver_p": (None,),
    "use_dynamic_shifting": (False,),
    "shift_terminal": (None, 0),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "rescale_betas_zero_snr": (False,),
}
_UNIPC_ABSENT = {"prediction_type": "epsilon", "use_flow_sigmas": False}  # diffusers' defaults where ours differ
_EULER_READ = {"shift", "num_train_timesteps"}
_UNIPC_READ = {"flow_shift", "num_train_timesteps", "solver_order", "disable_corrector"}
# Without effect on the solvers above.
_IGNORED = {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type", "beta_start"}
_IGNORED |= {"beta_end", "beta_schedule", "trained_betas", "dynamic_thresholding_ratio", "sample_max_value"}
_IGNORED |= {"timestep_spacing", "steps_offset", "sigma_min", "sigma_max"}


def _euler(config: Mapping[str, Any], steps: int, shift: float | None) -> Euler:
    shift = float(config.get("shift", 1.0)) if shift is None else shift
    return Euler(steps, shift, int(config.get("num_train_timesteps", 1000)))


def _unipc(config: Mapping[str, Any], steps: int, shift: float | None) -> UniPC:
    variant = config.get("solver_type", "bh2")
    if variant in ("midpoint", "heun", "logrho"):  # as diffusers reads them
        variant = "bh2"
    order = int(config.get("solver_order", 2))
    if variant not in ("bh1", "bh2") or order not in (1, 2, 3):
        raise StditError(
            f"UniPCMultistepScheduler with solver_type {variant!r} and solver_order {order} is not supported."
        )
    shift = float(config.get("flow_shift", 1.0)) if shift is None else shift
    skipped = tuple(config.get("disable_corrector") or ())
    return UniPC(steps, shift, order, skipped, int(config.get("num_train_timesteps", 1000)))


_SOLVERS: dict[str, tuple[Callable[..., Solver], dict[str, tuple[Any, ...]], set[str]]] = {
    "FlowMatchEulerDiscreteScheduler": (_euler, _EULER_FIXED, _EULER_READ),
    "UniPCMultistepScheduler": (_unipc, _UNIPC_FIXED, _UNIPC_READ),
}


def check_scheduler(config: Mapping[str, Any], where: str = "scheduler") -> None:
    """Raises where a scheduler config asks for something that is not reproduced; `where` names it in the error."""
    name = config.get("_class_name", "")
    if name not in _SOLVERS:
        raise StditError(
            f"{where}: the scheduler {name!r} is not supported. Supported: {', '.join(_SOLVERS)}."
            f"{nearest_name(name, _SOLVERS)}"
        )
    _, fixed, read = _SOLVERS[name]
    absent = _UNIPC_ABSENT if name == "UniPCMultistepScheduler" else {}
    for key, allowed in fixed.items():
        value = config.get(key, absent.get(key, allowed[0]))
        if value in allowed:
            continue
        if key == "use_dynamic_shifting":
            raise StditError(
                f"{where}: use_dynamic_shifting needs a shift for every size, which WanPipeline cannot pass either. "
                f"Set it to false and give a static {'flow_shift' if 'flow_shift' in read else 'shift'}."
            )
        raise StditError(f"{where}: {name} with {key} = {value!r} is not supported; only {allowed[0]!r} is.")
    for key, value in config.items():
        known = key.startswith("_") or key in fixed or key in read or key in _IGNORED
        if not known and value not in (None, False):  # an option of a later diffusers that is off changes nothing
            raise StditError(
                f"{where}: {name} has an option {key} = {value!r} that is not known here."
                f"{nearest_name(key, [*fixed, *read])}"
            )


def make_solver(config: Mapping[str, Any], steps: int, shift: float | None = None, where: str = "scheduler") -> Solver:
    """The solver a scheduler config names, over `steps` steps. `shift` replaces the config's static shift."""
    check_scheduler(config, where)
    if not 1 <= steps <= int(config.get("num_train_timesteps", 1000)):
        raise StditError(f"steps must be between 1 and {config.get('num_train_timesteps', 1000)}, not {steps}.")
    if shift is not None and shift <= 0:
        raise StditError(f"shift must be positive, not {shift}.")
    return _SOLVERS[config["_class_name"]][0](config, steps, shift)


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


def named_config(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a solver by short name ("euler" or "unipc"), with the static shift of another config."""
    makers = {"euler": euler_config, "unipc": unipc_config}
    if name not in makers:
        raise StditError(f"solver {name!r} is not known: euler or unipc.{nearest_name(name, makers)}")
    return makers[name](static_shift(config))


def static_shift(config: Mapping[str, Any]) -> float:
    """The shift of the noise levels that a scheduler config holds, whatever the clip."""
    return float(config.get("shift", config.get("flow_shift", 1.0)))


def read_scheduler(folder: str | Path) -> dict[str, Any]:
    """The config in a model folder's scheduler/, checked."""
    path = Path(folder) / "scheduler_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise StditError(f"{path} does not exist. A model folder's scheduler/ holds it.") from None
    except ValueError as error:
        raise StditError(f"{path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise StditError(f"{path} holds {type(config).__name__} where a JSON object is wanted.")
    check_scheduler(config, str(path))
    return config


def write_scheduler(config: Mapping[str, Any], folder: str | Path) -> None:
    """Writes scheduler_config.json as diffusers reads it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(config), indent=2, sort_keys=True) + "\n"
    publish_text(Path(folder) / "scheduler_config.json", text)
