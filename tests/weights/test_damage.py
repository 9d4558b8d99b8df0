"""Ten kinds of damage, to a plain, a fused and a permuted family: each is named, nothing loads, memory stays small."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tensor_files import load_file

import stdit
from stdit.errors import StditError
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.weights.families import allegro, ltx, pixart

SIZES = dict(dim=192, heads=2, layers=2, ffn_dim=768, text_dim=512, in_channels=4, out_channels=4)
MODELS = {  # layout, config, a tensor that is not square, in that layout
    "Wan": ("diffusers", TransformerConfig(**SIZES), "blocks.1.ffn.net.0.proj.weight"),
    "PixArt, fused": (
        "original",
        TransformerConfig(**SIZES, **pixart.FAMILY.settings, position_base=8),
        "blocks.1.attn.qkv.weight",
    ),
    "Allegro, permuted": (
        "diffusers",
        TransformerConfig(**SIZES, **allegro.FAMILY.settings, rope_scale=(2.2, 2.0, 2.0)),
        "transformer_blocks.1.ff.net.0.proj.weight",
    ),
}
NAME = "diffusion_pytorch_model.safetensors"
MB = 1 << 20


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.split(",")[0])
def saved(request, tmp_path_factory) -> tuple[Path, str]:
    layout, config, name = MODELS[request.param]
    place = tmp_path_factory.mktemp("whole")
    stdit.save_transformer(STDiT(config), place, layout)
    return place, name


@pytest.fixture
def broken(saved, tmp_path) -> tuple[Path, str]:
    """A copy to damage, which loads as it is."""
    place, name = saved
    for file in place.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stdit.load_transformer(tmp_path)
    return tmp_path, name


def peak_of(work: Callable[[], object]) -> int:
    """By how much the resident set grew at most, in bytes."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        work()
        return 0  # no Linux: the messages are tested, the memory is not
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def refused(place: Path, *messages: str, size: int | None = None) -> None:
    """Loading is an error with all of these in it; memory stays under twice the files, and 8 MB."""
    size = size or sum(file.stat().st_size for file in place.iterdir())
    loaded = []

    def load() -> None:
        with pytest.raises(StditError) as error:
            loaded.append(stdit.load_transformer(place))
        text = str(error.value)
        assert all(message in text for message in (str(place), *messages)), text

    assert peak_of(load) < 2 * size + 8 * MB
    assert not loaded


def change(place: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(place / NAME)
    edit(tensors)
    save_file(tensors, place / NAME)


def test_a_tensor_missing(broken):
    place, name = broken
    change(place, lambda tensors: tensors.pop(name))
    refused(place, f"missing: {name}", "get both from the same place again")


def test_a_tensor_renamed(broken):
    place, name = broken
    other = name.replace(".weight", ".wieght")
    change(place, lambda tensors: tensors.update({other: tensors.pop(name)}))
    refused(place, f"missing: {name}. Is it {other!r}?", f"unexpected: {other}", "again")


def test_a_tensor_transposed(broken):
    place, name = broken
    change(place, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    rows, columns = load_file(place / NAME)[name].shape
    refused(place, f"misshaped: {name} is ({rows}, {columns}), should be ({columns}, {rows})", "again")


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float64, "nan"),
        (torch.float32, "inf"),
        (torch.bfloat16, "nan"),
        (torch.bfloat16, "-inf"),
        (torch.float16, "inf"),
        (torch.float8_e4m3fn, "nan"),
        (torch.float8_e5m2, "inf"),
    ],
    ids=str,
)
def test_a_value_that_is_no_number(broken, value, dtype):
    place, name = broken

    def edit(tensors):
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-7] = float(value)

    change(place, edit)
    refused(place, f"the tensor {name} holds NaN or infinity", "take another copy, or an earlier checkpoint")


def test_another_familys_tensors_under_this_config(broken):
    place, _ = broken
    config = json.loads((place / "config.json").read_text())
    shapes = dict(dim=48, heads=2, layers=2, ffn_dim=192, in_channels=4, out_channels=4, text_dim=8)
    stdit.save_transformer(STDiT(TransformerConfig(**shapes, **{**ltx.FAMILY.settings, "patch": (1, 1, 1)})), place)
    (place / "config.json").write_text(json.dumps(config))
    refused(place, "these tensors are for the LTX-Video transformer", " is for the ", "Put the config.json of")


