"""The pipeline against diffusers' WanPipeline: the same folder, noise and prompts give the same clips, both ways."""

from __future__ import annotations

import copy
import inspect
import json
from dataclasses import fields, replace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image
from step_noise import same_noise

from stdit.diffusion import solvers
from stdit.diffusion.guidance import GuidanceOptions
from stdit.errors import StditError
from stdit.models.packing import pack_clips, pack_texts, unpack_clips
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.sampling.pipeline import FolderSettings, Pipeline, SampleRequest
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.vae.autoencoder import CausalVAE, VaeConfig

CAPTIONS = ["A red circle moves left.", "a big blue square moves up"]
SHAPES = [((48, 32), 9), ((32, 64), 5)]  # (width, height), frames
PADDING = 24


def randomise(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """All weights and biases random, norms and zero-initialised layers too, and none so large that outputs explode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
            noise = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
            is_gain = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + noise if is_gain else noise)
    return module.eval()


@pytest.fixture(scope="module")
def theirs() -> WanPipeline:
    tokenizer = build_word_tokenizer(CAPTIONS)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=40, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.1, 0.9, 1.3, 0.7],
    )  # fmt: skip
    pipe = WanPipeline(
        tokenizer, small_umt5(len(tokenizer), 16, 1, 2).eval(), randomise(vae, 1),
        UniPCMultistepScheduler.from_config(solvers.unipc_config(3.0)), randomise(transformer, 0),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "stranger"
    theirs.save_pretrained(path)
    FolderSettings(fps=8, shapes=("48x32x9", "32x64x5"), text_padding=PADDING).write(path)
    return path


@pytest.fixture(scope="module")
def ours(folder) -> Pipeline:
    return Pipeline.load(folder)


def noise_for(pipe: Pipeline, size, frames, count=1) -> torch.Tensor:
    latent = pipe.shape(size, frames).latent(pipe.vae.config.stride)
    shape = (count, pipe.vae.config.z_dim, latent.frames, latent.height, latent.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def run_theirs(pipe: WanPipeline, prompts, noise, frames, guidance, negative="", steps=4):
    scale = pipe.vae_scale_factor_spatial
    height, width = noise.shape[-2] * scale, noise.shape[-1] * scale
    settings = dict(
        prompt=prompts, negative_prompt=[negative] * len(prompts), height=height, width=width, num_frames=frames,
        num_inference_steps=steps, guidance_scale=guidance, max_sequence_length=PADDING,
    )  # fmt: skip
    latents = pipe(latents=noise.clone(), output_type="latent", **settings).frames
    images = pipe(latents=noise.clone(), output_type="pil", **settings).frames
    return latents, [np.stack([np.asarray(image) for image in clip]) for clip in images]


def assert_same(ours: Pipeline, theirs: WanPipeline, prompts, size, frames, guidance, solver, negative=""):
    noise = noise_for(ours, size, frames, len(prompts))
    expected, images = run_theirs(theirs, prompts, noise, frames, guidance, negative)
    settings = dict(
        size=size, frames=frames, steps=4, guidance=guidance, negative_prompt=negative, noise=noise, solver=solver
    )
    found = torch.stack(list(ours.sample_latents(SampleRequest(prompts, **settings))))
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    for mine, image in zip(ours(prompts, **settings), images):
        assert mine.shape == image.shape == (frames, size[1], size[0], 3)
        assert np.abs(mine.astype(int) - image.astype(int)).max() <= 2
        assert image.std() > 1  # something is there to compare


SCHEDULERS = {"euler": solvers.euler_config(3.0), "unipc": solvers.unipc_config(3.0)}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("solver", SCHEDULERS)
@pytest.mark.parametrize(("size", "frames"), SHAPES)
def test_agrees_with_wan_pipeline(ours, theirs, size, frames, solver, guidance):
    config = SCHEDULERS[solver]
    theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    assert_same(ours, theirs, CAPTIONS[:1], size, frames, guidance, solver)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("solver", "more"),
    [
        *((name, {}) for name in ("heun", "lcm", *sorted(solvers.FLOWS_BY_OPTION))),
        ("dpm++", {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_agrees_with_wan_pipeline_by_another_scheduler(ours, theirs, solver, more, monkeypatch):
    """Swapped in as its users do. Noise of a step is the same for both."""
    config = solvers.named_config(solver, ours.scheduler) | more
    kind = getattr(diffusers, config["_class_name"])
    again = same_noise(monkeypatch, kind)
    theirs.scheduler = kind.from_config({key: value for key, value in config.items() if key != "_class_name"})
    noise = noise_for(ours, (48, 32), 9, 1)
    (expected,) = theirs(
        prompt=CAPTIONS[0], height=32, width=48, num_frames=9, num_inference_steps=4, guidance_scale=5.0,
        max_sequence_length=PADDING, latents=noise.clone(), output_type="latent",
    ).frames  # fmt: skip
    again()
    request = SampleRequest(
        CAPTIONS[:1], size=(48, 32), frames=9, steps=4, guidance=5.0, noise=noise, solver=config if more else solver
    )
    (found,) = ours.sample_latents(request)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_steps_at_given_levels(ours, theirs):
    """As few-step weights are run: in diffusers, by flow Euler or LCM over sigmas without a shift."""
    levels = (1.0, 0.9375, 0.8, 0.5)
    noise = noise_for(ours, (48, 32), 9, 1)
    settings = dict(size=(48, 32), frames=9, guidance=1.0, noise=noise, steps=30, levels=levels)
    text = ours.encode_texts(CAPTIONS[:1])
    for solver in ("euler", "unipc"):
        (found,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], solver=solver, **settings))
        if solver == "euler":
            x, ends = noise, (*levels[1:], 0.0)
            for level, end in zip(levels, ends):
                out = theirs.transformer(x, torch.tensor([1000 * level]), padded(text), return_dict=False)[0]
                x = x + (end - level) * out
            torch.testing.assert_close(found, x[0], rtol=1e-4, atol=1e-4)
            euler = found
    assert 0.01 < (found - euler).norm() / euler.norm() < 0.5  # UniPC is of a higher order over the same levels
    lcm = SampleRequest(CAPTIONS[:1], solver="lcm", **settings)
    assert ours._solver(lcm, ours.shape((48, 32), 9)).levels == pytest.approx(levels)
    for wrong, says in (
        ((0.5, 0.8), "must fall"),
        ((1.2, 0.5), "from 1 at most"),
        ((1.0, 0.0), "above 0"),
    ):
        with pytest.raises(StditError, match=says):
            list(ours.sample_latents(SampleRequest(CAPTIONS[:1], solver="euler", **settings | {"levels": wrong})))
    with pytest.raises(StditError, match="DEISMultistepScheduler has noise levels of its own"):
        list(ours.sample_latents(SampleRequest(CAPTIONS[:1], solver="DEISMultistepScheduler", **settings)))
    with pytest.raises(StditError, match="nothing shifts them"):
        list(ours.sample_latents(SampleRequest(CAPTIONS[:1], solver="euler", shift=3.0, **settings)))


def padded(texts):
    """(1, PADDING, D), as WanPipeline pads."""
    return torch.nn.functional.pad(torch.stack(texts), (0, 0, 0, PADDING - texts[0].shape[0]))


def test_agrees_with_wan_pipeline_on_several_prompts_and_a_negative(ours, theirs):
    theirs.scheduler = UniPCMultistepScheduler.from_config(SCHEDULERS["unipc"])
    assert_same(ours, theirs, CAPTIONS, (48, 32), 5, 4.0, None, negative="a circle")


@pytest.mark.parametrize("solver", SCHEDULERS)
def test_a_shift_by_tokens_moves_the_static_one(ours, theirs, solver):
    """48x32x9 is 18 tokens, a quarter of 72: half the shift of 3. A config that is given is taken as it is."""
    settings = replace(ours.settings, shift_tokens=72)
    by_tokens = Pipeline(ours.transformer, ours.vae, ours.text_encoder, ours.scheduler, settings)
    half = {"euler": solvers.euler_config(1.5), "unipc": solvers.unipc_config(1.5)}
    for config, asked in ((half[solver], solver), (SCHEDULERS[solver], SCHEDULERS[solver])):
        theirs.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
        assert_same(by_tokens, theirs, CAPTIONS[:1], (48, 32), 9, 1.0, asked)


def test_what_we_save_opens_in_wan_pipeline(ours, theirs, tmp_path, caplog):
    """Both ways: every tensor survives our folder, nothing is missing, and the result is the same."""
    ours.save(tmp_path)
    assert FolderSettings.read(tmp_path) == ours.settings
    again = WanPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    for part in ("transformer", "vae", "text_encoder"):
        expected, found = getattr(theirs, part).state_dict(), getattr(again, part).state_dict()
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), part
    assert "not used" not in caplog.text and "newly initialized" not in caplog.text
    assert_same(Pipeline.load(tmp_path), again, CAPTIONS[:1], (48, 32), 9, 3.0, None)


@pytest.mark.parametrize(
    "vae",
    [
        VaeConfig(
            4, (1, 2, 2), 1, (True, True), z_dim=6, patch_size=2, latents_mean=(0.2,) * 6, latents_std=(1.5,) * 6
        ),
        VaeConfig(4, (1, 2, 1), 1, (True, True), z_dim=3),
    ],
    ids=["4x8x8 by a pixel patch", "4x4x4"],
)
def test_a_model_made_here_runs_in_wan_pipeline(vae, tmp_path):
    tokenizer = build_word_tokenizer(CAPTIONS)
    z = vae.z_dim
    config = TransformerConfig(24, 2, 2, 40, z, z, text_dim=16, frequency_dim=32, text_padding=PADDING)
    text_encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    made = Pipeline(
        randomise(STDiT(config), 0), randomise(CausalVAE(vae), 1), text_encoder,
        solvers.unipc_config(), FolderSettings(fps=8, shapes=("48x32x9",)),
    )  # fmt: skip
    made.save(tmp_path)
    again = WanPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert_same(made, again, CAPTIONS, (48, 32), 9, 3.0, None)
    assert_same(Pipeline.load(tmp_path), again, CAPTIONS[:1], (32, 64), 5, 1.0, None)


def test_one_clip_does_not_depend_on_the_others(ours):
    """Several prompts in one pack, or one after another under a small token bound: the same clips."""
    settings = dict(size=(48, 32), frames=5, steps=3, guidance=3.0, solver="unipc", seed=4)
    calls: list[tuple[int, int]] = []
    together = list(ours.sample_latents(SampleRequest(CAPTIONS, **settings)))
    apart = list(
        ours.sample_latents(
            SampleRequest(CAPTIONS, tokens_per_pack=1, **settings), lambda done, total: calls.append((done, total))
        )
    )
    for a, b in zip(together, apart):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert calls[-1] == (6, 6) and [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert not torch.allclose(together[0], together[1], atol=0.1)  # each prompt has its own noise


def test_clips_of_several_shapes_and_settings_share_a_pack(ours, monkeypatch):
    """Eight prompts of four shapes, with their own seeds, scales and solvers: the frames that each has alone."""
    shapes = [((48, 32), 5), ((32, 64), 9), ((32, 32), 1), ((64, 48), 5)]
    others = [{"guidance": 1.0}, {"seed": 3}, {"solver": "euler", "negative_prompt": "blue"}, {"shift": 2.0}]
    requests = [
        SampleRequest([*CAPTIONS[:2]], size=size, frames=frames, steps=3, **other)
        for (size, frames), other in zip(shapes, others)
    ]
    alone = [latents for request in requests for latents in ours.sample_latents(request)]
    forwards: list[int] = []
    hook = ours.transformer.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0].grids)))
    together = list(ours.sample_together(requests))
    hook.remove()
    assert forwards == [4 * 2 * 2 - 2] * 3  # one forward a step: two segments a clip, but one without guidance
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert np.abs(ours.decode(one).astype(int) - ours.decode(other).astype(int)).max() <= 1
    in_two = [SampleRequest([CAPTIONS[0]], size=(32, 32), frames=1, steps=steps) for steps in (2, 3)]
    assert len(list(ours.sample_together(in_two))) == 2  # other steps: another pack


def test_skipped_blocks_are_those_that_diffusers_skips(ours, theirs):
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    generator = torch.Generator().manual_seed(0)
    latents, text = (torch.randn(*size, generator=generator) for size in ((1, 4, 3, 4, 6), (1, 24, 16)))
    transformer = copy.deepcopy(theirs.transformer)
    apply_layer_skip(transformer, LayerSkipConfig([1], fqn="blocks"))
    wanted = transformer(latents, torch.tensor([700.0]), text, return_dict=False)[0]
    pack = pack_clips([latents[0]], [torch.tensor(0.7)], ours.transformer.config.patch)
    found = ours.transformer(pack, pack_texts([text[0]], padding=0), skip=(1,))
    torch.testing.assert_close(unpack_clips(found, pack, ours.transformer.config.patch)[0], wanted[0])
    assert not torch.allclose(wanted, theirs.transformer(latents, torch.tensor([700.0]), text, return_dict=False)[0])


def test_guidance_acts_where_it_is_asked_to(ours, monkeypatch):
    """Outside an interval the network runs once a clip; branches without some blocks are a pack of their own."""
    segments = []
    forward = type(ours.transformer).forward

    def counted(self, pack, text, **options):
        segments.append((len(pack.grids), tuple(options.get("skip", ()))))
        return forward(self, pack, text, **options)

    def latents(options=None, guidance=3.0):
        segments.clear()
        request = SampleRequest(
            CAPTIONS, size=(48, 32), frames=9, steps=4, guidance=guidance, solver="euler",
            guidance_options=options or GuidanceOptions(),
        )  # fmt: skip
        return torch.stack(list(ours.sample_latents(request)))

    monkeypatch.setattr(type(ours.transformer), "forward", counted)
    plain, unguided = latents(), latents(guidance=1.0)
    assert torch.equal(latents(GuidanceOptions(interval=(0.0, 1.0))), plain) and segments == [(4, ())] * 4
    levels = solvers.make_solver(solvers.named_config("euler", ours.scheduler), 4).levels
    between = GuidanceOptions(interval=(levels[2], levels[1]))
    assert not torch.allclose(latents(between), plain)
    assert segments == [(2, ()), (4, ()), (4, ()), (2, ())]
    nowhere = GuidanceOptions(interval=((levels[1] + levels[2]) / 2,) * 2)
    torch.testing.assert_close(latents(nowhere), unguided)
    skipping = GuidanceOptions(skip_layers=(1,), skip_interval=(levels[1], 1.0))
    assert not torch.allclose(latents(skipping), plain)
    assert segments == [(4, ()), (2, (1,))] * 2 + [(4, ())] * 2
    torch.testing.assert_close(latents(replace(skipping, skip_scale=0.0)), plain)
    latents(GuidanceOptions(zero_star=True, zero_steps=1))
    assert segments == [(4, ())] * 3
    with pytest.raises(StditError, match="blocks 0 to 1"):
        latents(GuidanceOptions(skip_layers=(2,)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
@pytest.mark.parametrize("solver", ["euler", "unipc", "heun", "dpm++", "SASolverScheduler"])
def test_a_clip_from_another_agrees_with_wan_video_to_video(ours, theirs, solver, strength, monkeypatch):
    config = solvers.named_config(solver, ours.scheduler)
    kind = getattr(diffusers, config["_class_name"])
    scheduler = kind.from_config({key: value for key, value in config.items() if key != "_class_name"})
    again = same_noise(monkeypatch, kind)
    pipe = diffusers.WanVideoToVideoPipeline(
        theirs.tokenizer, theirs.text_encoder, theirs.transformer, theirs.vae, scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    video = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), dtype=np.uint8)
    noise = noise_for(ours, (48, 32), 9, 1)
    monkeypatch.setattr("diffusers.pipelines.wan.pipeline_wan_video2video.randn_tensor", lambda *_, **__: noise.clone())
    (expected,) = pipe(
        video=[Image.fromarray(frame) for frame in video], prompt=CAPTIONS[0], height=32, width=48, strength=strength,
        num_inference_steps=8, guidance_scale=4.0, max_sequence_length=PADDING, output_type="latent",
    ).frames  # fmt: skip
    again()
    request = SampleRequest(
        CAPTIONS[:1], size=(48, 32), frames=9, steps=8, guidance=4.0, noise=noise, solver=solver, init=video,
        strength=strength,
    )  # fmt: skip
    (found,) = ours.sample_latents(request)
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def test_a_start_that_does_not_fit_is_named(ours):
    video = np.zeros((9, 32, 48, 3), np.uint8)
    settings = dict(size=(48, 32), frames=9, steps=4, guidance=1.0, init=video)
    for wrong, says in (
        ({"strength": 0.0}, "strength is 0.0"), ({"strength": 0.2}, "of 4 steps is none"),
        ({"init": video[:5]}, "init must be uint8"), ({"init": [video, None]}, "2 init for 1 prompts"),
    ):  # fmt: skip
        with pytest.raises(StditError, match=says):
            list(ours.sample_latents(SampleRequest(CAPTIONS[:1], **settings | wrong)))


def test_a_clip_in_windows_is_what_its_windows_are(ours, monkeypatch):
    """The first latent frames see only the first window, so one step of them is that window's own."""
    grids = []
    forward = type(ours.transformer).forward

    def spy(self, pack, text, **options):
        grids.append([grid.frames for grid in pack.grids])
        return forward(self, pack, text, **options)

    monkeypatch.setattr(type(ours.transformer), "forward", spy)
    noise = noise_for(ours, (48, 32), 25, 1)  # 7 latent frames
    settings = dict(size=(48, 32), steps=1, guidance=3.0, solver="euler")
    (whole,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], frames=25, window=13, noise=noise, **settings))
    assert grids == [[4, 4, 4, 4, 4, 4]]  # of 4: at 0, 2 and 3, with the prompt and without
    (first,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], frames=13, noise=noise[:, :, :4], **settings))
    torch.testing.assert_close(whole[:, :2], first[:, :2])
    (last,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], frames=13, noise=noise[:, :, 3:], **settings))
    torch.testing.assert_close(whole[:, 6:], last[:, 3:])
    (plain,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], frames=25, noise=noise, **settings))
    (wide,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], frames=25, noise=noise, window=25, **settings))
    assert torch.equal(plain, wide) and not torch.allclose(plain, whole)
    with pytest.raises(StditError, match="window 1: it must be long enough"):
        list(ours.sample_latents(SampleRequest(CAPTIONS[:1], frames=25, window=1, **settings)))


