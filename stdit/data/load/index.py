"""The index of a cache: which shard has which key, sorted by a hash of the key, so that it can be searched in place.

Every shard has a small index of its own, which makes it count. `index.arrow` merges them: it is mapped into memory, so
that all ranks of a machine share one copy and opening it reads nothing. Shards that came later are read beside it.

A key is a SHA-256 in hex, or one with "/" and more behind it. Its hash is the first 128 bits of that SHA-256, combined
by exclusive or with those of the SHA-256 of what is behind the "/". A key that is not such (clips of other programs may
have any id) is hashed whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stdit.data.remote.failures import StorageError
from stdit.data.remote.paths import join
from stdit.data.remote.storage import Storage, in_parallel
from stdit.errors import StditError

FORMAT = b"1"  # of `index.arrow`; another one is not used
NAME = "index.arrow"
PART = pa.schema([("key", pa.string()), ("shard", pa.string()), ("failure", pa.string())])  # of a shard's own index
_ROWS = pa.schema([(name, pa.large_string()) for name in PART.names])  # 64-bit offsets: keys may exceed 2 GB
_SCHEMA = pa.schema(
    [
        ("high", pa.uint64()),  # of the key's hash
        ("low", pa.uint64()),
        ("key", pa.large_string()),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("failure", pa.large_string()),
    ],
    {"stdit_cache_index": FORMAT},
)
_ID = 64  # hex digits of a SHA-256
_BLOCK = 1 << 20  # keys that are hashed at once, to bound the memory
_NIBBLE = np.full(256, 255, np.uint8)
_NIBBLE[np.frombuffer(b"0123456789abcdef", np.uint8)] = np.arange(16)


class Hashes(NamedTuple):
    """(keys,) uint64 each: the two halves of the hashes of keys."""

    high: np.ndarray
    low: np.ndarray


class ClipIds:
    """The ids of clips, hashed once for all the keys that begin with them."""

    def __init__(self, ids: pa.ChunkedArray) -> None:
        self._ids = ids
        self._hashes, usual = _hash_all(ids)
        self._odd = np.flatnonzero(~usual)

    def keys(self, rows: np.ndarray, rest: str) -> Hashes:
        """The hashes of the keys "ID/rest" of these rows."""
        high, low = _hash(rest)
        found = Hashes(self._hashes.high[rows] ^ np.uint64(high), self._hashes.low[rows] ^ np.uint64(low))
        for place in np.flatnonzero(np.isin(rows, self._odd)) if len(self._odd) else ():
            found.high[place], found.low[place] = _hash(f"{self._ids[int(rows[place])].as_py()}/{rest}")
        return found


def _hash(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


def hash_keys(keys: pa.Array | pa.ChunkedArray | Sequence[str]) -> Hashes:
    """The hashes of keys."""
    return _hash_all(keys if isinstance(keys, pa.Array | pa.ChunkedArray) else pa.array(keys, pa.large_string()))[0]


def hash_texts(texts: Sequence[str]) -> Hashes:
    """The hashes of the keys of texts, which are their SHA-256."""
    digests = b"".join(hashlib.sha256(text.encode()).digest()[:16] for text in texts)
    high, low = np.frombuffer(digests, ">u8").reshape(-1, 2).T
    return Hashes(high.astype(np.uint64), low.astype(np.uint64))


def _hash_all(keys: pa.Array | pa.ChunkedArray) -> tuple[Hashes, np.ndarray]:
    """The hashes of keys, and which of them begin with a SHA-256, (keys,) bool."""
    blocks = [_hash_block(keys.slice(first, _BLOCK)) for first in range(0, len(keys), _BLOCK)]
    if not blocks:
        return Hashes(np.empty(0, np.uint64), np.empty(0, np.uint64)), np.empty(0, bool)
    high, low, usual = map(np.concatenate, zip(*blocks))
    return Hashes(high, low), usual


def _hash_block(keys: pa.Array | pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    keys = (keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys).cast(pa.large_string())
    ids, rest = pc.utf8_slice_codeunits(keys, 0, _ID), pc.utf8_slice_codeunits(keys, _ID).dictionary_encode()
    rests, which = rest.dictionary.to_pylist(), rest.indices.to_numpy()
    usual = np.array([text[:1] in ("", "/") for text in rests], bool)[which]
    usual &= pc.binary_length(ids).to_numpy() == _ID
    rows = np.flatnonzero(usual)
    fixed = ids.filter(pa.array(usual)).cast(pa.large_binary()).cast(pa.binary(_ID))
    digits = np.frombuffer(fixed.buffers()[1] or b"", np.uint8)[fixed.offset * _ID :][: len(rows) * _ID]
    nibbles = _NIBBLE[digits].reshape(-1, _ID)
    usual[rows[nibbles.max(1, initial=0) > 15]] = False
    halves = (nibbles[:, 0:32:2] << 4 | nibbles[:, 1:32:2]).view(">u8")  # (rows, 2)
    of_rest = np.array([_hash(text[1:]) if text else (0, 0) for text in rests], np.uint64)
    found = np.zeros((len(keys), 2), np.uint64)
    found[rows] = halves ^ of_rest[which[rows]]
    for row in np.flatnonzero(~usual).tolist():
        found[row] = _hash(keys[row].as_py())
    return found[:, 0], found[:, 1], usual


@dataclass(frozen=True)
class Index:
    """The keys of a cache with their shards and failures, sorted by hash. Positions are rows of `table`.

    shards: the names of the shards whose keys it has. merged: those that `index.arrow` had.
    """

    table: pa.Table
    shards: frozenset[str]
    merged: frozenset[str]

    @cached_property
    def hashes(self) -> Hashes:
        """Of all keys: views of the file where it is mapped."""
        return Hashes(*(_numbers(self.table.column(name)) for name in ("high", "low")))

    def find(self, wanted: Hashes) -> np.ndarray:
        """(keys,) the positions of keys; −1 for those that are not there. Of a key with a failure and a tensor, the
        tensor's."""
        known, count = self.hashes, self.table.num_rows
        order = np.argsort(wanted.high)  # neighbours are found on the same pages
        high, low = wanted.high[order], wanted.low[order]
        at = np.searchsorted(known.high, high, "left")
        open_, found = np.arange(len(at)), np.full(len(at), -1, np.int64)
        while len(open_):  # once, unless two keys share 64 bits
            open_ = open_[at[open_] < count]
            open_ = open_[known.high[at[open_]] == high[open_]]
            same = known.low[at[open_]] == low[open_]
            found[open_[same]] = at[open_[same]]
            open_ = open_[~same]
            at[open_] += 1
        positions = np.empty_like(found)
        positions[order] = found
        return positions


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return column.chunk(0).to_numpy() if column.num_chunks == 1 else column.to_numpy()


