"""Writes LoRA files for other programs: diffusers and peft, ComfyUI, kohya's sd-scripts and musubi-tuner.

    common     diffusion_model.blocks.0.self_attn.q.lora_A.weight            alpha / rank is in B: no reader can miss it
    original   diffusion_model.blocks.0.self_attn.q.lora_down.weight, …alpha
    kohya      lora_unet_blocks_0_self_attn_q.lora_down.weight, …alpha              what musubi-tuner takes as it is
    diffusers  transformer.blocks.0.attn1.to_q.lora_A.weight       alpha in the metadata (lora_adapter_metadata)
    peft       base_model.model.blocks.0.attn1.to_q.lora_A.weight          alpha in adapter_config.json beside it

Most programs read the layout "common", which is diffusion-pipe's (a table is in docs/open-weights.md).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stdit.errors import StditError
from stdit.files import publish, publish_text
from stdit.models.config import TransformerConfig
from stdit.weights.families import table_of
from stdit.weights.lora.adapters import Adapter, Pair, converted
from stdit.weights.tensor_files import write_tensors

LAYOUTS = ("common", "original", "kohya", "diffusers", "peft")
ALIASES = {"comfyui": "common", "diffusion-pipe": "common"}
_PREFIXES = {"diffusers": "transformer.", "peft": "base_model.model.", "kohya": "lora_unet_"}


def write_adapter(
    adapter: Adapter, path: str | os.PathLike[str], config: TransformerConfig, layout: str = "common"
) -> None:
    """Writes an adapter for a model of this config to a safetensors file, in one of LAYOUTS.

    peft expects the name adapter_model.safetensors, and adapter_config.json beside it.
    """
    layout = ALIASES.get(layout, layout)
    if layout not in LAYOUTS:
        raise StditError(f"layout {layout!r} does not exist. Known: {', '.join((*LAYOUTS, *ALIASES))}.")
    path, plain = Path(path), layout in ("diffusers", "peft")
    there = converted(adapter, table_of(config, "diffusers" if plain else "original"))
    if plain and there.differences:
        raise StditError(
            f"{path}: the adapter adds a whole tensor to {next(iter(there.differences))}, which diffusers' LoRA "
            "files cannot hold: write layout 'common'."
        )

    def start(name: str) -> str:
        module = re.sub(r"\.(weight|bias)$", "", name)
        prefix = _PREFIXES.get(layout, "diffusion_model.")
        return prefix + (module.replace(".", "_") if layout == "kohya" else module)

    tensors: dict[str, Tensor] = {}
    down, up = ("lora_down", "lora_up") if layout in ("original", "kohya") else ("lora_A", "lora_B")
    for name, pair in there.pairs.items():
        module, written = start(name), _unscaled(pair) if layout == "common" else pair
        tensors[f"{module}.{down}.weight"] = written.down
        kernel = (1,) * (written.down.ndim - 2)  # of size 1 if A is a convolution
        tensors[f"{module}.{up}.weight"] = written.up.reshape(*written.up.shape, *kernel)
        if layout in ("original", "kohya"):
            tensors[f"{module}.alpha"] = pair.up.new_tensor(pair.alpha)
    for name, difference in there.differences.items():
        tensors[f"{start(name)}.{'diff_b' if name.endswith('.bias') else 'diff'}"] = difference
    metadata = {"format": "pt"}
    if plain:
        settings = _peft_settings({name.removesuffix(".weight"): pair for name, pair in there.pairs.items()})
        if layout == "peft":
            text = json.dumps({"peft_type": "LORA", **settings}, indent=2, sort_keys=True)
            publish_text(path.parent / "adapter_config.json", text + "\n")
        else:
            settings = {f"transformer.{key}": value for key, value in settings.items()}
            metadata["lora_adapter_metadata"] = json.dumps(settings, indent=2, sort_keys=True)
    with publish(path) as part:
        write_tensors(part, tensors, tensors.__getitem__, metadata)


def _unscaled(pair: Pair) -> Pair:
    """Multiplies alpha / rank into B: exactly if it is a power of two, else rounded in fp32 for any dtype of B."""
    up = pair.up if math.frexp(pair.scale)[0] == 0.5 or pair.up.dtype.itemsize > 2 else pair.up.float()
    return replace(pair, up=up * pair.scale, alpha=float(pair.rank))


def _peft_settings(modules: Mapping[str, Pair]) -> dict[str, Any]:
    """peft's LoraConfig for these ranks and alphas: the most common ones, and exceptions by name."""
    ranks = {module: pair.rank for module, pair in modules.items()}
    alphas = {
        module: int(pair.alpha) if float(pair.alpha).is_integer() else pair.alpha for module, pair in modules.items()
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(module)}": found for module, found in ranks.items() if found != rank},
        "alpha_pattern": {f"^{re.escape(module)}": found for module, found in alphas.items() if found != alpha},
        "target_modules": sorted(modules),
    }
