"""How latte_golden.npz was made: outputs and gradients of Latte's own LatteT2V.

    git clone https://github.com/Vchitect/Latte
    pip install --no-deps --target old diffusers==0.24.0 huggingface_hub==0.19.4 einops
    PYTHONPATH=old:Latte python tests/weights/goldens/latte_golden.py

Weights are not kept: golden_tools.py makes them from their names and shapes, here and in the test. That diffusers is
what Latte asks for; it reads today's transformers no more, and needs none of it here.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_tools import Golden, Run, answers, random_weights, released, stand_in


def _config(heads: int, head_dim: int, channels: tuple[int, int], sample: int, frames: int, **more: Any) -> dict:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "in_channels": channels[0],
        "out_channels": channels[1],
        "sample_size": sample,
        "video_length": frames,
        "caption_channels": 7,
        "num_layers": 2,
        "patch_size": 2,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_single",
        "num_embeds_ada_norm": 1000,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        **more,
    }


CONFIGS = (
    _config(2, 18, (5, 7), 8, 4),
    _config(3, 12, (4, 8), 64, 3, num_layers=3),
    _config(1, 20, (3, 3), 18, 2, patch_size=3),
    _config(4, 8, (4, 2), 64, 5),
    _config(2, 10, (6, 5), 200, 6, patch_size=1, num_layers=1),
)
GRIDS = ((4, 6, 4), (3, 4, 10), (2, 9, 3), (5, 8, 6), (6, 5, 7))


def runs(number: int) -> list[Run]:
    config, grid, draw = CONFIGS[number], GRIDS[number], np.random.default_rng(number).standard_normal
    shapes = {
        "latents": (2, config["in_channels"], *grid),
        "text": (2, 6, 7),
        "probe": (2, config["out_channels"], *grid),
    }
    made: dict[str, Any] = {n: torch.from_numpy(draw(shape, dtype=np.float32)) for n, shape in shapes.items()}
    made["t"], made["text_mask"] = torch.tensor([0.25, 0.8]), torch.ones(2, 6, dtype=torch.bool)
    made["text_mask"][1, 3:] = False
    return [Run("", made, made.pop("probe"))]


def config_json(number: int) -> dict[str, Any]:
    """As the release's, which names a larger class's settings too."""
    return {
        "_class_name": "LatteT2V",
        "_diffusers_version": "0.24.0",
        "double_self_attention": False,
        **CONFIGS[number],
    }


GOLDEN = Golden("Latte", "latte", Path(__file__).with_suffix(".npz"), 5, config_json, runs)


def call(model, key, *, latents, t, text, text_mask):
    return model(latents, t * 1000, text, encoder_attention_mask=text_mask.float(), return_dict=False)[0]


def main() -> None:
    stand_in("transformers", CLIPTextModel=None, CLIPTextModelWithProjection=None)
    sys.modules["transformers"].__spec__ = ModuleSpec("transformers", None)
    from models.latte_t2v import LatteT2V

    kept: dict[str, np.ndarray] = {}
    for number, config in enumerate(CONFIGS):
        model = LatteT2V(**config).eval()
        kept |= random_weights(model, GOLDEN, number) | answers(model, GOLDEN, number, call)
    size = _config(16, 72, (4, 8), 64, 16, caption_channels=4096, num_layers=28)
    np.savez_compressed(GOLDEN.file, **kept, **released(lambda: LatteT2V(**size), GOLDEN))


if __name__ == "__main__":
    main()
