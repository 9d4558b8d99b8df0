"""`stdit weights inspect` and `convert`."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensor_files import load_file

import stdit
from stdit import locks
from stdit.cli.main import app, run_command
from stdit.models.transformer import PRESETS, STDiT, TransformerConfig, count_parameters
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.weights.families.wan import FAMILY
from stdit.weights.lora.adapters import Adapter, Pair
from stdit.weights.lora.write import write_adapter

TRANSFORMER = TransformerConfig(dim=12, heads=2, layers=2, ffn_dim=8, text_dim=4)
VAE = VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=2)


@pytest.fixture
def folder(tmp_path) -> Path:
    stdit.save_transformer(STDiT(TRANSFORMER), tmp_path / "model" / "transformer")
    stdit.save_vae(CausalVAE(VAE), tmp_path / "model" / "vae")
    (tmp_path / "model" / "model_index.json").write_text("{}")
    return tmp_path / "model"


def run(*args: object) -> int:
    return run_command(app, ["weights", *map(str, args)], prog="stdit")


def test_inspect_tells_both_models_of_a_folder(folder, capsys):
    assert run("inspect", folder, "--json") == 0
    transformer, vae = json.loads(capsys.readouterr().out)["models"]
    assert (transformer["kind"], vae["kind"]) == ("transformer", "vae")
    assert transformer["dialect"] == "diffusers" and transformer["dtypes"] == {"float32": transformer["tensors"]}
    assert transformer["parameters"] == count_parameters(TRANSFORMER)
    assert vae["parameters"] == sum(p.numel() for p in CausalVAE(VAE).parameters())
    assert not (transformer["missing"] or vae["unexpected"] or vae["misshaped"])
    assert run("inspect", folder / "vae") == 0 and "Wan causal video VAE" in capsys.readouterr().out


def test_inspect_tells_what_is_wrong_and_fails(folder, capsys):
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["stray"] = tensors.pop("proj_out.bias")
    save_file(tensors, file)
    assert run("inspect", folder, "--json") == 1
    found = json.loads(capsys.readouterr().out)["models"][0]
    assert found["missing"] == ["proj_out.bias"] and found["unexpected"] == ["stray"]
    assert run("inspect", folder) == 1 and "stray" in capsys.readouterr().out


def test_inspect_names_presets_without_their_weights(tmp_path, capsys):
    stdit.save_transformer(STDiT(PRESETS["toy"]), tmp_path)
    assert run("inspect", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)["models"][0]
    assert (found["preset"], found["dialect"]) == ("toy", "diffusers")


def test_convert_there_and_back_is_bit_for_bit(folder, tmp_path, capsys):
    assert run("convert", folder, tmp_path / "original", "--layout", "original") == 0
    assert (tmp_path / "original" / "Wan2.1_VAE.safetensors").is_file()
    assert run("convert", tmp_path / "original", tmp_path / "back") == 0
    for part in ("transformer", "vae"):
        name = "diffusion_pytorch_model.safetensors"
        assert (tmp_path / "back" / part / name).read_bytes() == (folder / part / name).read_bytes()
    assert run("convert", folder / "transformer", tmp_path / "alone") == 0
    assert stdit.load_transformer(tmp_path / "alone").config == TRANSFORMER


def test_two_experts_are_told_and_converted_each_into_its_folder(tmp_path, capsys):
    for name, seed in (("transformer", 0), ("transformer_2", 1)):
        torch.manual_seed(seed)
        stdit.save_transformer(STDiT(TRANSFORMER), tmp_path / "A14B" / name)
    assert run("inspect", tmp_path / "A14B", "--json") == 0
    assert [one["part"] for one in json.loads(capsys.readouterr().out)["models"]] == ["high", "low"]
    assert run("convert", tmp_path / "A14B", tmp_path / "original", "--layout", "original") == 0
    assert run("convert", tmp_path / "original", tmp_path / "back") == 0
    for part in ("transformer", "transformer_2"):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "A14B" / name).read_bytes()


def test_comfyui_gets_one_file_with_its_prefix(folder, tmp_path, capsys):
    assert run("convert", folder / "transformer", tmp_path / "comfyui", "--layout", "comfyui") == 1
    assert "layout 'comfyui' cannot hold" in capsys.readouterr().err and not (tmp_path / "comfyui").exists()
    stdit.save_transformer(STDiT(TransformerConfig(256, 2, 1, 64)), folder / "transformer")
    assert run("convert", folder / "transformer", tmp_path / "comfyui", "--layout", "comfyui") == 0
    assert [entry.name for entry in (tmp_path / "comfyui").iterdir()] == ["wan.safetensors"]
    assert all(key.startswith("model.diffusion_model.") for key in load_file(tmp_path / "comfyui" / "wan.safetensors"))
    assert run("convert", tmp_path / "comfyui" / "wan.safetensors", tmp_path / "back") == 0
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "back" / name).read_bytes() == (folder / "transformer" / name).read_bytes()


def test_convert_copies_the_other_parts_and_changes_dtype(folder, tmp_path):
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "UniPCMultistepScheduler", "flow_shift": 3.0}'
    )
    for dtype in ("bf16", "fp32"):
        assert run("convert", folder, tmp_path / dtype, "--dtype", dtype) == 0
        assert (tmp_path / dtype / "model_index.json").is_file()
        assert (
            (tmp_path / dtype / "scheduler" / "scheduler_config.json").read_text().startswith('{"_class_name": "UniPC')
        )
    name = "transformer/diffusion_pytorch_model.safetensors"
    before, half = load_file(folder / name), load_file(tmp_path / "bf16" / name)
    assert all(torch.equal(half[key], tensor.bfloat16()) for key, tensor in before.items())
    assert (tmp_path / "fp32" / name).read_bytes() == (folder / name).read_bytes()


def test_inspect_tells_the_release_and_what_lies_beside(tmp_path, capsys):
    """Of a header alone: the tensors of 14 billion parameters are a hole in a file."""
    config = PRESETS["14B"]
    place = tmp_path / "transformer"
    place.mkdir()
    (place / "config.json").write_text(json.dumps(FAMILY.written(config, "diffusers")))
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in STDiT(config).state_dict().items()}
    header, stop = {}, 0
    for name, shape in FAMILY.keymap(config, "diffusers").table(shapes).foreign_shapes.items():
        start, stop = stop, stop + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header).encode()
    file = place / "diffusion_pytorch_model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + stop)
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        '{"_class_name": "UniPCMultistepScheduler", "flow_shift": 5.0}'
    )
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text('{"architectures": ["UMT5EncoderModel"]}')
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": NaN, "architectures": 3}')
    assert run("inspect", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"][0]["release"].startswith("Wan 2.1 T2V 14B") and found["models"][0]["parameters"] > 14e9
    assert found["models"][0]["objective"] == "rectified flow (velocity)"
    assert found["parts"] == {
        "text_encoder": "UMT5EncoderModel", "tokenizer": "unnamed", "scheduler": "UniPCMultistepScheduler, shift 5.0"
    }  # fmt: skip
    assert run("inspect", tmp_path) == 0
    assert "trained for" in (output := capsys.readouterr().out) and "UMT5EncoderModel" in output


def test_a_vae_that_diffusers_runs_is_told_beside_the_transformer(folder, capsys):
    diffusers = pytest.importorskip("diffusers")
    shutil.rmtree(folder / "vae")
    sizes = {"block_out_channels": (4,), "norm_num_groups": 2}
    diffusers.AutoencoderKL(**sizes, latent_channels=4).save_pretrained(folder / "vae")
    assert run("inspect", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["part"] for one in found["models"]] == ["transformer"] and found["parts"] == {"vae": "AutoencoderKL"}


def test_mistakes_are_messages(folder, tmp_path, capsys):
    cases = [
        (("inspect", tmp_path / "absent"), "no such file or folder"),
        (("convert", folder, tmp_path / "x", "--layout", "comfy"), "layout 'comfy' does not exist"),
        (("convert", folder, tmp_path / "x", "--dtype", "int4"), "dtype 'int4' does not exist"),
        (("convert", folder / "vae", folder / "vae", "--layout", "original"), "Write to another folder"),
        (("inspect", tmp_path / "other.safetensors"), "holds no model of a known family: Wan transformer, "),
        (("inspect", tmp_path / "old.pth"), "is a pickle"),
    ]
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    torch.save({}, tmp_path / "old.pth")
    for args, message in cases:
        assert run(*args) == 1
        assert message in capsys.readouterr().err


def test_a_pickled_vae_beside_a_transformer_is_left_out_aloud(tmp_path, capsys):
    stdit.save_transformer(STDiT(TRANSFORMER), tmp_path, "original")
    torch.save(CausalVAE(VAE).state_dict(), tmp_path / "Wan2.1_VAE.pth")
    assert run("inspect", tmp_path, "--json") == 0
    output = capsys.readouterr()
    assert len(json.loads(output.out)["models"]) == 1 and "left out" in output.err and "pickle" in output.err
    assert run("inspect", tmp_path, "--json", "--trust-pickle") == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2


def test_adapters_are_told_and_converted_for_their_model(folder, tmp_path, capsys):
    pair = Pair(torch.ones(2, 12), torch.ones(8, 2), 3.0)
    write_adapter(Adapter({"blocks.1.ffn.0.weight": pair}), tmp_path / "a.safetensors", TRANSFORMER, "kohya")
    assert run("inspect", tmp_path / "a.safetensors", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert found["ranks"] == {"2": 1} and found["alphas"] == {"3.0": 1} and found["targets"] == {"blocks_*_ffn_0": 1}
    assert found["fits"] == ["Wan transformer (original names)"]
    assert run("inspect", tmp_path / "a.safetensors", "--model", folder) == 0
    assert "Wan transformer" in capsys.readouterr().out
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "out") == 1
    assert "give its model by --model" in capsys.readouterr().err
    assert run("convert", tmp_path / "a.safetensors", tmp_path / "out", "--model", folder) == 0
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert list(tensors) == [f"diffusion_model.blocks.1.ffn.0.lora_{part}.weight" for part in "AB"]
    assert torch.equal(tensors["diffusion_model.blocks.1.ffn.0.lora_B.weight"], pair.up * 1.5)
    adapter = tmp_path / "a.safetensors", tmp_path / "out", "--model", folder
    assert run("convert", *adapter, "--layout", "diffusers") == 0
    tensors = load_file(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert list(tensors) == [f"transformer.blocks.1.ffn.net.0.proj.lora_{part}.weight" for part in "AB"]
    assert torch.equal(tensors["transformer.blocks.1.ffn.net.0.proj.lora_B.weight"], pair.up)
    large = TransformerConfig(dim=16, heads=2, layers=2, ffn_dim=8, text_dim=4)
    stdit.save_transformer(STDiT(large), tmp_path / "large")
    assert run("inspect", tmp_path / "a.safetensors", "--model", tmp_path / "large") == 1
    assert "Is it for a model of another size?" in capsys.readouterr().err


@pytest.fixture
def snapshot(folder) -> Path:
    """A model folder as a hub's cache has it: links to blobs, which are read-only."""
    blobs, place = folder.parent / "blobs", folder.parent / "snapshot"
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text("{}")
    blobs.mkdir()
    for number, file in enumerate(sorted(file for file in folder.rglob("*") if file.is_file())):
        shutil.move(file, blobs / f"{number}")
        (blobs / f"{number}").chmod(0o444)
        link = place / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blobs / f"{number}", link.parent))
    return place


