"""Every option of every scheduler that stdit reads, as diffusers' constructors list them: obeyed or refused."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from stdit.diffusion import solvers
from stdit.errors import StditError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, in diffusers' constructors
UNIPC = solvers.unipc_config(3.0)
BASES: dict[str, dict[str, Any]] = {
    **{name: {} for name in solvers.SCHEDULERS if name != "RFLOW"},
    "DDIMScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
}
BASES |= {"FlowMatchEulerDiscreteScheduler": solvers.euler_config(3.0), "UniPCMultistepScheduler": UNIPC}
# Legal values other than the default; of what is true or false, the other one is tried.
VALUES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (500, 2000), "shift": (2.0, 0.5), "flow_shift": (2.0,), "base_shift": (0.3,),
    "max_shift": (2.0,), "base_image_seq_len": (100,), "max_image_seq_len": (9000,), "shift_terminal": (0.1, 0.3),
    "time_shift_type": ("linear",), "beta_start": (0.0003,), "beta_end": (0.015,),
    "beta_schedule": ("scaled_linear", "squaredcos_cap_v2"), "trained_betas": ([1e-4 + 1e-5 * i for i in range(1000)],),
    "solver_order": (1, 3), "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "dynamic_thresholding_ratio": (0.5,), "sample_max_value": (2.0,), "clip_sample_range": (2.0,),
    "algorithm_type": ("dpmsolver", "sde-dpmsolver++"), "solver_type": ("heun", "bh1", "logrho"),
    "lambda_min_clipped": (-5.1,), "variance_type": ("learned", "learned_range", "fixed_small"),
    "timestep_spacing": ("leading", "trailing", "linspace"), "steps_offset": (1,),
    "final_sigmas_type": ("sigma_min", "zero"), "disable_corrector": ([0, 2],), "solver_p": (), "sigma_min": (0.01,),
    "sigma_max": (0.9,), "sigma_data": (1.0,), "sigma_schedule": ("exponential",), "rho": (5.0,),
    "corrector_order": (1, 3), "predictor_order": (1, 3), "interpolation_type": ("log_linear",),
    "original_inference_steps": (25,), "timestep_scaling": (5.0,), "timestep_type": ("continuous",),
    "upscale_mode": ("bilinear",),
}  # fmt: skip


def options() -> list[tuple[str, str, Any]]:
    found = []
    for name in BASES:
        for option in inspect.signature(getattr(diffusers, name).__init__).parameters.values():
            default = option.default
            other = (not default,) if isinstance(default, bool) else VALUES.get(option.name, (None,))
            found += [(name, option.name, value) for value in other if option.name != "self" and value != default]
    return found


def field(t: float, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(0.7 * x + 3 * t) + torch.cos(5 * t * x)


def generators(step: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(10 * step + clip) for clip in (0, 1)]


def assert_agrees(config: dict[str, Any], steps: int) -> None:
    """One network output for both at each step, since the field would magnify what rounding leaves."""
    ours = solvers.make_solver(config, steps)
    name = config["_class_name"]
    theirs = getattr(diffusers, name).from_config({key: v for key, v in config.items() if not key.startswith("_")})
    theirs.set_timesteps(steps)
    if name != "EDMEulerScheduler":  # which tells its network log(σ)/4
        assert [1000 * level for level in ours.levels] == pytest.approx(theirs.timesteps.tolist(), abs=1e-3)
    noise = torch.randn(2, 3, 2, 3, 5, generator=torch.Generator().manual_seed(0))
    # Cosmos' pipelines scale the first sample by sigma_max; a flow's by nothing.
    x = noise * (theirs.config.sigma_max if name == "EDMEulerScheduler" else getattr(theirs, "init_noise_sigma", 1.0))
    y = ours.start(noise)
    for index, t in enumerate(theirs.timesteps):
        scale = getattr(theirs, "scale_model_input", lambda x, t: x)
        output, before = field(ours.levels[index], scale(x, t)), x
        assert (ours.network_input(index, y) - scale(x, t)).norm() <= 1e-5 * scale(x, t).norm()
        drawn = {"generator": generators(index)} if ours.draws else {}
        drawn |= {"eta": 0.0} if "eta" in inspect.signature(theirs.step).parameters else {}  # as pipelines do
        x = theirs.step(output, t, x, return_dict=False, **drawn)[0]
        y = ours.step(index, output, y, generators(index))
        assert (y - x).norm() <= 1e-5 * max(x.norm(), before.norm())


def test_every_option_is_tried():
    assert not [option for option in options() if option[2] is None]


@pytest.mark.parametrize(("name", "option", "value"), options())
def test_an_option_is_obeyed_or_refused_by_name(name, option, value):
    config = {**BASES[name], "_class_name": name, option: value}
    try:
        solvers.make_solver(config, 5)
    except StditError as error:
        assert option in str(error)
        return
    for steps in (5 if name == "PNDMScheduler" else 3, 12):  # its Runge-Kutta needs four
        assert_agrees(config, steps)


@pytest.mark.parametrize("name", ["heun", "lcm", "dpm++", *sorted(solvers.FLOWS_BY_OPTION)])
@pytest.mark.parametrize("model", [solvers.euler_config(3.0), solvers.unipc_config(5.0)])
def test_a_flow_by_another_of_diffusers_schedulers(name, model):
    config = solvers.named_config(name, model)
    assert solvers.static_shift(config) == solvers.static_shift(model)
    for steps in (4, 20):
        assert_agrees(config, steps)
    if "flow_shift" in config:
        for more in ({"solver_order": 1}, {"final_sigmas_type": "sigma_min"}, {"algorithm_type": "sde-dpmsolver++"}):
            try:
                solvers.make_solver({**config, **more}, 8)
            except StditError as error:
                assert next(iter(more)) in str(error)
                continue
            assert_agrees({**config, **more}, 8)


@pytest.mark.parametrize("name", [*solvers.NAMES, *solvers.SCHEDULERS])
def test_a_solver_by_name_is_for_such_weights_or_is_refused_by_name(name):
    models = {"flow": solvers.euler_config(3.0), "ddpm": {"_class_name": "DDIMScheduler", "beta_end": 0.012}}
    models["edm"] = {"_class_name": "EDMEulerScheduler"}
    taken = []
    for kind, model in models.items():
        try:
            config = solvers.named_config(name, model)
        except StditError as error:
            assert name in str(error)
            continue
        taken.append(kind)
        paths = [solvers.path_of(one) for one in (config, model)]
        assert paths[0].name == paths[1].name == kind and solvers.make_solver(config, 8).levels
        assert kind != "ddpm" or torch.equal(paths[0].betas, paths[1].betas)
    assert taken or name in ("RFLOW", "EDMEulerScheduler"), name


@pytest.mark.parametrize("limits", [{}, {"sigma_min": 0.01, "sigma_max": 0.98}, {"sigma_min": 0.05}])
@pytest.mark.parametrize("terminal", [None, 0.2])
@pytest.mark.parametrize("caller", ["", "plain"])
def test_karras_levels_of_a_flow(limits, terminal, caller):
    """In t itself; only Cosmos' pipelines lay them in σ = t/(1 − t)."""
    config = {**solvers.euler_config(3.0), "use_karras_sigmas": True, "shift_terminal": terminal, **limits}
    for steps in (2, 5, 30):
        assert_agrees({**config, "_caller": caller}, steps)


@pytest.mark.parametrize(
    "leftovers",
    [
        {"beta_start": 0.00085, "clip_sample": True, "set_alpha_to_one": True, "skip_prk_steps": True},
        {"flow_shift": 9.0, "solver_order": 3, "solver_type": "bh1", "predict_x0": False, "thresholding": True},
        {"_diffusers_version": "0.99", "_use_default_values": ["shift"], "algorithm_type": "sde-dpmsolver++"},
    ],
)
def test_what_another_scheduler_left_is_ignored(leftovers):
    """from_config keeps the options of the scheduler that a config is from; diffusers' own class never reads them."""
    assert_agrees({**solvers.euler_config(3.0), **leftovers}, 5)


def test_an_unknown_option_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="no option shfit.*'shift'"):
        solvers.make_solver({**solvers.euler_config(), "shfit": 3.0}, 5)
