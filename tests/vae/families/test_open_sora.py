"""Open-Sora 1.2's autoencoder against its own code, whose latents and frames are kept in tests/weights/goldens."""

from __future__ import annotations

import json

import pytest
import torch
from golden_tools import relative, shapes_of
from open_sora_golden import CLIPS, VAES, clip, kept, vae_folder
from safetensors.torch import save_file
from tensor_files import load_file

import stdit
from stdit.errors import StditError
from stdit.vae.families.open_sora import OpenSoraConfig, OpenSoraVAE
from stdit.weights import io
from stdit.weights.families import on_meta, open_sora_vae
from stdit.weights.families import shapes_of as our_shapes

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def vaes(tmp_path_factory: pytest.TempPathFactory) -> list[OpenSoraVAE]:
    place = tmp_path_factory.mktemp("vaes")
    return [stdit.load_vae(vae_folder(place / str(number), number)).eval() for number in range(len(VAES))]


@pytest.mark.parametrize("number", range(len(CLIPS)))
@torch.no_grad()
def test_latents_and_frames_are_the_originals(number, vaes):
    which, shape = CLIPS[number]
    vae, wanted = vaes[which], torch.from_numpy(kept()[f"clip.{number}.latents"])
    latents = vae.encode(clip(number))
    wanted_video = kept()[f"clip.{number}.video"]
    assert latents.shape == wanted.shape and relative(latents, wanted) <= 1e-5
    video = vae.decode(wanted, clamp=False)
    assert video.shape == wanted_video.shape and relative(video, wanted_video) <= 1e-5
    print(f"{shape}: latents {relative(latents, wanted):.1e}, frames {relative(video, wanted_video):.1e}")
    streamed = list(vae.decode_stream(wanted[0], clamp=False))
    assert len(streamed) == -(-shape[0] // vae.config.group)
    assert torch.equal(torch.cat(streamed, dim=1), video[0])
    assert vae.decode(wanted).abs().max() <= 1


def test_draws_are_the_generators(vaes):
    video = clip(1)
    first, again, other = (vaes[0].encode(video, True, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_the_release_lacks_no_tensor_and_has_none_too_many():
    shapes = shapes_of(kept()["vae.released"])
    config = open_sora_vae.FAMILY.config_from({"micro_frame_size": None, "cal_loss": True}, shapes)
    assert config == OpenSoraConfig() and config.stride == (4, 8, 8) and config.stride.group == 17
    ours = on_meta(config)
    assert not open_sora_vae.FAMILY.keymap(config, "original").table(our_shapes(ours)).differences(shapes)
    assert sum(parameter.numel() for parameter in ours.parameters()) == int(kept()["vae.parameters"])


def test_a_folder_goes_there_and_back_bit_for_bit(tmp_path):
    first = vae_folder(tmp_path / "theirs", 1)
    vae = stdit.load_vae(first)
    assert io.vae_on_meta(first).config == vae.config
    for layout in ("diffusers", "original"):
        stdit.save_vae(vae, tmp_path / layout, layout)
        again = stdit.load_vae(tmp_path / layout)
        assert again.config == vae.config
        found = load_file(tmp_path / layout / "diffusion_pytorch_model.safetensors")
        wanted = load_file(first / "model.safetensors")
        assert found.keys() == wanted.keys() and all(torch.equal(found[key], t) for key, t in wanted.items())


def test_what_does_not_fit_is_named(tmp_path, vaes):
    with pytest.raises(StditError, match="nearest are 18 and 22"):
        vaes[0].encode(torch.zeros(1, 3, 19, 8, 8))
    with pytest.raises(StditError, match="uint8"):
        vaes[0].encode(torch.zeros(1, 3, 1, 16, 16, dtype=torch.uint8))
    with pytest.raises(StditError, match=r"decodes \(B, 4"):
        vaes[0].decode(torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(StditError, match="memory 1000: VideoAutoencoderPipeline keeps to no budget"):
        vaes[0].memory = 1000  # else it would be passed over in silence
    place = vae_folder(tmp_path / "vae", 1)
    tensors = load_file(place / "model.safetensors")
    name = "temporal_vae.decoder.conv_blocks.0.conv.weight"
    for changed in ({name: torch.zeros(1)}, {"temporal_vae.more": torch.zeros(1)}):
        save_file(tensors | changed, place / "model.safetensors")
        with pytest.raises(StditError, match=next(iter(changed)).replace(".", r"\.")):
            stdit.load_vae(place)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, place / "model.safetensors")
    with pytest.raises(StditError, match=name.replace(".", r"\.")):
        stdit.load_vae(place)
    save_file(tensors, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"_stdit": {"format": 1, "group": 8}}))
    with pytest.raises(StditError, match=r"groups of 8 frames are not 1\+2k"):
        stdit.load_vae(place)