def test_linked_files_become_ones_own_twice_over(snapshot, tmp_path):
    out = tmp_path / "out"
    (out / ".text_encoder.part").mkdir(parents=True)  # what a call that failed left, read-only
    (out / ".text_encoder.part" / "config.json").write_text("")
    (out / ".text_encoder.part").chmod(0o555)
    for _ in range(2):
        assert run("convert", snapshot, out) == 0
        assert sorted(os.listdir(out)) == ["model_index.json", "text_encoder", "transformer", "vae"]
        assert all(not file.is_symlink() and file.stat().st_mode & 0o200 for file in out.rglob("*"))


@pytest.mark.parametrize("name", ["text_encoder/config.json", "text_encoder", "generation.json"])
def test_a_dangling_link_is_named_before_anything_is_written(snapshot, tmp_path, capsys, name):
    if (snapshot / name).is_dir():
        shutil.rmtree(snapshot / name)
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).symlink_to("blobs/none")
    assert run("convert", snapshot, tmp_path / "out") == 1
    assert f"error: {snapshot / name}: is a link to blobs/none, which is not there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_in_and_out_are_apart(folder, tmp_path, capsys, monkeypatch):
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for out in (folder, folder / "new", tmp_path, folder / "vae", "..", ".", "../link/er", "../model/../model"):
        assert run("convert", folder, out) == 1
        assert "which is read. Write to another folder" in capsys.readouterr().err
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    assert run("convert", weights, folder / "vae") == 1
    assert run("convert", weights, folder / "vae" / "original", "--layout", "original") == 0  # beside a lone file
    shutil.rmtree(folder / "vae" / "original")
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_strangers_files_stay(snapshot, tmp_path, capsys):
    mine = tmp_path / "out" / "text_encoder" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert run("convert", snapshot, tmp_path / "out") == 1
    assert f"error: {mine}: would be lost" in capsys.readouterr().err
    assert mine.read_text() == "mine" and os.listdir(tmp_path / "out") == ["text_encoder"]


