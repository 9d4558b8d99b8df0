"""A tiny model to fine-tune, and its text encoder."""

from __future__ import annotations

from pathlib import Path

import torch
from random_weights import add_noise

from stdit.models.transformer import STDiT, TransformerConfig
from stdit.text.encoders import TextEncoder
from stdit.text.small import build_word_tokenizer, small_umt5
from stdit.weights.io import save_transformer


def save_tiny_model(out: Path, heads: int = 3) -> None:
    """Writes init/, a transformer with random weights, and text/."""
    sizes = dict(
        dim=24, heads=heads, layers=2, ffn_dim=48, frequency_dim=32, in_channels=4, out_channels=4, text_dim=16
    )
    model = STDiT(TransformerConfig.preset("toy", **sizes, text_padding=32))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        add_noise(parameter, generator)
    save_transformer(model, out / "init")
    tokenizer = build_word_tokenizer(["a small red circle moves left"])
    TextEncoder(small_umt5(len(tokenizer), 16, 1, 2), tokenizer).save(
        out / "text" / "text_encoder", out / "text" / "tokenizer"
    )
