"""VAEs through load_vae and save_vae: where they are found, and that nothing changes on the way."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from tensor_files import load_file

import stdit
from stdit.errors import StditError
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.weights.identity import folder_identity

CONFIG = VaeConfig(
    base_dim=6,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temporal_downsample=(True,),
    z_dim=3,
    latents_mean=(0.5, -1.0, 2.0),
    latents_std=(1.0, 2.0, 0.25),
)


@pytest.fixture
def vae() -> CausalVAE:
    torch.manual_seed(0)
    return CausalVAE(CONFIG)


def same(one: CausalVAE, other: CausalVAE) -> bool:
    states = one.state_dict(), other.state_dict()
    return one.config == other.config and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_round_trips_are_bit_for_bit(vae, tmp_path, layout):
    stdit.save_vae(vae, tmp_path, layout)
    assert same(stdit.load_vae(tmp_path), vae)
    file = next(tmp_path.glob("*.safetensors"))
    shutil.copy(file, tmp_path.parent / "alone.safetensors")  # the config travels in the file
    assert same(stdit.load_vae(tmp_path.parent / "alone.safetensors"), vae)
    (tmp_path.parent / "alone.safetensors").unlink()


def test_both_kinds_in_one_original_folder_are_told_apart(vae, tmp_path):
    from stdit.models.transformer import STDiT, TransformerConfig

    model = STDiT(TransformerConfig(dim=12, heads=2, layers=1, ffn_dim=8, text_dim=4))
    stdit.save_transformer(model, tmp_path, "original")
    stdit.save_vae(vae, tmp_path, "original")
    assert same(stdit.load_vae(tmp_path), vae)
    assert stdit.load_transformer(tmp_path).config == model.config


def test_a_model_folder_is_searched_for_its_vae(vae, tmp_path):
    stdit.save_vae(vae, tmp_path / "vae")
    assert same(stdit.load_vae(tmp_path), vae)
    with pytest.raises(StditError, match="holds no"):
        stdit.load_transformer(tmp_path)
    with pytest.raises(StditError, match="AutoencoderKLWan"):
        stdit.load_transformer(tmp_path / "vae")


def test_what_is_saved_opens_in_diffusers_with_nothing_missing_or_unexpected(vae, tmp_path, caplog):
    diffusers = pytest.importorskip("diffusers")
    stdit.save_vae(vae, tmp_path)
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        theirs, report = diffusers.AutoencoderKLWan.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and not caplog.records
    theirs.save_pretrained(tmp_path / "theirs")
    assert same(stdit.load_vae(tmp_path / "theirs"), vae)


def test_a_release_pickle_is_refused_unless_trusted(vae, tmp_path):
    torch.save(vae.state_dict(), tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(StditError, match=r"Wan2\.1_VAE\.pth: is a pickle"):
        stdit.load_vae(tmp_path)
    found = stdit.load_vae(tmp_path, trust_pickle=True)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in vae.state_dict().items())


def test_dtype_and_damage(vae, tmp_path):
    stdit.save_vae(vae, tmp_path)
    assert {p.dtype for p in stdit.load_vae(tmp_path, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(StditError, match="cut short"):
        stdit.load_vae(tmp_path)


def test_the_identity_of_a_saved_vae_does_not_depend_on_when_or_where(vae, tmp_path):
    def save(name: str) -> Path:
        stdit.save_vae(vae, tmp_path / name)
        return tmp_path / name

    assert folder_identity(save("one")) == folder_identity(save("two"))
    assert load_file(tmp_path / "one" / "diffusion_pytorch_model.safetensors")
