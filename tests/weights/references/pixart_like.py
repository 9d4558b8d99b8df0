"""PixArt and what was made of its blocks: Latte and Allegro."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from references.base import Family, captioned

# PixArt: frames are images, so the reference takes them as a batch.


def _per_frame(t: Tensor, frames: int) -> Tensor:
    """(B,) or (B, T) noise levels as (B·T,) DDPM times."""
    return ((t[:, None].expand(-1, frames) if t.ndim == 1 else t) * 1000).flatten()


def _call_pixart(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor, given: dict) -> Tensor:
    b, _, f, _, _ = latents.shape
    added = None
    if "size" in given:
        width, height = given["size"]
        added = {
            "resolution": torch.tensor([[height, width]] * (b * f), dtype=torch.float32),
            "aspect_ratio": torch.tensor([[height / width]] * (b * f), dtype=torch.float32),
        }
    out = model(
        latents.transpose(1, 2).flatten(0, 1),
        encoder_hidden_states=text.repeat_interleave(f, 0),
        encoder_attention_mask=mask.repeat_interleave(f, 0),
        timestep=_per_frame(t, f),
        added_cond_kwargs=added,
        return_dict=False,
    )[0]
    return out.unflatten(0, (b, f)).transpose(1, 2)


def _from_original_pixart(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    """As diffusers' script convert_pixart_sigma_to_diffusers.py has it."""
    renames = {
        "x_embedder.proj": "pos_embed.proj",
        "y_embedder.y_proj.fc": "caption_projection.linear_",
        "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
        "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
        "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
        "t_block.1": "adaln_single.linear",
        "final_layer.linear": "proj_out",
        "final_layer.scale_shift_table": "scale_shift_table",
        "cross_attn.proj": "attn2.to_out.0",
        "cross_attn.q_linear": "attn2.to_q",
        ".attn.proj": ".attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
    }
    found = {}
    for name, tensor in tensors.items():
        for old, new in renames.items():
            name = name.replace(old, new)
        name = name.replace("blocks.", "transformer_blocks.") if name.startswith("blocks.") else name
        for fused, parts in (("attn.qkv", ("q", "k", "v")), ("cross_attn.kv_linear", ("k", "v"))):
            if fused in name:
                attention = "attn1" if len(parts) == 3 else "attn2"
                for part, piece in zip(parts, tensor.chunk(len(parts))):
                    found[name.replace(fused, f"{attention}.to_{part}")] = piece
                break
        else:
            found[name] = tensor
    return found


def _pixart(
    heads: int, head_dim: int, channels: tuple[int, int], sample: int, scale: float, sized: bool, **more: Any
) -> dict[str, Any]:
    made_for = {"sample_size": sample, "interpolation_scale": scale, "use_additional_conditions": sized}
    return captioned(heads, head_dim, channels, **made_for, **more)


PIXART = Family(
    "PixArtTransformer2DModel",
    (
        _pixart(2, 18, (5, 7), 8, 1, True),
        _pixart(3, 16, (4, 8), 32, 2, False, num_layers=3),
        _pixart(1, 20, (3, 3), 18, 1.5, False, patch_size=3),
        _pixart(5, 12, (4, 2), 128, 2, True, caption_channels=7),
        _pixart(2, 10, (6, 5), 16, 0.5, False, patch_size=1),
    ),
    {
        "PixArt-α XL 256": {"sample_size": 32, "caption_channels": 4096},
        "PixArt-α XL 512-MS": {"sample_size": 64, "caption_channels": 4096},
        "PixArt-α XL 1024-MS": {"sample_size": 128, "caption_channels": 4096},
        "PixArt-Σ XL 1024-MS": {
            "sample_size": 128,
            "caption_channels": 4096,
            "use_additional_conditions": False,
            "interpolation_scale": 2,
        },
    },
    _call_pixart,
    ((1, 6, 4), (3, 4, 10), (2, 9, 3), (1, 8, 6), (2, 5, 7)),
    {"original": _from_original_pixart},
    per=("clip", "frame"),
    given=lambda config: {"size": (640, 384)} if config["use_additional_conditions"] else {},
)

# Latte: its text is cropped or attended as it is, so nothing is masked; as many frames as its positions are made for.


def _call_latte(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor, given: dict) -> Tensor:
    return model(latents, timestep=t * 1000, encoder_hidden_states=text, return_dict=False)[0]


_LATTE = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "patch_size": 2,
}


def _latte(
    heads: int, head_dim: int, channels: tuple[int, int], sample: int, frames: int, **more: Any
) -> dict[str, Any]:
    return captioned(heads, head_dim, channels, **{**_LATTE, "sample_size": sample, "video_length": frames, **more})


LATTE = Family(
    "LatteTransformer3DModel",
    (
        _latte(2, 18, (5, 7), 8, 4),
        _latte(3, 16, (4, 8), 128, 3, num_layers=3),
        _latte(1, 20, (3, 3), 18, 2, patch_size=3),
        _latte(5, 12, (4, 2), 64, 5, caption_channels=7),
        _latte(2, 10, (6, 5), 200, 6, patch_size=1),
    ),
    {"Latte-1": _latte(16, 72, (4, 8), 64, 16, num_layers=28, caption_channels=4096)},
    _call_latte,
    ((4, 6, 4), (3, 4, 10), (2, 9, 3), (5, 8, 6), (6, 5, 7)),
    masks=False,
    kept=("video_length",),
)

# Allegro: the pipeline makes the rotary angles.


def _call_allegro(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor, given: dict) -> Tensor:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    config, (f, h, w) = model.config, latents.shape[2:]
    h, w = h // config.patch_size, w // config.patch_size
    scale = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
    *table, t_, h_, w_ = get_3d_rotary_pos_embed_allegro(config.attention_head_dim, ((0, 0), (h, w)), (h, w), f, scale)
    places = torch.cartesian_prod(t_.round().long(), h_.round().long(), w_.round().long())
    rotary = (tuple(table), tuple(places.T.reshape(3, 1, -1).contiguous()))
    mask = mask.float()
    return model(latents, text, t * 1000, None, mask, rotary, return_dict=False)[0]


def _allegro(heads: int, head_dim: int, channels: tuple[int, int], patch: int, **more: Any) -> dict[str, Any]:
    return captioned(heads, head_dim, channels, patch_size=patch, **more)


ALLEGRO = Family(
    "AllegroTransformer3DModel",
    (
        _allegro(2, 18, (5, 7), 2),
        _allegro(3, 12, (4, 4), 3, interpolation_scale_t=1.0, num_layers=3),
        _allegro(1, 30, (3, 6), 1, interpolation_scale_h=1.5),
        _allegro(5, 6, (4, 2), 2, interpolation_scale_w=3.1, caption_channels=7),
        _allegro(2, 24, (6, 5), 2),
    ),
    {"Allegro": {}},
    _call_allegro,
    ((3, 6, 4), (2, 6, 9), (4, 3, 5), (1, 8, 2), (5, 2, 6)),
    kept=("sample_height", "sample_width", "sample_frames"),
)
