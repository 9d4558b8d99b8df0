"""Tensor files as untrusted input: safetensors, whole or in shards, and pickles only when asked.

The header of a safetensors file is checked here, every offset against the file's size, before memory is taken. Tensors
are then private memory maps of the file: nothing is copied, the page cache is the weights' memory, and writing to a
tensor, as training does, stays in this process and never reaches the file. (Reading into new memory takes longer: most
of the time the system clears new pages.)

While a model lives, its file may be renamed, removed or replaced (as `publish` does), but not rewritten or truncated in
place. A file that was truncated before a tensor is mapped is an error.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stdit.downloads import check_downloaded, unfinished
from stdit.errors import StditError
from stdit.files import unpickled
from stdit.weights.keymap import Read, Shape

MAX_HEADER = 16_000_000  # bytes; the format allows 100 MB, more than 1 GB when parsed. Released models: 0.4 MB
MAX_JSON = 50_000_000  # bytes of a config.json or an index
PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class NoWeights(StditError):
    """A folder without any weights in it."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: torch's name of its dtype, its shape, and its bytes [start, stop).

    tensor: itself, if the file is a trusted pickle.
    scale: of a quantised tensor, whose value is stored × scale.
    """

    path: Path
    dtype: str
    shape: Shape
    start: int = 0
    stop: int = 0
    tensor: Tensor | None = None
    scale: Entry | None = None


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of one file, or of the shards of one model, by name. Nothing is read until `read`.

    path: the file, or the index of the shards.
    prefix: that every name in the file has.
    """

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def files(self) -> list[Path]:
        return sorted({entry.path for entry in self.entries.values()})

    def reopened(self) -> TensorFiles:
        """The same without its memory maps: tensors read from it share no memory with those read before."""
        return replace(self, _maps={})

    def read(self, name: str) -> Tensor:
        """The tensor in its stored dtype, a private view of the file; with a scale, their product in fp32. Raises
        StditError if a value is not finite."""
        entry = self.entries[name]
        tensor = self._stored(entry, name)
        if not _finite(tensor):
            raise StditError(
                f"{entry.path}: the tensor {self.prefix}{name} holds NaN or infinity. The file is damaged, or the "
                "training that wrote it had diverged: take another copy, or an earlier checkpoint."
            )
        if entry.scale is None:
            return tensor
        scale = self._stored(entry.scale, f"the scale of {name}").float()  # one, or one per row
        return (tensor.float() * scale.reshape(-1, *(1 for _ in tensor.shape[1:]))).view(tensor.shape)

    def release(self, name: str) -> None:
        """Frees the pages of a mapped tensor that has been copied; the next access reads them again."""
        entry = self.entries[name]
        page = mmap.PAGESIZE  # whole pages only: the first and last are shared with its neighbours
        start, stop = -(-entry.start // page) * page, entry.stop // page * page
        if entry.path in self._maps and stop > start and hasattr(mmap, "MADV_DONTNEED"):
            self._maps[entry.path].madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _stored(self, entry: Entry, name: str) -> Tensor:
        if entry.tensor is not None:
            return entry.tensor
        dtype = getattr(torch, entry.dtype)
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=dtype)
        with open(entry.path, "rb") as file:
            if os.fstat(file.fileno()).st_size < entry.stop:
                raise StditError(
                    f"{entry.path}: the file ends inside the tensor {self.prefix}{name}; it was whole when it was "
                    "opened. Do not change a file while it is read."
                )
            if entry.path not in self._maps:
                self._maps[entry.path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        file_map = self._maps[entry.path]
        if hasattr(mmap, "MADV_WILLNEED"):  # reads what is not cached at once, not page by page
            start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
            file_map.madvise(mmap.MADV_WILLNEED, start, entry.stop - start)
        content: memoryview | bytearray = memoryview(file_map)[entry.start : entry.stop]
        if entry.start % dtype.itemsize:  # written without padding: not aligned for torch
            content = bytearray(content)
        return torch.frombuffer(content, dtype=dtype).view(entry.shape)

    def without_others(self, prefixes: tuple[str, ...], others: tuple[str, ...]) -> TensorFiles:
        """Leaves out other models' tensors (names that begin with one of `others`) if all the rest has one of
        `prefixes`: some programs keep a whole pipeline in one file."""
        left = {name: entry for name, entry in self.entries.items() if not name.startswith(others)}
        whole = len(left) == len(self.entries) or not any(all(n.startswith(p) for n in left) for p in prefixes)
        return self if whole else replace(self, entries=left)

    def without_prefix(self, prefixes: tuple[str, ...]) -> TensorFiles:
        """Removes all prefixes (there may be several) that all names have, as in single files from other programs."""
        for prefix in prefixes:
            if self.entries and all(name.startswith(prefix) for name in self.entries):
                entries = {name.removeprefix(prefix): entry for name, entry in self.entries.items()}
                return replace(self, entries=entries, prefix=self.prefix + prefix).without_prefix(prefixes)
        return self


def _finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass (min and max of NaN are NaN)."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor if tensor.itemsize > 1 else tensor.to(torch.float16))  # fp8 has no min
    return bool(low.isfinite() and high.isfinite())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises StditError naming the file."""
    try:
        check_downloaded(path)
        if path.stat().st_size > MAX_JSON:
            raise StditError(f"{path}: {path.stat().st_size} bytes is too large for a JSON file beside weights.")
        found = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise StditError(f"{path}: cannot be read ({error.strerror}).") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise StditError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(found, dict):
        raise StditError(f"{path}: holds {type(found).__name__}, not a JSON object.")
    return found


def open_safetensors(path: Path) -> TensorFiles:
    """A safetensors file. Its header is checked against the size of the file; no tensor is read."""
    check_downloaded(path)
    if (control := path.with_name(f"{path.name}.aria2")).exists():  # aria2 gives a file its full size at once
        raise StditError(f"{path}: its download has not finished ({control.name} is there): let it finish.")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER:
            raise StditError(
                f"{path}: its header would have {length} bytes; stdit reads at most {MAX_HEADER}. "
                "Is it a safetensors file? Download it again."
            )
        if length + 8 > size:
            raise StditError(
                f"{path}: the file ends inside its header ({size} of {length + 8} bytes). Download it again."
                f"{unfinished(path.parent)}"
            )
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise StditError(f"{path}: its header is damaged ({error}).") from None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise StditError(f"{path}: its header, or __metadata__ in it, is not a JSON object.")
    entries = {name: _entry(path, name, found, 8 + length, size) for name, found in header.items()}
    end, before = 0, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.stop > entry.start and entry.start < end:
            raise StditError(f"{path}: the tensors {before} and {name} overlap.")
        if entry.stop > end:
            end, before = entry.stop, name
    return TensorFiles(path, entries, {str(key): str(value) for key, value in metadata.items()})


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _entry(path: Path, name: str, found: Any, base: int, size: int) -> Entry:
    try:
        dtype, shape, (start, stop) = found["dtype"], found["shape"], found["data_offsets"]
        numbers = (*shape, start, stop)
        if type(shape) is not list or len(shape) > 15 or any(type(n) is not int or not 0 <= n < 2**62 for n in numbers):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise StditError(f"{path}: the header's entry of {name} is damaged.") from None
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise StditError(f"{path}: {name} has the dtype {dtype!r}; stdit reads {', '.join(DTYPES)}.")
    if math.prod(shape) * DTYPES[dtype].itemsize != stop - start:
        raise StditError(
            f"{path}: {name} is {dtype} of shape {tuple(shape)} in {stop - start} bytes, which does not fit."
        )
    if base + stop > size:
        raise StditError(
            f"{path}: the file ends at byte {size}, inside or before the tensor {name} (bytes {base + start} to "
            f"{base + stop}). It is cut short: copy or download it again.{unfinished(path.parent)}"
        )
    return Entry(path, _name(DTYPES[dtype]), tuple(shape), base + start, base + stop)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_tensors(
    path: str | os.PathLike[str], like: Mapping[str, Tensor], read: Read, metadata: Mapping[str, str]
) -> None:
    """Writes the safetensors file of `tensor_bytes`."""
    with open(path, "wb") as file:
        for block in tensor_bytes(like, read, metadata):
            file.write(block)


def tensor_bytes(like: Mapping[str, Tensor], read: Read, metadata: Mapping[str, str]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, one tensor in memory at a time; equal tensors give equal bytes.

    like: the shape and dtype of each tensor; may be on the meta device. read: returns a tensor by name.

    Not with the safetensors library: it writes metadata in an order that changes from run to run.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    order = sorted(like, key=lambda name: (-like[name].itemsize, name))  # aligned for memory maps
    stop = 0
    for name in order:
        start, stop = stop, stop + like[name].nbytes
        dtype, shape = names[like[name].dtype], list(like[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        tensor = read(name).detach().to("cpu").contiguous()
        assert (tensor.dtype, tensor.shape) == (like[name].dtype, like[name].shape), f"{name}: {tensor.dtype}"
        yield tensor.view(-1).view(torch.uint8).numpy().data


def open_file(path: Path, trust_pickle: bool = False) -> TensorFiles:
    """A safetensors file, a shard index (.index.json), or, only with `trust_pickle`, a pickle of tensors."""
    if not path.is_file():
        raise StditError(f"{path}: no such file.")
    if re.search(r"\.index\.(\w+\.)?json$", path.name):
        return open_index(path)
    if path.suffix.lower() in PICKLES:
        return _open_pickle(path, trust_pickle)
    if path.suffix.lower() not in (".safetensors", ".sft"):
        check_downloaded(path)
        raise StditError(f"{path}: not a file of weights. stdit reads .safetensors files, and folders that hold them.")
    return open_safetensors(path)


def open_index(path: Path) -> TensorFiles:
    """The shards of a `*.safetensors.index.json`, which must lie beside it and hold the tensors that it names."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StditError(f"{path}: has no weight_map.")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard or "\\" in shard:
            raise StditError(
                f"{path}: puts {name} in {shard!r}, which is not the name of a file beside the index. Files elsewhere "
                "are not opened: download the index again from a source that you trust."
            )
        shards.setdefault(shard, []).append(name)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for shard, names in shards.items():
        file = path.parent / shard
        if file.suffix != ".safetensors":
            raise StditError(f"{path}: puts {names[0]} in {shard}, which is not a safetensors file.")
        if not file.is_file():
            raise StditError(
                f"{file}: this shard is missing; {path.name} puts {len(names)} tensors in it, such as {names[0]}. "
                f"Download it.{unfinished(path.parent)}"
            )
        found = open_safetensors(file)
        if absent := [name for name in names if name not in found.entries]:
            raise StditError(f"{file}: has no tensor {absent[0]}, which {path.name} puts there.")
        if surplus := [name for name in found.entries if name not in weight_map]:
            raise StditError(f"{file}: holds {surplus[0]}, which {path.name} does not name.")
        entries |= {name: found.entries[name] for name in names}
        metadata |= found.metadata
    return TensorFiles(path, entries, metadata)


def open_folder(
    folder: Path, trust_pickle: bool = False, wanted: Callable[[str], bool] = lambda name: True
) -> TensorFiles:
    """The weights of a folder, an index with its shards or a single file. `wanted` filters file names."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and wanted(entry.name))
    whole = [name for name in names if name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    whole += [name for name in names if name.endswith(".safetensors.index.json")]
    if not whole:  # one variant, as diffusers and transformers name it
        whole = [name for name in names if re.search(r"\.safetensors\.index\.\w+\.json$", name)]
    files = [name for name in names if name.endswith(".safetensors")]
    pickles = [name for name in names if Path(name).suffix.lower() in PICKLES]
    for choice in (whole, files, pickles):
        if len(choice) == 1:
            return open_file(folder / choice[0], trust_pickle)
        if len(choice) > 1:
            why = " and no index that says which belong together" if choice is files else ""
            raise StditError(
                f"{folder}: holds {len(choice)} files of weights{why}: {', '.join(choice[:4])}"
                f"{', …' if len(choice) > 4 else ''}. Name the one to load.{_experts_hint(choice)}"
            )
    raise NoWeights(f"{folder}: holds no .safetensors file.{unfinished(folder)}")


def _experts_hint(names: list[str]) -> str:
    if len(names) == 2 and all(any(word in name.lower() for name in names) for word in ("high", "low")):
        return " For both experts of Wan 2.2, put one in high_noise_model/ and one in low_noise_model/."
    return ""


def _open_pickle(path: Path, trust: bool) -> TensorFiles:
    if path.stat().st_size < 1024:
        check_downloaded(path)
    if not trust:
        raise StditError(
            f"{path}: is a pickle, which can run code when it is opened, and is refused. Convert it to safetensors. If "
            "you trust its source, trust_pickle=True (--trust-pickle) opens it; only tensors are read."
        )
    found = unpickled(path)
    for key in ("state_dict", "model_state", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise StditError(
            f"{path}: cannot be read as a dictionary of tensors alone: it is damaged, or holds more. Give its "
            "weights as safetensors, or as a state dict."
        )
    entries = {n: Entry(path, _name(t.dtype), tuple(t.shape), tensor=t) for n, t in found.items()}
    return TensorFiles(path, entries)