def test_reuse_spares_runs_of_each_clip_alone(ours, monkeypatch):
    clips = []
    forward = type(ours.transformer).forward

    def counted(self, pack, text, **options):
        clips.append(len(pack.grids))
        return forward(self, pack, text, **options)

    monkeypatch.setattr(type(ours.transformer), "forward", counted)
    settings = dict(size=(48, 32), frames=9, steps=60, guidance=1.0, solver="euler")
    full = list(ours.sample_latents(SampleRequest(CAPTIONS, **settings)))
    assert clips == [2] * 60
    clips.clear()
    spared = list(ours.sample_latents(SampleRequest(CAPTIONS, reuse=0.5, **settings)))
    together = sum(clips)
    assert 8 < together < 100
    for mine, whole in zip(spared, full):
        assert 0 < (mine - whole).norm() < 0.5 * whole.norm()
    clips.clear()
    for index, caption in enumerate(CAPTIONS):
        (alone,) = ours.sample_latents(SampleRequest([caption], indices=[index], reuse=0.5, **settings))
        torch.testing.assert_close(alone, spared[index], rtol=1e-4, atol=1e-4)
    assert sum(clips) == together


def test_known_frames_are_conditions_at_level_0(ours, monkeypatch):
    """What the network sees: known tokens clean and at level 0 at every step; what comes out: the same tokens."""
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)
    expected = ours.vae.encode(torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1)[0]
    seen = []
    forward = type(ours.transformer).forward

    def spy(self, pack, text, **options):
        seen.append(pack)
        return forward(self, pack, text)

    monkeypatch.setattr(type(ours.transformer), "forward", spy)
    settings = dict(size=(48, 32), frames=13, steps=3, guidance=1.0)
    (extended,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], known={"video": video}, **settings))
    torch.testing.assert_close(extended[:, :2], expected, rtol=1e-5, atol=1e-5)
    for pack in seen:
        levels = pack.levels[pack.level_of].reshape(4, -1)  # (latent frames, tokens a frame)
        assert not levels[:2].any() and (levels[2:] > 0).all()
        assert len(pack.levels) == 2
    monkeypatch.undo()
    (image,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], known={"image": video[0]}, **settings))
    (free,) = ours.sample_latents(SampleRequest(CAPTIONS[:1], **settings))
    torch.testing.assert_close(image[:, :1], expected[:, :1], rtol=1e-5, atol=1e-5)  # causal: the prefix of a prefix
    assert (image[:, 1:] - free[:, 1:]).abs().mean() > 1e-4  # and the rest saw it
    mixed, _ = ours.sample_latents(SampleRequest([CAPTIONS[0]] * 2, known=[{"image": video[0]}, None], **settings))
    torch.testing.assert_close(mixed, image, rtol=1e-4, atol=1e-5)


