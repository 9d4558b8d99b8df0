"""Small random models of every family, made by diffusers, and how each is called: the oracles of test_families.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Converter = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Every weight, bias, norm and table random, none of them near 0 or 1 only."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + ("norm" in name))
    return model.float().eval()


@dataclass(frozen=True)
class Family:
    """name: of the class in diffusers. configs: five small ones. released: name: (config, parameters).

    call(model, latents, t, text, mask, given): what the reference computes, (B, C, T, H, W). converters: for dialects
    that diffusers can read, its own function from a dialect's tensors to its names. per: of which t may be, beside a
    clip. given(config): conditions for `predict`.
    """

    name: str
    configs: tuple[dict[str, Any], ...]
    released: Mapping[str, dict[str, Any]]
    call: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor, dict[str, Any]], Tensor]
    grids: tuple[tuple[int, int, int], ...]  # of latents, one for each config
    converters: Mapping[str, Converter] = field(default_factory=dict)
    per: tuple[str, ...] = ("clip",)
    given: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: {}
    text_tokens: int = 6
    masks: bool = True  # whether positions of the text may be dropped
    kept: tuple[str, ...] = ()  # of its config, what does not shape the network and is not written back

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        import diffusers

        return getattr(diffusers, self.name)(**config)


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


def _ltx(heads: int, head_dim: int, channels: tuple[int, int], text: int, layers: int, patch=(1, 1)) -> dict[str, Any]:
    volume = patch[0] * patch[1] ** 2
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "in_channels": channels[0] * volume,
        "out_channels": channels[1] * volume,
        "caption_channels": text,
        "num_layers": layers,
        "patch_size_t": patch[0],
        "patch_size": patch[1],
    }


LTX = Family(
    "LTXVideoTransformer3DModel",
    (
        _ltx(2, 14, (5, 7), 19, 3),
        _ltx(3, 16, (4, 4), 10, 2),
        _ltx(5, 10, (6, 3), 33, 2),
        _ltx(1, 38, (3, 5), 8, 1),
        _ltx(4, 12, (3, 2), 21, 2, patch=(2, 3)),
    ),
    {
        "LTX-Video 2B": {},
        "LTX-Video 13B": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    },
    _call_ltx,
    ((3, 5, 4), (1, 3, 7), (4, 2, 3), (2, 1, 5), (4, 3, 9)),
    {"original": _from_original_ltx},
    per=("clip", "frame", "token"),
    given=lambda config: {"fps": 24 + config["num_layers"]},
)

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
    heads: int, head_dim: int, channels: tuple[int, int], sample: int, scale: float, sized: bool, **more
) -> dict:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "in_channels": channels[0],
        "out_channels": channels[1],
        "sample_size": sample,
        "interpolation_scale": scale,
        "use_additional_conditions": sized,
        "caption_channels": 19,
        "num_layers": 2,
        **more,
    }


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


def _latte(heads: int, head_dim: int, channels: tuple[int, int], sample: int, frames: int, **more) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "in_channels": channels[0],
        "out_channels": channels[1],
        "sample_size": sample,
        "video_length": frames,
        "caption_channels": 19,
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


def _allegro(heads: int, head_dim: int, channels: tuple[int, int], patch: int, **more) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "cross_attention_dim": heads * head_dim,
        "in_channels": channels[0],
        "out_channels": channels[1],
        "patch_size": patch,
        "caption_channels": 19,
        "num_layers": 2,
        **more,
    }


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

# Cosmos-Predict.


def _call_cosmos(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor, given: dict) -> Tensor:
    padding = latents.new_zeros(1, 1, *latents.shape[3:])
    time = t if t.ndim == 1 else t[:, None, :, None, None]
    known = given.get("image")
    return model(latents, time, text, None, mask, given.get("fps"), known, padding_mask=padding, return_dict=False)[0]


def _from_original_cosmos(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_cosmos_transformer_checkpoint_to_diffusers

    class Full(dict):  # the converter looks for Predict1's names after it has emptied what it was given
        def pop(self, key):
            return self[key]

    return convert_cosmos_transformer_checkpoint_to_diffusers(Full({f"net.{name}": t for name, t in tensors.items()}))


def _cosmos(heads: int, head_dim: int, channels: tuple[int, int], text: int, **more) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels[0],
        "out_channels": channels[1],
        "text_embed_dim": text,
        "num_layers": 2,
        "adaln_lora_dim": 10,
        "max_size": (7, 24, 30),
        **more,
    }


def _cosmos_given(config: dict[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {"fps": 30} if config["num_layers"] == 2 else {}
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
        "Cosmos-Predict1 14B Video2World": {**_PREDICT1, **_LARGE, "in_channels": 17, "rope_scale": (2.0, 2.0, 2.0)},
        "Cosmos-Predict2 2B Text2Image": _PREDICT2,
        "Cosmos-Predict2 14B Video2World": {
            **_PREDICT2, **_LARGE, "in_channels": 17, "rope_scale": (20 / 24, 2.0, 2.0),
        },
        "Cosmos-Predict2.5 2B": _PREDICT25,
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


def _wan(heads: int, head_dim: int, channels: tuple[int, int], text: int, ffn: int, **more) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "in_channels": channels[0],
        "out_channels": channels[1],
        "text_dim": text,
        "ffn_dim": ffn,
        "freq_dim": 34,
        "num_layers": 2,
        **more,
    }


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
    {"original": _from_original_wan},
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
    {"original": _from_original_wan_image},
    given=_wan_image_given,
    masks=False,
    text_tokens=512,
)

FAMILIES = {
    "Wan": WAN,
    "Wan I2V": WAN_IMAGE,
    "LTX-Video": LTX,
    "PixArt": PIXART,
    "Latte": LATTE,
    "Allegro": ALLEGRO,
    "Cosmos-Predict": COSMOS,
}
