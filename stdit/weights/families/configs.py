"""Shared parts of the families' configs and key maps."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stdit.errors import StditError, nearest_name
from stdit.models.config import TransformerConfig
from stdit.weights.keymap import Flatten, Rule, Shape, Unflatten

Settings = dict[str, Any]
FORMAT = 1  # of the settings that stdit adds to other programs' config.json, under "_stdit"
DIFFUSERS_VERSION = "0.36.0"  # the first whose WanPipeline reads every key that is written
# For PixArt and its descendants: settings, and keys of config.json of which stdit runs only these values.
PIXART_LIKE: Settings = {"cross_norm": "none", "qk_norm": "none", "text_padding": 0}
PLAIN_BLOCKS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
}
PICTURE_KEPT = ("heads", "position_base", "position_stretch", "text_padding")  # written beside originals
LINEAR_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
PIXART_BLOCKS = {**PLAIN_BLOCKS, "dropout": (0.0,), "norm_type": ("ada_norm_single",)}


def checked_keys(
    found: Mapping[str, Any], fields: Mapping[str, str], own: Collection[str], place: object
) -> dict[str, Any]:
    """The values of a config.json under our names.

    fields: their name: ours. Other keys are an error, except those that begin with an underscore.
    own: our names that may be under "_stdit".
    """
    values = {}
    for name, value in found.items():
        if name in fields:
            values[fields[name]] = value
        elif not name.startswith("_"):
            raise StditError(f"{place}: unknown key {name!r}.{nearest_name(name, fields)}")
    added = found.get("_stdit", {"format": FORMAT})
    if not isinstance(added, dict) or added.get("format") != FORMAT:
        raise StditError(f"{place}: _stdit is {added!r}; this version of stdit reads format {FORMAT} of it.")
    for name, value in added.items():
        if name in own:
            values[name] = value
        elif name != "format":
            raise StditError(f"{place}: unknown key {name!r} in _stdit.{nearest_name(name, own)}")
    return values


@dataclass(frozen=True)
class Fields:
    """The config.json of one class.

    names: their name of a field: ours.
    defaults: the value of every key when it is absent, which also gives its type.
    only: keys of which stdit runs only these values; the first is written.
    """

    class_name: str
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def read(self, found: Mapping[str, Any], own: Collection[str], place: object) -> tuple[dict[str, Any], Settings]:
        """Our values (the fields of `names`, and `own` under "_stdit"), and all of theirs with defaults filled in."""
        kind = found.get("_class_name", self.class_name)
        if kind != self.class_name:
            raise StditError(f"{place}: {kind!r} is not a model that stdit loads; it loads {self.class_name}s.")
        checked_keys(found, {name: name for name in self.defaults}, own, place)
        theirs = {**self.defaults, **{name: found[name] for name in self.defaults if name in found}}
        for name, allowed in self.only.items():
            if theirs[name] not in allowed:
                runs = " or ".join(map(repr, allowed))
                raise StditError(f"{place}: {name} is {theirs[name]!r}; stdit runs such models with {runs} only.")
        for name, value in theirs.items():
            if not _of_type(value, self.defaults[name], least=0 if name in self.names else 1):
                raise StditError(f"{place}: {name} is {value!r}, not of the kind of {self.defaults[name]!r}.")
        values = {ours: theirs[name] for name, ours in self.names.items()}
        return values | {name: value for name, value in found.get("_stdit", {}).items() if name != "format"}, theirs

    def write(self, config: TransformerConfig, own: Collection[str] = (), **more: Any) -> Settings:
        """The config.json of `config`, every value explicit. more: their keys that are not in `names`."""
        values = {name: getattr(config, ours) for name, ours in self.names.items()}
        values = {**self.defaults, **{name: allowed[0] for name, allowed in self.only.items()}, **values, **more}
        added = {"_stdit": {"format": FORMAT, **{name: getattr(config, name) for name in own}}} if own else {}
        return {"_class_name": self.class_name, "_diffusers_version": DIFFUSERS_VERSION, **added, **listed(values)}


def describe(class_name: str, config: Any, kept: Collection[str]) -> Settings:
    """A config.json for originals that have none: the settings that tensor shapes do not tell."""
    values = listed({name: getattr(config, name) for name in kept})
    return {"_class_name": class_name, "_stdit": {"format": FORMAT, **values}}


def listed(values: Mapping[str, Any]) -> Settings:
    """Values as JSON reads them back: tuples become lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def described(found: Mapping[str, Any], kept: Collection[str], place: object) -> Settings:
    """The settings that `describe` wrote."""
    checked_keys(found, {}, kept, place)
    return {name: value for name, value in found.get("_stdit", {}).items() if name != "format"}


