"""The cache: tensors in safetensors shards with a Parquet index, addressed by content and read through memory maps.

    CACHE/latents-0123456789abcdef/settings.json              what made them: VAE identity, fps, dtype, …
                                   832x480x81-….safetensors   one tensor per key
                                   832x480x81-….parquet       its keys; a shard without this file does not count
                                   index.arrow                 the keys of all shards, for opening fast (see `index`)
    CACHE/text-…/                                          the same for text embeddings

The folder's name is the hash of the settings, so latents of different VAEs never mix. CACHE may be a URL of any fsspec
scheme: shards are then fetched into `storage`'s local cache and mapped there.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from stdit.data.config import DataConfig
from stdit.data.load.index import NAME as INDEX
from stdit.data.load.index import PART, Hashes, hash_keys, read_index, write_index
from stdit.data.remote.paths import is_remote, join
from stdit.data.remote.storage import STORAGE, Storage
from stdit.errors import StditError
from stdit.shapes import VideoShape

FORMAT = 1
TEXT_FORMAT = 2  # 1 did not record how texts were prepared
_OPEN_SHARDS = 64


def cuts(config: DataConfig) -> DataConfig:
    """The config for cutting cached clips: at the first frame and the centre, or in `crops` keyed ways."""
    return config.fixed() if config.crops == 1 else replace(config, cache=None, keep_gb=0.0)


def latent_settings(config: DataConfig, vae_identity: str) -> dict[str, Any]:
    """What determines a latent besides the clip, its shape and the number of the cut (more cuts can be added)."""
    cut = cuts(config)
    return {
        "format": FORMAT,
        "kind": "latents",
        "vae": vae_identity,
        "fps": float(config.fps),
        "start": cut.start,
        "crop": cut.crop,
        "dtype": config.cache_dtype,
        **({"mirror": True} if cut.mirror else {}),
    }


def text_settings(config: DataConfig, text_identity: Mapping[str, Any]) -> dict[str, Any]:
    """What determines an embedding besides its text. text_identity: see `stdit.prepare.encode.text_identity`."""
    return {"format": TEXT_FORMAT, "kind": "text", "dtype": config.cache_dtype, **text_identity}


def latent_key(clip_id: str, shape: VideoShape, cut: int | None = None) -> str:
    """cut: its number; None if there is only one, at the first frame and the centre."""
    return f"{clip_id}/{shape}" if cut is None else f"{clip_id}/{shape}/{cut}"


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class CacheMissing(StditError):
    """A cache has no tensors of these settings. others: whether it has tensors of other settings."""

    def __init__(self, message: str, others: bool) -> None:
        super().__init__(message)
        self.others = others


class Cache:
    """Tensors with the same settings. Use `open` for reading, `create` for reading and writing."""

    def __init__(self, folder: str, settings: Mapping[str, Any], storage: Storage = STORAGE) -> None:
        self.folder, self.settings, self.storage = folder, dict(settings), storage
        self._lock = Lock()
        self._shards: OrderedDict[str, Any] = OrderedDict()
        self.reload()

    @classmethod
    def create(
        cls, root: str | Path, settings: Mapping[str, Any], storage: Storage = STORAGE, write_settings: bool = True
    ) -> Cache:
        """Opens a cache for writing. write_settings: True for one of the ranks that write to it."""
        folder = join(str(root).removeprefix("file://"), _name(settings))
        if write_settings:
            _remove_parts(folder, "settings.json")
            text = json.dumps(dict(settings), indent=1, sort_keys=True)
            storage.write(join(folder, "settings.json"), text.encode())
        return cls(folder, settings, storage)

    @classmethod
    def open(cls, root: str | Path, settings: Mapping[str, Any], storage: Storage = STORAGE) -> Cache:
        """Opens the tensors with exactly these settings.

        Raises CacheMissing, which tells what the folder has instead, or StorageError if it cannot be reached.
        """
        root = str(root).removeprefix("file://")
        folder = join(root, _name(settings))
        if "settings.json" in storage.names(folder):
            return cls(folder, settings, storage)
        kind, others = settings["kind"], []
        for name in storage.names(root):
            place = join(root, name)
            if name.startswith(f"{kind}-") and "settings.json" in storage.names(place):
                others.append(f"{name}: {_difference(storage.read(join(place, 'settings.json')), settings)}")
        held = "holds no " + kind if not others else f"holds other {kind}:\n  " + "\n  ".join(others)
        advice = f"`stdit data encode MANIFEST --config CFG --out {root}` adds the missing ones."
        raise CacheMissing(f"cache {root} {held}.\n{advice}", others=bool(others))

    @classmethod
    def of_folder(cls, folder: str, storage: Storage = STORAGE) -> Cache:
        """Opens a cache by its own folder, whatever its settings."""
        path = join(folder, "settings.json")
        try:
            return cls(folder, dict(json.loads(storage.read(path))), storage)
        except (ValueError, TypeError) as error:
            raise StditError(f"{path} is damaged ({error}). Run `stdit data encode` again.") from error

    @property
    def name(self) -> str:
        """Of its folder: the kind of tensors, and a hash of the settings."""
        return self.folder.rstrip("/").rpartition("/")[2]

    def reload(self) -> None:
        """Reads the index again."""
        self._index = read_index(self.folder, self.storage)
        self.index = self._index.table
        self._complete = set(self._index.shards)

    def write_index(self) -> None:
        """Merges the shards' indices, as they were read, into one file that opens at once."""
        _remove_parts(self.folder, INDEX)
        write_index(self.folder, self._index, self.storage)

    @property
    def unmerged(self) -> int:
        """The number of shards that the merged index lacks."""
        return len(self._index.shards - self._index.merged)

    def __len__(self) -> int:
        return self.index.num_rows

    def has_shard(self, name: str) -> bool:
        return name in self._complete

    def find(self, keys: Sequence[str] | pa.Array | Hashes) -> np.ndarray:
        """(keys,) positions in the index; −1 for keys that are not there."""
        return self._index.find(keys if isinstance(keys, Hashes) else hash_keys(keys))

    def position(self, key: str) -> int:
        """The index position of a key; −1 if it is not there."""
        return int(self.find([key])[0])

    def failure(self, position: int) -> str | None:
        """Why there is no tensor at an index position, or None."""
        return self.index.column("failure")[int(position)].as_py()

    def shard(self, position: int) -> str:
        return self.index.column("shard")[int(position)].as_py()

    def key(self, position: int) -> str:
        return self.index.column("key")[int(position)].as_py()

    def tensor(self, position: int) -> Tensor:
        """The tensor at an index position, in fp32 (a view of the file if stored as fp32)."""
        name, key = self.shard(position), self.key(position)
        path = join(self.folder, f"{name}.safetensors")
        if is_remote(path):  # opened for this tensor only: open shards could not be dropped from the local cache
            with self.storage.local(path) as local:
                return self._open_shard(name, local).get_tensor(key).float()
        with self._lock:
            shard = self._shards.pop(name, None) or self._open_shard(name, path)
            self._shards[name] = shard  # most recently used last
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
            return shard.get_tensor(key).float()

    def _open_shard(self, name: str, path: str) -> Any:
        try:
            return self.storage.from_disk(path, lambda: safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise StditError(
                f"{join(self.folder, name)}.safetensors cannot be read ({error}). "
                f"Remove {name}.parquet beside it and run `stdit data encode` again."
            ) from error

    def write_shard(self, name: str, tensors: Mapping[str, Tensor], failures: Mapping[str, str]) -> None:
        """Writes a shard: first the tensors, then their index, which makes them count."""
        _remove_parts(self.folder, name)
        if name in self._index.merged:  # what the merged index says of it will not hold
            self.storage.remove(join(self.folder, INDEX))
        content = save({k: t.contiguous() for k, t in tensors.items()}, {"stdit_cache": str(FORMAT)})
        self.storage.write(join(self.folder, f"{name}.safetensors"), content)
        keys = [*tensors, *failures]
        columns = {"key": keys, "shard": [name] * len(keys), "failure": [None] * len(tensors) + [*failures.values()]}
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table(columns, schema=PART), buffer)
        self.storage.write(join(self.folder, f"{name}.parquet"), buffer.getvalue().to_pybytes())
        self._complete.add(name)


def _difference(content: bytes, wanted: Mapping[str, Any]) -> str:
    """How the settings in a settings.json differ from those wanted."""
    try:
        there = json.loads(content)
        names = [name for name in sorted({*wanted, *there.keys()}) if there.get(name) != wanted.get(name)]
    except (ValueError, AttributeError):
        return "its settings.json is damaged"
    return "; ".join(f"{name} {there.get(name)} there, {wanted.get(name)} wanted" for name in names)


def _remove_parts(folder: str, name: str) -> None:
    """Removes unfinished files of this name that a killed process left."""
    if not is_remote(folder):
        for part in Path(folder).glob(f".{name}*.part"):
            part.unlink(missing_ok=True)


def _name(settings: Mapping[str, Any]) -> str:
    text = json.dumps(dict(settings), sort_keys=True)
    return f"{settings['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
