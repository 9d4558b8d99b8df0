"""The exact loss of a step, against sums written out by hand; and what is random is keyed by the clip."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, UniPCMultistepScheduler
from keyed_noise import clip_noise

from stdit.data.plan.split import split
from stdit.diffusion.solvers import unipc_config, with_static_shift
from stdit.diffusion.tasks import draw_task
from stdit.errors import StditError
from stdit.models.packing import pack_texts, patchify, unpack_clips
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.sampling.pipeline import FolderSettings, SampleRequest
from stdit.training.config import load_config
from stdit.training.engine.parallel import World
from stdit.training.objectives.conditions import Conditions
from stdit.training.objectives.flow import FlowObjective
from stdit.training.objectives.protocol import StepKey
from stdit.training.outputs.export import make_pipeline, trained_module
from stdit.training.setup.build import RunComponents, build
from stdit.training.setup.resolve import resolve
from stdit.weights.families.ltx import FAMILY

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def parts(tiny: Path) -> RunComponents:
    parts = build(resolve(load_config(tiny / "flow.yaml", ["data.workers=0"])), ALONE)
    with torch.no_grad():
        for p in parts.objective.module.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return parts


def prepared(parts: RunComponents, groups: int, bound: int) -> list:
    """Batches of the plan's first step, all groups' and micro-steps'."""
    items = parts.plan.step(0)
    key = StepKey(0, 0, 0, len(items))
    packs = itertools.chain.from_iterable(split(parts.plan.items(0), groups, bound))
    return [parts.objective.prepare(parts.loader.fetch(pack, 0), pack, key) for pack in packs]


def test_the_loss_is_the_weighted_mean_over_unknown_tokens(parts: RunComponents) -> None:
    """Σ_c w_c · mean over c's unknown latents of (prediction − (ε − x_0))², w_c the number of unknown tokens."""
    objective = parts.objective
    assert isinstance(objective, FlowObjective)
    items = parts.plan.step(0)
    examples = parts.loader.fetch(items, 0)
    key = StepKey(0, 0, 0, len(items))
    batch = objective.prepare(examples, items, key)
    examples = [clip.example for clip in objective.sorted_clips(examples, items, key)]
    with torch.no_grad():
        found = float(objective.module(batch))
        assert batch.text_ids is not None
        text = objective.text_encoder(batch.text_ids)
        prediction = objective.module.transformer(batch.pack, pack_texts(text, 32))
    expected = weights = 0.0
    kinds = set()
    for example, output in zip(examples, unpack_clips(prediction, batch.pack, (1, 2, 2))):
        x0 = objective.vae.encode(example.video[None])[0]
        noise = clip_noise(x0, 0, example.clip_id)
        tasks = {"text_to_video": 2.0, "image_to_video": 1.0}
        task = draw_task(tasks, x0.shape[1], seed=0, epoch=0, clip_id=example.clip_id)
        kinds.add(task.name)
        unknown = slice(task.known_frames, None)
        w = x0[0, unknown].numel() / 4  # tokens of 2×2 latents
        expected += w * float((output - (noise - x0))[:, unknown].square().mean())
        weights += w
    assert len(kinds) == 2
    assert batch.weight == weights
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_pack_has_equal_clips_side_by_side(parts: RunComponents) -> None:
    items = parts.plan.step(0)[::-1]
    batch = parts.objective.prepare(parts.loader.fetch(items, 0), items, StepKey(0, 0, 0, len(items)))
    kinds = list(zip(batch.pack.segments.lengths, map(len, batch.text_ids)))
    assert kinds == sorted(kinds) and len(set(kinds)) > 1


@pytest.mark.parametrize(("groups", "bound"), [(1, 90), (2, 100), (3, 80)])
def test_the_loss_of_a_step_does_not_depend_on_its_split(parts: RunComponents, groups: int, bound: int) -> None:
    with torch.no_grad():
        (whole,) = prepared(parts, 1, 10_000)
        dealt = prepared(parts, groups, bound)
        assert len(dealt) > 2
        assert sum(batch.weight for batch in dealt) == whole.weight
        assert all(float(batch.token_weights.sum()) * 16 == pytest.approx(batch.weight) for batch in dealt)
        total = sum(float(parts.objective.module(batch)) for batch in dealt)
        assert total == pytest.approx(float(parts.objective.module(whole)), rel=1e-5)


