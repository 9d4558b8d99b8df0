"""The causal VAE against diffusers' AutoencoderKLWan, and the properties that training and sampling rest on."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from stdit.errors import StditError
from stdit.shapes import VideoShape
from stdit.vae.autoencoder import PRESETS, CausalVAE, VaeConfig, measure_latents, preset
from stdit.vae.streaming import CausalCache
from stdit.weights.families.wan_vae import FAMILY

TINY = VaeConfig(base_dim=4, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, True), z_dim=3)
CONFIGS = {
    "4x4x4": TINY,
    "4x8x8 patch 2": dataclasses.replace(TINY, patch_size=2),
    "wan 2.1's shape": VaeConfig(base_dim=4, num_res_blocks=2, z_dim=3),
    "2x4x4, another decoder": VaeConfig(
        base_dim=6, dim_mult=(1, 3), num_res_blocks=1, temporal_downsample=(True,), z_dim=5, patch_size=2,
        decoder_base_dim=4, latents_mean=[0.5, -1, 0, 2, 0.1], latents_std=[1, 2, 0.5, 3, 1.5],
    ),
    "wan 2.2's shape": VaeConfig(
        base_dim=4, decoder_base_dim=8, num_res_blocks=2, z_dim=5, patch_size=2, residual=True
    ),
    "2x8x8 residual, channels that do not double": VaeConfig(
        base_dim=4, dim_mult=(2, 4, 1), num_res_blocks=1, temporal_downsample=(False, True), z_dim=3, patch_size=2,
        residual=True,
    ),
}  # fmt: skip


def with_diffusers(config: VaeConfig, dtype: torch.dtype = torch.float32):
    """Our VAE and diffusers' with the same weights, all of them random."""
    diffusers = pytest.importorskip("diffusers")
    values = {k: v for k, v in FAMILY.written(config, "diffusers").items() if not k.startswith("_")}
    theirs = diffusers.AutoencoderKLWan(**values).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if name.endswith("gamma"):
                p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
            elif name.endswith("bias"):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / p[0].numel()) ** 0.5)
    ours = CausalVAE(config).to(dtype)
    table = FAMILY.keymap(config, "diffusers").table({k: tuple(v.shape) for k, v in ours.state_dict().items()})
    table.check({k: tuple(v.shape) for k, v in theirs.state_dict().items()}, "diffusers")
    ours.load_state_dict(dict(table.to_native(theirs.state_dict().__getitem__)), strict=True)
    return ours, theirs, table


def clip(config: VaeConfig, frames: int, rows: int = 3, columns: int = 2, batch: int = 1, seed: int = 0, **kwargs):
    """Random video of rows × columns latents."""
    shape = (batch, 3, frames, rows * config.stride[1], columns * config.stride[2])
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(**kwargs) * 2 - 1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("frames", [1, 5, 17, 33])
@torch.no_grad()
def test_equals_diffusers(config, frames):
    ours, theirs, _ = with_diffusers(config)
    video = clip(
        config, frames, rows=3 if frames < 17 else 1, columns=5 if frames == 5 else 1, batch=2 if frames < 33 else 1
    )
    posterior = theirs.encode(video).latent_dist
    mean, logvar = ours.encode_moments(video)
    shape = VideoShape(*video.shape[2:]).latent(ours.config.stride)
    assert mean.shape == (len(video), config.z_dim, shape.frames, shape.height, shape.width)
    assert_relative(mean, posterior.mean)
    assert_relative(logvar, posterior.logvar)
    statistics = theirs.config.latents_mean, theirs.config.latents_std
    m, s = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in statistics)
    assert_relative(ours.encode(video), (posterior.mean - m) / s)
    decoded = theirs.decode(mean).sample
    assert decoded.abs().lt(1).float().mean() > 0.5, "a clamped output compares nothing"
    assert_relative(ours.decode(ours.normalise(mean)), decoded)


def assert_relative(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).norm() <= tolerance * theirs.norm()
    assert (ours - theirs).abs().max() <= 10 * tolerance * theirs.abs().max()


