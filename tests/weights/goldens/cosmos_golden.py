"""How cosmos_golden.npz was made: what the state dicts of Cosmos-Predict's own networks hold at released sizes.

    git clone https://github.com/nvidia-cosmos/cosmos-predict1 && git clone https://github.com/nvidia-cosmos/cosmos-predict2
    pip install --no-deps --target einops einops
    PYTHONPATH=cosmos-predict1:cosmos-predict2:einops python tests/weights/goldens/cosmos_golden.py

Names, shapes, numbers of parameters and the values of computed tensors; nothing is run, since the attention is
TransformerEngine's, for which stand-ins that hold no weights are enough here.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_tools import described, hash_of, on_meta, stand_in
from torch import nn

FILE = Path(__file__).with_suffix(".npz")
_LARGE = {"model_channels": 5120, "num_heads": 40, "num_blocks": 36}
_PREDICT1 = {
    "model_channels": 4096,
    "num_heads": 32,
    "block_x_format": "THWBD",
    "affline_emb_norm": True,
    "extra_per_block_abs_pos_emb": True,
    "extra_per_block_abs_pos_emb_type": "learnable",
}
RELEASES: dict[str, dict[str, Any]] = {
    "Cosmos-Predict1 7B Text2World": _PREDICT1,
    "Cosmos-Predict1 14B Video2World": {**_PREDICT1, **_LARGE, "in_channels": 17},
    "Cosmos-Predict2 2B Text2Image": {},
    "Cosmos-Predict2 14B Video2World": {**_LARGE, "in_channels": 17},
    "Cosmos-Predict2.5 2B": {"in_channels": 17, "crossattn_proj_in_channels": 100352},
}
_COMMON = {
    "max_img_h": 240,
    "max_img_w": 240,
    "max_frames": 128,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 2048,
    "num_blocks": 28,
    "num_heads": 16,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
}


class _Weightless(nn.Module):
    EMBED_DIM, VIDEO, IMAGE = 1024, None, None

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def _stand_ins() -> None:
    stand_in("transformer_engine")
    stand_in("transformer_engine.pytorch", RMSNorm=nn.RMSNorm)
    stand_in("transformer_engine.pytorch.attention", DotProductAttention=_Weightless, apply_rotary_pos_emb=None)
    sys.modules["transformer_engine"].pytorch = sys.modules["transformer_engine.pytorch"]
    one, two = "cosmos_predict1.", "cosmos_predict2."
    wanted = {
        f"{one}diffusion.conditioner": ("DataType",),
        f"{one}diffusion.module.parallel": ("split_inputs_cp",),
        f"{two}conditioner": ("DataType",),
        f"{two}module.a2a_cp": ("MinimalA2AAttnOp", "NattenA2AAttnOp"),
        f"{two}module.neighborhood_attn": ("NeighborhoodAttention",),
        f"{two}utils.context_parallel": ("split_inputs_cp",),
        "imaginaire.auxiliary.text_encoder": ("CosmosTextEncoderConfig",),
        "imaginaire.utils.graph": ("create_cuda_graph",),
    }
    for name, members in wanted.items():
        stand_in(name, **dict.fromkeys(members, _Weightless))
    parts = ("", ".diffusion", ".diffusion.module", ".diffusion.networks", ".models", ".networks", ".module", ".utils")
    for name in (root + part for root in ("cosmos_predict1", "cosmos_predict2", "imaginaire") for part in parts):
        stand_in(name, __path__=[str(Path(place) / name.replace(".", "/")) for place in sys.path])
    for name in ("cosmos_predict1.utils", "imaginaire.utils"):
        stand_in(f"{name}.log", debug=print, critical=print)
        sys.modules[name].log = sys.modules[f"{name}.log"]


def main() -> None:
    _stand_ins()
    torch.Tensor.cuda = lambda self: self
    from cosmos_predict1.diffusion.networks.general_dit import GeneralDIT
    from cosmos_predict2.models.text2image_dit import MiniTrainDIT

    kept: dict[str, np.ndarray] = {}
    for name, size in RELEASES.items():
        network = GeneralDIT if size.get("affline_emb_norm") else MiniTrainDIT
        model = on_meta(lambda network=network, size=size: network(**{**_COMMON, **size}))
        state = model.state_dict()
        computed = {key: tensor for key, tensor in state.items() if not tensor.is_meta}
        kept[f"{name}.shapes"] = described(state)
        kept[f"{name}.computed"] = np.array([f"{key} {hash_of(tensor)}" for key, tensor in computed.items()])
        kept[f"{name}.parameters"] = np.array(sum(parameter.numel() for parameter in model.parameters()))
    np.savez_compressed(FILE, **kept)


if __name__ == "__main__":
    main()
