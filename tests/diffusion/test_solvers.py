"""Every solver, ours and the adapter, against diffusers' scheduler in a loop as its pipelines have it."""

from __future__ import annotations

import math
import sys
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from diffusers.pipelines.ltx.pipeline_ltx_condition import linear_quadratic_schedule

from stdit.diffusion import solvers
from stdit.errors import StditError
from stdit.models.positions import network_time
from stdit.shapes import LatentShape, VideoShape


def random_field(t: float, x: torch.Tensor) -> torch.Tensor:
    """Some smooth field without symmetry, random but the same for both sides."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(x.shape[1], x.shape[1], generator=generator).to(x)
    return torch.einsum("cd,bdthw->bcthw", weight, torch.tanh(x + 3 * t)) + torch.cos(5 * t * x)


FLOWS = [
    *(solvers.euler_config(shift) for shift in (1.0, 3.0)),
    *(solvers.unipc_config(shift) for shift in (1.0, 3.0, 8.0)),
    {**solvers.unipc_config(3.0), "solver_order": 3},
    {**solvers.unipc_config(3.0), "solver_order": 1},
    {**solvers.unipc_config(2.0), "disable_corrector": [0, 3]},
]
LATTE = {"_class_name": "DDIMScheduler", "clip_sample": False, "variance_type": "learned_range"}
PIXART = {"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -math.inf}
ALLEGRO = {"_class_name": "EulerAncestralDiscreteScheduler"}
DDPMS = [
    PIXART,
    {**PIXART, "solver_order": 1, "timestep_spacing": "trailing"},
    {**PIXART, "lower_order_final": False, "final_sigmas_type": "sigma_min", "timestep_spacing": "leading"},
    {**PIXART, "euler_at_final": True, "final_sigmas_type": "sigma_min", "prediction_type": "v_prediction"},
    LATTE,
    {**LATTE, "timestep_spacing": "trailing", "set_alpha_to_one": False, "prediction_type": "v_prediction"},
    {
        **LATTE,
        "timestep_spacing": "linspace",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
    {**LATTE, "clip_sample": True},
    {**PIXART, "solver_order": 3, "use_lu_lambdas": True},
    {**PIXART, "algorithm_type": "sde-dpmsolver++"},
    {**LATTE, "trained_betas": [0.001 + 1e-5 * i for i in range(1000)]},
    ALLEGRO,
    {**ALLEGRO, "timestep_spacing": "leading", "steps_offset": 1},
    {**ALLEGRO, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
]
COSMOS1 = {"_class_name": "EDMEulerScheduler", "final_sigmas_type": "sigma_min"}
COSMOS2 = {**solvers.euler_config(), "use_karras_sigmas": True, "_caller": "cosmos2"}
COSMOS25 = {
    **solvers.unipc_config(), "use_karras_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.01,
    "_caller": "cosmos2.5",
}  # fmt: skip
LTX = {**solvers.euler_config(), "use_dynamic_shifting": True, "shift_terminal": 0.1, "base_image_seq_len": 1024}
LTX |= {"base_shift": 0.95, "max_shift": 2.05, "_caller": "ltx"}
SIZE = {"shape": VideoShape(17, 256, 512), "latent": LatentShape(5, 32, 64)}


def theirs_of(config, **more):
    known = {key: value for key, value in config.items() if not key.startswith("_")} | more
    return getattr(diffusers, config["_class_name"]).from_config(known)


def noise() -> torch.Tensor:
    return torch.randn(2, 3, 2, 3, 5, generator=torch.Generator().manual_seed(0))


def assert_near(found, expected, before=None):
    """To 1e-6 of the sample, or of the one before where noise cancels: they round to fp32."""
    scale = max(float(x.norm()) for x in (expected, before) if x is not None)
    assert (found - expected).norm() <= 1e-6 * scale


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("config", FLOWS)
def test_flows_agree_with_diffusers(config, steps):
    theirs = theirs_of(config)
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    ours = solvers.make_solver(config, steps)
    assert [level * 1000 for level in ours.levels] == pytest.approx(theirs.timesteps.tolist(), rel=1e-12)
    assert ours.sigmas == theirs.sigmas.tolist()
    x = y = noise()
    for index, t in enumerate(theirs.timesteps):
        x = theirs.step(random_field(float(t) / 1000, x), t, x, return_dict=False)[0]
        y = ours.step(index, random_field(ours.levels[index], y), y)
        assert_near(y, x)


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize(("shift", "terminal"), [(1.0, None), (3.0, None), (1.0, 0.1)])
def test_ltx_condition_takes_linear_quadratic_steps(steps, shift, terminal):
    """As LTXConditionPipeline: levels of its own, steps that end at the scheduler's next lower sigma."""
    if terminal and steps == 1:
        return
    config = {**solvers.euler_config(shift), "shift_terminal": terminal, "_caller": "ltx condition"}
    theirs, ours = theirs_of(config), solvers.make_solver(config, steps)
    asked = linear_quadratic_schedule(steps) * 1000
    theirs.set_timesteps(steps, timesteps=asked.tolist())
    if diffusers.__version__.startswith(("0.40.", "0.41.")):
        theirs.timesteps = asked  # a fault of theirs: the network is given levels that are shifted twice
    assert [level * 1000 for level in ours.levels] == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)
    assert ours.sigmas == pytest.approx(theirs.sigmas.tolist(), rel=1e-6, abs=1e-7)
    x = y = noise()
    for index, t in enumerate(theirs.timesteps):
        output, packed = (one.flatten(2).transpose(1, 2) for one in (random_field(float(t) / 1000, x), x))
        stepped = theirs.step(-output, t, packed, per_token_timesteps=t.expand(2, 1), return_dict=False)[0]
        x = stepped.transpose(1, 2).reshape(x.shape)
        y = ours.step(index, random_field(ours.levels[index], y), y)
        assert_near(y, x)


