"""A VAE's training with all its terms: gradients against autograd written out, what stays, and how it goes on."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stdit.data.plan.split import split
from stdit.errors import StditError
from stdit.evaluation.report import read_metrics
from stdit.training import run as run_module
from stdit.training import trainer as trainer_module
from stdit.training.config import load_config
from stdit.training.engine.checkpoint import Checkpoint
from stdit.training.engine.parallel import World
from stdit.training.objectives.protocol import StepKey
from stdit.training.objectives.vae import VaeBatch, VaeObjective
from stdit.training.run import run
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.resolve import resolve
from stdit.vae.training.losses import kl_loss, outlier_penalty, pixel_loss, wavelet_loss
from stdit.weights.io import load_vae, save_vae

ALONE = World(0, 1, torch.device("cpu"))
TERMS = ["objective.vae.wavelet=0.5", "objective.vae.outlier=10", "objective.vae.kl=0.01"]
AGAINST = ["objective.vae.discriminator={dim: 8, layers: 3}", "objective.vae.discriminator.lr=0.002"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trainer_module, "measure_peak", lambda *args: 1e12)
    monkeypatch.setattr(run_module, "draw", lambda *args: None)
    monkeypatch.setattr(run_module, "report", lambda *args: None)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def built(tiny: Path, *overrides: str) -> RunComponents:
    return build(resolve(load_config(tiny / "vae.yaml", ["data.workers=0", *overrides])), ALONE)


def batches(parts: RunComponents, groups: int = 1, bound: int = 10**9, done: int = 0) -> list[Any]:
    """Of the plan's first step, all groups' and micro-steps'."""
    items = parts.plan.step(0)
    key = StepKey(0, 0, 0, len(items), done)
    packs = itertools.chain.from_iterable(split(parts.plan.items(0), groups, bound))
    return [parts.objective.prepare(parts.loader.fetch(pack, 0), pack, key) for pack in packs]


def gradients(module: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    return found


def relative(one: list[Tensor], other: list[Tensor]) -> float:
    a, b = (torch.cat([part.flatten() for part in parts]).double() for parts in (one, other))
    return float((a - b).norm() / b.norm())


def test_the_gradient_with_a_discriminator_is_that_of_the_terms_written_out(tiny: Path) -> None:
    parts = built(tiny, *TERMS, *AGAINST, "plan.largest_clips_per_step=4")
    objective = parts.objective
    assert isinstance(objective, VaeObjective) and objective.critic is not None
    critic, vae, settings = objective.critic.module, objective.vae, objective.config.vae
    (batch,) = batches(parts)
    assert {video.shape[2] for video, _, _ in batch.groups} == {1, 5}  # images and videos
    found_loss = objective.module(batch)
    found_loss.backward()
    found = gradients(objective.module)
    assert all(p.grad is None for p in critic.parameters())  # the VAE's pass teaches its critic nothing
    critic(batch).backward()
    of_critic = gradients(critic)
    assert not any(gradient.any() for gradient in gradients(objective.module))

    total, against = torch.zeros(()), torch.zeros(())
    for video, noise, weights in batch.groups:
        for clip, draw, weight in zip(video.split(1), noise.split(1), weights):
            mean, logvar = vae.encode_moments(clip)
            output = vae.decode_raw(mean + (logvar / 2).exp() * draw)
            pixels = pixel_loss(output, clip) + settings.wavelet * wavelet_loss(output, clip)
            fooling = -critic.discriminator(output).mean()
            last = vae.decoder.head[2].weight
            first, second = (torch.autograd.grad(l, last, retain_graph=True)[0].norm() for l in (pixels, fooling))
            share = (settings.discriminator.weight * first / (second + 1e-4)).detach()
            other = settings.kl * kl_loss(mean, logvar) + settings.outlier * outlier_penalty(mean)
            total = total + weight * (pixels + other + share * fooling).sum()
            real, made = critic.discriminator(clip), critic.discriminator(output.detach())
            against = against + weight * 0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + made).mean())
    assert float(found_loss.detach()) == pytest.approx(float(total.detach()), rel=1e-4)
    total.backward()
    assert relative(found, gradients(objective.module)) < 1e-3
    critic.zero_grad()
    against.backward()
    assert relative(of_critic, gradients(critic)) < 1e-4


