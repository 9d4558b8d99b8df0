"""Which scheduler, and so which path, goes with weights."""

from __future__ import annotations

import json

import diffusers
import pytest

from stdit.diffusion.solvers import make_solver, path_of, unipc_config, write_scheduler
from stdit.models.config import TransformerConfig
from stdit.shapes import LatentShape, VideoShape
from stdit.weights.families import allegro, cosmos, latte, ltx, pixart, scheduler_of, stdit3

SIZES = {"dim": 24, "heads": 2, "layers": 1, "ffn_dim": 48}
COSMOS = cosmos.FAMILY.settings | {"frequency_dim": 24, "text_embedding": "none"}
FAMILIES = {
    "Wan": ({"family": "wan"}, "flow", "WanPipeline"),
    "LTX-Video": (ltx.FAMILY.settings, "flow", "LTXPipeline"),
    "PixArt": (pixart.FAMILY.settings | {"position_base": 8}, "ddpm", "PixArtAlphaPipeline"),
    "Latte": (latte.FAMILY.settings | {"position_base": 8}, "ddpm", "LattePipeline"),
    "Allegro": (allegro.FAMILY.settings, "ddpm", "AllegroPipeline"),
    "Cosmos 1": (
        COSMOS | {"position": "learned", "position_max": (2, 2, 2), "network_time": "log_sigma"},
        "edm", "CosmosTextToWorldPipeline",
    ),
    "Cosmos 2": (COSMOS, "flow", "Cosmos2TextToImagePipeline"),
    "Cosmos 2.5": (
        COSMOS | {"text_embedding": "gelu", "text_width": 16}, "flow", "Cosmos2_5_PredictBasePipeline",
    ),
    "STDiT3": (stdit3.FAMILY.settings | {"position_base": 8}, "flow", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_own_path_and_a_scheduler_that_its_pipeline_takes(name, tmp_path):
    changes, path, pipeline = FAMILIES[name]
    config = scheduler_of("nowhere", TransformerConfig(**SIZES, **changes))
    assert path_of(config).name == path
    solver = make_solver(config, 4, shape=VideoShape(17, 64, 64), latent=LatentShape(5, 8, 8))
    assert len(solver.levels) == 4 and solver.levels == sorted(solver.levels, reverse=True)
    if pipeline is None:
        return
    write_scheduler(config, tmp_path / "scheduler")
    theirs = getattr(diffusers, config["_class_name"]).from_pretrained(tmp_path / "scheduler")
    assert all(theirs.config[key] == value for key, value in config.items() if not key.startswith("_"))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    again = scheduler_of(tmp_path, TransformerConfig(**SIZES, family="pixart"))  # the folder's, not the family's
    assert make_solver(again, 4, latent=LatentShape(5, 8, 8)).levels == solver.levels
    assert path_of(again).name == path


def test_weights_without_a_folder_have_their_familys(tmp_path):
    assert scheduler_of(tmp_path / "weights.safetensors", TransformerConfig(**SIZES)) == unipc_config()
    assert scheduler_of("nowhere", TransformerConfig(**SIZES, family="wan")) == unipc_config()
