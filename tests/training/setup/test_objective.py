"""A training says at its start how many of its captions are longer than what is used of them."""

from __future__ import annotations

import torch

from stdit.data.manifest import read_manifest
from stdit.training.config import load_config
from stdit.training.engine.parallel import World
from stdit.training.setup.build import build
from stdit.training.setup.resolve import resolve

ALONE = World(0, 1, torch.device("cpu"))


def test_a_training_says_how_many_captions_are_cut(tiny, capsys):
    texts = {one.text for clip in read_manifest(tiny / "manifest.parquet") for one in clip.captions}
    longest = max(len(text.replace(",", " ,").replace(".", " .").split()) + 1 for text in texts)
    build(resolve(load_config(tiny / "flow.yaml", [f"text.padding={longest}"])), ALONE)
    assert "are cut" not in capsys.readouterr().out
    build(resolve(load_config(tiny / "flow.yaml", ["text.padding=3"])), ALONE)
    told = (
        f"{len(texts)} of {len(texts)} captions have more than 3 tokens and are cut. The longest has {longest} tokens"
    )
    assert told in capsys.readouterr().out
