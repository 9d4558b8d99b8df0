"""Families that attend over whole clips: LTX-Video, Cosmos-Predict and Wan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from references.base import Family, captioned, sizes

# LTX-Video.


def _call_ltx(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor, given: dict) -> Tensor:
    pt, p = model.config.patch_size_t, model.config.patch_size
    b, c, f, h, w = latents.shape
    grid = (f // pt, h // p, w // p)
    x = latents.reshape(b, c, grid[0], pt, grid[1], p, grid[2], p).permute(0, 2, 4, 6, 1, 3, 5, 7)
    x = x.flatten(4, 7).flatten(1, 3)  # as LTXPipeline packs latents
    time = (t[:, None] if t.ndim == 1 else t) * 1000
    if time.shape[1] == grid[0]:
        time = time.repeat_interleave(grid[1] * grid[2], 1)
    scale = (8 / given.get("fps", 25), 32, 32)
    out = model(x, text, time, mask.float(), *grid, rope_interpolation_scale=scale, return_dict=False)[0]
    out = out.reshape(b, *grid, -1, pt, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return out.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def _from_original_ltx(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ltx_transformer_checkpoint_to_diffusers

    return convert_ltx_transformer_checkpoint_to_diffusers(tensors)


def ltx_config(
    heads: int, head_dim: int, channels: tuple[int, int], text: int, layers: int, patch: tuple[int, int] = (1, 1)
) -> dict[str, Any]:
    volume = patch[0] * patch[1] ** 2
    made_for = {"caption_channels": text, "num_layers": layers, "patch_size_t": patch[0], "patch_size": patch[1]}
    return captioned(heads, head_dim, (channels[0] * volume, channels[1] * volume), **made_for)


LTX = Family(
    "LTXVideoTransformer3DModel",
    (
        ltx_config(2, 14, (5, 7), 19, 3),
        ltx_config(3, 16, (4, 4), 10, 2),
        ltx_config(5, 10, (6, 3), 33, 2),
        ltx_config(1, 38, (3, 5), 8, 1),
        ltx_config(4, 12, (3, 2), 21, 2, patch=(2, 3)),
    ),
    {
        "LTX-Video 2B": {},
        "LTX-Video 13B (0.9.7, 0.9.8)": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    },
    _call_ltx,
    ((3, 5, 4), (1, 3, 7), (4, 2, 3), (2, 1, 5), (4, 3, 9)),
    {"original": _from_original_ltx, "ComfyUI": _from_original_ltx},
    per=("clip", "frame", "token"),
    given=lambda config: {"fps": 24 + config["num_layers"]},
)

# Cosmos-Predict.


def _call_cosmos(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor, given: dict) -> Tensor:
    padding = latents.new_zeros(1, 1, *latents.shape[3:])
    time = t if t.ndim == 1 else t[:, None, :, None, None]
    if model.config.extra_pos_embed_type:  # Cosmos-Predict1: its scheduler gives log(σ)/4
        time = (time / (1 - time)).log() / 4
    known = given.get("image")
    return model(latents, time, text, None, mask, given.get("fps"), known, padding_mask=padding, return_dict=False)[0]


def _from_original_cosmos(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers

    class Full(dict):  # the converter looks for Predict1's names after it has emptied what it was given
        def pop(self, key):
            return self[key]

    return convert_cosmos_transformer_checkpoint_to_diffusers(Full({f"net.{name}": t for name, t in tensors.items()}))


def _cosmos(heads: int, head_dim: int, channels: tuple[int, int], text: int, **more: Any) -> dict[str, Any]:
    made_for = {"text_embed_dim": text, "adaln_lora_dim": 10, "max_size": (7, 24, 30)}
    return sizes(heads, head_dim, channels, **made_for, **more)


def _cosmos_given(config: dict[str, Any]) -> dict[str, Any]:
    knows_fps = not config.get("use_crossattn_projection")  # 2.5 is told none
    given: dict[str, Any] = {"fps": 30} if knows_fps and config["num_layers"] == 2 else {}
    if config["in_channels"] == config["out_channels"] + 1:  # the first frame is known
        given["image"] = torch.zeros(2, 1, 3, 6, 4)
        given["image"][:, :, 0] = 1
    return given


_PREDICT1 = {"text_embed_dim": 1024}
_PREDICT2 = {"extra_pos_embed_type": None, "num_attention_heads": 16, "rope_scale": (1.0, 4.0, 4.0)}
_PREDICT25 = {
    **_PREDICT2,
    "in_channels": 17,
    "rope_scale": (1.0, 3.0, 3.0),
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
}
_LARGE = {"num_attention_heads": 40, "num_layers": 36}
COSMOS = Family(
    "CosmosTransformer3DModel",
    (
        _cosmos(2, 18, (6, 5), 19),
        _cosmos(3, 24, (4, 4), 11, num_layers=3, extra_pos_embed_type=None, rope_scale=(1.0, 3.0, 3.0)),
        _cosmos(1, 30, (3, 6), 9, patch_size=(1, 3, 1), rope_scale=(2.0, 2.0, 2.0), mlp_ratio=2.5),
        _cosmos(
            2, 20, (5, 7), 12, extra_pos_embed_type=None, use_crossattn_projection=True,
            crossattn_proj_in_channels=33, encoder_hidden_states_channels=12,
        ),
        _cosmos(2, 26, (4, 3), 8, extra_pos_embed_type=None, rope_scale=(20 / 24, 2.0, 2.0), patch_size=(1, 2, 2)),
    ),
    {
        "Cosmos-Predict1 7B Text2World": _PREDICT1,
        "Cosmos-Predict1 7B Video2World": {**_PREDICT1, "in_channels": 17},
        "Cosmos-Predict1 14B Text2World": {**_PREDICT1, **_LARGE, "rope_scale": (2.0, 2.0, 2.0)},
        "Cosmos-Predict1 14B Video2World": {**_PREDICT1, **_LARGE, "in_channels": 17, "rope_scale": (2.0, 2.0, 2.0)},
        "Cosmos-Predict2 2B Text2Image": _PREDICT2,
        "Cosmos-Predict2 2B Video2World": {**_PREDICT2, "in_channels": 17, "rope_scale": (1.0, 3.0, 3.0)},
        "Cosmos-Predict2 14B Text2Image": {**_PREDICT2, **_LARGE},
        "Cosmos-Predict2 14B Video2World": {
            **_PREDICT2, **_LARGE, "in_channels": 17, "rope_scale": (20 / 24, 2.0, 2.0),
        },
        "Cosmos-Predict2.5 2B": _PREDICT25,
        "Cosmos-Predict2.5 14B": {**_PREDICT25, **_LARGE},
    },
    _call_cosmos,
    ((3, 6, 4), (2, 4, 10), (4, 3, 5), (1, 8, 6), (3, 6, 4)),
    {"original": _from_original_cosmos},
    per=("clip", "frame"),
    given=_cosmos_given,
    kept=("max_size", "crossattn_proj_in_channels", "encoder_hidden_states_channels"),
)  # fmt: skip

# Wan: a text of 512 positions where there is an image branch.


def _call_wan(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor, given: dict) -> Tensor:
    patch = model.config.patch_size
    if t.ndim == 2 and t.shape[1] == latents.shape[2] // patch[0]:
        t = t.repeat_interleave(latents.shape[3] * latents.shape[4] // patch[1] // patch[2], 1)
    return model(latents, t * 1000, text, return_dict=False)[0]


def _from_original_wan(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return convert_wan_transformer_to_diffusers(tensors)


def _wan(heads: int, head_dim: int, channels: tuple[int, int], text: int, ffn: int, **more: Any) -> dict[str, Any]:
    return sizes(heads, head_dim, channels, text_dim=text, ffn_dim=ffn, freq_dim=34, **more)


WAN = Family(
    "WanTransformer3DModel",
    (
        _wan(3, 14, (5, 7), 19, 71, patch_size=(2, 1, 3)),
        _wan(2, 24, (4, 4), 10, 50, cross_attn_norm=False),
        _wan(1, 36, (6, 3), 33, 40, num_layers=3),
        _wan(5, 10, (3, 5), 8, 60, patch_size=(1, 1, 1), eps=1e-4),
        _wan(4, 12, (3, 2), 21, 30, patch_size=(1, 3, 1)),
    ),
    {
        "Wan 2.1 T2V 1.3B": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
        "Wan 2.1 and 2.2 T2V 14B": {},
        "Wan 2.2 TI2V 5B": {
            "num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48,
        },
    },
    _call_wan,
    ((4, 3, 6), (3, 4, 6), (1, 6, 2), (2, 3, 5), (3, 9, 2)),
    {"original": _from_original_wan, "ComfyUI": _from_original_wan},
    per=("clip", "frame", "token"),
    masks=False,
)  # fmt: skip

# Wan image to video: the image's latents and a mask come as channels, its embedding (in 2.1) beside a text of 512.


def _call_wan_image(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor, given: dict) -> Tensor:
    image = given.get("image_text")
    if image is not None and model.config.pos_embed_seq_len:  # first and last image, as the pipeline batches them
        image = image.reshape(2 * len(image), -1, image.shape[2])
    x = torch.cat([latents, given["image"]], dim=1)
    return model(x, t * 1000, text, image, return_dict=False)[0]


def _from_original_wan_image(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """diffusers' converter forgets the positions of first and last image; its script renames them so."""
    found = dict(_from_original_wan(tensors))
    if "img_emb.emb_pos" in found:
        found["condition_embedder.image_embedder.pos_embed"] = found.pop("img_emb.emb_pos")
    return found