@pytest.mark.parametrize("steps", [1, 2, 7, 14, 20, 50])
@pytest.mark.parametrize("config", DDPMS)
def test_ddpms_agree_with_diffusers(config, steps):
    """As PixArt's, Latte's and Allegro's pipelines: first sample and input scaled, Allegro's noise drawn."""
    theirs = theirs_of(config)
    theirs.set_timesteps(steps)
    ours = solvers.make_solver(config, steps)
    assert [level * 1000 for level in ours.levels] == pytest.approx(theirs.timesteps.tolist(), rel=1e-12)
    x, y = noise() * theirs.init_noise_sigma, ours.start(noise())
    assert_near(y, x)
    for index, t in enumerate(theirs.timesteps):
        drawn, again = ([torch.Generator().manual_seed(10 * index + clip) for clip in (0, 1)] for _ in range(2))
        generator = {"generator": again} if ours.draws else {}
        seen, before = theirs.scale_model_input(x, t), x
        assert_near(ours.network_input(index, before), seen)
        output = random_field(float(t) / 1000, seen)  # one for both: the field would magnify what rounding leaves
        x = theirs.step(output, t, x, return_dict=False, **generator)[0]
        y = ours.step(index, output, before, drawn)
        assert_near(y, x, before)
    assert torch.equal(ours.finish(y), y)


@pytest.mark.parametrize("steps", [1, 2, 8, 35])
@pytest.mark.parametrize(
    "changes", [{}, {"prediction_type": "v_prediction", "sigma_data": 1.0, "final_sigmas_type": "zero"}]
)
def test_edm_agrees_with_diffusers(changes, steps):
    """As CosmosTextToWorldPipeline: the network is told log(σ)/4, sees the preconditioned input, and D is guided."""
    config = COSMOS1 | changes
    theirs = theirs_of(config)
    theirs.set_timesteps(steps)
    ours = solvers.make_solver(config, steps)
    levels = network_time(torch.tensor(ours.levels, dtype=torch.float64), "log_sigma")
    assert levels.tolist() == pytest.approx(theirs.timesteps.tolist(), rel=1e-6)
    x, y = noise() * theirs.config.sigma_max, ours.start(noise())
    for index, t in enumerate(theirs.timesteps):
        seen, before = theirs.scale_model_input(x, t), x
        assert_near(ours.network_input(index, before), seen)
        output = random_field(float(t), seen)
        clean = theirs.step(output, t, x, return_dict=False)[1]
        theirs._step_index -= 1
        x = theirs.step(clean, t, x, return_dict=False, pred_original_sample=clean)[0]
        y = ours.step(index, output, before)
        assert_near(y, x, before)
    assert_near(ours.finish(y), x / theirs.config.sigma_data, before / theirs.config.sigma_data)


