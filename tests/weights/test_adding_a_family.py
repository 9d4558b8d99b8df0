"""The family that docs/adding-a-family.md adds: its code is taken from the page, as a reader would take it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

import stdit
from stdit.cli.main import app, run_command
from stdit.errors import StditError
from stdit.models.config import TransformerConfig
from stdit.models.transformer import STDiT
from stdit.text.places import Treatment
from stdit.weights import families
from stdit.weights.families.configs import ConfigJson, setting

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"
SIZES = {"width": 24, "heads": 2, "depth": 2, "mlp": 32, "text_width": 8}
WAN = TransformerConfig(24, 2, 2, 32, text_dim=8, text_padding=0)
NAMES = {  # Wan's names: Tern's, written out once more; the rest is the same
    "patch_embedding.": "stem.",
    "time_embedding.": "clock.",
    "time_projection.1.": "clock_out.",
    "text_embedding.": "words.",
    "blocks.": "layers.",
    ".self_attn.o.": ".attn.out.",
    ".self_attn.norm_q.": ".attn.q_norm.",
    ".self_attn.norm_k.": ".attn.k_norm.",
    ".cross_attn.norm_q.": ".cross.q_norm.",
    ".cross_attn.norm_k.": ".cross.k_norm.",
    ".cross_attn.": ".cross.",
    ".norm3.": ".cross.norm.",
    ".ffn.": ".mlp.",
    ".modulation": ".table",
    "head.head.": "out.",
    "head.table": "out_table",
}


@pytest.fixture
def tern(monkeypatch) -> Iterator[ModuleType]:
    file, line = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.S | re.M)
    module = ModuleType("stdit.weights.families.tern")
    exec(compile(file, "tern.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert line.strip().endswith('"tern"],')
    others = [name for name in families.FAMILIES["transformer"] if name != "tern"]
    monkeypatch.setitem(families.FAMILIES, "transformer", [*others, "tern"])
    yield module


@pytest.fixture
def wan() -> STDiT:
    model = STDiT(WAN)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def release(wan, tmp_path) -> Path:
    """A folder as Tern's authors would publish it."""
    tensors = {}
    state = wan.state_dict()
    for name, tensor in state.items():
        if found := re.fullmatch(r"blocks\.(\d+)\.self_attn\.q\.(\w+)", name):
            parts = [state[f"blocks.{found[1]}.self_attn.{p}.{found[2]}"] for p in "qkv"]
            tensors[f"layers.{found[1]}.attn.qkv.{found[2]}"] = torch.cat(parts)
        elif not re.search(r"\.self_attn\.[kv]\.", name):
            for ours, theirs in NAMES.items():
                name = name.replace(ours, theirs)
            tensors[name] = tensor.view(24, 16, 1, 2, 2) if name == "stem.weight" else tensor
    folder = tmp_path / "tern"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "TernModel", **SIZES}))
    return folder


def test_its_weights_load_compute_and_save_again_bit_for_bit(tern, wan, release, tmp_path, monkeypatch):
    model = stdit.load_transformer(release)
    assert model.config.family == "tern"
    inputs = torch.randn(1, 16, 1, 4, 4), torch.tensor([0.5]), torch.randn(1, 3, 8)
    assert torch.equal(model.predict(*inputs), wan.predict(*inputs))
    stdit.save_transformer(model, tmp_path / "again", layout="original")
    (written,) = (tmp_path / "again").glob("*.safetensors")
    again, first = load_file(written), load_file(release / "model.safetensors")
    assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first)
    assert stdit.load_transformer(tmp_path / "again").config == model.config
    with pytest.raises(StditError, match="ComfyUI has no Tern transformer"):
        stdit.save_transformer(model, tmp_path / "other", layout="comfyui")


def test_the_commands_know_it_and_its_pipeline(tern, release, tmp_path, capsys):
    assert run_command(app, ["weights", "inspect", str(release), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert (found["family"], found["dialect"], found["release"]) == ("Tern transformer", "original", None)
    assert found["objective"] == "rectified flow (velocity)"
    assert families.release_of(tern.FAMILY.config_from({}, {})).name == "Tern 1B"
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "TernPipeline"}))
    assert families.treatment_of(tmp_path) == Treatment(256, "none")


def test_what_does_not_fit_is_named(tern, release):
    (release / "config.json").write_text(json.dumps({"_class_name": "TernModel", **SIZES, "depht": 2}))
    with pytest.raises(StditError, match=r"unknown key 'depht'\. Did you mean 'depth'"):
        stdit.load_transformer(release)
    (release / "config.json").write_text(json.dumps({"_class_name": "TernModel", **SIZES, "act": "relu"}))
    with pytest.raises(StditError, match="act is 'relu'; stdit runs such models with 'gelu' only"):
        stdit.load_transformer(release)
    (release / "config.json").unlink()
    with pytest.raises(StditError, match=r"are of 2 blocks; .* 24 are expected\. Put the config\.json of"):
        stdit.load_transformer(release)


def test_a_setting_of_0_is_read_and_a_size_of_0_is_refused():
    form = ConfigJson("TernModel", {"context_padding": setting("text_padding", 512), "stride": 2})
    assert form.read({"context_padding": 0}, "config.json") == {"text_padding": 0}
    for wrong in ({"context_padding": -1}, {"stride": 0}):
        with pytest.raises(StditError, match=f"{next(iter(wrong))} is "):
            form.read(wrong, "config.json")
