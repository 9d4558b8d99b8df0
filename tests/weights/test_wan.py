"""Wan transformers from and to diffusers and the original layout, with diffusers as the oracle."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensor_files import load_file

import stdit
from stdit.errors import StditError
from stdit.models.transformer import PRESETS, STDiT, TransformerConfig, count_parameters
from stdit.weights import io
from stdit.weights.families.wan import FAMILY
from stdit.weights.sources import find

diffusers = pytest.importorskip("diffusers")

TINY = {  # odd on purpose: widths that are no power of two, other channels out than in, a patch in time
    "patch_size": (2, 1, 3),
    "num_attention_heads": 3,
    "attention_head_dim": 14,
    "in_channels": 5,
    "out_channels": 7,
    "text_dim": 19,
    "freq_dim": 34,
    "ffn_dim": 71,
    "num_layers": 3,
}


def stranger(seed: int = 0, **changes) -> torch.nn.Module:
    """A WanTransformer3DModel with every weight, bias, norm and table random."""
    generator = torch.Generator().manual_seed(seed)
    model = diffusers.WanTransformer3DModel(**{**TINY, **changes}).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + ("norm" in name))
    return model


def inputs(seed: int = 1, text: int = 11) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 5, 6, 4, 9, generator=generator)
    return latents, torch.tensor([0.25, 0.875]), torch.randn(2, text, 19, generator=generator)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("stranger") / "transformer"
    stranger().save_pretrained(place)
    return place


def original_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """diffusers' own converter, run backwards by name: what a Wan release would hold."""
    model = stdit.load_transformer(folder)
    table = FAMILY.keymap(model.config, "original").table({n: tuple(t.shape) for n, t in model.state_dict().items()})
    return dict(table.to_foreign(model.state_dict().__getitem__))


def test_a_strangers_transformer_agrees_in_outputs_and_gradients(folder):
    theirs, ours = stranger(), stdit.load_transformer(folder.parent)
    latents, t, text = inputs()
    wanted, found = theirs(latents, t * 1000, text, return_dict=False)[0], ours.predict(latents, t, text)
    assert relative(found, wanted) <= 1e-5
    # Their sinusoids are in fp32, off by 6e-8 of the angle; at t near 1 that is 1e-5 of a gradient (measured against
    # ours in fp64, which ours in fp32 meets to 2e-6). At small t the comparison is of everything else.
    t = torch.tensor([0.01, 0.05])
    wanted, found = theirs(latents, t * 1000, text, return_dict=False)[0], ours.predict(latents, t, text)
    probe = torch.randn(wanted.shape)
    (wanted * probe).sum().backward()
    (found * probe).sum().backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    table = find("transformer", folder).table
    for name, gradient in dict(table.to_foreign(gradients.__getitem__)).items():
        assert relative(gradient, theirs.get_parameter(name).grad) <= 1e-5, name


@pytest.mark.parametrize(
    "changes", [{"cross_attn_norm": False}, {"rope_max_seq_len": 64, "eps": 1e-4, "num_layers": 1}]
)
def test_other_settings_agree_too(tmp_path, changes):
    theirs = stranger(**changes)
    theirs.save_pretrained(tmp_path)
    latents, t, text = inputs()
    with torch.no_grad():
        wanted = theirs(latents, t * 1000, text, return_dict=False)[0]
        assert relative(stdit.load_transformer(tmp_path).predict(latents, t, text), wanted) <= 1e-5


def test_what_is_saved_opens_in_diffusers_with_nothing_missing_or_unexpected(folder, tmp_path, caplog):
    ours = stdit.load_transformer(folder)
    stdit.save_transformer(ours, tmp_path)
    diffusers.utils.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        theirs, report = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and not caplog.records
    assert all(torch.equal(tensor, stranger().state_dict()[name]) for name, tensor in theirs.state_dict().items())
    latents, t, text = inputs()
    with torch.no_grad():
        wanted = theirs(latents, t * 1000, text, return_dict=False)[0]
        assert relative(ours.predict(latents, t, text), wanted) <= 1e-5