def test_two_conversions_to_one_folder_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.0)
    with locks.locked(tmp_path / "out", "stdit weights convert", ""):
        assert run("convert", folder, tmp_path / "out") == 1
    assert "out: is in use by stdit weights convert (process" in capsys.readouterr().err
    assert os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize("out", ["out", "new/deep/out"])
def test_what_fails_leaves_no_empty_folder(out, folder, tmp_path, capsys):
    """A layout that cannot hold the second part, a tensor that is not finite, an adapter that is refused."""
    before = sorted(tmp_path.rglob("*"))
    stdit.save_transformer(STDiT(TransformerConfig(256, 2, 1, 64)), folder / "transformer")
    assert run("convert", folder, tmp_path / out, "--layout", "comfyui") == 1  # the transformer alone would do
    assert "layout 'comfyui' cannot hold" in capsys.readouterr().err
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["proj_out.bias"][0] = float("nan")
    save_file(tensors, weights)
    assert run("convert", folder, tmp_path / out) == 1
    assert "proj_out.bias holds NaN" in capsys.readouterr().err
    save_file({"blocks.0.attn1.to_q.lora_A.weight": torch.ones(2, 256)}, folder / "half.safetensors")
    assert run("convert", folder / "half.safetensors", tmp_path / out, "--model", folder) == 1
    (folder / "half.safetensors").unlink()
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / out).mkdir(parents=True)
    assert run("convert", folder, tmp_path / out) == 1
    assert os.listdir(tmp_path / out) == []  # the user's own stays