def read_index(folder: str, storage: Storage) -> Index:
    """The index of the shards in a cache's folder: what `index.arrow` has, and those beside it."""
    names = storage.names(folder)
    there = frozenset(name.removesuffix(".parquet") for name in names if name.endswith(".parquet") and name[0] != ".")
    table, merged = _SCHEMA.empty_table(), frozenset[str]()
    if NAME in names and (found := _merged(join(folder, NAME), storage)) is not None:
        covered = frozenset(found.column("shard").chunk(0).dictionary.to_pylist())
        if covered <= there:  # else a shard was removed
            table, merged = found, covered
    if new := sorted(there - merged):
        paths = [join(folder, f"{name}.parquet") for name in new]
        contents = in_parallel(storage.read, paths)
        parts = [_part(path, content) for path, content in zip(paths, contents)]
        table = _sorted(pa.concat_tables([table.select(_ROWS.names).cast(_ROWS), *parts]))
    return Index(table, there, merged)


def merge(rows: pa.Table, shards: frozenset[str]) -> Index:
    """The index of shards whose own indices are these rows, as `write_index` takes it."""
    return Index(_sorted(rows), shards, frozenset())


def _sorted(rows: pa.Table) -> pa.Table:
    """A table of rows by hash. Of equal keys, those with a tensor come before failures, in the order of the rows."""
    hashes = hash_keys(rows.column("key"))
    failed = pc.is_valid(rows.column("failure")).to_numpy()
    rank = np.lexsort((failed, hashes.high)) if failed.any() else np.argsort(hashes.high, kind="stable")
    order = pa.array(rank)
    shards = rows.column("shard").combine_chunks().dictionary_encode()
    names = pc.sort_indices(shards.dictionary)  # the same file, whatever the order of shards
    names = shards.dictionary.take(names).cast(pa.string())
    place = pc.index_in(shards.dictionary.cast(pa.string()), value_set=names).take(shards.indices)
    columns = [
        pa.array(hashes.high[rank]),
        pa.array(hashes.low[rank]),
        rows.column("key").combine_chunks().take(order),
        pa.DictionaryArray.from_arrays(place.take(order), names),
        rows.column("failure").combine_chunks().take(order),
    ]
    return pa.Table.from_arrays(columns, schema=_SCHEMA)


def _part(path: str, content: bytes) -> pa.Table:
    try:
        # there may be 100,000 such small files, for which read_table takes five times as long
        return pq.ParquetFile(pa.BufferReader(content)).read(use_threads=False).cast(PART).cast(_ROWS)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise StditError(
            f"{path} cannot be read as Parquet ({error}). Remove it and run `stdit data encode` again."
        ) from error


def _merged(path: str, storage: Storage) -> pa.Table | None:
    """`index.arrow`, mapped; None if another version wrote it, or it was removed meanwhile."""
    try:
        with storage.local(path) as local:
            table = storage.from_disk(path, lambda: pa.ipc.open_file(pa.memory_map(local)).read_all())
        return table if table.schema.equals(_SCHEMA, check_metadata=True) and table.column("shard").num_chunks else None
    except FileNotFoundError:
        return None
    except StorageError as error:
        if error.reason != "missing":
            raise
        return None
    except (pa.ArrowException, ValueError) as error:
        raise StditError(f"{path} cannot be read ({error}). Remove it: `stdit data encode` writes it again.") from error


def write_index(folder: str, index: Index, storage: Storage) -> None:
    """Writes `index.arrow`, if there are shards that it does not have."""
    if index.shards == index.merged:
        return
    with storage.publish(join(folder, NAME)) as part, pa.OSFile(str(part), "wb") as file:
        with pa.ipc.new_file(file, _SCHEMA) as writer:
            writer.write_table(index.table.combine_chunks(), max_chunksize=max(1, index.table.num_rows))