@pytest.mark.parametrize("config", [CONFIGS["4x8x8 patch 2"], CONFIGS["wan 2.2's shape"]], ids=["patch", "2.2"])
def test_gradients_equal_diffusers(config):
    ours, theirs, table = with_diffusers(config, torch.float64)
    video = clip(config, 9, dtype=torch.float64)
    weights = torch.randn(video.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    posterior = theirs.encode(video).latent_dist
    ((theirs.decode(posterior.mean).sample * weights).sum() + posterior.logvar.square().sum()).backward()
    mean, logvar = ours.encode_moments(video)
    ((ours.decode(mean) * weights).sum() + logvar.square().sum()).backward()
    wanted = {k: p.grad for k, p in theirs.named_parameters()}
    assert all(grad is not None for grad in wanted.values())
    for name, grad in table.to_native(wanted.__getitem__):
        assert_relative(ours.get_parameter(name).grad, grad, tolerance=1e-5)  # its upsampling rounds to fp32


def random_vae(config: VaeConfig, seed: int = 0) -> CausalVAE:
    """In float64; every parameter matters (as built, attention's output is zero)."""
    torch.manual_seed(seed)
    vae = CausalVAE(config).double()
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return vae


@pytest.mark.parametrize("config", [CONFIGS["4x8x8 patch 2"], CONFIGS["wan 2.2's shape"]], ids=["patch", "2.2"])
@torch.no_grad()
def test_latents_see_the_past_only(config):
    vae = random_vae(config)
    video = clip(config, 13, dtype=torch.float64)
    latents = vae.encode(video)
    for known in (1, 5, 9):
        first = 1 + (known - 1) // 4
        changed = video.clone()
        changed[:, :, known:] = 1 - changed[:, :, known:].abs()
        assert_close(vae.encode(changed)[:, :, :first], latents[:, :, :first], rtol=0, atol=1e-12)
        assert (vae.encode(changed)[:, :, first] - latents[:, :, first]).abs().max() > 1e-6
        assert_close(vae.encode(video[:, :, :known]), latents[:, :, :first], rtol=0, atol=1e-12)
        decoded = vae.decode(latents[:, :, :first], clamp=False)
        assert_close(decoded, vae.decode(latents, clamp=False)[:, :, :known], rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [[1, 4, 4, 4, 4], [5, 4, 8], [9, 8], [17]])
@pytest.mark.parametrize("config", [CONFIGS["wan 2.1's shape"], CONFIGS["wan 2.2's shape"]], ids=["2.1", "2.2"])
@torch.no_grad()
def test_chunks_equal_the_whole_clip(config, chunks):
    vae = random_vae(config)
    video = clip(config, sum(chunks), dtype=torch.float64)
    mean, logvar = vae.encode_moments(video)
    cache = CausalCache()
    parts = [vae.encode_moments(part, cache) for part in video.split(chunks, dim=2)]
    assert_close(torch.cat([m for m, _ in parts], 2), mean, rtol=0, atol=1e-12)
    assert_close(torch.cat([l for _, l in parts], 2), logvar, rtol=0, atol=1e-12)
    cache = CausalCache()
    latents = [-(-n // 4) for n in chunks]
    decoded = torch.cat([vae.decode_raw(part, cache) for part in mean.split(latents, dim=2)], 2)
    assert_close(decoded, vae.decode_raw(mean), rtol=0, atol=1e-12)


@torch.no_grad()
def test_clips_do_not_see_each_other():
    vae = random_vae(TINY)
    video = clip(TINY, 5, batch=3, dtype=torch.float64)
    assert_close(vae.encode(video)[1:2], vae.encode(video[1:2]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [TINY, CONFIGS["wan 2.2's shape"]], ids=["2.1", "2.2"])
@torch.no_grad()
def test_half_precision_is_no_worse_than_diffusers(config):
    """bf16 loses bits whoever computes: ours loses no more than a quarter more than theirs on the same weights."""
    ours, theirs, _ = with_diffusers(config)
    video = clip(config, 9, rows=8, columns=8)
    mean = ours.encode_moments(video)[0]
    wanted = theirs.decode(mean).sample
    ours, theirs = ours.bfloat16(), theirs.bfloat16()
    found = ours.decode(ours.normalise(mean.bfloat16()))
    assert found.dtype == torch.bfloat16
    lost = (theirs.decode(mean.bfloat16()).sample.float() - wanted).norm()
    assert 0 < (found.float() - wanted).norm() < 1.25 * lost
    their_mean = theirs.encode(video.bfloat16()).latent_dist.mean
    our_mean = ours.encode_moments(video.bfloat16())[0]
    assert 0 < (our_mean.float() - mean).norm() < 1.25 * (their_mean.float() - mean).norm()


@pytest.mark.slow  # tracing takes its time
@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph_it_is_the_same(training):
    config = dataclasses.replace(TINY, dim_mult=(1, 1), temporal_downsample=(True,), residual=True)
    vae = random_vae(config).float()
    video = clip(config, 3, rows=2, columns=1)

    def through(video: torch.Tensor) -> torch.Tensor:
        mean, logvar = vae.encode_moments(video)
        return vae.decode_raw(mean) + logvar.mean()

    torch.compiler.reset()
    results = []
    for run in (through, torch.compile(through, fullgraph=True, backend="aot_eager")):
        with torch.set_grad_enabled(training):
            out = run(video)
        if training:
            out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in vae.parameters() if training)])
        vae.zero_grad()
    for one, other in zip(*results):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_clips_of_another_type_are_taken_as_the_weights_are():
    vae, video = random_vae(TINY).bfloat16(), clip(TINY, 5)
    latents = vae.encode(video)
    assert torch.equal(latents, vae.encode(video.bfloat16())) and latents.dtype == torch.bfloat16
    assert torch.equal(vae.decode(latents.double()), vae.decode(latents))


@torch.no_grad()
def test_sampling_draws_from_the_posterior():
    vae = random_vae(TINY).float()
    video = clip(TINY, 1, rows=40, columns=40)
    mean, logvar = vae.encode_moments(video)
    draws = [vae.encode(video, sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    noise = (draws[0] - mean) / (0.5 * logvar).exp()
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    assert_close(vae.encode(video), mean)


@torch.no_grad()
def test_normalise_and_measured_statistics():
    config = CONFIGS["2x4x4, another decoder"]
    vae = random_vae(config).float()
    batches = [clip(config, 5, batch=2, seed=1), clip(config, 1, rows=5, seed=2)]
    vae.memory = 1000
    with pytest.raises(StditError, match="memory 1000"):  # it keeps to the budget, as `encode` does
        measure_latents(vae, batches)
    vae.memory = None
    mean, std = measure_latents(vae, batches)
    vae.config = dataclasses.replace(config, latents_mean=mean, latents_std=std)
    latents = torch.cat([vae.encode(b).transpose(0, 1).flatten(1) for b in batches], 1)
    assert_close(latents.mean(1), torch.zeros(5), atol=1e-4, rtol=0)
    assert_close(latents.std(1, unbiased=False), torch.ones(5), atol=1e-4, rtol=0)
    raw = torch.randn(2, 5, 1, 2, 3)
    assert_close(vae.denormalise(vae.normalise(raw)), raw)


@pytest.mark.parametrize(
    ("video", "words"),
    [
        (torch.zeros(1, 3, 6, 8, 8), "nearest are 5 and 9"),
        (torch.zeros(1, 3, 5, 8, 10), "Nearest: 8x8 or 12x8"),
        (torch.zeros(1, 3, 5, 8, 8, dtype=torch.uint8), r"/ 127.5 - 1"),
        (torch.zeros(3, 5, 8, 8), r"\(3, 5, 8, 8\)"),
        (torch.zeros(1, 5, 3, 8, 8), "B, 3, T, H, W"),
        (torch.zeros(0, 3, 5, 8, 8), r"\(0, 3, 5, 8, 8\)"),
        (torch.full((1, 3, 5, 8, 8), float("nan")), "NaN"),
        (torch.full((1, 3, 5, 8, 8), 200.0), r"200"),
    ],
)
def test_encode_says_what_is_wrong_with_a_clip(video, words):
    with pytest.raises(StditError, match=words):
        CausalVAE(TINY).encode(video)


def test_decode_says_what_is_wrong_with_latents():
    with pytest.raises(StditError, match=r"\(B, 3, T', H', W'\)"):
        CausalVAE(TINY).decode(torch.zeros(1, 4, 1, 2, 2))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (dict(temporal_downsample=(True,)), "has 1 entries"),
        (dict(dim_mult=(1, 1, 1, 1), temporal_downsample=(True, True, True)), "at most 4"),
        (dict(dim_mult=()), "dim_mult is .*at least 1"),
        (dict(base_dim=3, dim_mult=(1, 1, 2)), "even"),
        (dict(residual=True, dim_mult=(1, 3, 4)), "not a multiple of 3"),
        (dict(latents_mean=(0.1,)), "z_dim is 3"),
        (dict(latents_std=(1, 0, 2)), "positive"),
        (dict(latents_mean=(float("nan"), 0, 0)), "finite"),
        (dict(z_dim=0), "z_dim is 0"),
    ],
)
def test_config_says_what_is_wrong(values, words):
    with pytest.raises(StditError, match=words):
        dataclasses.replace(TINY, **values)


def test_a_released_preset_says_what_goes_with_another_size():
    with pytest.raises(StditError, match=r"preset wan2\.1 with z_dim=8: .* has 16 entries, z_dim is 8.* null"):
        preset("wan2.1", z_dim=8)
    with pytest.raises(StditError, match=r"preset wan2\.1 with dim_mult=.1, 2.: .*2 levels in dim_mult have 1 down"):
        preset("wan2.1", dim_mult=(1, 2))
    changed = preset("wan2.1", z_dim=8, latents_mean=None, latents_std=None)
    assert (changed.z_dim, changed.latents_mean, changed.base_dim) == (8, None, 96)


def test_presets():
    assert preset("wan2.1").stride == (4, 8, 8) and preset("wan2.2").stride == (4, 16, 16)
    assert all(config.stride[0] == 4 for config in PRESETS.values())
    with pytest.raises(StditError, match=r"wan2\.1"):
        preset("wan21")


def test_trains_a_little():
    """An untrained posterior is narrow, every parameter gets a gradient, and a few steps on one clip lower the loss."""
    from stdit.vae.training.losses import kl_loss, pixel_loss

    torch.manual_seed(0)
    vae = CausalVAE(TINY)
    video = clip(TINY, 5)
    assert_close(vae.encode_moments(video)[1], torch.full((1, 3, 2, 3, 2), -6.0))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        mean, logvar = vae.encode_moments(video)
        loss = (pixel_loss(vae.decode_raw(mean), video) + 1e-6 * kl_loss(mean, logvar)).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.85 * losses[0]
