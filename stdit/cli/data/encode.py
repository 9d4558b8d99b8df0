"""`stdit data encode`: encodes latents and text embeddings into a cache."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

from typer import Option

from stdit.cli.common.options import (
    Device,
    Json,
    Manifests,
    Memory,
    PartOf,
    local_gpu,
    out_store,
    pick_device,
    split_words,
    when_stopped,
)
from stdit.errors import StditError, error_context
from stdit.heartbeat import HEARTBEAT, counting_bar


@when_stopped("What is encoded is kept: the same command goes on from there.")
def encode(
    manifests: Manifests,
    config: Annotated[Path, Option(help="The run's config: its shapes, fps, VAE and text encoder are used.")],
    out: Annotated[
        str, Option(metavar="CACHE", parser=out_store, help="The cache's folder or URL; existing entries are kept.")
    ],
    batch: Annotated[int, Option(min=1, max=100_000, help="Clips that the VAE encodes at once.")] = 4,
    crops: Annotated[
        int,
        Option(
            min=0, max=1000, help="Cuts per clip (data.crops), of which training draws one each time. 0: the config's."
        ),
    ] = 0,
    memory: Memory = None,
    device: Device = None,
    retry_failed: Annotated[bool, Option(help="Retry clips that could not be read before.")] = False,
    part: PartOf = None,
    as_json: Json = False,
) -> None:
    """Encode the latents of a manifest's clips and the embeddings of its captions, each once.

    If interrupted, the same command resumes, in any number of parts. With --part, many machines share the work, and
    `stdit data merge` checks that none is missing and merges their index.

    Example: stdit data encode videos/manifest.parquet --config toy/dit --out videos/cache
    """
    from stdit.cli.common.parts import finish_part, part_answer, take_part
    from stdit.data.load.loader import check_files
    from stdit.data.manifests import named, read_manifests
    from stdit.data.plan.buckets import assign
    from stdit.data.remote.storage import STORAGE
    from stdit.prepare.encode import PRECISION, encode_manifest, text_identity, vae_identity
    from stdit.training.config import load_config
    from stdit.training.setup.objective import LONGER, check_vae, long_captions
    from stdit.training.setup.resolve import resolve
    from stdit.weights.io import load_vae

    places, overrides = split_words(manifests)
    manifest = named(places)
    mine = take_part(part, out, "encode")
    run = resolve(load_config(config, [*overrides, *([f"data.crops={crops}"] if crops else [])]))
    if run.vae.path is None:
        raise StditError(f"{config} sets no vae.path. Encoding needs the folder of a trained VAE.")
    check_vae(run.vae.path)
    HEARTBEAT.doing(f"reading {manifest}")
    clips = read_manifests(places)
    check_files(clips)
    assignment = assign(clips, run.data)
    left_out = ", ".join(f"{n} {reason}" for reason, n in assignment.reasons.items())
    if not len(assignment.rows()):
        raise StditError(f"{manifest}: no clip fits one of data.shapes ({left_out or 'it is empty'}).")
    device = pick_device(device, local_gpu())
    HEARTBEAT.doing(f"loading {run.vae.path}")
    with error_context("vae.path"):
        vae = load_vae(run.vae.path, dtype=PRECISION, device=device).eval()
    vae.memory = memory
    for shape in assignment.shapes:
        with error_context(f"data.shapes: {shape}"):
            shape.latent(vae.config.stride)
    text_encoder = text_id = None
    if run.text.path:
        from stdit.text.loading import load_text_encoder
        from stdit.weights.families import treatment_of

        HEARTBEAT.doing(f"loading {run.text.path}")
        with error_context("text.path"):
            treatment, padding = treatment_of(run.text.path), run.text.padding
            text_encoder = load_text_encoder(
                run.text.path, treatment, max_length=padding or None, dtype=PRECISION, device=device
            ).eval()
            text_id = text_identity(run.text.path, padding)
    found = long_captions(run, clips, assignment) if mine.number == 1 else None
    if found is not None and found.count:
        print(f"{found}{LONGER}", file=sys.stderr, flush=True)
    with counting_bar("encoding", hidden=mine.is_quiet) as (on_start, on_clips):
        done = encode_manifest(
            clips, assignment, replace(run.data, verify=True),  # the cache is addressed by the files' content
            vae, text_encoder, out, vae_id=vae_identity(run.vae.path), text_id=text_id, device=device, batch=batch,
            part=mine, retry_failed=retry_failed, on_start=on_start, on_clips=on_clips,
        )  # fmt: skip
    then = ""
    if not mine.is_whole:
        settings = {"manifest": clips.hash, "caches": list(done.caches), "crops": run.data.crops, "batch": batch}
        found_failures = [failure for _, failure in done.failures]
        then = " " + finish_part(mine, out, "encode", settings, found={"failures": found_failures})
    if as_json:
        answer = {
            "cache": out,
            "clips": done.clips,
            "reused": done.reused,
            "texts": done.texts,
            "retries": STORAGE.retries,
            "long_captions": asdict(found) if found else None,
            "failures": [{"id": clip_id, "failure": failure} for clip_id, failure in done.failures],
            "left_out": assignment.reasons,
        }
        print(json.dumps(part_answer(mine, answer), ensure_ascii=False))
        return
    for _, failure in done.failures:
        print(f"skipped: {failure}")
    what = out if mine.is_whole else f"part {mine} of {out}"
    print(
        f"{what}: {done.clips} clips encoded, {done.reused} were there, {done.texts} texts, {len(done.failures)} failed"
        + (f", {STORAGE.retries} requests retried" if STORAGE.retries else "")
        + (f"; left out: {left_out}" if left_out else "")
        + f".{then}"
    )
