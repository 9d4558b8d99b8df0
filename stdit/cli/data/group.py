"""`stdit data …`: prepares files for training."""

from __future__ import annotations

from stdit.cli.common.lazy import lazy_group

app = lazy_group(
    {
        "scan": ("stdit.cli.data.scan", "Probe every file of a folder and write the manifest."),
        "caption": ("stdit.cli.data.caption", "Caption a manifest's clips with a local vision-language model."),
        "plan": ("stdit.cli.data.plan", "Show what training will do: buckets, packs, balance, drops, memory."),
        "encode": ("stdit.cli.data.encode", "Encode a manifest's latents and text embeddings; resumable."),
        "toy": ("stdit.cli.data.toy", "Render the built-in toy clips."),
    },
    name="data",
    help="""Scan, caption, plan and encode clips; render the built-in toy clips.

Example: stdit data scan videos --out videos/manifest.parquet
""",
)
