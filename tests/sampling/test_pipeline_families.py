"""Every family's model folder: a small random one made by diffusers samples here what diffusers' pipeline samples.

The same latents and frames for the same noise, from text and from pictures; and what is saved here opens there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers as d
import numpy as np
import pytest
import torch
from PIL import Image
from references import randomise, small_reason
from step_noise import same_noise
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, T5Config, T5EncoderModel

from stdit.diffusion.solvers import euler_config, unipc_config
from stdit.errors import StditError
from stdit.keyed import keyed_generator
from stdit.sampling.pipeline import Pipeline, SampleRequest
from stdit.shapes import VideoShape
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.weights.families import pipelines

CAPTIONS = ["a red circle moves left", "a big blue square"]
PROMPT, NEGATIVE, SEED = CAPTIONS[0], "blue", 3
ATTENTION = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}


@dataclass(frozen=True)
class Case:
    """make(): diffusers' pipeline. shape: of the clip. call: what theirs is given beside prompt, noise and steps.

    pictures: the known frames by our name ("video": five of them). noisy: so many of their latent frames, theirs, have
    noise left, and are not compared. vae: changes to a VAE's module on both sides. off: by how much of 255 frames may
    differ.
    """

    make: Callable[[], Any]
    shape: VideoShape
    call: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()
    noisy: int = 0
    guidance: float = 3.0
    more: dict[str, Any] = field(default_factory=dict)
    vae: Callable[[Any], None] = lambda module: None
    off: int = 1


def texts(umt5: bool = False) -> dict[str, Any]:
    tokenizer = build_word_tokenizer(CAPTIONS)
    if umt5:
        return {"tokenizer": tokenizer, "text_encoder": small_umt5(len(tokenizer), 16, 1, 2).eval()}
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": randomise(T5EncoderModel(config), 9)}


def wan_vae(z: int = 4) -> Any:
    vae = d.AutoencoderKLWan(
        base_dim=4, z_dim=z, dim_mult=[1, 2, 2, 2], num_res_blocks=1, latents_mean=[0.1 * n for n in range(z)],
        latents_std=[1 + 0.1 * n for n in range(z)],
    )  # fmt: skip
    vae = randomise(vae, 1)
    narrow(vae.quant_conv, z)
    return vae


def narrow(last: torch.nn.Module, z: int) -> None:
    """A posterior so narrow that its mode, which we take, is what diffusers draws from it."""
    with torch.no_grad():
        last.weight[z:], last.bias[z:] = 0, -40


def wan_transformer(seed: int, channels: tuple[int, int] = (4, 4), **more: Any) -> Any:
    model = d.WanTransformer3DModel(
        **ATTENTION, in_channels=channels[0], out_channels=channels[1], text_dim=16, freq_dim=32, ffn_dim=40,
        rope_max_seq_len=32, **more,
    )  # fmt: skip
    return randomise(model, seed)


def flow(shift: float = 3.0) -> Any:
    return d.FlowMatchEulerDiscreteScheduler.from_config(euler_config(shift))


def wan_a14b() -> Any:
    scheduler = d.UniPCMultistepScheduler.from_config(unipc_config(3.0))
    experts = {"transformer": wan_transformer(0), "transformer_2": wan_transformer(1)}
    return d.WanPipeline(**texts(True), vae=wan_vae(), scheduler=scheduler, **experts, boundary_ratio=0.8)


def wan_image(positions: int | None = None, tokens: bool = True, experts: bool = False) -> Any:
    beside: dict[str, Any] = {"image_encoder": None, "image_processor": None}
    seen: dict[str, Any] = {}
    if tokens:
        config = CLIPVisionConfig(
            hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
        )
        beside["image_encoder"] = randomise(CLIPVisionModel(config), 5)
        beside["image_processor"] = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
        seen = {"image_dim": 8, "added_kv_proj_dim": 24, "pos_embed_seq_len": positions}
    if experts:
        beside |= {"transformer_2": wan_transformer(1, (36, 16)), "boundary_ratio": 0.9}
    transformer = wan_transformer(0, (36, 16), **seen)
    return d.WanImageToVideoPipeline(
        **texts(True), vae=wan_vae(16), scheduler=flow(), transformer=transformer, **beside
    )


def wan_5b() -> Any:
    return d.WanImageToVideoPipeline(
        **texts(True), vae=wan_vae(), scheduler=flow(), transformer=wan_transformer(0), expand_timesteps=True
    )


def ltx(name: str = "LTXPipeline") -> Any:
    blocks = {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8)}
    layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5}
    later = name == "LTXConditionPipeline"  # 0.9.5 and on
    settings = {"timestep_conditioning": True} if later else {"scaling_factor": 0.8}
    vae = d.AutoencoderKLLTXVideo(latent_channels=6, **blocks, **layers, **settings)
    vae = randomise(vae, 1)
    narrow(vae.encoder.conv_out.conv, 6)
    vae.latents_mean.copy_(torch.linspace(-1, 1, 6)), vae.latents_std.copy_(torch.linspace(0.5, 2, 6))
    transformer = d.LTXVideoTransformer3DModel(
        **ATTENTION, cross_attention_dim=24, in_channels=6, out_channels=6, caption_channels=16, patch_size=1
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
    )
    scheduler = d.FlowMatchEulerDiscreteScheduler() if later else scheduler
    return getattr(d, name)(scheduler, vae, **texts(), transformer=randomise(transformer, 0))


def image_vae() -> Any:
    vae = d.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.2,
    )  # fmt: skip
    return randomise(vae, 1)


PIXART = {**ATTENTION, "cross_attention_dim": 24, "in_channels": 4, "out_channels": 8, "caption_channels": 16}


def pixart(name: str, sample_size: int) -> Any:
    transformer = d.PixArtTransformer2DModel(**PIXART, sample_size=sample_size)
    scheduler = d.DPMSolverMultistepScheduler()
    return getattr(d, name)(**texts(), vae=image_vae(), scheduler=scheduler, transformer=randomise(transformer, 0))


def latte() -> Any:
    transformer = d.LatteTransformer3DModel(
        **PIXART, sample_size=16, video_length=3, patch_size=2, attention_bias=True, activation_fn="gelu-approximate",
        norm_type="ada_norm_single", num_embeds_ada_norm=1000, norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    scheduler = d.DDIMScheduler(clip_sample=False)
    return d.LattePipeline(**texts(), vae=image_vae(), scheduler=scheduler, transformer=randomise(transformer, 0))


def allegro() -> Any:
    vae = d.AutoencoderKLAllegro(
        block_out_channels=(4, 4, 4), down_block_types=("AllegroDownBlock3D",) * 3,
        up_block_types=("AllegroUpBlock3D",) * 3, temporal_downsample_blocks=(True, True, False),
        temporal_upsample_blocks=(False, True, True), layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    transformer = d.AllegroTransformer3DModel(**ATTENTION | {"attention_head_dim": 18}, cross_attention_dim=36,
                                              in_channels=4, out_channels=4, caption_channels=16)  # fmt: skip
    scheduler = d.EulerAncestralDiscreteScheduler()
    return d.AllegroPipeline(
        **texts(), vae=randomise(vae, 1), scheduler=scheduler, transformer=randomise(transformer, 0)
    )


def smaller_tiles(module: Any) -> None:
    """Released tiles are of 24 frames and at least 121 pixels; two along one side here."""
    module.enable_tiling()
    module.kernel, module.stride = (8, 16, 16), (4, 8, 8)


class Unchecked:
    """In place of NVIDIA's guardrail, which diffusers' pipelines insist on."""

    def to(self, device: Any) -> None:
        pass

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames: np.ndarray) -> np.ndarray:
        return frames


def cosmos(name: str, z: int, video: bool = False, **more: Any) -> Any:
    config = {
        **ATTENTION | {"attention_head_dim": 24}, "in_channels": z + video, "out_channels": z, "mlp_ratio": 2.0,
        "text_embed_dim": 16, "adaln_lora_dim": 4, "max_size": (8, 16, 16), "patch_size": (1, 2, 2),
        "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": True, "extra_pos_embed_type": None,
    }  # fmt: skip
    transformer = randomise(d.CosmosTransformer3DModel(**config | more.pop("transformer", {})), 0)
    vae = more.pop("vae", None) or wan_vae(z)
    scheduler = more.pop("scheduler", None) or d.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return getattr(d, name)(
        **more.pop("texts", None) or texts(), vae=vae, scheduler=scheduler, transformer=transformer,
        safety_checker=Unchecked(),
    )  # fmt: skip


def cosmos1() -> Any:
    vae = d.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4, latents_mean=[0.1 * n for n in range(12)],
        latents_std=[1 + 0.1 * n for n in range(12)],
    )  # fmt: skip
    scheduler = d.EDMEulerScheduler(sigma_data=0.5, final_sigmas_type="sigma_min")
    positions = {"extra_pos_embed_type": "learnable"}
    return cosmos("CosmosTextToWorldPipeline", 4, vae=randomise(vae, 1), scheduler=scheduler, transformer=positions)


def cosmos25() -> Any:
    text_encoder, tokenizer = small_reason(CAPTIONS)
    scheduler = d.UniPCMultistepScheduler(
        use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_max=200.0, sigma_min=0.01
    )
    projection = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 2 * 16}
    more = {"encoder_hidden_states_channels": 16, "rope_scale": (1.0, 3.0, 3.0)}
    return cosmos(
        "Cosmos2_5_PredictBasePipeline", 4, True, texts={"tokenizer": tokenizer, "text_encoder": text_encoder},
        scheduler=scheduler, transformer=projection | more,
    )  # fmt: skip


CLIP, PICTURE = VideoShape(5, 32, 32), VideoShape(1, 32, 48)
IMAGE_TO_VIDEO = {"shape": VideoShape(9, 32, 32), "pictures": ("image",)}
CASES = {
    "Wan 2.2 T2V A14B": Case(wan_a14b, CLIP, {"guidance_scale_2": 2.0}, more={"guidance_2": 2.0}),
    "Wan 2.1 I2V": Case(wan_image, **IMAGE_TO_VIDEO),
    "Wan 2.1 FLF2V": Case(lambda: wan_image(10), CLIP, pictures=("image", "last")),
    "Wan 2.2 I2V A14B": Case(lambda: wan_image(tokens=False, experts=True), **IMAGE_TO_VIDEO),
    "Wan 2.2 TI2V 5B": Case(wan_5b, **IMAGE_TO_VIDEO),
    "LTX-Video": Case(ltx, VideoShape(9, 32, 64), {"frame_rate": 30}, more={"fps": 30}),
    "LTX-Video from an image": Case(lambda: ltx("LTXImageToVideoPipeline"), VideoShape(17, 32, 64), {"frame_rate": 25},
                                    ("image",)),
    "LTX-Video 0.9.5": Case(lambda: ltx("LTXConditionPipeline"), VideoShape(9, 32, 64), {"frame_rate": 30},
                            more={"fps": 30}),
    "LTX-Video 0.9.5 from an image": Case(lambda: ltx("LTXConditionPipeline"), VideoShape(17, 32, 64),
                                          {"frame_rate": 25}, ("image",)),
    "PixArt-α": Case(lambda: pixart("PixArtAlphaPipeline", 128), PICTURE),
    "PixArt-Σ": Case(lambda: pixart("PixArtSigmaPipeline", 64), PICTURE),
    "Latte": Case(latte, VideoShape(3, 32, 48)),
    "Allegro": Case(allegro, VideoShape(12, 16, 24), vae=smaller_tiles),
    "Cosmos-Predict1": Case(cosmos1, VideoShape(9, 32, 48), {"fps": 24}, more={"fps": 24}),
    "Cosmos-Predict2 pictures": Case(lambda: cosmos("Cosmos2TextToImagePipeline", 4), PICTURE),
    # Their known frames keep noise of the smallest σ, 0.002; ours are clean.
    "Cosmos-Predict2 from an image": Case(lambda: cosmos("Cosmos2VideoToWorldPipeline", 4, True), CLIP, {"fps": 16},
                                          ("image",), off=2),
    "Cosmos-Predict2.5": Case(cosmos25, CLIP),
    # Theirs begin with noise alone where their first σ, 0.995, has a share of the clip, and end with half a percent.
    "Cosmos-Predict2.5 from an image": Case(cosmos25, CLIP, pictures=("image",), noisy=1),
    "Cosmos-Predict2.5 from a video": Case(cosmos25, VideoShape(9, 32, 32), pictures=("video",), noisy=2),
}  # fmt: skip


def run_theirs(pipe: Any, case: Case, noise: torch.Tensor, pictures: dict[str, np.ndarray], output: str) -> Any:
    shape, name = case.shape, type(pipe).__name__
    given: dict[str, Any] = dict(case.call)
    if name.startswith("PixArt"):
        given |= {"clean_caption": False, "use_resolution_binning": False}
    elif name in ("LattePipeline", "AllegroPipeline"):
        given["clean_caption"] = False
    if shape.frames > 1:
        given["video_length" if name == "LattePipeline" else "num_frames"] = shape.frames
    named = {"image": "image", "last": "last_image", "video": "video"}
    for ours, picture in pictures.items():
        given[named[ours]] = [*map(Image.fromarray, picture)] if ours == "video" else Image.fromarray(picture)
    if name.startswith("LTX"):
        noise = pipe._pack_latents(noise)
    elif name.startswith("PixArt"):
        noise = noise[:, :, 0]
    out = pipe(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=shape.height, width=shape.width, num_inference_steps=3,
        guidance_scale=case.guidance, latents=noise.clone(), output_type=output, **given,
    )[0]  # fmt: skip
    if output == "latent":
        if name.startswith("LTX") and out.ndim == 3:
            grid = shape.latent((8, 32, 32))
            out = pipe._unpack_latents(out, grid.frames, grid.height, grid.width)
        out = out[0] / pipe.scheduler.config.get("sigma_data", 1.0)
        return out[:, None] if out.ndim == 3 else out
    frames = out if name.startswith(("PixArt", "Cosmos2TextToImage")) else out[0]
    return np.stack([np.asarray(frame) for frame in frames])


@pytest.fixture(scope="module")
def table():
    """The errors of every family, printed when all is done."""
    rows: dict[str, tuple[float, int]] = {}
    yield rows
    print(f"\n{'sampled':32}{'latents':>10}{'frames':>8}")
    for name, (latents, frames) in rows.items():
        print(f"{name:32}{latents:10.1e}{frames:8d}")


@pytest.mark.parametrize("name", CASES)
def test_a_folder_samples_what_diffusers_samples_and_goes_back(name, tmp_path, monkeypatch, table, caplog):
    case = CASES[name]
    theirs = case.make()
    theirs.set_progress_bar_config(disable=True)
    case.vae(theirs.vae)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Pipeline.load(tmp_path / "theirs")
    case.vae(getattr(ours.vae, "module", ours.vae))
    shape = case.shape
    latent = shape.latent(ours.vae.config.stride)
    wanted = (ours.vae.config.z_dim, latent.frames, latent.height, latent.width)
    noise = torch.randn(1, *wanted, generator=torch.Generator().manual_seed(SEED))
    rng = np.random.default_rng(0)
    several = {"video": (5,)}
    pictures = {
        one: rng.integers(0, 256, (*several.get(one, ()), shape.height, shape.width, 3), dtype=np.uint8)
        for one in case.pictures
    }

    def expect(output: str) -> Any:
        steps = iter(range(9))  # the noise of our keys, for their solver

        def drawn(like: Any, **_: Any) -> torch.Tensor:
            return torch.randn(like, generator=keyed_generator(SEED, "sample step", 0, next(steps)))

        def drawn_by_ltx(like: Any, **_: Any) -> torch.Tensor:
            """The first noise, which that pipeline lets nobody give; then, packed, that of the known frame."""
            if len(like) == 5:
                return noise.clone()
            on_known = torch.randn(
                (6, 1, *noise.shape[3:]), generator=keyed_generator(SEED, "known noise", 0, next(steps))
            )
            return torch.nn.functional.pad(on_known.flatten(1).T, (0, 0, 0, like[1] - on_known[0].numel()))[None]

        monkeypatch.setattr("diffusers.schedulers.scheduling_euler_ancestral_discrete.randn_tensor", drawn)
        monkeypatch.setattr("diffusers.pipelines.ltx.pipeline_ltx_condition.randn_tensor", drawn_by_ltx)
        start = noise
        if type(theirs).__name__ == "LTXImageToVideoPipeline":  # wants the picture's latents where it wants noise
            start = torch.cat([ours.known_frames.encode(pictures, shape).tokens[None], noise[:, :, 1:]], dim=2)
        return run_theirs(theirs, case, start, pictures, output)

    request = SampleRequest(
        [PROMPT], size=(shape.width, shape.height), frames=shape.frames, steps=3, guidance=case.guidance,
        negative_prompt=NEGATIVE, seed=SEED, noise=noise, known=pictures or None, **case.more,
    )  # fmt: skip
    (found,) = ours.sample_latents(request)
    expected = expect("latent")
    assert found.shape == expected.shape
    error = float((found - expected)[:, case.noisy :].norm() / expected[:, case.noisy :].norm())
    whole = torch.cat([expected[:, : case.noisy], found[:, case.noisy :]], dim=1)
    frames, mine = expect("pil"), ours.decode(whole)
    assert mine.shape == frames.shape == (shape.frames, shape.height, shape.width, 3)
    off = int(np.abs(mine.astype(int) - frames.astype(int)).max())
    table[name] = error, off
    assert error <= 1e-4 and off <= case.off and frames.std() > 1

    ours.save(tmp_path / "ours")
    index, before = (json.loads((tmp_path / at / "model_index.json").read_text()) for at in ("ours", "theirs"))
    same = ("_class_name", "transformer", "transformer_2", "vae", "scheduler", "text_encoder", "image_encoder")
    for key in (*same, "boundary_ratio", "expand_timesteps"):
        assert index.get(key) == before.get(key), key
    checked = {"safety_checker": Unchecked()} if name.startswith("Cosmos") else {}
    again = type(theirs).from_pretrained(tmp_path / "ours", **checked)
    for part in ("transformer", "transformer_2", "vae", "text_encoder", "image_encoder"):
        if getattr(theirs, part, None) is not None:
            kept, back = getattr(theirs, part).state_dict(), getattr(again, part).state_dict()
            assert kept.keys() == back.keys(), part
            assert all(torch.equal(back[key], tensor) for key, tensor in kept.items()), part
    assert "not used" not in caplog.text and "newly initialized" not in caplog.text


@pytest.mark.parametrize("name", [name for name, kind in pipelines().items() if kind.refused])
def test_what_is_not_built_is_refused_by_name(name, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(StditError, match=f"{name} is not supported: "):
        Pipeline.load(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [
        "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
        "EulerDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "KDPM2DiscreteScheduler",
        "LCMScheduler", "LMSDiscreteScheduler", "PNDMScheduler", "SASolverScheduler", "TCDScheduler",
        "UniPCMultistepScheduler",
    ],
)  # fmt: skip
def test_latte_by_another_scheduler_of_diffusers(name, tmp_path, monkeypatch):
    """Swapped in as its users do: by from_config of the folder's own, and by its name."""
    case = CASES["Latte"]
    theirs = case.make()
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = getattr(d, name).from_config(theirs.scheduler.config, variance_type=None)
    again = same_noise(monkeypatch, type(theirs.scheduler))
    theirs.save_pretrained(tmp_path)
    ours, steps = Pipeline.load(tmp_path), 6
    latent = case.shape.latent(ours.vae.config.stride)
    noise = torch.randn(
        1, ours.vae.config.z_dim, *latent.sizes, generator=torch.Generator().manual_seed(SEED)
    )  # fmt: skip
    expected = theirs(
        prompt=PROMPT, negative_prompt=NEGATIVE, height=case.shape.height, width=case.shape.width,
        video_length=case.shape.frames, num_inference_steps=steps, guidance_scale=case.guidance, clean_caption=False,
        latents=noise.clone(), output_type="latent", **case.call,
    )[0][0]  # fmt: skip
    request = SampleRequest(
        [PROMPT], size=(case.shape.width, case.shape.height), frames=case.shape.frames, steps=steps,
        guidance=case.guidance, negative_prompt=NEGATIVE, noise=noise, **case.more,
    )  # fmt: skip
    again()
    (found,) = ours.sample_latents(request)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