def test_neither_side_depends_on_the_split(tiny: Path) -> None:
    parts = built(tiny, *TERMS, *AGAINST)
    objective = parts.objective
    assert objective.critic is not None

    def both(dealt: list[VaeBatch]) -> tuple[list[Tensor], list[Tensor]]:
        for batch in dealt:
            objective.module(batch).backward()
            objective.critic.module(batch).backward()
        return gradients(objective.module), gradients(objective.critic.module)

    whole, dealt = both(batches(parts)), both(batches(parts, 2, 48 * 32 * 5))
    assert relative(dealt[0], whole[0]) < 1e-4 and relative(dealt[1], whole[1]) < 1e-4


def test_the_discriminator_begins_at_its_step(tiny: Path) -> None:
    parts, plain = built(tiny, *AGAINST, "objective.vae.discriminator.start=3"), built(tiny)
    for done, adversarial in ((2, False), (3, True)):
        (batch,), (other,) = batches(parts, done=done), batches(plain, done=done)
        assert batch.adversarial == adversarial and not other.adversarial
        with torch.set_grad_enabled(adversarial):
            same = torch.equal(parts.objective.module(batch), plain.objective.module(other))
        assert same != adversarial


@pytest.fixture(scope="module")
def start(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE with statistics of its latents, to fine-tune."""
    vae = load_vae(tiny / "vae", dtype=torch.float32)
    vae.config = type(vae.config)(**vars(vae.config) | {"latents_mean": (0.1,) * 4, "latents_std": (2.0,) * 4})
    folder = tmp_path_factory.mktemp("start")
    save_vae(vae, folder)
    return folder


def fine_tuning(start: Path, part: str) -> list[str]:
    return ["vae={path: " + str(start) + "}", f"objective.vae.train={part}"]


def train(tiny: Path, folder: Path, *overrides: str) -> None:
    run(load_config(tiny / "vae.yaml", [f"run={folder}", "data.workers=0", *overrides]), ALONE)


@pytest.mark.parametrize(("part", "begin"), [("all", 1), ("temporal", 3)])
def test_a_killed_run_goes_on_bit_for_bit_with_its_discriminator(
    tiny: Path, tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch, part: str, begin: int
) -> None:
    """begin: the discriminator's first step, before the checkpoint that is gone on from (2) or after it."""
    settings = [*TERMS, *AGAINST, f"objective.vae.discriminator.start={begin}", "checkpoint.every=2"]
    settings += fine_tuning(start, part) if part != "all" else []
    train(tiny, tmp_path / "whole", *settings)

    def killed(self: trainer_module.Trainer, step: Any) -> Any:
        if self.step == 3:
            raise RuntimeError("killed")
        return accumulate(self, step)

    accumulate = trainer_module.Trainer.accumulate
    monkeypatch.setattr(trainer_module.Trainer, "accumulate", killed)
    with pytest.raises(RuntimeError, match="killed"):
        train(tiny, tmp_path / "cut", *settings)
    monkeypatch.setattr(trainer_module.Trainer, "accumulate", accumulate)
    between = Checkpoint.latest(tmp_path / "cut")
    assert between is not None and between.step == 2
    train(tiny, tmp_path / "cut", *settings)

    ends = [Checkpoint.latest(tmp_path / name) for name in ("whole", "cut")]
    assert all(end is not None and end.step == 4 for end in ends)
    files = [(end.path / "rank-00000.safetensors").read_bytes() for end in ends if end is not None]
    assert files[0] == files[1]
    lines = [read_metrics(tmp_path / name, "train") for name in ("whole", "cut")]
    kept = ("step", "loss", "critic_loss", "grad_norm")
    seen, again = ([[line.get(name) for name in kept] for line in some] for some in lines)
    assert seen == again and len(seen) == 4
    assert ["critic_loss" in line for line in lines[0]] == [step >= begin for step in range(4)]
    assert all(0 < line["critic_loss"] < 1.5 for line in lines[0][begin:])  # 1 for who says 0 to all
    weights = [between.weights(), Checkpoint.latest(tmp_path / "whole").weights()]  # type: ignore[union-attr]
    moved = {name.split(".")[0] for name, weight in weights[0].items() if not torch.equal(weight, weights[1][name])}
    assert moved == {"vae", "discriminator"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_decoder_only_keeps_latents_and_what_normalises_them(
    tiny: Path, tmp_path: Path, start: Path, precision: str
) -> None:
    train(tiny, tmp_path, *fine_tuning(start, "decoder"), *AGAINST, f"run.precision={precision}")
    before, after = load_vae(start), load_vae(tmp_path / "model")
    assert after.config == before.config
    state = after.state_dict()
    for name, weight in before.state_dict().items():
        assert torch.equal(state[name], weight) == (not name.startswith(("decoder.", "conv2."))), name


def test_temporal_only_keeps_images(tiny: Path, tmp_path: Path, start: Path) -> None:
    train(tiny, tmp_path, *fine_tuning(start, "temporal"), *AGAINST, "checkpoint.every=2")
    before, after = load_vae(start), load_vae(tmp_path / "model")
    image, clip = torch.rand(1, 3, 1, 16, 16) * 2 - 1, torch.rand(1, 3, 5, 16, 16) * 2 - 1
    with torch.no_grad():
        raw = before.encode_moments(image)[0]
        assert torch.equal(after.encode_moments(image)[0], raw)
        assert torch.equal(after.decode_raw(raw), before.decode_raw(raw))
        assert not torch.equal(after.encode_moments(clip)[0], before.encode_moments(clip)[0])
    with pytest.raises(StditError, match=r"objective\.vae\.train=temporal .* set vae\.path"):
        build(resolve(load_config(tiny / "vae.yaml", ["objective.vae.train=temporal"])), ALONE)

    changed = load_vae(start)
    with torch.no_grad():
        next(iter(changed.parameters())).add_(1)
    kept = {path: path.read_bytes() for path in start.iterdir()}
    save_vae(changed, start)
    try:
        with pytest.raises(StditError, match=r"goes with other weights: .* has changed since"):
            train(tiny, tmp_path, *fine_tuning(start, "temporal"), *AGAINST, "schedule.steps=5")
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def test_lpips_is_a_term_and_does_not_train(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub(nn.Module):
        """Another distance in LPIPS' place, to be found in the loss as it is."""

        def __init__(self, path: str, trust_pickle: bool) -> None:
            super().__init__()
            assert path == "lpips.pth" and not trust_pickle
            self.scale = nn.Parameter(torch.tensor(3.0), requires_grad=False)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.scale * (a - b).square().flatten(1).mean(1)

    monkeypatch.setitem(sys.modules, "stdit.vae.training.lpips", SimpleNamespace(Lpips=Stub))
    lpips = ["objective.vae.lpips.path=lpips.pth", "objective.vae.lpips.weight=0.5"]
    plain, parts = built(tiny), built(tiny, *lpips)
    (batch,) = batches(plain)
    difference = parts.objective.module(batch) - plain.objective.module(batch)
    wanted = torch.zeros(())
    for video, noise, weights in batch.groups:
        mean, logvar = plain.objective.vae.encode_moments(video)
        output = plain.objective.vae.decode_raw(mean + (logvar / 2).exp() * noise)
        wanted = wanted + (1.5 * (output - video).square().flatten(1).mean(1) * weights).sum()
    assert float(difference.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)
    names = {name for name, _ in parts.objective.module.named_parameters()}
    assert names == {name for name, _ in plain.objective.module.named_parameters()}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("objective.vae.wavelet=-1", "objective.vae.wavelet is -1"),
        ("objective.vae.train=encoder", "'encoder'; it must be 'all', 'decoder' or 'temporal'"),
        ("objective.vae.lpips.weight=1", "path is not set: the folder or file with LPIPS' weights"),
        ("objective.vae.lpips.path=nowhere.pth", r"objective\.vae\.lpips: .*nowhere"),
        ("objective.vae.discriminator.dim=12", "dim.* 12.* a multiple of 8"),
        ("objective.vae.discriminator.layers=6", r"data\.shapes: 32x32x5: .*32x32 pixels .*at least 64 per side"),
    ],
)
def test_mistakes_are_named(tiny: Path, override: str, words: str) -> None:
    with pytest.raises(StditError, match=words):
        built(tiny, override)
