"""Saving: nothing stale is left, nothing is half there, whenever a save ends."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

import stdit
from stdit.errors import StditError
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.weights import io
from stdit.weights.families import pixart
from stdit.weights.sources import find


def random_model() -> STDiT:
    torch.manual_seed(0)
    return STDiT(TransformerConfig(dim=42, heads=3, layers=3, ffn_dim=71, text_dim=19, frequency_dim=34))


def test_saving_again_leaves_no_stale_shards_and_no_other_files_touched(tmp_path):
    model = random_model()
    (tmp_path / "notes.txt").write_text("mine")
    stdit.save_transformer(model, tmp_path, shard_bytes=20_000)
    stdit.save_transformer(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "diffusion_pytorch_model.safetensors", "notes.txt"]
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == (tmp_path / "notes.txt").stat().st_mode & 0o777


def test_a_save_that_fails_leaves_the_earlier_one_whole(tmp_path, monkeypatch):
    model = random_model()
    stdit.save_transformer(model, tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(path, *_):
        Path(path).write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "write_tensors", full_disk)
    with pytest.raises(StditError, match="no space left on the disk"):
        stdit.save_transformer(model, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("before", [10**9, 20_000])
@pytest.mark.parametrize("after", [10**9, 20_000])
def test_killed_among_the_renames_is_never_a_mixture(tmp_path, monkeypatch, before, after):
    old = random_model()
    new = random_model()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    replace, loaded = os.replace, []
    for renames in range(50):
        place = tmp_path / str(renames)
        stdit.save_transformer(old, place, shard_bytes=before)
        left = [renames]

        def until_killed(source, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", until_killed)
            with contextlib.suppress(KeyboardInterrupt):
                stdit.save_transformer(new, place, shard_bytes=after)
        try:
            found = stdit.load_transformer(place)
        except StditError:
            continue
        whole = [all(map(torch.equal, found.parameters(), model.parameters())) for model in (old, new)]
        assert any(whole), renames
        loaded.append(whole[1])
        if left[0] >= 0:
            break
    assert loaded[-1] and left[0] == 0  # all renames were made, and no fewer


def test_saving_the_same_weights_gives_the_same_bytes(tmp_path):
    model = random_model()
    for name in ("one", "two"):
        stdit.save_transformer(model, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_an_unknown_layout_is_named(tmp_path):
    with pytest.raises(StditError, match="layout 'comfy' does not exist"):
        stdit.save_transformer(random_model(), tmp_path, "comfy")


def test_a_second_load_is_of_the_file_and_not_of_what_became_of_the_first(tmp_path):
    stdit.save_transformer(random_model(), tmp_path)
    source = find("transformer", tmp_path)
    first, stored = io.load(source), io.load(source).state_dict()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter += 1  # in a private memory map of the file
    again = io.load(source).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in stored.items())


def test_fused_weights_of_mixed_dtypes_are_saved_in_the_wider_one(tmp_path):
    """PixArt's original has q, k and v in one tensor."""
    sizes = dict(dim=24, heads=2, layers=2, ffn_dim=96, text_dim=8, in_channels=4, out_channels=4, position_base=8)
    model = STDiT(TransformerConfig(**sizes, **pixart.FAMILY.settings)).bfloat16()
    model.blocks[0].self_attn.q.float()
    stdit.save_transformer(model, tmp_path, "original")
    found = stdit.load_transformer(tmp_path).state_dict()
    assert found["blocks.0.self_attn.v.weight"].dtype == torch.float32
    assert found["blocks.1.self_attn.v.weight"].dtype == torch.bfloat16
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in model.state_dict().items())