def _of_type(value: Any, like: Any, least: int = 1) -> bool:
    """Whether a value is of the type of `like`, and finite. least: for an integer. It is 1 for those that a family
    calculates with, and 0 for those that become a setting as they are: TransformerConfig checks their ranges."""
    if like is None or value is None:
        return value is None or type(value) in (int, float, bool)
    if isinstance(like, float):
        return type(value) in (int, float) and 0 <= value < math.inf
    if isinstance(like, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(like) and all(map(_of_type, value, like))
    if type(like) is int:
        return type(value) is int and least <= value < 2**31
    return type(value) is type(like)


def width(heads: int, head_dim: int) -> Settings:
    """Settings of families that give a head's width and have an MLP four times as wide as the model."""
    return {"heads": heads, "dim": heads * head_dim, "ffn_dim": 4 * heads * head_dim}


def checked_width(theirs: Mapping[str, Any], place: object) -> Settings:
    """`width` of a config.json; cross_attention_dim must be the model's width."""
    values = width(theirs["num_attention_heads"], theirs["attention_head_dim"])
    if theirs["cross_attention_dim"] != values["dim"]:
        raise StditError(f"{place}: cross_attention_dim {theirs['cross_attention_dim']} is not {values['dim']}.")
    return values


def head_fields(config: TransformerConfig) -> Settings:
    """The inverse of `checked_width`."""
    heads = {"num_attention_heads": config.heads, "attention_head_dim": config.head_dim}
    return {**heads, "cross_attention_dim": config.dim}


def picture(theirs: Mapping[str, Any]) -> Settings:
    """Settings of image models: patches, channels, and sinusoids stretched to the trained image size."""
    patch, sample = theirs["patch_size"], theirs["sample_size"]
    return {
        "out_channels": theirs["out_channels"] or theirs["in_channels"],
        "patch": (1, patch, patch),
        "position_base": sample // patch,
        "position_stretch": float(max(sample // 64, 1)),
    }


def picture_fields(config: TransformerConfig) -> Settings:
    """The inverse of `picture`."""
    side = config.patch[1]
    return {"out_channels": config.out_channels, "patch_size": side, "sample_size": config.position_base * side}


def pixart_built_in(config: TransformerConfig) -> dict[str, tuple[Any, ...]]:
    """`built_in` of PixArt and its descendants: patches are squares of one frame, texts are projected."""
    square = (1, config.patch[1], config.patch[1])
    return {"patch": (square,), "blank_channels": (0,), "text_embedding": ("mlp",)}


def picture_from_shapes(
    shapes: Mapping[str, Shape],
    place: object,
    what: str,
    blocks: str,
    names: tuple[str, str, str],
    heads: int | None,
    released: Mapping[int, int],
) -> Settings:
    """Settings of the same models from tensor shapes.

    names: of the patch embedding, the head, and the text embedding's first layer.
    heads: the number of heads, if the user gave it.
    released: the releases' number of heads by width.
    """
    dim, channels, patch, _ = needed(shapes, names[0], 4, place, what)
    return {
        **width(*checked_heads(heads, dim, released, place, what)),
        "layers": count(shapes, blocks),
        "in_channels": channels,
        "out_channels": needed(shapes, names[1], 2, place, what)[0] // patch**2,
        "patch": (1, patch, patch),
        "text_dim": needed(shapes, names[2], 2, place, what)[1],
    }


def checked_heads(
    heads: int | None, dim: int, released: Mapping[int, int], place: object, what: str
) -> tuple[int, int]:
    """Number and width of the heads of a model without a config.json: as given, else as in the release of this width.
    Raises StditError otherwise, since no tensor's shape tells them."""
    heads = released.get(dim) if heads is None else heads
    if heads is None:
        raise StditError(
            f"{place}: no config.json, and the tensors do not tell the number of heads ({what}, {dim} wide). Put the "
            "weights' config.json beside the file, or give the number: load_transformer(heads=N), or "
            "`stdit weights convert FILE OUT --heads N`, which makes a folder for all commands."
        )
    if heads < 1 or dim % heads:
        raise StditError(f"{place}: {heads} heads do not divide a width of {dim}.")
    return heads, dim // heads


def checked_transformer(
    values: Mapping[str, Any], shapes: Mapping[str, Shape], place: object, blocks: str
) -> TransformerConfig:
    """The config of `values`. Its number of blocks must be the tensors'; `blocks` is a pattern of their names."""
    try:
        config = TransformerConfig(**values)
    except (StditError, TypeError, ValueError) as error:
        raise StditError(f"{place}: {error}") from None
    if shapes and (found := count(shapes, blocks)) != config.layers:
        if isinstance(place, Path) and place.name != "config.json":  # weights without a config.json
            raise StditError(
                f"{place}: the tensors are of {found} blocks; without their config.json, {config.layers} are expected. "
                "Put the config.json of the weights beside them."
            )
        raise StditError(
            f"{place}: the config says {config.layers} blocks, the tensors are of {found}. "
            "Does this config.json belong to these weights?"
        )
    return config


def count(shapes: Mapping[str, Shape], blocks: str) -> int:
    """The number of blocks. blocks: a pattern whose group is a block's number."""
    return len({found[1] for name in shapes if (found := re.match(blocks, name))})


def needed(shapes: Mapping[str, Shape], name: str, rank: int, place: object, what: str) -> Shape:
    """The shape of a tensor that is needed to derive the config. Raises StditError if it is absent."""
    if len(shapes.get(name, ())) != rank:
        raise StditError(f"{place}: no config.json, and no {name} of rank {rank} to tell the size by ({what}).")
    return shapes[name]


def patch_rules(config: TransformerConfig, theirs: str = "pos_embed.proj", axes: int = 2) -> list[Rule]:
    """A patch embedding that is a convolution there: a Conv2d per frame, or a Conv3d."""
    kernel = (config.in_channels, *config.patch[-axes:])
    return [
        Rule("patch_embedding.weight", f"{theirs}.weight", Unflatten(1, kernel)),
        Rule("patch_embedding.bias", f"{theirs}.bias"),
    ]


def block_rules(ours: str = "blocks", theirs: str = "transformer_blocks", q_norm: str = "norm_{p}") -> list[Rule]:
    """The blocks of diffusers' PixArt and its descendants."""
    rules = []
    for mine, yours in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        a, b = f"{ours}.{{i}}.{mine}", f"{theirs}.{{i}}.{yours}"
        rules += [
            Rule(f"{a}.{{p:q|k|v}}.{{leaf}}", f"{b}.to_{{p}}.{{leaf}}"),
            Rule(f"{a}.o.{{leaf}}", f"{b}.to_out.0.{{leaf}}"),
            Rule(f"{a}.norm_{{p:q|k}}.weight", f"{b}.{q_norm}.weight"),
        ]
    return [
        *rules,
        Rule(f"{ours}.{{i}}.ffn.0.{{leaf}}", f"{theirs}.{{i}}.ff.net.0.proj.{{leaf}}"),
        Rule(f"{ours}.{{i}}.ffn.2.{{leaf}}", f"{theirs}.{{i}}.ff.net.2.{{leaf}}"),
        Rule(f"{ours}.{{i}}.modulation", f"{theirs}.{{i}}.scale_shift_table", Flatten(0, (1, 6))),
    ]


def end_rules(time: str = "adaln_single") -> list[Rule]:
    """Time embedding, text embedding and head of the same models."""
    return [
        Rule("time_embedding.0.{leaf}", f"{time}.emb.timestep_embedder.linear_1.{{leaf}}"),
        Rule("time_embedding.2.{leaf}", f"{time}.emb.timestep_embedder.linear_2.{{leaf}}"),
        Rule("time_projection.1.{leaf}", f"{time}.linear.{{leaf}}"),
        Rule("text_embedding.0.{leaf}", "caption_projection.linear_1.{leaf}"),
        Rule("text_embedding.2.{leaf}", "caption_projection.linear_2.{leaf}"),
        Rule("head.modulation", "scale_shift_table", Flatten(0, (1, 2))),
        Rule("head.head.{leaf}", "proj_out.{leaf}"),
    ]
