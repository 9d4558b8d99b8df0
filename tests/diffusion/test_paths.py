"""The families' paths against diffusers' schedulers and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler
from scipy import stats

from stdit.diffusion import solvers
from stdit.diffusion.noise_levels import NoiseLevelConfig, noise_levels
from stdit.diffusion.paths import DdpmPath, EdmPath, FlowPath, token_errors
from stdit.models.positions import network_time, sinusoids
from stdit.shapes import VideoShape

DDPM = {"_class_name": "DDIMScheduler", "clip_sample": False}
PATHS = [
    FlowPath(),
    FlowPath(reverse=True),
    DdpmPath.of(DDPM),
    DdpmPath.of({**DDPM, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}),
    EdmPath(),
    EdmPath(1.0, -1),
]


def clean_of(path, output, x, t):
    """x_0 from the network's input and output, by the inverse of the table at the top of paths.py."""
    if isinstance(path, FlowPath):
        return x + t * output if path.reverse else x - t * output
    if isinstance(path, EdmPath):
        sigma, data = t / (1 - t), path.sigma_data
        return (data * x + path.sign * sigma * output) / (sigma**2 + data**2).sqrt()
    alpha = path.alphas[path.index(t)]
    if path.prediction == "epsilon":
        return (x - (1 - alpha).sqrt() * output) / alpha.sqrt()
    return alpha.sqrt() * x - (1 - alpha).sqrt() * output


@pytest.fixture
def pair() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("path", PATHS)
def test_the_target_gives_the_clip_back(path, pair):
    x0, noise = pair
    for t in path.trained_levels(torch.tensor([0.003, 0.437, 0.98], dtype=torch.float64), []):
        x = path.noisy(x0, noise, t)
        torch.testing.assert_close(clean_of(path, path.target(x0, noise, t), x, t), x0, rtol=1e-9, atol=1e-9)
    frames = torch.tensor([0.2, 0.7], dtype=torch.float64)[:, None, None]  # a level a frame
    apart = [path.noisy(x0[:, [i]], noise[:, [i]], frames[i]) for i in (0, 1)]
    torch.testing.assert_close(path.noisy(x0, noise, frames), torch.cat(apart, 1))


def test_a_flows_ends_are_exact(pair):
    x0, noise = pair
    assert torch.equal(FlowPath().noisy(x0, noise, torch.tensor(0.0)), x0)
    assert torch.equal(FlowPath().noisy(x0, noise, torch.tensor(1.0)), noise)


