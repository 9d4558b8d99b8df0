"""The cache: tensors in safetensors shards with a Parquet index, addressed by content. Read through memory maps.

    CACHE/latents-0123456789abcdef/settings.json              what made them: VAE identity, fps, dtype, …
                                   832x480x81-….safetensors   one tensor a key
                                   832x480x81-….parquet       its keys; a shard without one is not there
    CACHE/text-…/                                          the same for text embeddings

The folder's name is the hash of the settings, so another VAE never reads, and never mixes with, this one's latents.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stdit.data.buckets import DataConfig
from stdit.errors import StditError
from stdit.files import publish, publish_text
from stdit.shapes import VideoShape

if TYPE_CHECKING:
    import torch

FORMAT = 1
_INDEX = pa.schema([("key", pa.string()), ("shard", pa.string()), ("failure", pa.string())])
_OPEN_SHARDS = 64


def latent_settings(config: DataConfig, vae_identity: str) -> dict[str, Any]:
    """What decides a latent besides the clip and its shape."""
    return {
        "format": FORMAT,
        "kind": "latents",
        "vae": vae_identity,
        "fps": float(config.fps),
        "start": "first",
        "crop": "centre",
        "dtype": config.cache_dtype,
    }


def text_settings(config: DataConfig, text_encoder_identity: str) -> dict[str, Any]:
    return {"format": FORMAT, "kind": "text", "text_encoder": text_encoder_identity, "dtype": config.cache_dtype}


def latent_key(clip_id: str, shape: VideoShape) -> str:
    return f"{clip_id}/{shape}"


def text_key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Cache:
    """Tensors of one settings. `open` for reading; `create` also for writing."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        self._lock = Lock()
        self._shards: OrderedDict[str, Any] = OrderedDict()
        self.reload()

    @classmethod
    def create(cls, root: str | Path, settings: Mapping[str, Any]) -> Cache:
        folder = Path(root) / _name(settings)
        folder.mkdir(parents=True, exist_ok=True)
        publish_text(folder / "settings.json", json.dumps(dict(settings), indent=1, sort_keys=True))
        return cls(folder, settings)

    @classmethod
    def open(cls, root: str | Path, settings: Mapping[str, Any]) -> Cache:
        """The tensors made with exactly these settings; otherwise an error that says what the folder holds instead."""
        folder = Path(root) / _name(settings)
        if (folder / "settings.json").is_file():
            return cls(folder, settings)
        kind, others = settings["kind"], []
        for path in sorted(Path(root).glob(f"{kind}-*/settings.json")):
            other = json.loads(path.read_text())
            names = sorted({*settings, *other})
            differs = [
                f"{n} {other.get(n)} there, {settings.get(n)} wanted" for n in names if other.get(n) != settings.get(n)
            ]
            others.append(f"{path.parent.name}: {'; '.join(differs)}")
        held = "holds no " + kind if not others else f"holds other {kind}:\n  " + "\n  ".join(others)
        raise StditError(
            f"cache {root} {held}.\n`stdit data encode MANIFEST --config CFG --out {root}` adds those wanted here."
        )

    def reload(self) -> None:
        """Reads the index anew."""
        parts = [pq.read_table(path, schema=_INDEX) for path in sorted(self.folder.glob("*.parquet"))]
        self.index = pa.concat_tables(parts) if parts else _INDEX.empty_table()
        # keys begin with a SHA-256 in hex: its first 8 bytes, sorted, find one key among millions in 16 bytes a key
        prefixes = "".join(pc.utf8_slice_codeunits(self.index.column("key"), 0, 16).to_pylist())
        numbers = np.frombuffer(bytes.fromhex(prefixes), ">u8").astype(np.uint64)
        self._order = np.argsort(numbers, kind="stable")
        self._sorted = numbers[self._order]

    def __len__(self) -> int:
        return self.index.num_rows

    def has_shard(self, name: str) -> bool:
        return (self.folder / f"{name}.parquet").is_file()

    def find(self, keys: Sequence[str] | pa.Array) -> np.ndarray:
        """(keys,) positions in the index, −1 for a key that is not there."""
        found = pc.index_in(pa.array(keys, pa.string()), value_set=self.index.column("key"))
        return found.fill_null(-1).to_numpy(zero_copy_only=False)

    def position(self, key: str) -> int:
        """The position of one key in the index, or −1."""
        number = np.uint64(int(key[:16], 16))
        low, high = np.searchsorted(self._sorted, number, "left"), np.searchsorted(self._sorted, number, "right")
        return next((int(p) for p in self._order[low:high] if self.key(p) == key), -1)

    def failure(self, position: int) -> str | None:
        """Why there is no tensor at this position of the index, or None."""
        return self.index.column("failure")[int(position)].as_py()

    def key(self, position: int) -> str:
        return self.index.column("key")[int(position)].as_py()

    def tensor(self, position: int) -> torch.Tensor:
        """The tensor at a position of the index, in fp32 (a view of the file where it is stored so)."""
        name, key = self.index.column("shard")[int(position)].as_py(), self.key(position)
        with self._lock:
            shard = self._shards.pop(name, None) or self._open_shard(name)
            self._shards[name] = shard  # the most recently used last
            if len(self._shards) > _OPEN_SHARDS:
                self._shards.popitem(last=False)
            return shard.get_tensor(key).float()

    def _open_shard(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"{name}.safetensors"
        try:
            return safe_open(str(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise StditError(
                f"{path} cannot be read ({error}). Remove {name}.parquet beside it and run `stdit data encode` again."
            ) from error

    def write_shard(self, name: str, tensors: Mapping[str, torch.Tensor], failures: Mapping[str, str]) -> None:
        """Publishes a shard: the tensors first, then, renamed into place, the index part that makes them count."""
        from safetensors.torch import save

        metadata = {"stdit_cache": str(FORMAT)}
        with publish(self.folder / f"{name}.safetensors") as part:
            part.write_bytes(save({k: t.contiguous() for k, t in tensors.items()}, metadata))
        keys = [*tensors, *failures]
        columns = [keys, [name] * len(keys), [None] * len(tensors) + list(failures.values())]
        table = pa.table([pa.array(c, f.type) for c, f in zip(columns, _INDEX)], schema=_INDEX)
        with publish(self.folder / f"{name}.parquet") as part:
            pq.write_table(table, part)


def _name(settings: Mapping[str, Any]) -> str:
    text = json.dumps(dict(settings), sort_keys=True)
    return f"{settings['kind']}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
