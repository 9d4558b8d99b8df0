"""The discriminator on clips of all lengths, its losses by hand, and its weight by autograd."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from stdit.errors import StditError
from stdit.settings import read
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.vae.clips import patchify
from stdit.vae.training.discriminator import (
    Discriminator,
    DiscriminatorConfig,
    adaptive_weight,
    generator_loss,
    hinge_loss,
)

SMALL = DiscriminatorConfig(dim=8, layers=3)
TINY = VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=3, patch_size=2)


@pytest.mark.parametrize(
    ("size", "logits"),
    [((1, 32, 48), (1, 4, 6)), ((5, 32, 32), (2, 4, 4)), ((9, 40, 24), (3, 5, 3)), ((2, 8, 8), (1, 1, 1))],
)
def test_every_clip_is_judged_alone(size: tuple[int, int, int], logits: tuple[int, int, int]):
    torch.manual_seed(0)
    judge = Discriminator(SMALL)
    clips = torch.randn(3, 3, *size)
    found = judge(clips)
    assert found.shape == (3, *logits) and found.std() > 0
    for clip, alone in zip(clips, found):
        assert_close(judge(clip[None])[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_in_bf16_it_reads_no_memory_that_nobody_wrote(frames: int):
    """Finite and as in fp64, forward and backward, where the memory that torch hands out anew is full of NaN."""
    torch.manual_seed(0)
    clips, found = torch.randn(1, 3, frames, 32, 32), []
    judge = Discriminator(SMALL)
    for dtype in (torch.float64, torch.bfloat16):
        judge = judge.to(dtype)
        for _ in range(5):
            junk = [torch.full((size,), float("nan"), dtype=torch.bfloat16) for size in (3072, 4096, 16384) * 10]
            del junk
            judge.zero_grad()
            logits = judge(clips.to(dtype))
            logits.float().sum().backward()
            found.append(torch.cat([logits.flatten(), *(p.grad.flatten() for p in judge.parameters())]).double())
    for other in found[1:]:
        assert (other - found[0]).norm() < 0.05 * found[0].norm()


def test_it_sees_what_frames_do_one_after_another():
    """Frames in another order, every one the same as before, are another clip to it."""
    torch.manual_seed(0)
    judge = Discriminator(SMALL).double()
    still = torch.randn(1, 3, 1, 32, 32, dtype=torch.float64).repeat(1, 1, 9, 1, 1)
    bright = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1.0], dtype=torch.float64).view(1, 1, 9, 1, 1)
    flicker = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0.0], dtype=torch.float64).view(1, 1, 9, 1, 1)
    calm, nervous = judge(still + bright).mean(), judge(still + flicker).mean()
    assert (calm - nervous).abs() > 1e-3


def test_hinge_and_generator_losses_by_hand():
    real = torch.tensor([[2.0, 0.5], [0.0, 0.0]])
    made = torch.tensor([[-3.0, -0.5], [0.0, 0.0]])
    assert_close(hinge_loss(real, made), torch.tensor([(0.25 + 0.25) / 2, 1.0]))
    assert hinge_loss(torch.tensor([[1.5]]), torch.tensor([[-1.0]])) == 0
    assert_close(generator_loss(made), torch.tensor([1.75, 0.0]))


@pytest.mark.parametrize("frames", [1, 5])
def test_its_weight_is_the_ratio_of_gradients_at_the_last_layer(frames: int):
    torch.manual_seed(0)
    vae, judge = CausalVAE(TINY), Discriminator(SMALL)
    last = vae.decoder.head[2]
    latents, video = torch.randn(3, 3, (frames + 1) // 2, 4, 4), torch.randn(3, 3, frames, 16, 16)

    seen: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    output = vae.decode_raw(latents)
    leaf = output.detach().requires_grad_()
    (down,) = torch.autograd.grad((leaf - video).abs().flatten(1).mean(1).sum(), leaf)
    (up,) = torch.autograd.grad(generator_loss(judge(leaf)).sum(), leaf)
    found = adaptive_weight(last, seen[0], patchify(down, 2), patchify(up, 2))

    for clip in range(3):
        again = vae.decode_raw(latents[clip : clip + 1])
        terms = ((again - video[clip]).abs().mean(), -judge(again).mean())
        (first,), (second,) = (torch.autograd.grad(term, last.weight, retain_graph=True) for term in terms)
        assert_close(found[clip], first.norm() / (second.norm() + 1e-4), rtol=1e-3, atol=0)
    assert found.std() > 0
    zero = torch.zeros_like(patchify(up, 2))
    assert_close(adaptive_weight(last, seen[0], 1e3 * patchify(down, 2), zero), torch.full((3,), 1e4))


@pytest.mark.parametrize("settings", [{"dim": 12}, {"layers": 0}, {"weight": 0.0}, {"lr": -1.0}, {"start": -1}])
def test_mistakes_are_named(settings: dict[str, float]):
    (name, value), *_ = settings.items()
    with pytest.raises(StditError, match=f"here: {name} is {value}; it must be"):
        read(DiscriminatorConfig, settings, "here")


def test_its_gradients_in_bf16_are_those_in_fp32():
    torch.manual_seed(0)
    judge, low = Discriminator(SMALL), Discriminator(SMALL).bfloat16()
    low.load_state_dict(judge.state_dict())
    clips = torch.rand(2, 3, 5, 32, 32)
    for one in (judge, low):
        x = clips.to(one.head.weight.dtype)
        hinge_loss(one(x), one(x * 0.5)).sum().backward()
    for (name, p), q in zip(judge.named_parameters(), low.parameters()):
        assert p.grad is not None and q.grad is not None
        assert (q.grad.float() - p.grad).norm() <= 0.3 * p.grad.norm() + 1e-6, (
            name
        )  # bf16 has 3 digits, and terms cancel
