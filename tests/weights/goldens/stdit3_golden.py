"""How stdit3_golden.npz was made: outputs and gradients of Open-Sora v1.2.0's own STDiT3.

    git clone -b v1.2.0 https://github.com/hpcaitech/Open-Sora && pip install rotary-embedding-torch==0.5.3
    PYTHONPATH=Open-Sora python tests/weights/goldens/stdit3_golden.py

Weights are not kept: golden_tools.py makes them from their names and shapes, here and in the test. What Open-Sora
imports for many GPUs is replaced by stand-ins, and xformers' attention by torch's. With a mask of frames, its last
layer modulates what it has modulated already; such frames are given, their outputs are not used, and are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_tools import Golden, Run, answers, open_sora, random_weights, released

CONFIGS = (
    {"hidden_size": 24, "num_heads": 2, "in_channels": 3, "caption_channels": 7, "depth": 2, "input_sq_size": 512},
    {"hidden_size": 36, "num_heads": 3, "in_channels": 4, "caption_channels": 5, "depth": 1, "input_sq_size": 256},
    {"hidden_size": 40, "num_heads": 1, "in_channels": 2, "caption_channels": 9, "depth": 1, "patch_size": (2, 1, 3)},
    {"hidden_size": 48, "num_heads": 6, "in_channels": 5, "caption_channels": 6, "depth": 1, "pred_sigma": False},
    {"hidden_size": 20, "num_heads": 2, "in_channels": 4, "caption_channels": 8, "depth": 3, "qk_norm": False},
)
GRIDS = ((3, 6, 4), (2, 4, 10), (4, 3, 6), (6, 8, 6), (5, 2, 4))
SIZES = ((640, 360), (256, 256), (512, 384), (480, 854), (144, 256))  # width, height in pixels
FPS = (24.0, 8.0, 120.0, 16.0, 30.0)


def inputs(number: int) -> dict[str, torch.Tensor]:
    """Latents, t in [0, 1], text with how many of its 6 tokens count, a probe of the output, frames to denoise."""
    config, grid, draw = CONFIGS[number], GRIDS[number], np.random.default_rng(number).standard_normal
    out = config["in_channels"] * (2 if config.get("pred_sigma", True) else 1)
    frames = grid[0] // config.get("patch_size", (1, 2, 2))[0]
    shapes = {"latents": (2, config["in_channels"], *grid), "text": (2, 6, config["caption_channels"])}
    made = {name: torch.from_numpy(draw(shape, dtype=np.float32)) for name, shape in shapes.items()}
    made["probe"] = torch.from_numpy(draw((2, out, *grid), dtype=np.float32))
    made["t"], made["text_mask"] = torch.tensor([0.25, 0.8]), torch.ones(2, 6, dtype=torch.bool)
    made["text_mask"][1, 3:] = False
    made["denoised"] = torch.ones(2, frames, dtype=torch.bool)
    made["denoised"][1, 0] = False  # a given frame
    return made


def runs(number: int) -> list[Run]:
    given = inputs(number)
    probe, denoised, t = (given.pop(name) for name in ("probe", "denoised", "t"))
    used = denoised.repeat_interleave(CONFIGS[number].get("patch_size", (1, 2, 2))[0], 1)[:, None, :, None, None]
    given |= {"fps": FPS[number], "size": SIZES[number]}
    return [
        Run("clip.", {**given, "t": t}, probe),
        Run("frame.", {**given, "t": t[:, None] * denoised}, probe, used),
    ]


def config_json(number: int) -> dict[str, Any]:
    notes = {"architectures": ["STDiT3"], "model_type": "STDiT3", "input_size": [None] * 3, "torch_dtype": "float32"}
    return {**notes, "model_max_length": 6, **CONFIGS[number], "transformers_version": "4.36.2"}


GOLDEN = Golden("STDiT3", "stdit3", Path(__file__).with_suffix(".npz"), 5, config_json, runs, ("rope.freqs",))


def call(model, key, *, latents, t, text, text_mask, fps, size):
    width, height = (torch.full((2,), float(side)) for side in size)
    mask, t = (t > 0, t.amax(1)) if t.ndim == 2 else (None, t)
    return model(latents, t * 1000, text[:, None], text_mask, mask, torch.full((2,), fps), height, width)


def main() -> None:
    open_sora()
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    kept: dict[str, np.ndarray] = {}
    for number, config in enumerate(CONFIGS):
        model = STDiT3(STDiT3Config(**config, model_max_length=6)).eval()
        kept |= random_weights(model, GOLDEN, number) | answers(model, GOLDEN, number, call)
    np.savez_compressed(GOLDEN.file, **kept, **released(lambda: STDiT3(STDiT3Config()), GOLDEN))


if __name__ == "__main__":
    main()