@pytest.mark.parametrize("layout", ["diffusers", "original"])
@pytest.mark.parametrize("shard_bytes", [io.SHARD_BYTES, 20_000])
def test_round_trips_are_bit_for_bit(folder, tmp_path, layout, shard_bytes):
    ours = stdit.load_transformer(folder)
    stdit.save_transformer(ours, tmp_path, layout, shard_bytes)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 3) == (shard_bytes == 20_000)
    back = stdit.load_transformer(tmp_path)
    assert back.config == ours.config
    assert back.state_dict().keys() == ours.state_dict().keys()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    stdit.save_transformer(back, tmp_path / "again", "diffusers")
    again, first = (
        load_file(next((tmp_path / "again").glob("*.safetensors"))),
        load_file(next(folder.glob("*.safetensors"))),
    )
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)


def test_shards_that_we_write_open_in_diffusers(folder, tmp_path):
    stdit.save_transformer(stdit.load_transformer(folder), tmp_path, shard_bytes=20_000)
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, stranger().state_dict()[name]) for name, tensor in theirs.state_dict().items())


def test_shards_that_diffusers_writes_open_here(tmp_path):
    stranger().save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    latents, t, text = inputs()
    with torch.no_grad():
        wanted = stranger()(latents, t * 1000, text, return_dict=False)[0]
        assert relative(stdit.load_transformer(tmp_path).predict(latents, t, text), wanted) <= 1e-5


def test_the_original_layout_is_what_diffusers_own_converter_reads(folder):
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    converted = convert_wan_transformer_to_diffusers(original_tensors(folder))
    wanted = stranger().state_dict()
    assert converted.keys() == wanted.keys() and all(torch.equal(converted[name], wanted[name]) for name in wanted)