def test_bf16_encodes_and_exports_the_vae_in_fp32(tiny: Path) -> None:
    parts = build(resolve(load_config(tiny / "flow.yaml", ["data.workers=0", "run.precision=bf16"])), ALONE)
    objective = parts.objective
    assert isinstance(objective, FlowObjective)
    (batch, *_) = prepared(parts, 1, 10_000)
    assert batch.pack.tokens.dtype == torch.bfloat16
    assert {p.dtype for p in objective.vae.parameters()} == {torch.float32}


def test_a_clip_that_failed_weighs_nothing(parts: RunComponents) -> None:
    from dataclasses import replace

    items = parts.plan.step(0)
    examples = parts.loader.fetch(items, 0)
    key = StepKey(0, 0, 0, len(items))
    failed = [replace(examples[0], weight=0.0, failure="gone"), *examples[1:]]
    with torch.no_grad():
        all_of_them = parts.objective.prepare(failed, items, key)
        the_others = parts.objective.prepare(examples[1:], items[1:], key)
        assert all_of_them.weight == the_others.weight
        loss = float(parts.objective.module(all_of_them))
        assert loss == pytest.approx(float(parts.objective.module(the_others)), rel=1e-5)


def test_a_rank_without_clips_has_every_gradient_and_all_are_zero(parts: RunComponents) -> None:
    batch = parts.objective.prepare([], [], StepKey(0, 0, 0, 4))
    loss = parts.objective.module(batch)
    gradients = torch.autograd.grad(loss, list(parts.objective.module.parameters()))
    assert batch.weight == 0 and float(loss) == 0
    assert all(not gradient.any() for gradient in gradients)


def test_token_power_zero_counts_every_clip_alike(tiny: Path) -> None:
    parts = build(resolve(load_config(tiny / "flow.yaml", ["data.workers=0", "objective.token_power=0"])), ALONE)
    (batch,) = prepared(parts, 1, 10_000)
    assert batch.weight == len(parts.plan.step(0))


def test_captions_are_dropped_by_key(tiny: Path) -> None:
    settings = ["data.workers=0", "objective.flow.caption_dropout=0.5"]
    parts = build(resolve(load_config(tiny / "flow.yaml", settings)), ALONE)
    objective = parts.objective
    assert isinstance(objective, FlowObjective)
    empty = objective.text_encoder.tokenize([""])[0]
    batches = prepared(parts, 1, 10_000)
    again = prepared(parts, 1, 10_000)
    dropped = [ids == empty for batch in batches for ids in batch.text_ids]
    assert 0 < sum(dropped) < len(dropped)
    assert dropped == [ids == empty for batch in again for ids in batch.text_ids]


def test_the_vae_loss_does_not_depend_on_the_split(tiny: Path) -> None:
    parts = build(resolve(load_config(tiny / "vae.yaml", ["data.workers=0"])), ALONE)
    with torch.no_grad():
        (whole,) = prepared(parts, 1, 10**9)
        dealt = prepared(parts, 2, 48 * 32 * 5)
        assert sum(batch.weight for batch in dealt) == whole.weight
        total = sum(float(parts.objective.module(batch)) for batch in dealt)
        assert total == pytest.approx(float(parts.objective.module(whole)), rel=1e-5)


@pytest.mark.parametrize(("crop", "near"), [(18, "16 or 20"), (3, "4")])
def test_a_crop_that_the_vaes_stride_does_not_divide_is_named_before_training(tiny: Path, crop: int, near: str) -> None:
    with pytest.raises(StditError, match=rf"objective\.vae\.crop is {crop}; .* 4 pixels\. Nearest: {near}\."):
        build(resolve(load_config(tiny / "vae.yaml", [f"objective.vae.crop={crop}"])), ALONE)