def test_seed_decides(ours):
    settings = dict(size=(32, 32), frames=1, steps=2)
    first, second, other = (ours(CAPTIONS[0], seed=seed, **settings) for seed in (1, 1, 2))
    assert first.dtype == np.uint8 and first.shape == (1, 32, 32, 3)
    assert np.array_equal(first, second) and not np.array_equal(first, other)


def test_defaults_come_from_the_folder(ours, theirs, tmp_path):
    assert str(ours.shape()) == "48x32x9" and str(ours.shape(frames=5)) == "48x32x5"
    assert ours.settings.fps == 8 and ours.text_padding == PADDING
    assert FolderSettings.read(tmp_path).shape.frames == 81  # Wan's, for a folder without stdit.json


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": (50, 32)}, "48x32 or 64x32"),
        ({"frames": 7}, "nearest are 5 and 9"),
        ({"fps": 30}, "8 frames per second"),
        ({"noise": torch.zeros(1, 4, 2, 4, 6)}, "noise has shape"),
        ({"known": {"picture": None}}, "known must be"),
        ({"known": {"image": np.zeros((32, 32, 3), np.uint8)}}, "32x32, the clip 48x32"),
        ({"known": {"video": np.zeros((9, 32, 48, 3), np.uint8)}}, "nothing is left"),
        ({"known": {"video": np.zeros((4, 32, 48, 3), np.uint8)}}, "nearest are 1 and 5"),
        ({"known": {"image": np.zeros((32, 48, 3), np.float32)}}, "uint8"),
        ({"solver": "ddim"}, "'ddim'"),
        ({"steps": 0}, "steps"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"shift": float("inf")}, "shift is inf"),
        ({"size": (960000, 960000)}, "GB of memory"),
        ({"guidance_2": 3.0}, "this model has one"),
        ({"known": {"image": np.zeros((32, 48, 3), np.uint8), "last": np.zeros((32, 48, 3), np.uint8)}}, "last frame"),
    ],
)
def test_errors_say_what_is_wrong(ours, settings, message):
    with pytest.raises(StditError, match=message):
        ours(CAPTIONS[0], **settings)


