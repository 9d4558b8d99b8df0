"""Tiny clips, a tiny VAE and tiny configs that the tests of training share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from stdit.data.scan.scan import scan
from stdit.data.toy import ToySettings, make_toy
from stdit.vae.autoencoder import CausalVAE, VaeConfig
from stdit.weights.io import save_vae


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with clips of several shapes (clips/manifest.parquet), a random VAE (vae/), and flow.yaml, vae.yaml."""
    folder = tmp_path_factory.mktemp("tiny")
    toy = ToySettings(clips=14, held_out=1, shapes=("32x32", "48x32"), scales=(1.0,), seconds=(0.7,), fps=(16,),
                      image_share=0.3)  # fmt: skip
    make_toy(folder / "clips", toy)
    scan(folder / "clips" / "train", out=folder / "manifest.parquet")
    torch.manual_seed(1)
    config = VaeConfig(
        base_dim=4, dim_mult=(1, 2), num_res_blocks=1, temporal_downsample=(True,), z_dim=4, patch_size=2
    )
    save_vae(CausalVAE(config), folder / "vae")
    flow = {
        "model": {"preset": "toy", "dim": 24, "heads": 2, "layers": 2, "ffn_dim": 48, "frequency_dim": 32},
        "vae": {"path": str(folder / "vae")},
        "text": {"trained": {"dim": 16, "layers": 1, "heads": 2}, "padding": 32},
        "data": {
            "manifest": str(folder / "manifest.parquet"),
            "shapes": ["32x32x5", "48x32x5", "32x32", "48x32"],
            "fps": 8,
            "workers": 1,
        },
        "plan": {"largest_clips_per_step": 4, "tokens_per_pack": 200},
        "objective": {
            "flow": {
                "caption_dropout": 0.2,
                "tasks": {"text_to_video": 2, "image_to_video": 1},
            }
        },
        "optimizer": {"lr": 2e-3, "clip": 1.0},
        "schedule": {"steps": 8, "warmup": 2, "decay": "cosine"},
        "log": {"every": 1, "tensorboard": False, "progress": False},
        "checkpoint": {"every": 3, "keep": 2},
    }
    (folder / "flow.yaml").write_text(yaml.safe_dump(flow))
    vae = {key: flow[key] for key in ("data", "optimizer", "log", "checkpoint")}
    vae |= {
        "vae": {"preset": "toy", "base_dim": 4, "dim_mult": [1, 2], "temporal_downsample": [True], "z_dim": 4},
        "objective": {"kind": "vae"},
        "plan": {"largest_clips_per_step": 2},
        "schedule": {"steps": 4},
    }
    (folder / "vae.yaml").write_text(yaml.safe_dump(vae))
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, as a model folder has it."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("image")
    settings = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModel(CLIPVisionConfig(**settings, image_size=28, patch_size=14)).save_pretrained(
            folder / "image_encoder"
        )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**size).save_pretrained(folder / "image_processor")
    return folder
