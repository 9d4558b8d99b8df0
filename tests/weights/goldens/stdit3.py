"""How stdit3.npz was made: outputs and gradients of Open-Sora v1.2.0's own STDiT3.

    git clone -b v1.2.0 https://github.com/hpcaitech/Open-Sora && pip install rotary-embedding-torch==0.5.3
    PYTHONPATH=Open-Sora python tests/weights/goldens/stdit3.py

Weights are not kept: `weights` makes them from their names and shapes, here and in the test. What Open-Sora imports
for many GPUs is replaced by stand-ins, and xformers' attention by torch's. With a mask of frames, its last layer
modulates what it has modulated already; such frames are given, their outputs are not used, and they are left out.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch.nn import functional as F

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


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Random weights of every name, norms and tables too, the same wherever they are made."""
    found = {}
    for name, shape in shapes.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        values = torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))
        found[name] = values * spread + ("_norm." in name)
    return found


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


def gradient_sum(name: str, gradient: torch.Tensor) -> float:
    """A gradient as one number: its product with a random one."""
    return float((gradient.double() * weights({f"probe of {name}": tuple(gradient.shape)})[f"probe of {name}"]).sum())


def _stand_ins() -> None:
    def module(name: str, **members: object) -> None:
        made = sys.modules.setdefault(name, ModuleType(name))
        vars(made).update(members)

    class Registry:
        def register_module(self, *_):
            return lambda one: one

    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(queries, keys):
            return list(queries), [int(n) for n in keys]

    def attention(q, k, v, p=0.0, attn_bias=None):
        queries, keys = attn_bias
        parts = zip(*(tensor[0].split(lengths) for tensor, lengths in ((q, queries), (k, keys), (v, keys))))
        heads = [F.scaled_dot_product_attention(*(t.transpose(0, 1) for t in part)).transpose(0, 1) for part in parts]
        return torch.cat(heads)[None]

    def same(function, *arguments):
        return function(*arguments)

    module("xformers"), module("xformers.ops", memory_efficient_attention=attention)
    sys.modules["xformers"].ops = sys.modules["xformers.ops"]
    sys.modules["xformers.ops"].fmha = type("fmha", (), {"BlockDiagonalMask": BlockDiagonalMask})
    module("opensora.acceleration.checkpoint", auto_grad_checkpoint=same)
    names = ("all_to_all", "split_forward_gather_backward", "gather_forward_split_backward")
    module("opensora.acceleration.communications", **dict.fromkeys(names))
    module("opensora.acceleration.parallel_states", get_sequence_parallel_group=None)
    module("opensora.registry", MODELS=Registry())
    module("opensora.utils.ckpt_utils", load_checkpoint=None)
    module("opensora.models", __path__=[str(Path(p) / "opensora/models") for p in sys.path])
    module("opensora.models.layers", __path__=[str(Path(p) / "opensora/models/layers") for p in sys.path])
    module("opensora.models.stdit", __path__=[str(Path(p) / "opensora/models/stdit") for p in sys.path])


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
            kept[f"{key}names"] = np.array(list(found))
            kept[f"{key}sums"] = np.array([gradient_sum(name, gradient) for name, gradient in found.items()])
            kept[f"{key}norms"] = np.array([float(gradient.norm()) for gradient in found.values()])
        kept[f"{number}.shapes"] = np.array([f"{name}:{','.join(map(str, shape))}" for name, shape in shapes.items()])
    linspace = torch.linspace
    torch.linspace = lambda *arguments: linspace(*arguments, device="cpu")  # its constructor asks for values
    with torch.device("meta"):
        released = STDiT3(STDiT3Config())
    kept["released"] = np.array([f"{n}:{','.join(map(str, t.shape))}" for n, t in released.state_dict().items()])
    kept["parameters"] = np.array(sum(p.numel() for n, p in released.named_parameters() if n != "rope.freqs"))
    np.savez_compressed(GOLDEN, **kept)


if __name__ == "__main__":
    main()
