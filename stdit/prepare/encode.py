"""Encodes clips to cached latents and captions to cached embeddings, each once; can be stopped and continued."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from stdit.data.config import DataConfig
from stdit.data.decode.checks import CHANGED, check_content
from stdit.data.load.cache import Cache, cuts, latent_key, latent_settings, text_key, text_settings
from stdit.data.load.index import hash_texts
from stdit.data.load.loader import Example, Loader, local_file
from stdit.data.manifest import Clip, Manifest
from stdit.data.parts import WHOLE, Part
from stdit.data.plan.buckets import Assignment
from stdit.data.plan.split import PlanItem
from stdit.data.remote.paths import join
from stdit.errors import StditError
from stdit.files import part_folder
from stdit.text.places import find_text_encoder
from stdit.weights.families import treatment_of
from stdit.weights.identity import folder_identity, tokenizer_identity

if TYPE_CHECKING:
    from stdit.text.encoders import TextEncoder
    from stdit.vae.families.open_sora import AnyVAE

CLIPS_PER_SHARD = 64
TEXTS_PER_SHARD = 1024
TEXTS_AT_ONCE = 1 << 20  # looked up
BATCH = 4
PRECISION = torch.float32  # of the encoders, whatever dtype the cache stores


@dataclass(frozen=True)
class EncodeResult:
    """How many clips and texts were encoded, and how many clips were there already.

    failures: (clip id, reason) of clips that failed.
    caches: the names of the folders that were written to.
    """

    clips: int
    reused: int
    texts: int
    failures: tuple[tuple[str, str], ...]
    caches: tuple[str, ...]


def vae_identity(path: str | Path) -> str:
    """SHA-256 of a VAE's weights and config. path: its folder, a model folder, or a file."""
    return folder_identity(part_folder(path, "vae"))


def text_identity(path: str | Path, padding: int | None = None) -> dict[str, Any]:
    """All that an embedding depends on besides the text: the key of a cache of texts.

    It has the SHA-256 of the encoder's and the tokenizer's files, and how texts are treated.

    path: the folder that `load_text_encoder` takes.
    padding: `text.padding`, the number of positions that texts are cut to; 0 or None: the treatment's.
    """
    (encoder, tokenizer), treatment = find_text_encoder(path), treatment_of(path)
    return {
        "text_encoder": folder_identity(encoder),
        "tokenizer": tokenizer_identity(tokenizer),
        **asdict(replace(treatment, max_length=padding or treatment.max_length)),
        "precision": str(PRECISION).removeprefix("torch."),
    }


def encode_manifest(
    manifest: Manifest,
    assignment: Assignment,
    config: DataConfig,
    vae: AnyVAE,
    text_encoder: TextEncoder | None,
    out: str | Path,
    *,
    vae_id: str,
    text_id: Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    batch: int = BATCH,
    clips_per_shard: int = CLIPS_PER_SHARD,
    part: Part = WHOLE,
    retry_failed: bool = False,
    on_start: Callable[[int], None] = lambda _: None,
    on_clips: Callable[[int], None] = lambda _: None,
) -> EncodeResult:
    """Caches the latents of every clip that has a shape, and the embeddings of every caption and of "".

    Clips start at their first frame and are cropped at the centre, or are cut in `config.crops` ways. A shard is a
    fixed list of clips, which follows from the manifest. It is encoded in fixed batches and published whole. So the
    same call continues one that was killed, in any number of parts, and the files are the same, byte for byte. A clip
    that cannot be read is recorded as failed. If its file had changed, it is tried again once the file is back that was
    scanned.

    text_encoder: None leaves out the texts.
    out: the cache's folder.
    vae_id, text_id: identify the encoders' weights, as `vae_identity` and `text_identity` do.
    batch: clips or texts in one forward.
    part: encodes every `part.of`-th shard, and does not merge their indices: `merge_caches` does.
    retry_failed: tries shards with failed clips again.
    on_start, on_clips: are called with the number of clips to encode, and of clips just done.
    """
    cut = cuts(config)
    cache = Cache.create(out, latent_settings(config, vae_id), write_settings=part.number == 1)
    shards = list(_shards(cache, manifest, assignment, config.crops, clips_per_shard, retry_failed))
    wanted = sum(len(assignment.rows(bucket)) for bucket in range(len(assignment.shapes))) * config.crops
    reused = wanted - sum(len(items) for _, items in shards)
    # Shards are numbered whether done or not, so that the work of other parts does not change this part's share.
    todo = [(name, items) for number, (name, items) in enumerate(shards) if items and part.has_place(number)]
    on_start(sum(len(items) for _, items in todo))
    loader = Loader(manifest, assignment, cut, seed=0)
    batches = [items[i : i + batch] for _, items in todo for i in range(0, len(items), batch)]
    examples = loader.iterate((0, batch) for batch in batches)
    failures: list[tuple[str, str]] = []
    dtype = getattr(torch, config.cache_dtype)

    def key(example: Example) -> str:
        return latent_key(example.clip_id, example.shape, example.occurrence if config.crops > 1 else None)

    for name, items in todo:
        tensors: dict[str, Tensor] = {}
        failed: dict[str, str] = {}
        for _ in range(0, len(items), batch):
            got = next(examples)
            videos = [example.video for example in got if example.failure is None]
            with torch.no_grad():  # (B, C, T', H', W')
                latents = iter(vae.encode(torch.stack(videos).to(device)).cpu() if videos else ())
            for example in got:
                if (failure := example.failure) is None:
                    stored = next(latents).to(dtype)
                    if torch.isfinite(stored).all():
                        tensors[key(example)] = stored
                        continue
                    path = manifest[example.row].path
                    failure = f"{path}: the VAE's latents are not finite in {dtype}."
                failed[key(example)] = failure
                failures.append((example.clip_id, failure))
            on_clips(len(got))
        cache.write_shard(name, tensors, failed)
    caches, new = [cache], 0
    if text_encoder is not None:
        assert text_id is not None, "a text encoder has an identity"
        caches.append(Cache.create(out, text_settings(config, text_id), write_settings=part.number == 1))
        new = _encode_texts(_texts(manifest, assignment), text_encoder, caches[-1], dtype, batch, part)
    if part.is_whole:
        for written in caches:
            written.reload()
            written.write_index()
    names = tuple(written.name for written in caches)
    return EncodeResult(sum(map(len, batches)) - len(failures), reused, new, tuple(failures), names)


