"""A small model folder for the tests of `stdit sample`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sample_runs import PROMPTS

from stdit.diffusion.solvers import unipc_config
from stdit.models.transformer import STDiT, TransformerConfig
from stdit.sampling.pipeline import FolderSettings, Pipeline
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.vae.autoencoder import CausalVAE, VaeConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    tokenizer = build_word_tokenizer(PROMPTS)
    config = TransformerConfig(dim=24, heads=2, layers=1, ffn_dim=32, in_channels=4, out_channels=4, text_dim=16)
    sizes = VaeConfig(base_dim=4, dim_mult=(1, 1, 1), num_res_blocks=1, temporal_downsample=(True, True), z_dim=4)
    encoder = TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer)
    settings = FolderSettings(fps=8, shapes=("48x32x9",), text_padding=16)
    path = tmp_path_factory.mktemp("model")
    transformer = STDiT(config)
    torch.nn.init.normal_(transformer.head.head.weight, std=0.3)  # a fresh one is 0, and no other weight would matter
    Pipeline(transformer, CausalVAE(sizes), encoder, unipc_config(), settings).save(path)
    return path