def test_these_tensors_under_another_familys_config(broken):
    place, _ = broken
    shapes = dict(dim=48, heads=2, layers=2, ffn_dim=192, in_channels=4, out_channels=4, text_dim=8)
    config = TransformerConfig(**shapes, **{**ltx.FAMILY.settings, "patch": (1, 1, 1)})
    (place / "config.json").write_text(json.dumps(ltx.FAMILY.written(config, "diffusers")))
    refused(place, "these tensors are for", "config.json is for the LTX-Video transformer", "Put the config.json of")


@pytest.mark.parametrize("left", [0.999, 0.4])
def test_a_truncated_file(broken, left):
    place, _ = broken
    os.truncate(place / NAME, int((place / NAME).stat().st_size * left))
    refused(place, "the tensor ", "cut short: copy or download it again")


def test_a_truncated_file_of_terabytes_is_refused_by_its_header(broken):
    """What it declares fits the model, and the file is as long as it says but for a byte: none of it is read."""
    place, _ = broken
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    (place / NAME).write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(place / NAME, 8 + len(header) + 2**36)
    refused(place, "the tensor x", "download it again", size=1)


def test_a_shard_gone(broken):
    place, name = broken
    model = stdit.load_transformer(place)
    layout = "original" if "qkv" in name else "diffusers"
    stdit.save_transformer(model, place, layout, shard_bytes=MB)
    gone = sorted(place.glob("*.safetensors"))[1]
    gone.unlink()
    refused(place, f"{gone.name}: this shard is missing", "Download it")


@pytest.mark.parametrize("outside", ["../{}", "/tmp/{}", "x/../../{}"])
def test_an_index_naming_a_file_outside_the_folder(broken, outside):
    place = broken[0] / "inner"
    place.mkdir()
    (place.parent / NAME).rename(place.parent / "elsewhere.safetensors")
    (place.parent / "config.json").rename(place / "config.json")
    weight_map = dict.fromkeys(
        load_file(place.parent / "elsewhere.safetensors"), outside.format("elsewhere.safetensors")
    )
    (place / f"{NAME}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    refused(place, f"{NAME}.index.json: puts ", "not the name of a file beside the index", "download the index")


@pytest.mark.parametrize("length", [100_000_000, 100_000_001, 2**62])
def test_a_header_of_100_mb(broken, length):
    place, _ = broken
    (place / NAME).write_bytes(struct.pack("<Q", length))
    os.truncate(place / NAME, 100_000_100)
    refused(place, f"its header would have {length} bytes", "Download it again", size=1)


def test_a_pickle(broken):
    place, _ = broken
    torch.save(load_file(place / NAME), place / "diffusion_pytorch_model.bin")
    (place / NAME).unlink()
    refused(place, "is a pickle", "Convert it to safetensors", "trust_pickle=True")


def test_what_is_written_to_loaded_weights_stays_in_memory(broken):
    place, _ = broken
    before = (place / NAME).read_bytes()
    model = stdit.load_transformer(place)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (place / NAME).read_bytes() == before
    assert all(torch.equal(a, b + 1) for a, b in zip(model.parameters(), stdit.load_transformer(place).parameters()))


def test_weights_stay_when_their_file_is_replaced_or_removed(broken):
    place, name = broken
    model = stdit.load_transformer(place)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = STDiT(model.config)
    stdit.save_transformer(other, place, "original" if "qkv" in name else "diffusers")
    (place / NAME).unlink()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_conversion_of_dtype_holds_the_model_and_one_tensor(tmp_path):
    """Also where rows are permuted, or a fused tensor is split: the file is never held as well."""
    for name, (layout, config, _) in MODELS.items():
        model = STDiT(TransformerConfig(**{**vars(config), "layers": 12}))
        stdit.save_transformer(model, tmp_path / name, layout)
        half = sum(p.numel() for p in model.parameters()) * 2
        kept = []
        peak = peak_of(
            lambda place=tmp_path / name, kept=kept: kept.append(stdit.load_transformer(place, torch.bfloat16))
        )
        assert peak < half + 6 * MB < 2 * half
        assert all(torch.equal(a.bfloat16(), b) for a, b in zip(model.parameters(), kept[0].parameters()))