def test_a_shift_by_tokens_goes_into_the_model_folder(tiny: Path, tmp_path: Path) -> None:
    settings = ["shift=2.5", "shift_tokens=96"]
    overrides = ["data.workers=0", *(f"objective.flow.noise_levels.{one}" for one in settings)]
    parts = build(resolve(load_config(tiny / "flow.yaml", overrides)), ALONE)
    weights = {name: p.detach() for name, p in parts.objective.module.named_parameters()}
    make_pipeline(parts, trained_module(parts, weights.items(), ALONE)).save(tmp_path)
    assert FolderSettings.read(tmp_path).shift_tokens == 96
    assert UniPCMultistepScheduler.from_pretrained(tmp_path / "scheduler").config.flow_shift == 2.5


def test_a_vae_trains_on_keyed_squares_of_its_clips(tiny: Path) -> None:
    parts = build(resolve(load_config(tiny / "vae.yaml", ["data.workers=0", "objective.vae.crop=16"])), ALONE)
    items = parts.plan.step(0)
    assert all(item.tokens == 16 * 16 * parts.assignment.shapes[item.bucket].frames for item in items)

    def squares(epoch: int) -> list[torch.Tensor]:
        found = []
        for item in items:  # one at a time, to know which clip a square is of
            (example,) = parts.loader.fetch([item], 0)
            batch = parts.objective.prepare([example], [item], StepKey(0, epoch, 0, len(items)))
            ((video, noise, _),) = batch.groups
            assert batch.weight == item.tokens and noise.shape[-2:] == (4, 4)
            windows = example.video.unfold(2, 16, 1).unfold(3, 16, 1)  # (3, T, rows, columns, 16, 16)
            same = (windows == video[0][:, :, None, None]).flatten(4).all(-1).all(0).all(0)
            assert same.any(), "not a part of the clip"
            found.append(video)
        return found

    once, again, later = squares(0), squares(0), squares(1)
    assert all(map(torch.equal, once, again))
    assert not all(map(torch.equal, once, later))


def test_a_vae_trains_on_keyed_frames_of_its_clips(tiny: Path) -> None:
    parts = build(resolve(load_config(tiny / "vae.yaml", ["data.workers=0", "objective.vae.frames=3"])), ALONE)
    starts: set[int] = set()
    for epoch in range(8):
        for item in parts.plan.step(0):
            shape = parts.assignment.shapes[item.bucket]
            assert item.tokens == min(3, shape.frames) * shape.height * shape.width
            (example,) = parts.loader.fetch([item], 0)
            ((video, noise, _),) = parts.objective.prepare([example], [item], StepKey(0, epoch, 0, 1)).groups
            assert noise.shape[2] == (video.shape[2] + 1) // 2
            windows = example.video.unfold(1, video.shape[2], 1).movedim(-1, 2)  # (3, starts, t, H, W)
            same = (windows == video[0][:, None]).flatten(2).all(-1).all(0)
            assert same.any(), "not frames of the clip in a row"
            starts |= set(same.nonzero().flatten().tolist())
    assert len(starts) > 1


def test_frames_that_the_vaes_stride_does_not_divide_are_named_before_training(tiny: Path) -> None:
    with pytest.raises(StditError, match=r"objective\.vae\.frames.* 6 frames: .* 1\+2k .* 5 and 7"):
        build(resolve(load_config(tiny / "vae.yaml", ["objective.vae.frames=6"])), ALONE)