def test_the_call_lists_every_option_of_a_request(ours):
    listed = inspect.signature(Pipeline.__call__).parameters
    options = {field.name: (field.type, field.default) for field in fields(SampleRequest) if field.name != "prompts"}
    assert {name: (listed[name].annotation, listed[name].default) for name in options} == options
    assert listed.keys() - options.keys() == {"self", "prompt", "progress"}
    with pytest.raises(TypeError, match="'negative'"):
        ours(CAPTIONS[0], negative="a")


def test_folders_that_cannot_be_loaded(folder, tmp_path):
    with pytest.raises(StditError, match="not a model folder"):
        Pipeline.load(tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "LTXPipelin"}))
    with pytest.raises(StditError, match=r"LTXPipelin is not supported.*'LTXPipeline'"):
        Pipeline.load(tmp_path)
    (tmp_path / "stdit.json").write_text(json.dumps({"format": 1, "fsp": 8}))
    with pytest.raises(StditError, match="'fps'"):
        FolderSettings.read(tmp_path)
    (tmp_path / "stdit.json").write_text(json.dumps({"format": 1, "shift_tokens": 0}))
    with pytest.raises(StditError, match="shift_tokens is 0"):
        FolderSettings.read(tmp_path)
    for wrong, words in (
        ({"fps": "sixteen"}, "stdit.json: fps is 'sixteen'"),
        ({"fps": float("nan")}, "stdit.json: fps is nan"),
        ({"fps": 1e300}, "fps is 1e\\+300"),
        ({"shapes": "832x480x81"}, "stdit.json: shapes is '832x480x81'; it must be a list"),
        ({"shapes": []}, r"stdit.json: shapes is \[\]; it must be a list of at least 1"),
        ({"shapes": ["wide"]}, "'wide' is not a shape"),
        ({"text_padding": 1.5}, "text_padding is 1.5"),
        ({"text_padding": -1}, "text_padding is -1"),
    ):
        (tmp_path / "stdit.json").write_text(json.dumps({"format": 1, **wrong}))
        with pytest.raises(StditError, match=words):
            FolderSettings.read(tmp_path)
    (tmp_path / "stdit.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(StditError, match="format"):
        FolderSettings.read(tmp_path)
