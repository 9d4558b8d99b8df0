"""The families' paths against diffusers' schedulers and closed forms."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler

from stdit.diffusion import solvers
from stdit.diffusion.paths import DdpmPath, EdmPath, FlowPath
from stdit.models.positions import level_sinusoids, sinusoids

DDPM = {"_class_name": "DDIMScheduler", "clip_sample": False}
PATHS = [
    FlowPath(),
    FlowPath(reverse=True),
    DdpmPath.of(DDPM),
    DdpmPath.of({**DDPM, "prediction_type": "v_prediction", "beta_schedule": "scaled_linear"}),
    EdmPath(),
    EdmPath(1.0, -1),
]


@pytest.fixture
def pair() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("path", PATHS)
def test_the_target_gives_the_clip_back(path, pair):
    x0, noise = pair
    for t in path.snap(torch.tensor([0.003, 0.437, 0.98], dtype=torch.float64)):
        x = path.noisy(x0, noise, t)
        torch.testing.assert_close(path.clean(path.target(x0, noise, t), x, t), x0, rtol=1e-9, atol=1e-9)
    frames = torch.tensor([0.2, 0.7], dtype=torch.float64)[:, None, None]  # a level a frame
    apart = [path.noisy(x0[:, [i]], noise[:, [i]], frames[i]) for i in (0, 1)]
    torch.testing.assert_close(path.noisy(x0, noise, frames), torch.cat(apart, 1))


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
    levels = DdpmPath.of(DDPM).snap((indices.double() + 0.5) / 1000)
    assert torch.equal(DdpmPath.of(DDPM).index(levels), indices)
    assert torch.equal(level_sinusoids(levels, 8), sinusoids(indices, 8))


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
        assert path.network_levels(t[None]).item() == pytest.approx(theirs.precondition_noise(sigma).item(), rel=1e-9)
        output = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        clean = theirs.precondition_outputs(x, output, sigma)
        torch.testing.assert_close(path.clean(output, seen, t) * data, clean)
        weight = (sigma**2 + data**2) / (sigma * data) ** 2
        torch.testing.assert_close(
            (output - path.target(z, noise, t)).square(), weight * (clean - data * z).square(), rtol=1e-6, atol=1e-9
        )


def test_known_tokens_have_a_finite_level_everywhere():
    for path in PATHS:
        assert path.network_levels(torch.tensor([0.0, 0.5], dtype=torch.float64)).isfinite().all()
