"""How a run with millions of clips starts: what each rank reads and computes before its first step, by the clock, in
CPU seconds and in memory. Nothing is decoded, and no model is built.

python benchmarks/start.py FOLDER --clips 10000000            # writes a manifest and two caches' indices, then 8 ranks
python benchmarks/start.py FOLDER --clips 1000000 --unmerged  # also without index.arrow, from the shards' own indices
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from planner import COST, columns, trace

from stdit.data.config import DataConfig, PlanConfig
from stdit.data.load.cache import Cache, latent_settings, text_key, text_settings
from stdit.data.load.index import NAME, PART, merge, write_index
from stdit.data.load.loader import Loader
from stdit.data.manifest import SCHEMA, read_manifest
from stdit.data.plan.buckets import assign
from stdit.data.plan.planner import Plan
from stdit.data.plan.split import split
from stdit.prepare.encode import CLIPS_PER_SHARD, TEXTS_PER_SHARD, check_texts

LIMIT = 3600.0  # seconds for a rank
WANTED = 60.0  # seconds for a rank to start
STEPS = 8  # of which every rank deals its share
TEXT = "a person in a blue jacket walks along a street in the rain while cars pass by, seen from above, take "
ROWS = 1 << 20  # written at once


def settings() -> tuple[DataConfig, list[str]]:
    _, shapes, _ = trace(1)
    names = [str(shape) for shape in shapes]
    return DataConfig(shapes=names, fps=16.0, start="first", crop="centre"), names


def texts_of(width: int, data: np.ndarray) -> pa.Array:
    """(rows, width) uint8 characters as texts."""
    offsets = np.arange(0, data.size + 1, width, dtype=np.int64)
    return pa.Array.from_buffers(pa.large_string(), len(data), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def hexadecimal(rows: int, random: np.random.Generator) -> pa.Array:
    return texts_of(64, np.frombuffer(b"0123456789abcdef", np.uint8)[random.integers(0, 16, (rows, 64), np.uint8)])


def numbered(text: str, first: int, rows: int) -> pa.Array:
    """Texts that end in a number of eight digits."""
    found = np.empty((rows, len(text) + 8), np.uint8)
    found[:, : len(text)] = np.frombuffer(text.encode(), np.uint8)
    numbers = np.arange(first, first + rows)
    for digit in range(8):
        found[:, -1 - digit] = 48 + numbers // 10**digit % 10
    return texts_of(found.shape[1], found)


def write_manifest(path: Path, clips: int) -> None:
    bucket, shapes, _ = trace(clips)
    random = np.random.default_rng(0)
    kind = SCHEMA.field("captions").type
    schema = SCHEMA.append(pa.field("file_state", pa.string()))
    with pq.ParquetWriter(path, schema.with_metadata({"stdit_manifest": "1"}), compression="zstd") as writer:
        for first in range(0, clips, ROWS):
            rows = min(ROWS, clips - first)
            found: dict[str, Any] = columns(bucket[first : first + rows], shapes, first)
            caption = pa.StructArray.from_arrays([numbered(TEXT, first, rows), np.ones(rows)], ["text", "weight"])
            offsets = pa.array(np.arange(rows + 1), pa.int64())
            found |= {"id": hexadecimal(rows, random).cast(pa.string()), "path": numbered("shard/clip-", first, rows)}
            found |= {"captions": pa.LargeListArray.from_arrays(offsets, caption).cast(kind)}
            found |= {"sha256": hexadecimal(rows, random).cast(pa.string())}
            found |= {"file_state": pa.array(["[1234567, 1700000000000000000]"] * rows)}
            writer.write_table(pa.table([found[name] for name in schema.names], schema=schema))


def write_indices(cache: Cache, keys: pa.ChunkedArray, each: int, unmerged: bool) -> None:
    """The merged index, and a file for each shard: its own index, or an empty file where the merged one is all that is
    read. There are no tensors."""
    names = pa.array([f"shard-{first:012d}" for first in range(0, len(keys), each)], pa.large_string())
    shard = names.take(pa.array(np.arange(len(keys)) // each))
    rows = pa.table({"key": keys, "shard": shard, "failure": pa.nulls(len(keys), pa.large_string())})
    for number, name in enumerate(names.to_pylist()):
        path = Path(cache.folder, f"{name}.parquet")
        if unmerged:
            pq.write_table(rows.slice(number * each, each).cast(PART), path)
        else:
            path.touch()
    write_index(cache.folder, merge(rows, frozenset(names.to_pylist())), cache.storage)


def prepare(folder: Path, clips: int, unmerged: bool) -> None:
    """Writes the manifest and the caches' indices, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "manifest.parquet"
    if path.exists():
        return
    config, _ = settings()
    write_manifest(folder / "part.parquet", clips)
    manifest = read_manifest(folder / "part.parquet")
    assignment = assign(manifest, config)
    keys = [
        pc.binary_join_element_wise(
            manifest.ids.take(assignment.rows(bucket)).cast(pa.large_string()),
            pa.scalar(str(shape), pa.large_string()),
            pa.scalar("/", pa.large_string()),
        )
        for bucket, shape in enumerate(assignment.shapes)
    ]
    clip_keys = pa.chunked_array([chunk for array in keys for chunk in array.chunks])
    write_indices(Cache.create(folder / "cache", latent_settings(config, "vae")), clip_keys, CLIPS_PER_SHARD, unmerged)
    del keys, clip_keys
    texts = pc.unique(pc.struct_field(pc.list_flatten(manifest.table.column("captions")), "text"))
    blocks = [texts.slice(first, ROWS).to_pylist() for first in range(0, len(texts), ROWS)]
    text_keys = pa.chunked_array([pa.array(map(text_key, block), pa.large_string()) for block in [[""], *blocks]])
    write_indices(
        Cache.create(folder / "cache", text_settings(config, {"text_encoder": "text"})), text_keys, TEXTS_PER_SHARD,
        unmerged,
    )  # fmt: skip
    (folder / "part.parquet").rename(path)