@pytest.mark.parametrize("steps", [1, 2, 8, 35])
def test_a_flow_in_cosmos_2s_coordinates_agrees_with_diffusers(steps):
    """As Cosmos2TextToImagePipeline, line by line."""
    theirs = theirs_of(COSMOS2, sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    theirs.set_timesteps(sigmas=torch.linspace(0, 1, steps, dtype=torch.float64))
    theirs.sigmas[-1] = theirs.sigmas[-2]
    ours = solvers.make_solver(COSMOS2, steps)
    assert ours.sigmas == theirs.sigmas.tolist()
    assert (
        solvers.make_solver(dict(theirs.config) | {"_class_name": COSMOS2["_class_name"]}, steps).sigmas == ours.sigmas
    )
    x, y = noise() * theirs.config.sigma_max, ours.start(noise())
    for index, t in enumerate(theirs.timesteps):
        sigma = theirs.sigmas[index]
        level = sigma / (sigma + 1)
        assert ours.levels[index] == pytest.approx(float(level), rel=1e-6)
        seen, before = x * (1 - level), x
        assert_near(ours.network_input(index, before), seen)
        output = random_field(float(level), seen)
        clean = (1 - level) * x.double() - level * output  # in fp32 the next line would lose what σ = 0.002 leaves
        x = theirs.step(((x - clean) / sigma).float(), t, x, return_dict=False)[0]
        y = ours.step(index, output, before)
        assert_near(y, x, before)


@pytest.mark.parametrize("steps", [2, 8, 36])
@pytest.mark.parametrize("caller", ["cosmos2.5", ""])
def test_unipc_over_karras_levels_agrees_with_diffusers(caller, steps):
    """Cosmos 2.5's pipeline tells the network the levels themselves, others their integers."""
    theirs = theirs_of(COSMOS25)
    theirs.set_timesteps(steps)
    ours = solvers.make_solver(COSMOS25 | {"_caller": caller}, steps)
    assert ours.sigmas == theirs.sigmas.tolist()
    told = theirs.sigmas[:-1].tolist() if caller else (theirs.timesteps / 1000).tolist()
    assert ours.levels == pytest.approx(told, rel=1e-6)
    x = y = noise()
    for index, t in enumerate(theirs.timesteps):
        x = theirs.step(random_field(told[index], x), t, x, return_dict=False)[0]
        y = ours.step(index, random_field(ours.levels[index], y), y)
        assert_near(y, x)


@pytest.mark.parametrize("steps", [1, 2, 8, 50])
@pytest.mark.parametrize("changes", [{}, {"use_dynamic_shifting": False, "shift": 2.5}, {"time_shift_type": "linear"},
                                     {"shift_terminal": None, "base_image_seq_len": 256}])  # fmt: skip
def test_ltx_videos_levels_agree_with_diffusers(changes, steps):
    config = LTX | changes
    theirs = theirs_of(config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(5 * 32 * 64, *(theirs.config[name] for name in names))
    if steps == 1 and config["shift_terminal"]:  # diffusers divides zero by zero
        with pytest.raises(StditError, match="two or more"):
            solvers.make_solver(config, steps, **SIZE)
        return
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    ours = solvers.make_solver(config, steps, **SIZE)
    assert ours.sigmas == pytest.approx(theirs.sigmas.tolist(), rel=2e-6)
    assert [level * 1000 for level in ours.levels] == pytest.approx(theirs.timesteps.tolist(), rel=2e-6)
    x = y = noise()
    for index, t in enumerate(theirs.timesteps):
        x = theirs.step(random_field(float(t) / 1000, x), t, x, return_dict=False)[0]
        y = ours.step(index, random_field(ours.levels[index], y), y)
        assert (y - x).norm() <= 2e-6 * x.norm()


@pytest.mark.parametrize(("shape", "ratio"), [
    (VideoShape(1, 512, 512), 1.0), (VideoShape(1, 256, 256), 0.5), (VideoShape(51, 1024, 512), 30**0.5),
    (VideoShape(68, 512, 512), 20**0.5),
])  # fmt: skip
def test_open_soras_sampler(shape, ratio):
    """Its loop in fp64: t_i = 1 − i/S moved by the clip's shape, z ← z + (t_i − t_{i+1})·output."""
    solver = solvers.make_solver({"_class_name": "RFLOW", "use_timestep_transform": True}, 6, shape=shape)
    times = [ratio * t / (1 + (ratio - 1) * t) for t in (1 - i / 6 for i in range(6))]
    assert solver.levels == pytest.approx(times, rel=1e-6)
    x = y = noise()
    for index, (t, end) in enumerate(pairwise([*times, 0.0])):
        x = x + random_field(t, x) * (t - end)
        y = solver.step(index, random_field(solver.levels[index], y), y)
        assert (y - x).norm() <= 2e-6 * x.norm()
    plain = solvers.make_solver({"_class_name": "RFLOW"}, 6)
    assert plain.levels == pytest.approx([1 - i / 6 for i in range(6)])
    with pytest.raises(StditError, match="shape in pixels"):
        solvers.make_solver({"_class_name": "RFLOW", "use_timestep_transform": True}, 6)
    with pytest.raises(StditError, match="17 frames"):
        solvers.make_solver({"_class_name": "RFLOW", "use_timestep_transform": True}, 6, shape=VideoShape(9, 32, 32))


@pytest.mark.parametrize("config", [PIXART, LATTE, ALLEGRO, COSMOS1])
def test_without_diffusers_paths_are_read_and_solvers_name_the_extra(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert solvers.path_of(config).name in ("ddpm", "edm")
    with pytest.raises(StditError, match=r"folder: .*Scheduler is run by diffusers.*pip install 'stdit\[vaes\]'"):
        solvers.make_solver(config, 5, where="folder")


def solve(solver, field, x):
    """Integrates dx/dt = field(t, x) from noise x to the clip."""
    for index, t in enumerate(solver.levels):
        x = solver.step(index, field(t, x), x)
    return x


@pytest.mark.parametrize("config", FLOWS[:6])
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


@pytest.mark.parametrize("config", [*FLOWS, *DDPMS, COSMOS1, COSMOS2, COSMOS25, LTX])
def test_a_folder_goes_both_ways(config, tmp_path):
    solvers.write_scheduler(config, tmp_path)
    theirs = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path)
    for key, value in config.items():
        assert key.startswith("_") or theirs.config[key] == value
    theirs.save_pretrained(tmp_path)  # with every option of theirs spelled out
    read = solvers.read_scheduler(tmp_path, caller=config.get("_caller", ""))
    assert solvers.make_solver(read, 5, **SIZE).levels == solvers.make_solver(config, 5, **SIZE).levels


@pytest.mark.parametrize("name", ["dpm++", "ddim", "ancestral"])
def test_a_solver_by_name_keeps_the_betas(name):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    made = solvers.named_config(name, {**ALLEGRO, **betas})
    assert torch.equal(solvers.path_of(made).alphas, solvers.path_of({**PIXART, **betas}).alphas)
    assert solvers.make_solver(made, 4).levels[0] > 0.7
    if name != "dpm++":  # which does both
        with pytest.raises(StditError, match="other weights"):
            solvers.named_config(name, solvers.unipc_config())
    with pytest.raises(StditError, match="other weights"):
        solvers.named_config("FlowMatchEulerDiscreteScheduler", made)


@pytest.mark.parametrize("left", ["many", math.nan, [0], {}])
def test_a_leftover_may_be_anything(left):
    config = {"_class_name": "RFLOW", "num_train_timesteps": left, "disable_corrector": left, "shift": left}
    assert len(solvers.make_solver(config, 4).levels) == 4


@pytest.mark.parametrize("content", [b"{", b"[]", b'"\xe4"'])
def test_a_file_that_is_no_json_object_is_named(tmp_path, content):
    (tmp_path / "scheduler_config.json").write_bytes(content)
    with pytest.raises(StditError, match=r"scheduler_config\.json (is not JSON|holds list)"):
        solvers.read_scheduler(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "CogVideoXDPMScheduler"}, "CogVideoXDPMScheduler"),
        ({**solvers.unipc_config(), "use_dynamic_shifting": True}, "static flow_shift"),
        ({**solvers.euler_config(), "use_dynamic_shifting": True}, "latent shape"),
        ({**solvers.unipc_config(), "use_karras_sigmas": True}, "needs sigma_min and sigma_max"),
        (
            {**solvers.euler_config(), "use_karras_sigmas": True, "sigma_max": 80.0, "_caller": "plain"},
            "up to 1",
        ),
        ({**solvers.euler_config(), "num_train_timesteps": 500}, "num_train_timesteps = 500"),
        ({**solvers.unipc_config(), "num_train_timesteps": 500}, "num_train_timesteps = 500"),
        ({**solvers.unipc_config(), "disable_corrector": 1}, "disable_corrector = 1"),
        ({**solvers.unipc_config(), "disable_corrector": [0, "a"]}, "disable_corrector"),
        ({**ALLEGRO, "trained_betas": [0.5] * 1000}, "too large"),
        ({**PIXART, "beta_end": 1e8}, "beta_end = 1.*between 0 and 1"),
        ({**COSMOS1, "sigma_max": 1e300}, "between 0 and 1e.09"),
        ({**solvers.euler_config(), "shift_terminal": 1.0}, "shift_terminal = 1.0"),
        ({**LTX, "_caller": "ltx condition"}, "use_dynamic_shifting"),
        ({**solvers.euler_config(), "invert_sigmas": True}, "invert_sigmas"),
        ({**solvers.euler_config(), "stochastic_sampling": True}, "stochastic_sampling"),
        ({**LATTE, "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({**LATTE, "steps_offset": 900}, "beyond the last"),
        ({**ALLEGRO, "prediction_type": "sample"}, "prediction_type"),
        ({**ALLEGRO, "trained_betas": [0.1, 0.2]}, "1000 numbers"),
        ({**COSMOS1, "sigma_schedule": "linear"}, "sigma_schedule"),
        ({**COSMOS2, "sigma_data": 0.5}, "sigma_data"),
        ({**COSMOS1, "rho": 0}, "rho = 0; it must be between 0 and"),
        ({**solvers.euler_config(), "shift": "three"}, "shift = 'three'"),
        ({**solvers.unipc_config(), "flow_shift": math.inf}, "flow_shift = inf"),
        ({**PIXART, "beta_start": []}, "beta_start"),
        ({**ALLEGRO, "trained_betas": "0.1"}, "1000 numbers"),
        ({**ALLEGRO, "beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({**LATTE, "timestep_spacing": 7}, "timestep_spacing = 7"),
        ({**PIXART, "timestep_spacing": "odd"}, "odd is not supported"),
        ({**PIXART, "algorithm_type": "dpmsolver+"}, "algorithm_type"),
        ({**PIXART, "steps_offset": "one"}, "steps_offset = 'one'"),
        ({**PIXART, "variance_type": "learned"}, "variance_type"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "epsilon"),
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
    with pytest.raises(StditError, match="are both 1024"):
        solvers.make_solver({**LTX, "max_image_seq_len": 1024}, 5, **SIZE)
    with pytest.raises(StditError, match="leave shift out"):
        solvers.make_solver(PIXART, 5, shift=2.0)
