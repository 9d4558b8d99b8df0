"""Damaged and hostile tensor files: each kind of damage names itself, the file and the tensor."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from stdit.errors import StditError
from stdit.weights.identity import folder_identity
from stdit.weights.tensor_files import open_file, open_folder

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
DTYPES += [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"first": torch.arange(6.0).view(2, 3), "second": torch.arange(40, dtype=torch.int64)}, path)
    return path


def header_of(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def with_header(path: Path, header: dict | str) -> None:
    data = path.read_bytes()
    body = data[8 + struct.unpack("<Q", data[:8])[0] :]
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_are_read_as_the_library_wrote_them(tmp_path, dtype):
    wanted = {
        "a": torch.randn(3, 5).to(dtype),
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.zeros(0, 4).to(dtype),
    }
    save_file(wanted, tmp_path / "x.safetensors")
    found = open_file(tmp_path / "x.safetensors")
    for name, tensor in wanted.items():
        read = found.read(name)
        assert read.dtype == dtype and read.shape == tensor.shape
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("left", [0, 5, 40, -300, -8])
def test_a_file_cut_anywhere_says_so(file, left):
    data = file.read_bytes()
    file.write_bytes(data[:left])
    with pytest.raises(StditError, match=r"model\.safetensors.*(is empty|too short|ends inside|ends at byte)"):
        open_file(file)


def test_a_cut_inside_a_tensor_names_the_tensor(file):
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(
        StditError, match=f"tensor {max(header_of(file).items(), key=lambda i: i[1].get('data_offsets', [0])[0])[0]}"
    ):
        open_file(file)


def test_a_file_cut_after_it_was_opened_is_an_error_and_no_crash(file):
    found = open_file(file)
    os.truncate(file, file.stat().st_size - 8)
    last = max(found.entries, key=lambda name: found.entries[name].stop)
    with pytest.raises(StditError, match=f"ends inside the tensor {last}"):
        found.read(last)


def test_headers_that_lie_take_no_memory(file):
    data = file.read_bytes()
    file.write_bytes(struct.pack("<Q", 2**62) + data[8:])
    with pytest.raises(StditError, match="at most 16000000"):
        open_file(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 24]}, "first is F32 of shape .* does not fit"),
        ({"dtype": "F32", "shape": [-2, 3], "data_offsets": [0, 24]}, "entry of first is damaged"),
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [0]}, "entry of first is damaged"),
        ({"dtype": "F32", "shape": [2.0, 3], "data_offsets": [0, 24]}, "entry of first is damaged"),
        ({"dtype": "F32", "shape": [2, 3]}, "entry of first is damaged"),
        ({"dtype": "F31", "shape": [2, 3], "data_offsets": [0, 24]}, "first has the dtype 'F31'"),
        ({"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}, "overlap"),
        ("x", "entry of first is damaged"),
    ],
)
def test_entries_that_lie_are_named(file, change, message):
    header = header_of(file)
    header["first"], header["second"]["data_offsets"] = change, [24, 344]
    with_header(file, header)
    with pytest.raises(StditError, match=message):
        open_file(file)


def test_damaged_json_and_names_twice(file):
    with_header(file, '{"first": ')
    with pytest.raises(StditError, match="header is damaged"):
        open_file(file)
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    with_header(file, f'{{"first": {entry}, "first": {entry}}}')
    with pytest.raises(StditError, match="twice"):
        open_file(file)
    with_header(file, "[]")
    with pytest.raises(StditError, match="not a JSON object"):
        open_file(file)


def sharded(folder: Path, weight_map: dict[str, str]) -> Path:
    save_file({"a": torch.zeros(2)}, folder / "m-00001-of-00002.safetensors")
    save_file({"b": torch.ones(2)}, folder / "m-00002-of-00002.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


ONE, TWO = "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"


def test_shards_are_read_through_their_index(tmp_path):
    sharded(tmp_path, {"a": ONE, "b": TWO})
    found = open_folder(tmp_path)
    assert found.read("b").tolist() == [1, 1] and [file.name for file in found.files] == [ONE, TWO]


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": ONE, "b": "m-00003-of-00002.safetensors"}, "m-00003-of-00002.safetensors: this shard is missing.* b"),
        ({"a": ONE, "b": f"../{TWO}"}, "not the name of a file beside the index"),
        ({"a": ONE, "b": f"/etc/{TWO}"}, "not the name of a file beside the index"),
        ({"a": ONE, "b": f"..\\{TWO}"}, "not the name of a file beside the index"),
        ({"a": ONE, "b": 3}, "not the name of a file beside the index"),
        ({"a": ONE, "b": "weights.bin"}, "not a safetensors file"),
        ({"a": ONE, "b": ONE}, f"{ONE}: has no tensor b"),
        ({"a": ONE, "c": TWO}, f"{TWO}: has no tensor c"),
        ({}, "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_named(tmp_path, weight_map, message):
    sharded(tmp_path, weight_map)
    with pytest.raises(StditError, match=message):
        open_folder(tmp_path)


def test_tensors_that_the_index_does_not_name_are_an_error(tmp_path):
    sharded(tmp_path, {"a": ONE, "b": TWO})
    save_file({"b": torch.ones(2), "stray": torch.ones(2)}, tmp_path / TWO)
    with pytest.raises(StditError, match="holds stray"):
        open_folder(tmp_path)


def test_folders_without_or_with_several_sets_of_weights(tmp_path):
    with pytest.raises(StditError, match="holds no"):
        open_folder(tmp_path)
    sharded(tmp_path, {"a": ONE, "b": TWO}).unlink()
    with pytest.raises(StditError, match="no index"):
        open_folder(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert open_folder(tmp_path).path.name == "model.safetensors"


class Malice:
    def __reduce__(self):
        return os.system, ("touch /tmp/stdit-was-here",)


def test_pickles_are_refused_and_when_trusted_hold_tensors_only(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"a": torch.ones(3)}}, path)
    with pytest.raises(StditError, match="is a pickle"):
        open_file(path)
    assert open_file(path, trust_pickle=True).read("a").tolist() == [1, 1, 1]
    contents = [path.read_bytes()[:-100], b""]
    for content in ({"a": Malice()}, [torch.ones(3)]):
        torch.save(content, path)
        contents.append(path.read_bytes())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(StditError, match=r"as a dictionary of tensors alone|is empty") as error:
            open_file(path, trust_pickle=True)
        assert "weights_only" not in str(error.value)  # nor what else torch advises


def test_identity_follows_content_and_nothing_else(tmp_path):
    def folder(name: str, value: float = 1.0, config: str = "{}") -> Path:
        place = tmp_path / name
        place.mkdir()
        save_file({"a": torch.full((3,), value)}, place / "m.safetensors")
        (place / "config.json").write_text(config)
        return place

    one, same = folder("one"), folder("same")
    (same / "notes.md").write_text("other files do not count")
    assert folder_identity(one) == folder_identity(same) and len(folder_identity(one)) == 64
    assert folder_identity(folder("weights", value=2.0)) != folder_identity(one)
    assert folder_identity(folder("config", config='{"z": 1}')) != folder_identity(one)
    before = folder_identity(one)
    (one / "config.json").write_text('{"changed": true}')
    assert folder_identity(one) != before
    with pytest.raises(StditError, match="no such"):
        folder_identity(tmp_path / "absent")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file whose reading fails: /proc/self/mem of Linux")
def test_a_file_whose_reading_fails_is_named() -> None:
    with pytest.raises(StditError, match=r"^/proc/self/mem: cannot be read \("):
        open_file(Path("/proc/self/mem"))
