"""How pixart_alpha_golden.npz and pixart_sigma_golden.npz were made: PixArt's own PixArtMS, Σ's with compressed keys.

    git clone https://github.com/PixArt-alpha/PixArt-alpha && git clone https://github.com/PixArt-alpha/PixArt-sigma
    PYTHONPATH=PixArt-alpha python tests/weights/goldens/pixart_golden.py alpha
    PYTHONPATH=PixArt-sigma python tests/weights/goldens/pixart_golden.py sigma

Weights are not kept: golden_tools.py makes them from their names and shapes, here and in the test.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_tools import (
    Golden,
    Registry,
    Run,
    answers,
    checkpoint_nothing,
    random_weights,
    released,
    stand_in,
    xformers,
)


def _config(dim: int, heads: int, depth: int, size: int, **more: Any) -> dict[str, Any]:
    shape = {"hidden_size": dim, "num_heads": heads, "depth": depth, "input_size": size}
    return {**shape, "caption_channels": 7, "model_max_length": 6, **more}


def _compressed(dim: int, heads: int, depth: int, factor: int, layers: list[int], size: int, **more: Any) -> dict:
    compress = {"sampling": "conv", "scale_factor": factor, "kv_compress_layer": layers}
    return _config(dim, heads, depth, size, kv_compress_config=compress, **more)


CONFIGS = {
    "alpha": (
        _config(24, 2, 2, 16),
        _config(36, 3, 3, 32, pred_sigma=False),
        _config(60, 1, 1, 18, in_channels=3, patch_size=3, lewei_scale=2.0),
        _config(48, 6, 2, 64, in_channels=5),
        _config(12, 3, 2, 12, patch_size=1, lewei_scale=0.5),
    ),
    "sigma": (
        _compressed(24, 2, 2, 2, [1], 16),
        _compressed(36, 3, 3, 2, [0, 2], 32, micro_condition=True),
        _compressed(20, 1, 1, 3, [0], 18, in_channels=3, patch_size=3, pe_interpolation=2.0),
        _compressed(48, 6, 2, 2, [0, 1], 64, in_channels=5, pred_sigma=False),
        _compressed(24, 3, 2, 4, [1], 12, patch_size=1, pe_interpolation=0.5),
    ),
}
GRIDS = ((8, 12), (6, 10), (18, 27), (10, 14), (9, 8))  # latents; squares left over at the edge included
SIZE = (640, 384)  # width, height in pixels


def runs(release: str, number: int) -> list[Run]:
    config, draw = CONFIGS[release][number], np.random.default_rng(number).standard_normal
    channels = config.get("in_channels", 4)
    out = channels * (2 if config.get("pred_sigma", True) else 1)
    grid = (1, *GRIDS[number])
    shapes = {"latents": (2, channels, *grid), "text": (2, 6, 7), "probe": (2, out, *grid)}
    made: dict[str, Any] = {n: torch.from_numpy(draw(shape, dtype=np.float32)) for n, shape in shapes.items()}
    made["t"], made["text_mask"] = torch.tensor([0.25, 0.8]), torch.ones(2, 6, dtype=torch.bool)
    made["text_mask"][1, 3:] = False
    if release == "alpha" or config.get("micro_condition"):
        made["size"] = SIZE
    return [Run("", made, made.pop("probe"))]


def config_json(release: str, number: int) -> dict[str, Any]:
    """What stdit writes beside an original, which has none."""
    config = CONFIGS[release][number]
    known = {
        "heads": config["num_heads"],
        "position_base": config["input_size"] // config.get("patch_size", 2),
        "position_stretch": config.get("pe_interpolation", config.get("lewei_scale", 1.0)),
        "text_padding": 0,
    }
    return {"_class_name": "PixArtMS", "_stdit": {"format": 1, **known}}


GOLDENS = {
    release: Golden(
        name,
        "pixart",
        Path(__file__).with_name(f"pixart_{release}_golden.npz"),
        5,
        partial(config_json, release),
        partial(runs, release),
        ("pos_embed",),
    )
    for release, name in (("alpha", "PixArt-α"), ("sigma", "PixArt-Σ 2K"))
}


def call(model, key, *, latents, t, text, text_mask, size=SIZE):
    width, height = size
    info = {"img_hw": torch.tensor([[height, width]] * 2).float(), "aspect_ratio": torch.tensor([[height / width]] * 2)}
    return model(latents[:, :, 0], t * 1000, text[:, None], text_mask, info)[:, :, None]


def main(release: str) -> None:
    xformers()
    stand_in("diffusion.model.builder", MODELS=Registry())
    stand_in(
        "diffusion.model.utils",
        auto_grad_checkpoint=checkpoint_nothing,
        to_2tuple=lambda x: (x, x),
        add_decomposed_rel_pos=None,
    )
    stand_in("diffusion.utils.logger", get_root_logger=None)
    for name in ("diffusion", "diffusion/model", "diffusion/model/nets"):
        stand_in(name.replace("/", "."), __path__=[str(Path(place) / name) for place in sys.path])
    from diffusion.model.nets.PixArtMS import PixArtMS

    golden, kept = GOLDENS[release], {}
    for number, config in enumerate(CONFIGS[release]):
        model = PixArtMS(**config).eval()
        kept |= random_weights(model, golden, number) | answers(model, golden, number, call)
    compress = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": list(range(14, 28))}
    size = {
        "alpha": {"input_size": 128, "model_max_length": 120, "lewei_scale": 2.0},
        "sigma": {"input_size": 256, "model_max_length": 300, "pe_interpolation": 4.0, "kv_compress_config": compress},
    }[release]
    kept |= released(lambda: PixArtMS(depth=28, hidden_size=1152, num_heads=16, **size), golden)
    np.savez_compressed(golden.file, **kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
