"""`stdit data …`: from a folder of files to what training reads."""

from __future__ import annotations

from stdit.cli.common.lazy import lazy_group

app = lazy_group(
    {
        "scan": ("stdit.cli.data.scan", "Probe every file of a folder and write the manifest."),
        "caption": ("stdit.cli.data.caption", "Caption a manifest's clips with a local vision-language model."),
        "plan": ("stdit.cli.data.plan", "What training will do: buckets, packs, balance, drops, memory."),
        "encode": ("stdit.cli.data.encode", "Latents and text embeddings of a manifest, resumable."),
        "toy": ("stdit.cli.data.toy", "Render the embedded toy clips."),
    },
    name="data",
    help="""Scan, caption, plan and encode clips; render the embedded toy clips.

Example: stdit data scan videos --out videos/manifest.parquet
""",
)