def merge_caches(out: str | Path, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Merges the indices of the shards that the parts of `encode_manifest` wrote, so that a cache opens at once.

    names: `EncodeResult.caches`. Returns the entries of each, and how many of them are failures.
    """
    found = {}
    for name in names:
        cache = Cache.of_folder(join(str(out), name))
        cache.write_index()
        found[name] = (len(cache), cache.index.num_rows - cache.index.column("failure").null_count)
    return found


def _shards(
    cache: Cache, manifest: Manifest, assignment: Assignment, crops: int, clips_per_shard: int, retry_failed: bool
) -> Iterator[tuple[str, list[PlanItem]]]:
    """(name, clips to encode) of every shard; no clips if it exists. A shard's name follows from its clips."""
    for bucket, shape in enumerate(assignment.shapes):
        rows = assignment.rows(bucket)
        ids = manifest.ids.take(rows).to_pylist()
        for cut in range(crops):
            keys = [latent_key(clip_id, shape, cut if crops > 1 else None) for clip_id in ids]
            positions = cache.find(keys)
            for first in range(0, len(rows), clips_per_shard):
                part = slice(first, first + clips_per_shard)
                name = f"{shape}-{hashlib.sha256(' '.join(keys[part]).encode()).hexdigest()[:16]}"
                there = positions[part]
                # If the manifest has grown, another shard may have some of the clips: they are not encoded again.
                todo = (there < 0) & (not cache.has_shard(name))
                failed = [
                    p
                    for row, p in zip(rows[part], there)
                    if p >= 0 and (why := cache.failure(p)) and (retry_failed or _is_back(why, manifest[int(row)]))
                ]
                if failed:  # in this shard, which is written again, or in one made from a smaller manifest
                    todo |= np.isin(there, failed + [p for p in there if p >= 0 and cache.shard(p) == name])
                yield name, [PlanItem(int(row), cut, bucket) for row in rows[part][todo]]


def _is_back(failure: str, clip: Clip) -> bool:
    """Whether a clip failed because its file had changed, and the file that was scanned is back."""
    if CHANGED not in failure:
        return False
    try:
        with local_file(clip) as path:
            check_content(path, clip.sha256)
    except (StditError, OSError):
        return False
    return True


def _texts(manifest: Manifest, assignment: Assignment) -> list[str]:
    return sorted({"", *_captions(manifest, assignment).to_pylist()})


def _captions(manifest: Manifest, assignment: Assignment) -> pa.Array:
    """The distinct captions of the clips that have a shape."""
    rows = assignment.rows()
    captions = manifest.table.column("captions")
    if len(rows) < len(manifest):
        captions = captions.take(rows)
    return pc.unique(pc.struct_field(pc.list_flatten(captions), "text"))


def check_texts(manifest: Manifest, assignment: Assignment, cache: Cache) -> None:
    """Raises StditError if the cache lacks a caption of a clip that has a shape."""
    texts, first = _captions(manifest, assignment), ""
    missing = int(cache.position(text_key("")) < 0)
    for begin in range(0, len(texts), TEXTS_AT_ONCE):  # there may be ten million
        block = texts[begin : begin + TEXTS_AT_ONCE].to_pylist()
        gone = np.flatnonzero(cache.find(hash_texts(block)) < 0)
        first = first or (block[gone[0]] if len(gone) else "")
        missing += len(gone)
    if missing:
        total = len(texts) + (pc.index(texts, "").as_py() < 0)  # "" always has one
        raise StditError(
            f"{cache.folder} lacks the embeddings of {missing} of {total} captions, such as "
            f"{first[:80]!r}. Run `stdit data encode {manifest.source} --config CFG --out "
            f"{cache.folder.rpartition('/')[0]}`."
        )


def _encode_texts(
    texts: list[str], encoder: TextEncoder, cache: Cache, dtype: torch.dtype, batch: int, part: Part
) -> int:
    new = 0
    known = cache.find(hash_texts(texts))
    for number, first in enumerate(range(0, len(texts), TEXTS_PER_SHARD)):
        if not part.has_place(number):
            continue
        there = slice(first, first + TEXTS_PER_SHARD)
        name = f"text-{hashlib.sha256(''.join(map(text_key, texts[there])).encode()).hexdigest()[:16]}"
        todo = [text for text, at in zip(texts[there], known[there]) if at < 0]
        if cache.has_shard(name) or not todo:
            continue
        tensors: dict[str, Tensor] = {}
        for i in range(0, len(todo), batch):
            with torch.no_grad():
                embeddings = encoder.encode(todo[i : i + batch])
            for text, embedding in zip(todo[i : i + batch], embeddings):
                tensors[text_key(text)] = stored = embedding.detach().cpu().to(dtype)
                if not torch.isfinite(stored).all():
                    raise StditError(
                        f"the text encoder's embedding of the caption {text!r} is not finite in {dtype}. "
                        f"Set data.cache_dtype to bfloat16 or float32, or change that caption."
                    )
        cache.write_shard(name, tensors, {})
        new += len(todo)
    return new