def test_attention_runs_on_the_backend_that_is_named(tiny: Path) -> None:
    found = []
    for backend in ("naive", "dense"):
        parts = build(
            resolve(load_config(tiny / "flow.yaml", ["data.workers=0", f"model.attention_backend={backend}"])), ALONE
        )
        assert parts.objective.module.transformer.attention_backend == backend
        with torch.no_grad():
            for p in parts.objective.module.transformer.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            found.append(sum(float(parts.objective.module(batch)) for batch in prepared(parts, 1, 10_000)))
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def family(parts: RunComponents, scheduler: dict, **changes: object) -> FlowObjective:
    """An objective like that of `parts`, for fresh weights of another path."""
    flow = parts.objective
    assert isinstance(flow, FlowObjective)
    z = flow.vae.config.z_dim
    torch.manual_seed(3)
    config = TransformerConfig(24, 2, 2, 48, z, text_dim=16, frequency_dim=32, **({"out_channels": z} | changes))
    transformer = STDiT(config)
    with torch.no_grad():
        for p in transformer.parameters():
            p += 0.1 * torch.randn(p.shape)
    return FlowObjective(
        flow.config, transformer, flow.vae, flow.text_encoder, train_text=True, text_padding=32, scheduler=scheduler,
        conditions=Conditions(config, flow.vae, 8.0, None), device=torch.device("cpu"),
    )  # fmt: skip


DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}
EDM = {"_class_name": "EDMEulerScheduler"}
PATHS = [
    (DDIM, {"out_channels": 8}),  # PixArt, Latte: a learned variance
    ({"_class_name": "EulerAncestralDiscreteScheduler"}, {}),  # Allegro
    (EDM, {"network_time": "log_sigma"}),  # Cosmos-Predict1
    ({"_class_name": "RFLOW"}, {"out_channels": 8}),  # STDiT3: the other half is not trained
]