def test_an_original_release_folder_loads_beside_its_vae_and_text_encoder(folder, tmp_path):
    save_file(original_tensors(folder), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"x")
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").write_bytes(b"x")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v", "dim": 42, "eps": 1e-06,
                "ffn_dim": 71, "freq_dim": 34, "in_dim": 5, "num_heads": 3, "num_layers": 3, "out_dim": 7,
                "text_len": 512, "text_dim": 19, "patch_size": [2, 1, 3],
            }
        )
    )  # fmt: skip
    ours = stdit.load_transformer(tmp_path)
    assert ours.config == stdit.load_transformer(folder).config
    latents, t, text = inputs()
    with torch.no_grad():
        wanted = stranger()(latents, t * 1000, text, return_dict=False)[0]
        assert relative(ours.predict(latents, t, text), wanted) <= 1e-5
    assert stdit.load_transformer(tmp_path / "diffusion_pytorch_model.safetensors").config == ours.config


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dialect", ["original", "diffusers"])
def test_a_single_file_without_config_tells_its_size_by_its_shapes(tmp_path, prefix, dialect):
    config = TransformerConfig(dim=256, heads=2, layers=2, ffn_dim=100, in_channels=6, out_channels=4, text_dim=10)
    ours = STDiT(config)
    stdit.save_transformer(ours, tmp_path / "saved", dialect)
    tensors = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "alone.safetensors")
    back = stdit.load_transformer(tmp_path / "alone.safetensors")
    assert back.config == config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_dtypes_are_kept_or_changed_and_devices_obeyed(folder, tmp_path):
    model = stranger().to(torch.bfloat16)
    model.scale_shift_table.data = model.scale_shift_table.data.float()
    model.save_pretrained(tmp_path)
    kept = stdit.load_transformer(tmp_path)
    assert kept.head.modulation.dtype == torch.float32 and kept.head.head.weight.dtype == torch.bfloat16
    assert {p.dtype for p in stdit.load_transformer(tmp_path, dtype=torch.float64).parameters()} == {torch.float64}
    assert {p.device.type for p in stdit.load_transformer(tmp_path, device="meta").parameters()} == {"meta"}
    stdit.save_transformer(kept, tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    assert saved["scale_shift_table"].dtype == torch.float32 and saved["proj_out.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "parameters"), [("1.3B", 1.42e9), ("14B", 14.29e9), ("5B", 5.00e9)])
def test_presets_are_wans_with_no_key_missing_unexpected_or_misshaped(name, parameters):
    config = PRESETS[name]
    settings = {k: v for k, v in FAMILY.written(config, "diffusers").items() if not k.startswith("_")}
    with torch.device("meta"):
        theirs, ours = diffusers.WanTransformer3DModel(**settings), STDiT(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    table = FAMILY.keymap(config, "diffusers").table({key: tuple(t.shape) for key, t in ours.state_dict().items()})
    assert not table.differences(shapes) and table.foreign_shapes.keys() == shapes.keys()
    count = sum(p.numel() for p in theirs.parameters())
    assert count == sum(p.numel() for p in ours.parameters()) == count_parameters(config)
    assert abs(count - parameters) < 0.005e9


def test_the_releases_own_configs_are_the_presets():
    base = {"_class_name": "WanModel", "_diffusers_version": "0.30.0", "eps": 1e-06, "freq_dim": 256, "text_len": 512}
    small = {"dim": 1536, "ffn_dim": 8960, "in_dim": 16, "num_heads": 12, "num_layers": 30, "out_dim": 16}
    large = {"dim": 5120, "ffn_dim": 13824, "in_dim": 16, "num_heads": 40, "num_layers": 40, "out_dim": 16}
    five = {"dim": 3072, "ffn_dim": 14336, "in_dim": 48, "num_heads": 24, "num_layers": 30, "out_dim": 48}
    assert FAMILY.config_from({**base, **small, "model_type": "t2v"}, {}) == PRESETS["1.3B"]
    assert FAMILY.config_from({**base, **large, "model_type": "t2v"}, {}) == PRESETS["14B"]
    assert FAMILY.config_from({**base, **five, "model_type": "ti2v"}, {}) == PRESETS["5B"]
    for config in PRESETS.values():
        for dialect in ("diffusers", "original"):
            assert FAMILY.config_from(json.loads(json.dumps(FAMILY.written(config, dialect))), {}) == config


@pytest.mark.parametrize(
    ("changes", "layout"),
    [({"qk_norm": "none"}, "original"), ({"cross_norm": "none"}, "original"), ({"cross_norm": "none"}, "diffusers")],
)
def test_models_without_norms_come_back_whole(tmp_path, changes, layout):
    small = dict(dim=24, heads=2, layers=2, ffn_dim=32, in_channels=4, out_channels=4, text_dim=8, frequency_dim=16)
    model = STDiT(TransformerConfig(**small, **changes))
    stdit.save_transformer(model, tmp_path, layout)
    again = stdit.load_transformer(tmp_path)
    assert again.config == model.config
    assert {name: t.shape for name, t in again.state_dict().items()} == {
        name: t.shape for name, t in model.state_dict().items()
    }


# What must end in an error that names it.


def damaged(folder: Path, place: Path, change) -> Path:
    tensors = load_file(next(folder.glob("*.safetensors")))
    change(tensors)
    place.mkdir(exist_ok=True)
    save_file(tensors, place / "diffusion_pytorch_model.safetensors")
    (place / "config.json").write_text((folder / "config.json").read_text())
    return place


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.attn2.to_k.bias"), r"missing: blocks\.1\.attn2\.to_k\.bias\."),
        (lambda t: t.update(surplus=torch.ones(1)), r"unexpected: surplus\."),
        (lambda t: t.update({"proj_out.bias": torch.ones(3)}), r"proj_out\.bias is \(3,\), should be \(42,\)"),
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.2.")], "says 3 blocks, the tensors are of 2"),
        (lambda t: t.update({"blocks.0.norm3.weight": t.pop("blocks.0.norm2.weight")}), r"Is it 'blocks\.0\.norm3"),
        (lambda t: t.update({"blocks.0.attn2.add_k_proj.weight": torch.ones(1)}), "unexpected: blocks.0.attn2.add_k"),
        (lambda t: t.update({"vace_blocks.0.proj_out.weight": torch.ones(1)}), "VACE"),
        (lambda t: [t.pop(n) for n in list(t)] and t.update(x=torch.ones(1)), "the tensors are of 0"),
    ],
)  # fmt: skip
def test_nothing_is_loaded_partly_and_silently(folder, tmp_path, change, message):
    with pytest.raises(StditError, match=message) as error:
        stdit.load_transformer(damaged(folder, tmp_path / "bad", change))
    assert str(tmp_path / "bad") in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "WanVACETransformer3DModel"}, "'WanVACETransformer3DModel' is not a model that stdit loads"),
        ({"_class_name": "MochiTransformer3DModel"}, "'MochiTransformer3DModel' is not a model"),
        ({"added_kv_proj_dim": 42}, r"added_kv_proj_dim is 42; .* \(image_dim None\)"),
        ({"image_dim": 42}, "added_kv_proj_dim is None"),
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' is not one of Wan's"),
        ({"num_layer": 3}, "unknown key 'num_layer'. Did you mean 'num_layers'"),
        ({"quantization_config": {}}, "unknown key 'quantization_config'"),
        ({"ffn_dim": -1}, "ffn_dim is -1, not a positive whole number"),
        ({"ffn_dim": "71"}, "ffn_dim is '71', not a positive whole number"),
        ({"num_layers": 10**9}, "layers is 1000000000; it must be at most 1,000"),
        ({"_stdit": {"format": 99}}, "_stdit is {'format': 99}; this version of stdit reads format 1"),
        ({"_stdit": {"format": 1, "txet_padding": 0}}, "txet_padding"),
        ({"_stdit": 3}, "_stdit"),
        ({"patch_size": [1, 2]}, "patch"),
        ({"eps": "small"}, "eps is 'small', not a positive number"),
        ({"cross_attn_norm": "no"}, "cross_norm is 'no', not true or false"),
        ({"_stdit": {"format": 1, "qk_norm": "none"}}, "qk_norm is 'none', not true or false"),
    ],
)
def test_configs_that_cannot_be_are_named(folder, tmp_path, change, message):
    place = damaged(folder, tmp_path / "bad", lambda tensors: None)
    config = json.loads((place / "config.json").read_text()) | change
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(StditError, match=message) as error:
        stdit.load_transformer(place)
    assert str(place / "config.json") in str(error.value)


