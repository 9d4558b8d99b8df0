"""How stdit3_golden.npz was made: outputs and gradients of Open-Sora v1.2.0's own STDiT3.

    git clone -b v1.2.0 https://github.com/hpcaitech/Open-Sora && pip install rotary-embedding-torch==0.5.3
    PYTHONPATH=Open-Sora python tests/weights/goldens/stdit3_golden.py

Weights are not kept: golden_tools.py makes them from their names and shapes, here and in the test. What Open-Sora
imports for many GPUs is replaced by stand-ins, and xformers' attention by torch's. With a mask of frames, its last
layer modulates what it has modulated already; such frames are given, their outputs are not used, and are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from golden_tools import Registry, checkpoint_nothing, described, gradients_kept, stand_in, weights, xformers

GOLDEN = Path(__file__).with_suffix(".npz")
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


def _stand_ins() -> None:
    xformers()
    stand_in("opensora.acceleration.checkpoint", auto_grad_checkpoint=checkpoint_nothing)
    names = ("all_to_all", "split_forward_gather_backward", "gather_forward_split_backward")
    stand_in("opensora.acceleration.communications", **dict.fromkeys(names))
    stand_in("opensora.acceleration.parallel_states", get_sequence_parallel_group=None)
    stand_in("opensora.registry", MODELS=Registry())
    stand_in("opensora.utils.ckpt_utils", load_checkpoint=None)
    for name in ("models", "models/layers", "models/stdit"):
        places = [str(Path(place) / "opensora" / name) for place in sys.path]
        stand_in(f"opensora.{name.replace('/', '.')}", __path__=places)


def main() -> None:
    _stand_ins()
    from opensora.models.stdit.stdit3 import STDiT3, STDiT3Config

    kept: dict[str, np.ndarray] = {}
    for number, config in enumerate(CONFIGS):
        model = STDiT3(STDiT3Config(**config, model_max_length=6)).eval()
        shapes = {name: tuple(t.shape) for name, t in model.state_dict().items() if name != "rope.freqs"}
        model.load_state_dict(weights(shapes) | {"rope.freqs": model.state_dict()["rope.freqs"]})
        given = inputs(number)
        width, height = (torch.full((2,), float(side)) for side in SIZES[number])
        fps = torch.full((2,), FPS[number])
        for per in ("clip", "frame"):
            model.zero_grad()
            latents = given["latents"].clone().requires_grad_()
            mask = {"clip": None, "frame": given["denoised"]}[per]
            text = given["text"][:, None]
            out = model(latents, given["t"] * 1000, text, given["text_mask"], mask, fps, height, width)
            used = given["denoised"].repeat_interleave(model.patch_size[0], 1)[:, None, :, None, None]
            probe = given["probe"] * (used if per == "frame" else 1)
            (out * probe).sum().backward()
            key = f"{number}.{per}."
            kept[f"{key}output"] = (out * used if per == "frame" else out).detach().numpy()
            kept[f"{key}latents"] = latents.grad.numpy()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            kept |= gradients_kept(found, key)
        state = {name: tensor for name, tensor in model.state_dict().items() if name != "rope.freqs"}
        kept[f"{number}.shapes"] = described(state)
    linspace = torch.linspace
    torch.linspace = lambda *arguments: linspace(*arguments, device="cpu")  # its constructor asks for values
    with torch.device("meta"):
        released = STDiT3(STDiT3Config())
    kept["released"] = described(released.state_dict())
    kept["parameters"] = np.array(sum(p.numel() for n, p in released.named_parameters() if n != "rope.freqs"))
    np.savez_compressed(GOLDEN, **kept)


if __name__ == "__main__":
    main()
