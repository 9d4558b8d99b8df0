"""What training tells the weights of a clip, against diffusers' pipeline; packed gradients against single ones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stdit.data.load.loader import Example
from stdit.diffusion.tasks import Task
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.models.packing import pack_clips, pack_texts, unpack_clips
from stdit.models.transformer import STDiT
from stdit.shapes import VideoShape
from stdit.text.images import ImageEncoder, load_image_encoder
from stdit.training.objectives.conditions import Conditions
from stdit.vae.autoencoder import CausalVAE
from stdit.weights.io import load_vae

WAN_IMAGE = {"in_channels": 10, "out_channels": 4, "image_channels": 6, "text_dim": 10}


def config(**settings: Any) -> TransformerConfig:
    given: dict[str, Any] = {"dim": 24, "heads": 2, "layers": 2, "ffn_dim": 48, "frequency_dim": 32}
    return TransformerConfig(**(given | settings))


def clip(frames: int, height: int, width: int) -> Example:
    generator = torch.Generator().manual_seed(frames * height + width)
    pixels = torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)
    return Example("clip", 0, 0, 0, VideoShape(frames, height, width), 1.0, "", pixels)


@pytest.fixture(scope="module")
def vae(tiny: Path) -> CausalVAE:
    return load_vae(tiny / "vae", dtype=torch.float32).eval()


def test_first_and_last_images_are_given_as_diffusers_gives_them(
    tiny: Path, vae: CausalVAE, image_folder: Path
) -> None:
    """Mask, latents of the image before grey, and CLIP tokens, by WanImageToVideoPipeline's own methods."""
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
    from PIL import Image
    from transformers import CLIPImageProcessor, CLIPVisionModel

    pipe = WanImageToVideoPipeline.__new__(WanImageToVideoPipeline)
    pipe.vae = AutoencoderKLWan.from_pretrained(tiny / "vae")
    pipe.image_encoder = CLIPVisionModel.from_pretrained(image_folder / "image_encoder")
    pipe.image_processor = CLIPImageProcessor.from_pretrained(image_folder / "image_processor")
    pipe._internal_dict = SimpleNamespace(expand_timesteps=False)
    pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 2, 4
    example = clip(9, 32, 48)
    first = example.video[None, :, 0]
    _, wanted = pipe.prepare_latents(first, 1, 4, 32, 48, 9, torch.float32, "cpu", torch.Generator())
    tokens = pipe.encode_image(Image.fromarray(example.frames[0].numpy()), "cpu")

    encoder = load_image_encoder(image_folder)
    conditions = Conditions(config(**WAN_IMAGE, image_text_dim=12), vae, 8.0, encoder)
    (found,) = conditions.of([example], [Task("image_to_video", 1)])
    (more,) = conditions.of([example], [Task("extend", 3)])
    assert found.keys() == {"image", "image_text"} and found["image"].shape == (6, 5, 8, 12)
    torch.testing.assert_close(found["image"], wanted[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found["image_text"], tokens[0], rtol=0, atol=1e-6)
    assert more["image"][:2, :, 0, 0].tolist() == [[1, 1, 1, 0, 0]] * 2
    torch.testing.assert_close(more["image"][2:, :3], vae.encode(example.video[None, :, :5])[0], rtol=0, atol=2e-5)

    both = Conditions(config(**WAN_IMAGE, image_text_dim=12, image_text_positions=10), vae, 8.0, encoder)
    found, image = both.of([example, clip(1, 32, 48)], [Task("first_last_to_video", 1, last=True), Task()])
    ends = [Image.fromarray(example.frames[at].numpy()) for at in (0, -1)]
    _, wanted = pipe.prepare_latents(
        first, 1, 4, 32, 48, 9, torch.float32, "cpu", torch.Generator(), last_image=example.video[None, :, -1]
    )
    torch.testing.assert_close(found["image"], wanted[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(found["image_text"], pipe.encode_image(ends, "cpu").flatten(0, 1), rtol=0, atol=1e-6)
    assert found["image"][:2, :, 0, 0].tolist() == [[1, 0, 0, 0, 0], [1, 0, 0, 0, 1]]
    assert not image["image"][:2].any() and image["image_text"].shape == both.of_empty_clip()["image_text"].shape == (
        10,
        12,
    )


def test_rates_sizes_and_masks_are_the_clips_own(vae: CausalVAE) -> None:
    weights = config(
        attention="spatial_temporal_text", rotary="time", position="space_resolution", position_base=32, in_channels=4,
        out_channels=4, level_condition="fps",
    )  # fmt: skip
    video, image = clip(5, 32, 48), clip(1, 48, 32)
    found = Conditions(weights, vae, 8.0, None).of([video, image], [Task(), Task()])
    assert [(one["fps"].item(), one["size"].tolist()) for one in found] == [(8, [48, 32]), (120, [32, 48])]
    masked = config(in_channels=5, out_channels=4, image_channels=1)
    found = Conditions(masked, vae, 8.0, None).of([video, image], [Task("extend", 2), Task()])
    assert found[0]["image"].shape == (1, 3, 8, 12) and found[0]["image"][0, :, 3, 4].tolist() == [1, 1, 0]
    assert found[1]["image"].shape == (1, 1, 12, 8) and not found[1]["image"].any()


def test_what_cannot_be_given_is_named(vae: CausalVAE, image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StditError, match="no image_encoder/"):
        Conditions(config(**WAN_IMAGE, image_text_dim=12), vae, 8.0, None)
    with pytest.raises(StditError, match=r"takes 3 image channels; supported are 1 \(a mask of frames\) and 6"):
        Conditions(config(in_channels=7, out_channels=4, image_channels=3), vae, 8.0, None)
    first_alone = Conditions(config(**WAN_IMAGE, image_text_dim=12), vae, 8.0, load_image_encoder(image_folder))
    for conditions, words in (
        (first_alone, "see the tokens of a first image alone"),
        (Conditions(config(), vae, 8.0, None), "take no image beside the noise"),
    ):
        conditions.check(["image_to_video", "extend"])
        with pytest.raises(StditError, match=f"first_last_to_video is for weights .*; these {words}"):
            conditions.check(["first_last_to_video"])
    Conditions(config(**WAN_IMAGE), vae, 8.0, None).check(["first_last_to_video"])  # Wan 2.2 I2V
    with pytest.raises(StditError, match=f"{tmp_path / 'image_encoder'}: no such folder"):
        load_image_encoder(tmp_path)


FAMILIES = {
    "STDiT3": {
        "attention": "spatial_temporal_text", "cross_norm": "none", "qk_norm": "per_head_self", "rotary": "time",
        "position": "space_resolution", "position_base": 32, "level_condition": "fps", "in_channels": 4,
        "out_channels": 8, "text_dim": 10, "text_padding": 0,
    },
    "LTX": {
        "norm": "rms", "cross_norm": "none", "rotary": "inner_causal", "rope_scale": (20, 2048, 2048),
        "rope_stride": (8, 32, 32), "rope_fps": 25, "patch": (1, 1, 1), "in_channels": 4, "out_channels": 4,
        "text_dim": 10, "text_padding": 0,
    },
    "Cosmos": {
        "frequency_dim": 24, "cross_norm": "modulated", "qk_norm": "per_head", "bias": False, "activation": "gelu",
        "modulation": "low_rank", "modulation_rank": 5, "time_scale": 1.0, "rotary": "axes_ntk", "rope_fps": 24,
        "rope_scale": (1, 3, 3), "blank_channels": 1, "in_channels": 5, "image_channels": 1, "out_channels": 4,
        "text_dim": 10, "text_embedding": "none",
    },
    "Wan I2V": WAN_IMAGE | {"image_text_dim": 12},
}  # fmt: skip
CLIPS = ((5, 32, 48), (1, 16, 16), (3, 32, 16), (5, 16, 24), (1, 48, 32))


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_gradients_are_the_sum_of_each_clips_own(name: str, vae: CausalVAE, image_folder: Path) -> None:
    """fp64, mixed shapes and tasks, every condition: one pack, or `predict` one clip at a time."""
    weights = config(**FAMILIES[name])
    model = STDiT(weights).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    encoder: ImageEncoder | None = load_image_encoder(image_folder) if weights.image_text_dim else None
    conditions = Conditions(weights, vae, 8.0, encoder)
    examples = [clip(*shape) for shape in CLIPS]
    latents = [vae.encode(one.video[None])[0].detach().double() for one in examples]
    tasks = [Task("image_to_video", 1) if len(z[0]) > 1 else Task() for z in latents]
    given = [{n: v.double() for n, v in one.items()} for one in conditions.of(examples, tasks)]
    assert given[0].keys() == set(weights.conditions)
    levels = [torch.rand(z.shape[1], generator=generator, dtype=torch.float64) for z in latents]
    texts = [torch.randn(3 + n, 10, generator=generator, dtype=torch.float64) for n in range(len(latents))]
    probes = [torch.randn(weights.out_channels, *z.shape[1:], generator=generator, dtype=z.dtype) for z in latents]

    pack = pack_clips(latents, levels, weights.patch, given)
    found = unpack_clips(model(pack, pack_texts(texts, 0)), pack, weights.patch)
    sum((one * probe).sum() for one, probe in zip(found, probes)).backward()
    packed = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    for index, z in enumerate(latents):
        alone = {n: v[None] for n, v in given[index].items()}
        out = model.predict(z[None], levels[index][None], texts[index][None], **alone)
        torch.testing.assert_close(found[index], out[0], rtol=0, atol=1e-10)
        (out[0] * probes[index]).sum().backward()
    largest = max(p.grad.abs().max() for p in model.parameters())
    worst = max(float((packed[n] - p.grad).abs().max() / largest) for n, p in model.named_parameters())
    print(f"{name}: {worst:.1e}")
    assert worst <= 1e-12