def start(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What a rank does: seconds by the clock and of CPU, by part."""
    found: dict[str, Any] = {"rank": rank, "clock": {}, "cpu": {}}
    last = [time.perf_counter(), time.process_time()]

    def done(what: str) -> None:
        now = [time.perf_counter(), time.process_time()]
        found["clock"][what], found["cpu"][what] = now[0] - last[0], now[1] - last[1]
        last[:] = now

    config, _ = settings()
    manifest = read_manifest(folder / "manifest.parquet")
    done("manifest")
    assignment = assign(manifest, config)
    done("buckets")
    _ = manifest.hash
    done("hash")
    tokens = [shape.grid((4, 8, 8), (1, 2, 2)).tokens for shape in assignment.shapes]
    plan = Plan(assignment.bucket, tokens, COST, PlanConfig(1.1 * ranks), 0, source=manifest.hash)
    _ = plan.hash
    found["steps"], found["plan_hash"] = plan.num_steps, plan.hash
    packs = [split(plan.items(step), ranks, 4 * max(tokens)) for step in range(STEPS)]
    own = [[item.row for micro in step for item in micro[rank]] for step in packs]
    found["own"] = own
    done("plan")
    cache = Cache.open(folder / "cache", latent_settings(config, "vae"))
    text_cache = Cache.open(folder / "cache", text_settings(config, {"text_encoder": "text"}))
    done("caches")
    if rank == 0:
        check_texts(manifest, assignment, text_cache)
    done("texts (rank 0)")
    loader = Loader(manifest, assignment, config, 0, cache, text_cache)
    assert (loader.positions[0][own[0]] >= 0).all()
    done("places of the latents")
    found["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    mapped = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "RssFile" in line]
    found["mapped_gib"] = int(mapped[0]) / 2**20 if mapped else None
    return found


def check_shares(rows: list[dict[str, Any]], folder: Path) -> str:
    """Whether all ranks have one plan, and their clips of its first steps are each clip of these steps once."""
    config, _ = settings()
    assert len({row["plan_hash"] for row in rows}) == 1
    manifest = read_manifest(folder / "manifest.parquet")
    assignment = assign(manifest, config)
    tokens = [shape.grid((4, 8, 8), (1, 2, 2)).tokens for shape in assignment.shapes]
    plan = Plan(assignment.bucket, tokens, COST, PlanConfig(1.1 * len(rows)), 0, source=manifest.hash)
    assert plan.hash == rows[0]["plan_hash"]
    seen = set()
    for step in range(STEPS):
        shares = sorted(clip for row in rows for clip in row["own"][step])
        assert shares == sorted(plan.items(step).row.tolist()) and not seen & set(shares)
        seen |= set(shares)
    return f"{len(seen):,} clips in the first {STEPS} of {plan.num_steps:,} steps, each at one of {len(rows)} ranks"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clips", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--measure", type=int, nargs="+", help="ranks that are run, one after another (default: all)")
    parser.add_argument("--unmerged", action="store_true", help="also without index.arrow")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON; what it has of other numbers of clips is kept")
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(start(args.folder, args.rank, args.ranks)))
        return
    begun = time.perf_counter()
    prepare(args.folder, args.clips, args.unmerged)
    print(f"inputs after {time.perf_counter() - begun:.0f} s", flush=True)
    found = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for merged in (True, False) if args.unmerged else (True,):
        if not merged:
            for path in args.folder.glob(f"cache/*/{NAME}"):
                path.rename(path.with_name(f".{NAME}"))
        rows = []
        for rank in args.measure or range(args.ranks):
            words = [sys.executable, __file__, str(args.folder), "--ranks", str(args.ranks), "--rank", str(rank)]
            answer = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=True)
            row = json.loads(answer.stdout.splitlines()[-1]) | {"clips": args.clips, "merged": merged}
            clock, cpu = sum(row["clock"].values()), sum(row["cpu"].values())
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row["clock"].items())
            index = "merged index" if merged else "indices of shards"
            memory = f"peak {row['peak_gib']:.2f} GiB, of which mapped {row['mapped_gib']:.2f}"
            print(f"{args.clips:,} clips, rank {rank} of {args.ranks}, {index}: {clock:.1f} s by the clock,")
            print(f"  {cpu:.1f} s of CPU (wanted: {WANTED:g}); {memory}; {parts}", flush=True)
            rows.append(row)
            kept = {name: value for name, value in row.items() if name != "own"}
            found[f"{args.clips} clips, rank {rank}, {'merged' if merged else 'shards'}"] = kept
        if len(rows) == args.ranks:
            print(check_shares(rows, args.folder), flush=True)
        if not merged:
            for path in args.folder.glob(f"cache/*/.{NAME}"):
                path.rename(path.with_name(NAME))
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
