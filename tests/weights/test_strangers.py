"""Files that people really have: what each is, is found out and said, or it is read as what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from references import FAMILIES, randomise
from references.base import captioned, sizes
from safetensors.torch import save_file
from tensor_files import load_file

import stdit
from stdit.cli.main import app, run_command
from stdit.errors import StditError
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.weights.sources import find
from stdit.weights.tensor_files import open_folder

diffusers = pytest.importorskip("diffusers")

STEM = "diffusion_pytorch_model.safetensors"
CONFIG = TransformerConfig(dim=256, heads=2, layers=2, ffn_dim=40, text_dim=6, frequency_dim=34)


def model() -> STDiT:
    torch.manual_seed(0)
    made = STDiT(CONFIG)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    stdit.save_transformer(model(), tmp_path / "model")
    return tmp_path / "model"


def rewrite(folder: Path, change) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / STEM)
    tensors = change(tensors) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / STEM)
    return tensors


def answer(found) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, 16, 2, 4, 4, generator=generator)
    text = torch.randn(1, 3, 6, generator=generator)
    with torch.no_grad():
        return found.predict(latents, torch.tensor([0.5]), text)


def said(path: Path, kind: str = "transformer", **more) -> str:
    with pytest.raises(StditError) as error:
        stdit.load_transformer(path, **more) if kind == "transformer" else stdit.load_vae(path)
    return str(error.value)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 5678901234\n"


@pytest.mark.parametrize("kind", ["transformer", "vae"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER.encode(), "is a Git LFS pointer"),
        (b"<!DOCTYPE html><html><head><title>401</title>", "is a web page, not the file"),
        (b"GGUF\x03\x00\x00\x00" + b"\0" * 64, "is a GGUF file"),
        (b"PK\x03\x04" + b"\0" * 64, "is a pickle of torch.save"),
        (b"", "is empty"),
    ],
)
def test_what_is_not_weights_under_their_name_is_said(kind, content, words, folder, tmp_path):
    vae = VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=2)
    place = folder
    if kind == "vae":
        place = tmp_path / "vae"
        stdit.save_vae(CausalVAE(vae), place)
    (place / STEM).write_bytes(content)
    assert words in (message := said(place, kind)) and str(place / STEM) in message


def test_a_pointer_in_place_of_an_index_a_config_or_a_pickle_is_said(folder, tmp_path):
    (folder / "config.json").write_text(POINTER)
    assert "config.json: is a Git LFS pointer" in said(folder)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / f"{STEM}.index.json").write_text(POINTER)
    assert "index.json: is a Git LFS pointer" in said(tmp_path / "a")
    (tmp_path / "b.pth").write_text(POINTER)
    assert "b.pth: is a Git LFS pointer" in said(tmp_path / "b.pth")


def test_half_a_download_is_said(folder, tmp_path):
    whole = (folder / STEM).read_bytes()
    (folder / STEM).write_bytes(whole[: len(whole) // 2])
    (folder / ".cache/huggingface/download").mkdir(parents=True)
    (folder / ".cache/huggingface/download/abc.incomplete").write_bytes(b"x")
    assert "cut short" in (message := said(folder)) and "abc.incomplete is a download that has not finished" in message
    (folder / STEM).write_bytes(whole)
    stdit.load_transformer(folder)
    (folder / f"{STEM}.aria2").write_bytes(b"x")
    assert "its download has not finished" in said(folder)
    (folder / f"{STEM}.aria2").unlink()
    (folder / STEM).rename(folder / f"{STEM}.crdownload")
    assert "holds no .safetensors file" in (message := said(folder)) and ".crdownload is a download" in message
    stdit.save_transformer(model(), tmp_path / "shards", shard_bytes=100_000)
    shard = sorted((tmp_path / "shards").glob("*-of-*.safetensors"))[1]
    shard.rename(f"{shard}.part")
    assert "this shard is missing" in (message := said(tmp_path / "shards")) and ".part is a download" in message


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    "names",
    [
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "transformer.blocks.0.attn1.to_q.lora_B.weight"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.weight", "lora_unet_blocks_0_self_attn_q.alpha"),
        ("diffusion_model.blocks.0.ffn.0.lokr_w1", "diffusion_model.blocks.0.ffn.0.lokr_w2_a"),
        ("blocks.0.self_attn.q.lora_A.default.weight", "blocks.0.cross_attn.q.diff"),
    ],
)
def test_an_adapter_given_as_a_model_is_called_one(names, alone, tmp_path):
    file = tmp_path / ("pytorch_lora_weights.safetensors" if alone else "style.safetensors")
    save_file({name: torch.ones(2, 2) for name in names}, file)
    for path in (tmp_path, file):
        assert "is an adapter (LoRA), not a model" in (message := said(path)) and "--lora" in message


def test_a_variant_beside_the_plain_weights_is_left_and_alone_it_is_read(folder, tmp_path):
    wanted = answer(stdit.load_transformer(folder))
    save_file({"x": torch.ones(1)}, folder / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(answer(stdit.load_transformer(folder)), wanted)
    (folder / STEM).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(answer(stdit.load_transformer(folder)), wanted)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(folder, variant="fp16")
    theirs.save_pretrained(tmp_path / "shards", variant="fp16", max_shard_size="500KB")
    assert torch.equal(answer(stdit.load_transformer(tmp_path / "shards")), wanted)


def test_two_models_in_a_folder_are_named(tmp_path):
    for name in ("wan2.2_t2v_high_noise_14B.safetensors", "wan2.2_t2v_low_noise_14B.safetensors"):
        save_file({"x": torch.ones(1)}, tmp_path / name)
    message = said(tmp_path)
    assert (
        "holds 2 files of weights" in message and "Name the one to load" in message and "high_noise_model/" in message
    )


@pytest.mark.parametrize(
    "prefix",
    ["_orig_mod.", "module.", "module._orig_mod.", "model.", "model.diffusion_model.", "net.", "transformer.", "dit."],
)
def test_prefixes_of_other_programs_and_of_torch_are_taken_off(prefix, folder):
    wanted = answer(stdit.load_transformer(folder))
    rewrite(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert torch.equal(answer(stdit.load_transformer(folder)), wanted)


def test_blocks_that_were_wrapped_one_by_one_are_read(folder):
    wanted = answer(stdit.load_transformer(folder))
    rewrite(
        folder,
        lambda t: {n.replace("blocks.0.", "blocks.0._orig_mod._checkpoint_wrapped_module."): x for n, x in t.items()},
    )
    assert torch.equal(answer(stdit.load_transformer(folder)), wanted)


# fp8.

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def is_matrix(name: str, tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith("blocks.")


@pytest.mark.parametrize("dtype", FP8)
def test_plain_fp8_is_computed_in_bf16_and_says_so(dtype, folder, capsys):
    kept = rewrite(folder, lambda t: {n: x.to(dtype) if is_matrix(n, x) else x.bfloat16() for n, x in t.items()})
    found = stdit.load_transformer(folder)
    assert "are fp8; they are computed in bf16" in capsys.readouterr().err
    weight = found.blocks[0].self_attn.q.weight
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, kept["blocks.0.attn1.to_q.weight"].bfloat16())
    assert answer(found).isfinite().all()
    assert stdit.load_transformer(folder, dtype=torch.float32).blocks[0].ffn[0].weight.dtype == torch.float32
    assert "computed in fp32" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["comfyui", "comfyui 2", "rows", "pickle"])
def test_scaled_fp8_is_stored_times_scale(form, folder, tmp_path, capsys):
    whole = load_file(folder / STEM)
    scales: dict[str, torch.Tensor] = {}

    def quantise(tensors):
        stored = {}
        for name, tensor in tensors.items():
            if not is_matrix(name, tensor):
                stored[name] = tensor
                continue
            scale = tensor.abs().amax(1, keepdim=True) if form == "rows" else tensor.abs().max()
            scales[name] = scale / 400
            stored[name] = (tensor / scales[name]).to(FP8[0])
            stem = name.removesuffix(".weight")
            stored[f"{stem}.{'scale_weight' if form in ('comfyui', 'pickle') else 'weight_scale'}"] = scales[name]
            if form == "comfyui 2":
                note = json.dumps({"format": "float8_e4m3fn"}).encode()
                stored[f"{stem}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
                stored[f"{stem}.input_scale"] = torch.ones(())
        if form in ("comfyui", "pickle"):
            stored["scaled_fp8"] = torch.zeros(2).to(FP8[0])
        return {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}

    stored = rewrite(folder, quantise)
    path = folder
    if form == "pickle":
        torch.save(stored, tmp_path / "model.pth")
        (tmp_path / "config.json").write_text((folder / "config.json").read_text())
        path = tmp_path / "model.pth"
    found = stdit.load_transformer(path, trust_pickle=True)
    assert "are fp8, with scales; they are computed in bf16" in capsys.readouterr().err
    table = find("transformer", path, trust_pickle=True).table
    loaded = dict(table.to_foreign(found.state_dict().__getitem__))
    for name, scale in scales.items():
        wanted = (stored[f"model.diffusion_model.{name}"].float() * scale).bfloat16()
        assert torch.equal(loaded[name], wanted)
        assert (loaded[name].float() - whole[name]).abs().max() <= 0.07 * whole[name].abs().max()
    if form != "pickle":
        assert run_command(app, ["weights", "convert", str(path), str(tmp_path / "out")], prog="stdit") == 0
        assert torch.equal(
            load_file(tmp_path / "out" / STEM)["blocks.1.ffn.net.2.weight"], loaded["blocks.1.ffn.net.2.weight"]
        )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"blocks.0.ffn.net.2.weight_scale_2": torch.ones(())}, "NVFP4"),
        ({"blocks.0.ffn.net.2.weight_scale_inv": torch.ones(2, 1)}, "fp8 in blocks"),
        ({"blocks.0.ffn.net.2.weight.absmax": torch.ones(2)}, "bitsandbytes"),
        ({"blocks.0.ffn.net.2.qweight": torch.ones(2, dtype=torch.int32)}, "GPTQ"),
        ({"blocks.0.ffn.net.2.weight_scale": torch.ones(3, 2)}, "with a scale of shape"),
        ({"blocks.0.ffn.net.2.comfy_quant": torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)}, "'mxfp8'"),
    ],
)
def test_other_quantisations_are_refused_by_name(extra, words, folder):
    rewrite(folder, lambda tensors: tensors | extra)
    assert words in said(folder)


def test_a_vae_in_fp8_is_computed_in_bf16(tmp_path, capsys):
    config = VaeConfig(base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=2)
    stdit.save_vae(CausalVAE(config), tmp_path)
    kept = rewrite(tmp_path, lambda tensors: {name: tensor.to(FP8[0]) for name, tensor in tensors.items()})
    vae = stdit.load_vae(tmp_path)
    assert "fp8" in capsys.readouterr().err
    assert torch.equal(vae.conv1.weight, kept["quant_conv.weight"].bfloat16())


# A file alone, and other networks.


def alone(name: str, config: dict, place: Path) -> Path:
    theirs = randomise(FAMILIES[name].build(config), 0)
    theirs.save_pretrained(place)
    (place / "config.json").unlink()
    return place / STEM


def test_a_lone_allegro_is_not_pixart(tmp_path):
    config = captioned(24, 96, (4, 4), num_layers=1)
    file = alone("Allegro", config, tmp_path)
    found = stdit.load_transformer(file)
    assert (found.config.family, found.config.heads, found.config.rope_scale) == ("allegro", 24, (2.2, 2.0, 2.0))
    with torch.no_grad():
        latents, t, text = torch.randn(1, 4, 2, 4, 6), torch.tensor([0.3]), torch.randn(1, 5, 19)
        theirs = FAMILIES["Allegro"].build(config)
        theirs.load_state_dict(load_file(file))
        wanted = FAMILIES["Allegro"].call(theirs.eval(), latents, t, text, torch.ones(1, 5, dtype=torch.bool), {})
        assert (found.predict(latents, t, text) - wanted).norm() <= 1e-5 * wanted.norm()


def test_a_lone_cosmos_tells_its_size_under_diffusers_names_too(tmp_path):
    config = sizes(2, 18, (5, 5), text_embed_dim=19, adaln_lora_dim=10, max_size=(7, 24, 30))
    randomise(FAMILIES["Cosmos-Predict"].build(config), 0).save_pretrained(tmp_path / "whole")
    found = stdit.load_transformer(alone("Cosmos-Predict", config, tmp_path / "alone"))
    assert found.config == stdit.load_transformer(tmp_path / "whole").config


@pytest.mark.parametrize(
    ("name", "heads", "config"),
    [
        ("Allegro", 4, captioned(4, 12, (4, 4))),
        ("PixArt", 16, captioned(16, 6, (4, 8), use_additional_conditions=False, sample_size=64)),
        ("LTX-Video", 2, captioned(2, 14, (4, 4))),
        ("Wan", 3, FAMILIES["Wan"].configs[0]),
    ],
)
def test_heads_that_no_shape_tells_are_asked_for(name, heads, config, tmp_path):
    file = alone(name, config, tmp_path / "alone")
    message = said(file)
    assert "do not tell the number of heads" in message and "--heads N" in message and "heads=N" in message
    assert stdit.load_transformer(file, heads=heads).config.heads == heads
    assert "5 heads do not divide" in said(file, heads=5)
    assert run_command(app, ["weights", "convert", str(file), str(tmp_path / "out")], prog="stdit") == 1
    command = ["weights", "convert", str(file), str(tmp_path / "out"), "--heads", str(heads)]
    assert run_command(app, command, prog="stdit") == 0
    assert stdit.load_transformer(tmp_path / "out").config.heads == heads
    assert f"says {heads} heads, not 1" in said(tmp_path / "out", heads=1)


@pytest.mark.parametrize(
    ("name", "word"),
    [("HunyuanVideoTransformer3DModel", "HunyuanVideo: its text and video attend jointly"),
     ("MochiTransformer3DModel", "Mochi: its text"), ("LTX2VideoTransformer3DModel", "LTX-2"),
     ("ChronoEditTransformer3DModel", "its last frame stands"), ("WanVACETransformer3DModel", "control branches"),
     ("FancyTransformer", "It loads Wan transformer")],
)  # fmt: skip
def test_a_class_that_does_not_load_is_named_with_what_does(name, word, folder):
    config = json.loads((folder / "config.json").read_text()) | {"_class_name": name}
    (folder / "config.json").write_text(json.dumps(config))
    message = said(folder)
    assert f"'{name}' is not a model that stdit loads" in message and word in message and "LTX-Video" in message


@pytest.mark.parametrize(
    ("tensor", "word"),
    [("double_blocks.0.img_attn.qkv.weight", "HunyuanVideo or Flux"), ("joint_blocks.0.x.weight", "Stable Diffusion 3"),
     ("transformer_blocks.0.audio_attn1.to_q.weight", "LTX-2"), ("audio_patchify_proj.weight", "LTX-2"),
     ("transformer_blocks.0.attn.add_q_proj.weight", "joint-attention"), ("t5_yproj.weight", "Mochi"),
     ("patch_embed.text_proj.weight", "CogVideoX"), ("input_blocks.0.0.weight", "U-Net")],
)  # fmt: skip
def test_lone_tensors_of_other_networks_are_named(tensor, word, tmp_path):
    save_file({f"model.diffusion_model.{tensor}": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    assert word in said(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("tensor", "word"),
    [("fps_embedding.weight", "SkyReels"), ("audio_proj.proj1.weight", "HuMo"), ("ref_conv.weight", "Fun-Control"),
     ("vace_blocks.0.proj_out.weight", "VACE"), ("face_adapter.x.weight", "Animate"),
     ("frame_packer.proj.weight", "S2V"),
     ("blocks.0.cam_encoder.weight", "ReCamMaster"), ("dwpose_embedding.0.weight", "UniAnimate")],
)  # fmt: skip
def test_wans_relatives_with_branches_of_their_own_are_named(tensor, word, tmp_path):
    stdit.save_transformer(model(), tmp_path, "original")
    rewrite(tmp_path, lambda tensors: tensors | {tensor: torch.ones(2, 2)})
    assert word in said(tmp_path)
    (tmp_path / "config.json").unlink()
    assert word in said(tmp_path / STEM)


def test_wans_relatives_with_its_tensors_are_told_by_their_channels_or_names(tmp_path):
    control = STDiT(TransformerConfig(256, 2, 1, 40, in_channels=48, text_dim=6))
    io_table = dict(control.state_dict())
    io_table["patch_embedding.weight"] = io_table["patch_embedding.weight"].view(256, 48, 1, 2, 2)
    save_file(io_table, tmp_path / "fun-control.safetensors")
    assert "a control variant of Wan" in said(tmp_path / "fun-control.safetensors")
    stdit.save_transformer(model(), tmp_path / "wan", "original")
    chrono = tmp_path / "chronoedit_14B_bf16.safetensors"
    save_file(load_file(tmp_path / "wan" / STEM), chrono)
    assert "ChronoEdit" in said(chrono)


@pytest.mark.parametrize(("change", "loads"), [({}, True), ({"inject_sample_info": True}, False)])
def test_skyreels_is_read_where_it_is_wans_network(change, loads, tmp_path):
    config = {**FAMILIES["Wan"].configs[3], "image_dim": None, "pos_embed_seq_len": None, **change}
    theirs = randomise(diffusers.SkyReelsV2Transformer3DModel(**config), 0)
    theirs.save_pretrained(tmp_path)
    if not loads:
        assert "SkyReels-V2" in said(tmp_path)
        return
    latents, t, text = torch.randn(1, 3, 2, 3, 5), torch.tensor([0.4]), torch.randn(1, 6, 8)
    with torch.no_grad():
        wanted = theirs(latents, t * 1000, text, return_dict=False)[0]
        found = stdit.load_transformer(tmp_path).predict(latents, t, text)
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_open_folder_names_a_folder_without_weights(tmp_path):
    with pytest.raises(StditError, match=r"holds no \.safetensors file"):
        open_folder(tmp_path)
