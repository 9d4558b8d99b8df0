"""What the families' configs and key maps have in common."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from stdit.errors import StditError, nearest_name
from stdit.models.config import TransformerConfig
from stdit.weights.keymap import Flatten, Rule, Shape, Unflatten

Settings = dict[str, Any]
FORMAT = 1  # of what we add to other programs' config.json, under "_stdit"
DIFFUSERS_VERSION = "0.36.0"  # the first whose WanPipeline reads every key that is written
# PixArt, and what was made after it: settings, and keys of a config.json that stdit runs with these values alone.
PIXART_LIKE: Settings = {"cross_norm": "none", "qk_norm": "none", "text_padding": 0}
PLAIN_BLOCKS: dict[str, tuple[Any, ...]] = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-6,),
}
PICTURE_KEPT = ("heads", "position_base", "position_stretch", "text_padding")  # beside an original, of frames
LINEAR_BETAS = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
PIXART_BLOCKS = {**PLAIN_BLOCKS, "dropout": (0.0,), "norm_type": ("ada_norm_single",)}


def checked_keys(
    found: Mapping[str, Any], fields: Mapping[str, str], own: Collection[str], place: object
) -> dict[str, Any]:
    """found's values under our names, `fields` their name: ours, and those of `own` that lie under "_stdit".

    Unknown keys are an error; those with an underscore are notes of a program.
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
    """How one program's config.json describes a family.

    names: the program's name of a field: ours. defaults: what it means when a key is absent, and the type that its
    value has. only: keys that stdit runs with these values alone (the first is written).
    """

    class_name: str
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def read(self, found: Mapping[str, Any], own: Collection[str], place: object) -> tuple[dict[str, Any], Settings]:
        """Our values of the fields in `names` and of `own` under "_stdit"; and all of theirs, defaults filled in."""
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
            if not _of_type(value, self.defaults[name]):
                raise StditError(f"{place}: {name} is {value!r}, not of the kind of {self.defaults[name]!r}.")
        values = {ours: theirs[name] for name, ours in self.names.items()}
        return values | {name: value for name, value in found.get("_stdit", {}).items() if name != "format"}, theirs

    def write(self, config: TransformerConfig, own: Collection[str] = (), **more: Any) -> Settings:
        """The config.json of `config`, every value explicit; `more`: of theirs, what `names` does not say."""
        values = {name: getattr(config, ours) for name, ours in self.names.items()}
        values = {**self.defaults, **{name: allowed[0] for name, allowed in self.only.items()}, **values, **more}
        added = {"_stdit": {"format": FORMAT, **{name: getattr(config, name) for name in own}}} if own else {}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"_class_name": self.class_name, "_diffusers_version": DIFFUSERS_VERSION, **added, **listed}


def describe(class_name: str, config: Any, kept: Collection[str]) -> Settings:
    """A config.json for originals that have none: what the shapes of their tensors do not say."""
    values = {name: getattr(config, name) for name in kept}
    listed = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"_class_name": class_name, "_stdit": {"format": FORMAT, **listed}}


def described(found: Mapping[str, Any], kept: Collection[str], place: object) -> Settings:
    """What `describe` wrote."""
    checked_keys(found, {}, kept, place)
    return {name: value for name, value in found.get("_stdit", {}).items() if name != "format"}


def _of_type(value: Any, like: Any) -> bool:
    if like is None or value is None:
        return value is None or type(value) in (int, float, bool)
    if isinstance(like, float):
        return type(value) in (int, float) and 0 <= value < math.inf
    if isinstance(like, tuple | list):
        return isinstance(value, tuple | list) and len(value) == len(like) and all(map(_of_type, value, like))
    if type(like) is int:
        return type(value) is int and 0 < value < 2**31
    return type(value) is type(like)


def width(heads: int, head_dim: int) -> Settings:
    """Of families that say a head's width and have an MLP of four times the model's."""
    return {"heads": heads, "dim": heads * head_dim, "ffn_dim": 4 * heads * head_dim}


def checked_width(theirs: Mapping[str, Any], place: object) -> Settings:
    """The same of a config.json, whose text must come to cross-attention as wide as the model."""
    values = width(theirs["num_attention_heads"], theirs["attention_head_dim"])
    if theirs["cross_attention_dim"] != values["dim"]:
        raise StditError(f"{place}: cross_attention_dim {theirs['cross_attention_dim']} is not {values['dim']}.")
    return values