@pytest.mark.parametrize("level", [0.0, 0.437, 1.0])
def test_velocity_gives_both_ends_back_and_is_the_derivative(pair, level):
    (x0, noise), path, t = pair, FlowPath(), torch.tensor(level, dtype=torch.float64)
    x_t, v = path.noisy(x0, noise, t), path.target(x0, noise, t)
    torch.testing.assert_close(x_t - t * v, x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x_t + (1 - t) * v, noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((path.noisy(x0, noise, t + 1e-3) - x_t) / 1e-3, v, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear"])
def test_ddpm_agrees_with_diffusers(kind, pair):
    config = {**DDPM, "beta_schedule": kind}
    theirs = DDPMScheduler(beta_schedule=kind)
    x0, noise = (one[None].float() for one in pair)
    epsilon, v = DdpmPath.of(config), DdpmPath.of({**config, "prediction_type": "v_prediction"})
    for index in (0, 1, 437, 999):
        t = torch.tensor(index / 1000, dtype=torch.float64)
        step = torch.tensor([index])
        torch.testing.assert_close(epsilon.noisy(x0, noise, t), theirs.add_noise(x0, noise, step), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(v.target(x0, noise, t), theirs.get_velocity(x0, noise, step), rtol=1e-6, atol=1e-6)
        assert torch.equal(epsilon.target(x0, noise, t), noise)


def test_the_network_is_told_the_ddpm_index_itself():
    """index / 1000 · 1000 in fp64 is the integer, for every one of them: sinusoids to the last bit."""
    indices = torch.arange(1000)
    levels = DdpmPath.of(DDPM).trained_levels((indices.double() + 0.5) / 1000, [])
    assert torch.equal(DdpmPath.of(DDPM).index(levels), indices)
    assert torch.equal(sinusoids(network_time(levels), 8), sinusoids(indices, 8))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("data", [0.5, 1.0])
def test_edm_agrees_with_diffusers(prediction, data, pair):
    """Input, output and what the network is told, at σ from 0.002 to 80; Karras et al.'s weight makes it F's error."""
    theirs = EDMEulerScheduler(sigma_data=data, prediction_type=prediction)
    path = solvers.path_of({"_class_name": "EDMEulerScheduler", "sigma_data": data, "prediction_type": prediction})
    z, noise = pair
    for sigma in torch.tensor([0.002, 0.3, 1.0, 80.0], dtype=torch.float64):
        t = sigma / (sigma + 1)
        x = data * z + sigma * noise
        seen = path.noisy(z, noise, t)
        torch.testing.assert_close(seen, theirs.precondition_inputs(x, sigma))
        told = network_time(t[None], "log_sigma").item()
        assert told == pytest.approx(theirs.precondition_noise(sigma).item(), rel=1e-9)
        output = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        clean = theirs.precondition_outputs(x, output, sigma)
        torch.testing.assert_close(clean_of(path, output, seen, t) * data, clean)
        weight = (sigma**2 + data**2) / (sigma * data) ** 2
        torch.testing.assert_close(
            (output - path.target(z, noise, t)).square(), weight * (clean - data * z).square(), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("index", [0, 1, 300, 999])
def test_the_learned_variances_bound_is_the_kl_of_two_gaussians(prediction, index):
    """Means and variances of both written out from Ho et al. (2020), eq. 6-7; at index 0 the mass of a bin of 2/255."""
    path = DdpmPath.of({**DDPM, "prediction_type": prediction})
    generator = torch.Generator().manual_seed(index)
    x0, noise, error, values = (torch.randn(400, generator=generator, dtype=torch.float64) for _ in range(4))
    t = torch.tensor(index / 1000, dtype=torch.float64)
    found = path.variance_bound(values, 0.1 * error, x0, t)

    beta = np.linspace(0.0001, 0.02, 1000)
    bar = np.cumprod(1 - beta)
    last = bar[index - 1] if index else 1.0
    x = bar[index] ** 0.5 * x0 + (1 - bar[index]) ** 0.5 * noise
    if prediction == "epsilon":
        clean = (x - (1 - bar[index]) ** 0.5 * (noise + 0.1 * error)) / bar[index] ** 0.5
    else:
        v = bar[index] ** 0.5 * noise - (1 - bar[index]) ** 0.5 * x0
        clean = bar[index] ** 0.5 * x - (1 - bar[index]) ** 0.5 * (v + 0.1 * error)

    def mean(x0: torch.Tensor) -> torch.Tensor:
        a = beta[index] * last**0.5 / (1 - bar[index])
        b = (1 - last) * (1 - beta[index]) ** 0.5 / (1 - bar[index])
        return a * x0 + b * x

    small = max(index, 1)
    posterior = beta[small] * (1 - bar[small - 1]) / (1 - bar[small])
    share = (values + 1) / 2
    variance = torch.exp(share * np.log(beta[index]) + (1 - share) * np.log(posterior))
    if index:
        q = torch.distributions.Normal(mean(x0), torch.full_like(x0, posterior).sqrt())
        expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(mean(clean), variance.sqrt()))
    else:
        p = stats.norm(mean(clean).numpy(), variance.sqrt().numpy())
        above, below = p.cdf(x0.numpy() + 1 / 255), p.cdf(x0.numpy() - 1 / 255)
        mass = np.where(x0 < -0.999, above, np.where(x0 > 0.999, 1 - below, above - below))
        expected = -torch.from_numpy(np.log(np.clip(mass, 1e-12, None)))
    torch.testing.assert_close(found, expected / math.log(2), rtol=1e-5, atol=1e-6)  # betas are fp32 in the path


def test_the_bound_teaches_the_variance_alone():
    path = DdpmPath.of(DDPM)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    output = draw(5, 3 * 8).requires_grad_()  # three places of 4 + 4 channels
    target, clean = draw(5, 3 * 4), draw(5, 3 * 4)
    levels = torch.tensor([0.0, 0.1, 0.4, 0.7, 0.999], dtype=torch.float64)
    hybrid = token_errors(path, output, target, 3, levels, clean)
    plain = token_errors(path, output, target, 3, levels, None)
    mean = output.unflatten(1, (3, 8))[..., :4].flatten(1)
    torch.testing.assert_close(plain, (mean - target).square().sum(1))
    with_bound, without = (torch.autograd.grad(one.sum(), output, retain_graph=True)[0] for one in (hybrid, plain))
    with_bound, without = (one.unflatten(1, (3, 8)) for one in (with_bound, without))
    assert torch.equal(with_bound[..., :4], without[..., :4])
    assert not without[..., 4:].any() and with_bound[..., 4:].all()
    assert (hybrid > plain - 1e-9).all()  # a KL and a probability's logarithm
    narrow = output[:, :12].detach()
    torch.testing.assert_close(token_errors(path, narrow, target, 3, levels, clean), (narrow - target).square().sum(1))


SCHEDULERS = {
    "PixArt": {"_class_name": "DPMSolverMultistepScheduler"},
    "Latte": DDPM,
    "Allegro": {"_class_name": "EulerAncestralDiscreteScheduler"},
    "v": {"_class_name": "DDIMScheduler", "clip_sample": False, "prediction_type": "v_prediction"},
    "Cosmos 1": {"_class_name": "EDMEulerScheduler", "final_sigmas_type": "sigma_min"},
    "Cosmos 2": {**solvers.euler_config(), "use_karras_sigmas": True, "_caller": "cosmos2"},
    "Cosmos 2.5": {**solvers.unipc_config(), "use_karras_sigmas": True, "sigma_max": 200.0, "sigma_min": 0.01},
    "LTX": {**solvers.euler_config(), "_caller": "ltx"},
    "STDiT3": {"_class_name": "RFLOW", "use_timestep_transform": True},
    "Wan": solvers.unipc_config(3.0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_is_learned_along_a_path_is_sampled_by_its_solver(name):
    """Clips of one colour from N(0.7, 0.4²): their best predictor is linear in what the network sees. It is fitted to
    the path's noisy clips and targets at the solver's levels; samples must have the mean and deviation of the clips."""
    config = SCHEDULERS[name]
    steps = 200 if name == "Allegro" else 40  # ancestral steps are of first order in the noise as well
    solver, path = solvers.make_solver(config, steps, shape=VideoShape(17, 256, 256)), solvers.path_of(config)
    generator = torch.Generator().manual_seed(0)
    clips, noise, x = (torch.randn(20_000, generator=generator, dtype=torch.float64) for _ in range(3))
    clips = 0.7 + 0.4 * clips
    x = solver.start(x)
    for index, level in enumerate(solver.levels):
        t = torch.tensor(level, dtype=torch.float64)
        seen, target = path.noisy(clips, noise, t), path.target(clips, noise, t)
        slope = torch.cov(torch.stack([seen, target]))[0, 1] / seen.var()
        output = target.mean() + slope * (solver.network_input(index, x) - seen.mean())
        x = solver.step(index, output, x, [generator])
    found = solver.finish(x)
    assert float(found.mean()) == pytest.approx(0.7, abs=0.03)
    assert float(found.std()) == pytest.approx(0.4, rel=0.08)


def test_levels_are_drawn_as_the_family_trains():
    """DDPM: its indices, uniformly. EDM: log-normal σ. Open-Sora: moved by the clip's shape."""
    key = {"seed": 0, "epoch": 0, "step": 0}
    u = noise_levels(range(4000), 4000, [1] * 4000, NoiseLevelConfig(distribution="uniform"), **key)
    indices = DdpmPath.of(DDPM).trained_levels(u, []) * 1000
    assert torch.equal(indices, indices.round()) and torch.equal(indices.unique(), torch.arange(1000.0).double())
    assert (torch.bincount(indices.long()) - 4).abs().max() <= 1
    t = noise_levels(range(4000), 4000, [1] * 4000, NoiseLevelConfig(mean=-0.4, std=1.3), **key)
    sigma = t / (1 - t)
    assert stats.kstest(sigma.numpy(), stats.lognorm(1.3, scale=math.exp(-0.4)).cdf).pvalue > 1e-3
    moved = FlowPath(reverse=True, by_shape=True).trained_levels(
        t[:2], [VideoShape(1, 512, 512), VideoShape(34, 256, 256)]
    )
    ratio = 10**0.5 / 2
    assert moved.tolist() == pytest.approx([t[0].item(), (ratio * t[1] / (1 + (ratio - 1) * t[1])).item()])