@pytest.mark.parametrize("kind", ["vace", "s2v", "animate"])
def test_original_variants_are_named(kind):
    with pytest.raises(StditError, match=f"model_type is '{kind}', a variant of Wan not supported yet"):
        FAMILY.config_from({"_class_name": "WanModel", "model_type": kind, "dim": 1536}, {})


def test_folders_that_are_not_a_model_say_so(folder, tmp_path):
    with pytest.raises(StditError, match="no such file or folder"):
        stdit.load_transformer(tmp_path / "absent")
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "model_index.json").write_text("{}")
    with pytest.raises(StditError, match="without transformer/"):
        stdit.load_transformer(tmp_path / "index")


def test_a_config_of_other_weights_says_so(folder, tmp_path):
    place = damaged(folder, tmp_path / "bad", lambda tensors: None)
    (place / "config.json").write_text(json.dumps(FAMILY.written(PRESETS["1.3B"], "diffusers")))
    with pytest.raises(StditError, match=r"Does this config.json belong to these weights"):
        stdit.load_transformer(place)
    (place / "config.json").write_text("{")
    with pytest.raises(StditError, match=r"config.json: not valid JSON"):
        stdit.load_transformer(place)


def test_text_padding_survives_a_trip_through_other_programs_config(tmp_path):
    config = TransformerConfig(dim=12, heads=2, layers=1, ffn_dim=8, text_padding=0, text_dim=4)
    for layout in ("diffusers", "original"):
        stdit.save_transformer(STDiT(config), tmp_path / layout, layout)
        assert stdit.load_transformer(tmp_path / layout).config == config