def head_fields(config: TransformerConfig) -> Settings:
    """What `checked_width` reads."""
    heads = {"num_attention_heads": config.heads, "attention_head_dim": config.head_dim}
    return {**heads, "cross_attention_dim": config.dim}


def picture(theirs: Mapping[str, Any]) -> Settings:
    """Patches, channels and positions of models of frames: sinusoids stretched to the picture they were made for."""
    patch, sample = theirs["patch_size"], theirs["sample_size"]
    return {
        "out_channels": theirs["out_channels"] or theirs["in_channels"],
        "patch": (1, patch, patch),
        "position_base": sample // patch,
        "position_stretch": float(max(sample // 64, 1)),
    }


def picture_fields(config: TransformerConfig) -> Settings:
    """What `picture` reads."""
    side = config.patch[1]
    return {"out_channels": config.out_channels, "patch_size": side, "sample_size": config.position_base * side}


def pixart_built_in(config: TransformerConfig) -> dict[str, tuple[Any, ...]]:
    """For `built_in` of PixArt and what was made after it: patches are squares of one frame, texts are projected."""
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
    """The same models by their tensors, `names` those of the patch embedding, the head and the text's first layer.

    released: the number of heads by the width, of the releases. heads: where it was given.
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
    """Number and width of the heads of a model without a config.json: as given, or as the releases of its width have
    them; else they are asked for, since no tensor's shape tells them."""
    heads = released.get(dim) if heads is None else heads
    if heads is None:
        raise StditError(
            f"{place}: no config.json, and the tensors do not tell the number of heads of a {what} {dim} wide. Put the "
            "config.json of the weights beside the file, or say it: load_transformer(heads=N), or for all commands "
            "`stdit weights convert FILE OUT --heads N` makes a folder."
        )
    if heads < 1 or dim % heads:
        raise StditError(f"{place}: {heads} heads do not divide a width of {dim}.")
    return heads, dim // heads


def checked_transformer(
    values: Mapping[str, Any], shapes: Mapping[str, Shape], place: object, blocks: str
) -> TransformerConfig:
    """The config of `values`, whose number of blocks must be that of the tensors; `blocks` matches their names."""
    try:
        config = TransformerConfig(**values)
    except (StditError, TypeError, ValueError) as error:
        raise StditError(f"{place}: {error}") from None
    if shapes and count(shapes, blocks) != config.layers:
        raise StditError(
            f"{place}: the config says {config.layers} blocks, the tensors are of {count(shapes, blocks)}. "
            "Does this config.json belong to these weights?"
        )
    return config


def count(shapes: Mapping[str, Shape], blocks: str) -> int:
    """How many blocks there are, `blocks` a pattern with their number in a group."""
    return len({found[1] for name in shapes if (found := re.match(blocks, name))})


def needed(shapes: Mapping[str, Shape], name: str, rank: int, place: object, what: str) -> Shape:
    """The shape of a tensor by which a config is told where there is no config.json."""
    if len(shapes.get(name, ())) != rank:
        raise StditError(f"{place}: not a {what}: no config.json, and no {name} of rank {rank} to tell the size by.")
    return shapes[name]


def patch_rules(config: TransformerConfig, theirs: str = "pos_embed.proj", axes: int = 2) -> list[Rule]:
    """A patch embedding that is a convolution: a Conv2d of every frame, or a Conv3d."""
    kernel = (config.in_channels, *config.patch[-axes:])
    return [
        Rule("patch_embedding.weight", f"{theirs}.weight", Unflatten(1, kernel)),
        Rule("patch_embedding.bias", f"{theirs}.bias"),
    ]


def block_rules(ours: str = "blocks", theirs: str = "transformer_blocks", q_norm: str = "norm_{p}") -> list[Rule]:
    """The blocks of diffusers' PixArt and of all that were made after it."""
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
    """Time, text and head of the same models; not the patch embedding."""
    return [
        Rule("time_embedding.0.{leaf}", f"{time}.emb.timestep_embedder.linear_1.{{leaf}}"),
        Rule("time_embedding.2.{leaf}", f"{time}.emb.timestep_embedder.linear_2.{{leaf}}"),
        Rule("time_projection.1.{leaf}", f"{time}.linear.{{leaf}}"),
        Rule("text_embedding.0.{leaf}", "caption_projection.linear_1.{leaf}"),
        Rule("text_embedding.2.{leaf}", "caption_projection.linear_2.{leaf}"),
        Rule("head.modulation", "scale_shift_table", Flatten(0, (1, 2))),
        Rule("head.head.{leaf}", "proj_out.{leaf}"),
    ]