def _wan_image_given(config: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    channels = config["in_channels"] - config["out_channels"]
    given = {"image": torch.randn(2, channels, 3, 4, 6, generator=generator)}
    if config.get("image_dim"):
        tokens = config.get("pos_embed_seq_len") or 5
        given["image_text"] = torch.randn(2, tokens, config["image_dim"], generator=generator)
    return given


_BRANCH = {"image_dim": 1280, "added_kv_proj_dim": 5120}
WAN_IMAGE = Family(
    "WanTransformer3DModel",
    (
        _wan(2, 14, (7, 5), 9, 31, image_dim=17, added_kv_proj_dim=28),
        _wan(3, 12, (9, 4), 10, 50, image_dim=10, added_kv_proj_dim=36, pos_embed_seq_len=8),
        _wan(1, 36, (4, 3), 12, 40, image_dim=8, added_kv_proj_dim=36, num_layers=3, cross_attn_norm=False),
        _wan(2, 18, (36, 16), 8, 20),
        _wan(4, 12, (5, 2), 11, 30, image_dim=21, added_kv_proj_dim=48, patch_size=(1, 1, 3), pos_embed_seq_len=6),
    ),
    {
        "Wan 2.1 I2V 14B": {**_BRANCH, "in_channels": 36},
        "Wan 2.1 FLF2V 14B": {**_BRANCH, "in_channels": 36, "pos_embed_seq_len": 514},
        "Wan 2.2 I2V A14B": {"in_channels": 36},
    },
    _call_wan_image,
    ((3, 4, 6),) * 5,
    {"original": _from_original_wan_image, "ComfyUI": _from_original_wan_image},
    given=_wan_image_given,
    masks=False,
    text_tokens=512,
)
