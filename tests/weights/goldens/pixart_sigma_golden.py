"""How pixart_sigma_golden.npz was made: outputs and gradients of PixArt-Σ's own PixArtMS with compressed keys.

    git clone https://github.com/PixArt-alpha/PixArt-sigma && cd PixArt-sigma
    PYTHONPATH=. python …/tests/weights/goldens/pixart_sigma_golden.py

Weights are not kept: golden_tools.py makes them from their names and shapes, here and in the test.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_tools import Registry, checkpoint_nothing, described, gradients_kept, stand_in, weights, xformers

GOLDEN = Path(__file__).with_suffix(".npz")


def _config(dim: int, heads: int, depth: int, factor: int, layers: list[int], size: int, **more: Any) -> dict[str, Any]:
    compress = {"sampling": "conv", "scale_factor": factor, "kv_compress_layer": layers}
    shape = {"hidden_size": dim, "num_heads": heads, "depth": depth, "input_size": size}
    return {**shape, "kv_compress_config": compress, "caption_channels": 7, "model_max_length": 6, **more}


CONFIGS = (
    _config(24, 2, 2, 2, [1], 16),
    _config(36, 3, 3, 2, [0, 2], 32, micro_condition=True),
    _config(20, 1, 1, 3, [0], 18, in_channels=3, patch_size=3, pe_interpolation=2.0),
    _config(48, 6, 2, 2, [0, 1], 64, in_channels=5, pred_sigma=False),
    _config(24, 3, 2, 4, [1], 12, patch_size=1, pe_interpolation=0.5),
)
GRIDS = ((8, 12), (6, 10), (18, 27), (10, 14), (9, 8))  # latents; squares left over at the edge included
SIZE = (640, 384)  # width, height in pixels


def inputs(number: int) -> dict[str, torch.Tensor]:
    config, draw = CONFIGS[number], np.random.default_rng(number).standard_normal
    channels = config.get("in_channels", 4)
    out = channels * (2 if config.get("pred_sigma", True) else 1)
    shapes = {"latents": (2, channels, *GRIDS[number]), "text": (2, 6, 7), "probe": (2, out, *GRIDS[number])}
    made = {name: torch.from_numpy(draw(shape, dtype=np.float32)) for name, shape in shapes.items()}
    made["t"], made["text_mask"] = torch.tensor([0.25, 0.8]), torch.ones(2, 6, dtype=torch.bool)
    made["text_mask"][1, 3:] = False
    return made


def main() -> None:
    xformers()
    stand_in("diffusion.model.builder", MODELS=Registry())
    stand_in("diffusion.model.utils", auto_grad_checkpoint=checkpoint_nothing, to_2tuple=lambda x: (x, x))
    stand_in("diffusion.utils.logger", get_root_logger=None)
    for name in ("diffusion", "diffusion/model", "diffusion/model/nets"):
        stand_in(name.replace("/", "."), __path__=[str(Path(place) / name) for place in sys.path])
    from diffusion.model.nets.PixArtMS import PixArtMS

    kept: dict[str, np.ndarray] = {}
    width, height = SIZE
    info = {"img_hw": torch.tensor([[height, width]] * 2).float(), "aspect_ratio": torch.tensor([[height / width]] * 2)}
    for number, config in enumerate(CONFIGS):
        model = PixArtMS(**config).eval()
        model.load_state_dict(weights({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}))
        given = inputs(number)
        latents = given["latents"].clone().requires_grad_()
        out = model(latents, given["t"] * 1000, given["text"][:, None], given["text_mask"], info)
        (out * given["probe"]).sum().backward()
        kept[f"{number}.output"], kept[f"{number}.latents"] = out.detach().numpy(), latents.grad.numpy()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        kept |= gradients_kept(gradients, f"{number}.")
        kept[f"{number}.shapes"] = described(model.state_dict())
    linspace = torch.linspace
    torch.linspace = lambda *arguments: linspace(*arguments, device="cpu")  # its constructor asks for values
    compress = {"sampling": "conv", "scale_factor": 2, "kv_compress_layer": list(range(14, 28))}
    with torch.device("meta"):
        released = PixArtMS(
            256, depth=28, hidden_size=1152, num_heads=16, model_max_length=300, pe_interpolation=4.0,
            kv_compress_config=compress,
        )  # fmt: skip
    kept["released"] = described(released.state_dict())
    kept["parameters"] = np.array(sum(parameter.numel() for parameter in released.parameters()))
    np.savez_compressed(GOLDEN, **kept)


if __name__ == "__main__":
    main()