@pytest.mark.parametrize(("scheduler", "changes"), PATHS)
def test_every_path_has_its_own_noise_target_and_loss(parts: RunComponents, scheduler: dict, changes: dict) -> None:
    """Noisy clips as diffusers' schedulers make them, known frames clean, and the loss written out clip by clip."""
    objective = family(parts, scheduler, **changes)
    items = parts.plan.step(0)
    examples = parts.loader.fetch(items, 0)
    key = StepKey(0, 0, 0, len(items))
    batch = objective.prepare(examples, items, key)
    with torch.no_grad():
        found = float(objective.module(batch))
        text = pack_texts(objective.text_encoder(batch.text_ids), 32)
        output = objective.module.transformer(batch.pack, text)
    clips = unpack_clips(output, batch.pack, (1, 2, 2))
    examples = [clip.example for clip in objective.sorted_clips(examples, items, key)]
    seen = batch.pack.tokens.split(batch.pack.segments.lengths)
    levels = batch.pack.levels[batch.pack.level_of].split(batch.pack.segments.lengths)
    expected, kinds, path = 0.0, set(), objective.path
    for example, clip, tokens, level in zip(examples, clips, seen, levels):
        x0 = objective.vae.encode(example.video[None])[0]
        noise = clip_noise(x0, 0, example.clip_id)
        tasks = {"text_to_video": 2.0, "image_to_video": 1.0}
        task = draw_task(tasks, x0.shape[1], seed=0, epoch=0, clip_id=example.clip_id)
        kinds.add(task.name)
        t = level[-1]
        unknown = slice(task.known_frames, None)
        if path.name == "ddpm":
            index = (t * 1000).round().long()
            assert index.double() / 1000 == t
            x = DDPMScheduler().add_noise(x0[None], noise[None], index[None])[0]
            target = noise
        elif path.name == "edm":
            theirs, sigma = EDMEulerScheduler(), (t / (1 - t)).float()
            x = theirs.precondition_inputs(0.5 * x0 + sigma * noise, sigma)
            clean = theirs.precondition_outputs(0.5 * x0 + sigma * noise, clip, sigma)
            weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        else:
            x, target = (1 - t.float()) * x0 + t.float() * noise, x0 - noise
        x[:, : task.known_frames] = x0[:, : task.known_frames]
        torch.testing.assert_close(tokens, patchify(x, (1, 2, 2)), rtol=1e-5, atol=1e-5)
        if path.name == "edm":
            terms = weight * (clean - 0.5 * x0).square()
        else:
            terms = (clip[:4] - target).square()
        if path.name == "ddpm" and len(clip) == 8:
            terms = terms + path.variance_bound(clip[4:], clip[:4] - target, x0, t)
        assert not level[: len(level) * task.known_frames // x0.shape[1]].any()
        expected += x0[0, unknown].numel() / 4 * float(terms[:, unknown].mean())
    assert len(kinds) == 2
    assert found == pytest.approx(expected, rel=1e-4)

    packs = list(itertools.chain.from_iterable(split(parts.plan.items(0), 2, 100)))
    assert len(packs) > 2
    with torch.no_grad():
        total = sum(
            float(objective.module(objective.prepare(parts.loader.fetch(pack, 0), pack, key))) for pack in packs
        )
    assert total == pytest.approx(found, rel=1e-5)  # however the step is split
    nothing = objective.module(objective.prepare([], [], key))
    assert float(nothing.detach()) == 0
    gradients = torch.autograd.grad(nothing, list(objective.module.parameters()), allow_unused=True)
    assert all(gradient is None or not gradient.any() for gradient in gradients)


@pytest.mark.parametrize(("scheduler", "changes"), PATHS)
def test_what_trained_samples_along_its_own_path(parts: RunComponents, scheduler: dict, changes: dict) -> None:
    """The pipeline of a run has the scheduler of its weights; variances are dropped, guidance and known frames work."""
    run = copy.copy(parts)
    run.objective = objective = family(parts, scheduler, **changes)
    weights = {name: p.detach() for name, p in objective.module.named_parameters()}
    pipeline = make_pipeline(run, trained_module(run, weights.items(), ALONE))
    assert pipeline.scheduler == scheduler
    known = {"image": np.full((32, 32, 3), 128, np.uint8)}
    settings = dict(size=(32, 32), frames=5, steps=3, guidance=3.0)
    free, again = (next(pipeline.sample_latents(SampleRequest(["a circle"], seed=1, **settings))) for _ in range(2))
    assert free.shape == (4, 3, 8, 8) and free.isfinite().all() and torch.equal(free, again)
    held = next(pipeline.sample_latents(SampleRequest(["a circle"], seed=1, known=known, **settings)))
    image = objective.vae.encode(torch.full((1, 3, 1, 32, 32), 128 / 127.5 - 1))[0]
    torch.testing.assert_close(held[:, :1], image, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(held[:, 1:], free[:, 1:])


def test_a_static_shift_follows_the_runs() -> None:
    """Where the scheduler holds one that is in use; others have none to follow."""
    assert with_static_shift(unipc_config(3.0), 2.0)["flow_shift"] == 2.0
    ltx = FAMILY.scheduler(TransformerConfig(24, 2, 2, 48, family="ltx"))
    assert with_static_shift(ltx, 2.0) == {**ltx, "shift": 2.0, "use_dynamic_shifting": False}
    for config, shift in ((DDIM, 2.0), (EDM, 2.0), (ltx, None)):
        assert with_static_shift(config, shift) == config


def test_errors_by_noise_level_are_those_of_the_clips(parts: RunComponents) -> None:
    """Each clip's error and weight count in the quarter of its noise level, known tokens in none, and all add up."""
    objective, items = parts.objective, parts.plan.step(0)
    key = StepKey(0, 0, 0, len(items))
    batch = objective.prepare(parts.loader.fetch(items, 0), items, key)
    total = float(objective.module(batch))
    errors, weights = batch.by_level.double()
    assert float(errors.sum()) == pytest.approx(total, rel=1e-5)
    assert float(weights.sum()) == pytest.approx(batch.weight, rel=1e-5)
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for item in items:
        alone = objective.prepare(parts.loader.fetch([item], 0), [item], key)
        expected[:, int(alone.noise_level * 4)] += torch.tensor([float(objective.module(alone)), alone.weight])
    torch.testing.assert_close(batch.by_level.double(), expected, rtol=1e-5, atol=1e-6)
    assert (expected[1] > 0).sum() >= 2 and objective.level_names == ["0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1"]
