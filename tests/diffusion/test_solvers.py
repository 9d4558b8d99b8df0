from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from stdit.diffusion import solvers
from stdit.errors import StditError

DIFFUSERS = {cls.__name__: cls for cls in (FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)}


def random_field(t: float, x: torch.Tensor) -> torch.Tensor:
    """Some smooth field without symmetry, random but the same for both sides."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(x.shape[1], x.shape[1], generator=generator).to(x)
    return torch.einsum("cd,bdthw->bcthw", weight, torch.tanh(x + 3 * t)) + torch.cos(5 * t * x)


CONFIGS = [
    *(solvers.euler_config(shift) for shift in (1.0, 3.0)),
    *(solvers.unipc_config(shift) for shift in (1.0, 3.0, 8.0)),
    {**solvers.unipc_config(3.0), "solver_order": 3},
    {**solvers.unipc_config(3.0), "solver_order": 1},
    {**solvers.unipc_config(2.0), "disable_corrector": [0, 3]},
]


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("config", CONFIGS)
def test_agrees_with_diffusers(config, steps):
    theirs = DIFFUSERS[config["_class_name"]].from_config(config)
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    ours = solvers.make_solver(config, steps)
    assert [level * 1000 for level in ours.levels] == pytest.approx(theirs.timesteps.tolist(), rel=1e-12)
    assert ours.sigmas == theirs.sigmas.tolist()
    x = y = torch.randn(2, 3, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    for index, t in enumerate(theirs.timesteps):
        x = theirs.step(random_field(float(t) / 1000, x), t, x, return_dict=False)[0]
        y = ours.step(index, random_field(ours.levels[index], y), y)
        assert (y - x).norm() <= 1e-6 * x.norm(), index


def solve(solver, field, x):
    """Integrates dx/dt = field(t, x) from noise x to the clip."""
    for index, t in enumerate(solver.levels):
        x = solver.step(index, field(t, x), x)
    return x


@pytest.mark.parametrize("config", CONFIGS[:6])
def test_a_straight_flow_ends_at_the_clip(config):
    """v = ε − x_0 wherever x is: any solver must land on x_0 exactly, but for UniPC's start at 1 − 1e-6."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(1, 2, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    solver = solvers.make_solver(config, 7)
    start = solver.sigmas[0] * noise + (1 - solver.sigmas[0]) * x0
    end = solve(solver, lambda t, x: noise - x0, start)
    torch.testing.assert_close(end, x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("config", "order"), [(solvers.euler_config(), 1), (solvers.unipc_config(), 2)])
def test_order_of_convergence_on_a_gaussian(config, order):
    """x_0 ~ N(0, s²): the exact velocity is linear in x, and x_0 = s·ε/1 along the flow from ε (closed form)."""
    s = 0.6
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]

    def error(steps: int) -> float:
        solver = solvers.make_solver(config, steps)
        if isinstance(solver, solvers.UniPC):  # what is tested is the rule, not the truncation to integers
            solver.levels = solver.sigmas[:-1]

        def field(t: float, x: torch.Tensor) -> torch.Tensor:
            return x * (t - (1 - t) * s**2) / (t**2 + (1 - t) ** 2 * s**2)

        spread = math.sqrt(solver.sigmas[0] ** 2 + (1 - solver.sigmas[0]) ** 2 * s**2)
        return float((solve(solver, field, x * spread) - s * x).norm())

    errors = [error(steps) for steps in (16, 32, 64)]
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert min(rates) > order - 0.35, (errors, rates)


def test_the_static_shift_is_applied_twice():
    """facts: 10 steps at shift 3 end at σ 0.009; a single application would end at 0.25."""
    assert solvers.make_solver(solvers.euler_config(3.0), 10).sigmas[-2] == pytest.approx(0.009, abs=5e-4)


def test_a_folder_goes_both_ways(tmp_path):
    for config in (solvers.euler_config(2.0), solvers.unipc_config(2.0)):
        solvers.write_scheduler(config, tmp_path)
        theirs = DIFFUSERS[config["_class_name"]].from_pretrained(tmp_path)
        for key, value in config.items():
            assert key.startswith("_") or theirs.config[key] == value
        theirs.save_pretrained(tmp_path)  # with every option of theirs spelled out
        read = solvers.read_scheduler(tmp_path)
        assert solvers.make_solver(read, 5).levels == solvers.make_solver(config, 5).levels


@pytest.mark.parametrize("content", [b"{", b"[]", b'"\xe4"'])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "scheduler_config.json").write_bytes(content)
    with pytest.raises(StditError, match=r"scheduler_config\.json (is not JSON|holds list)"):
        solvers.read_scheduler(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "DDIMScheduler"}, "DDIMScheduler"),
        ({**solvers.euler_config(), "use_dynamic_shifting": True}, "static shift"),
        ({**solvers.euler_config(), "use_karras_sigmas": True}, "use_karras_sigmas"),
        ({**solvers.euler_config(), "shfit": 3.0}, "'shift'"),
        ({"_class_name": "UniPCMultistepScheduler"}, "epsilon"),
        ({**solvers.unipc_config(), "lower_order_final": False}, "lower_order_final"),
        ({**solvers.unipc_config(), "solver_type": "bh1"}, "bh1"),
        ({**solvers.unipc_config(), "solver_order": 4}, "solver_order"),
    ],
)
def test_what_is_not_reproduced_is_an_error(config, message):
    with pytest.raises(StditError, match=message):
        solvers.make_solver(config, 5)
    with pytest.raises(StditError, match="steps"):
        solvers.make_solver(solvers.euler_config(), 0)
