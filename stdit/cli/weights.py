"""`stdit weights`: describes weights, and converts them to another program's layout."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text
from typer import Argument, Option, echo

from stdit.cli.common.options import out_path
from stdit.cli.common.tables import print_table
from stdit.errors import StditError
from stdit.files import check_copyable, no_empty_folders, publish_copy, within
from stdit.heartbeat import HEARTBEAT
from stdit.locks import locked

if TYPE_CHECKING:
    from stdit.weights.sources import Source

_Model = Annotated[Path | None, Option(help="For an adapter (LoRA): its model.")]
_Heads = Annotated[int | None, Option(help="Number of heads, for a transformer whose tensors do not tell it.")]
_Pickle = Annotated[bool, Option("--trust-pickle", help="Also open .pth and .bin files (tensors only).")]


def inspect(
    path: Annotated[
        Path, Argument(help="A model folder, transformer/ or vae/, a Wan release, or a file; or a LoRA file.")
    ],
    model: _Model = None,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False,
    trust_pickle: _Pickle = False,
    heads: _Heads = None,
    verify: Annotated[
        bool, Option("--verify", help="Only hash the files and compare with the published SHA-256.")
    ] = False,
) -> int:
    """Show family, dialect, size, dtype, and missing or unexpected tensors, without reading any.

    Exit status 1 if anything is missing, unexpected or misshaped, or, with --verify, if a file differs from its
    published checksum: FILE.sha256 or SHA256SUMS beside it, or the notes of the hub's download.

    Example: stdit weights inspect Wan2.1-T2V-1.3B-Diffusers
    """
    from stdit.weights.lora.read import describe, is_adapter
    from stdit.weights.sources import find

    path = path.expanduser()
    if verify:
        return _verify(path, as_json)
    if is_adapter(path):
        adapter = describe(path, find("transformer", model, trust_pickle).config if model else None)
        if as_json:
            print(json.dumps({"path": str(path), "models": [adapter]}, indent=2))
        else:
            _show_adapter(adapter)
        return 0
    sources = _sources(path, trust_pickle, strict=False, heads=heads)
    models, parts = [_description(part, source) for part, source in sources.items()], _parts(path)
    if as_json:
        print(json.dumps({"path": str(path), "models": models, "parts": parts}, indent=2))
    else:
        for found in models:
            _show_model(found)
        print_table("beside it", ("", ""), [*parts.items()])
    return int(any(found["missing"] or found["unexpected"] or found["misshaped"] for found in models))


def _verify(path: Path, as_json: bool) -> int:
    """Prints a line per file: ok, differs, or nothing to check against."""
    from stdit.weights.identity import check, weight_files

    files = weight_files(path)
    if not path.exists() or not files:
        raise StditError(f"{path}: holds no file of weights.")
    found = []
    with Console(stderr=True).status("reading") as status:
        for file in files:
            status.update(escape(f"{file}: {file.stat().st_size / 1e9:.1f} GB"))
            found.append(check(file))
    if as_json:
        rows = [{**vars(checked), "verdict": checked.verdict} for checked in found]
        print(json.dumps({"path": str(path), "checksums": rows}, indent=2, default=str))
    else:
        table = []
        for checked in found:
            name = str(checked.file.relative_to(path)) if path.is_dir() else str(checked.file)
            differs = f"\nwanted {checked.wanted}\nfound  {checked.found}" if checked.verdict == "differs" else ""
            table.append((name, checked.verdict, checked.source + differs))
        print_table(f"checksums: {path}", ("file", "is", "by"), table)
    return int(any(checked.verdict == "differs" for checked in found))


def convert(
    source: Annotated[Path, Argument(metavar="IN", help="What `inspect` takes.")],
    out: Annotated[Path, Argument(metavar="OUT", parser=out_path, help="A folder; created if needed.")],
    layout: Annotated[
        str,
        Option(
            help='"diffusers", "original" (the release\'s) or "comfyui"; a LoRA also "common", "kohya" or "peft". '
            "Default: diffusers; for a LoRA common, which most programs read."
        ),
    ] = "",
    dtype: Annotated[str, Option(help="bf16 or fp32. Default, and always for adapters: as stored.")] = "",
    model: _Model = None,
    trust_pickle: _Pickle = False,
    heads: _Heads = None,
) -> None:
    """Convert weights to another layout or dtype; in the same dtype bit for bit. One tensor in memory at a time.

    A transformer or VAE alone goes straight into OUT. Both, in diffusers' layout, go into OUT/transformer and OUT/vae;
    the other parts of a model folder are copied beside them.

    An adapter (LoRA) needs --model and becomes one file.

    Example: stdit weights convert Wan2.1-T2V-1.3B wan-diffusers --layout diffusers
    """
    from stdit.vae.config import VaeConfig
    from stdit.weights import io
    from stdit.weights.lora.read import is_adapter
    from stdit.weights.sources import EXPERT_NAMES, expert_folders

    if is_adapter(source):
        if model is None:
            raise StditError(f"{source}: is an adapter; give its model by --model: the model's sizes are needed.")
        return _convert_adapter(source, out, layout, model, trust_pickle)
    layout = layout or "diffusers"
    io.dialect_in(layout)  # raises for an unknown layout
    import torch

    dtypes = {"": None, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise StditError(f"dtype {dtype!r} does not exist. Known: bf16, fp32.")
    found = _sources(source, trust_pickle, strict=True, heads=heads)
    for inner, outer, how in ((out, source, "is or lies in"), (source, out, "holds")):
        if source.is_dir() and within(inner, outer):
            raise StditError(f"{out}: {how} {source}, which is read. Write to another folder.")
    named = "vae" in found and isinstance(found["vae"].config, VaeConfig)  # it has a file name of its own

    def place_of(part: str) -> Path:
        if part in EXPERT_NAMES:
            return out / expert_folders(layout)[part]
        return out / part if len(found) > 1 and (layout == "diffusers" or not named) else out

    for converted in found.values():  # before anything is written: the second may be refused
        io.check_layout(converted.config, layout)
    places = {part: place_of(part) for part in found}
    read_from = {file.parent.resolve() for converted in found.values() for file in converted.files.files}
    for part, place in places.items():
        if place.resolve() in read_from:
            raise StditError(f"{place}: is where {part} is read from. Write to another folder.")
    others: list[Path] = []
    if len(found) > 1 and layout == "diffusers" and (source / "model_index.json").is_file():
        others = _others(source, {place.name for place in places.values()})
    for entry in others:
        check_copyable(entry)
        _check_replaceable(entry, out / entry.name)
    console = Console(stderr=True)
    remedy = "Wait until it ends, or write to another folder."
    with no_empty_folders(out, *places.values()), locked(out, "stdit weights convert", remedy):
        for part, converted in found.items():
            doing = f"{part}: {converted.parameters:,} parameters to {places[part]}"
            HEARTBEAT.doing(doing)
            with console.status(escape(doing)):
                io.convert(converted, places[part], layout, dtype=dtypes[dtype])
            echo(f"{part}: {converted.dialect} → {layout}, {places[part]}", err=True)
        with console.status("copying the other parts"):
            for entry in others:
                publish_copy(entry, out)


def _convert_adapter(source: Path, out: Path, layout: str, model: Path, trust_pickle: bool) -> None:
    from stdit.weights.lora.read import FILES, read_adapter
    from stdit.weights.lora.write import ALIASES, write_adapter
    from stdit.weights.sources import find

    config = find("transformer", model, trust_pickle).config
    layout = ALIASES.get(layout, layout) or "common"
    adapter = read_adapter(source, config)
    place = out if out.suffix == ".safetensors" else out / FILES.get(layout, "lora.safetensors")
    if place.exists() and place.samefile(source):
        raise StditError(f"{place}: is the adapter itself and would be overwritten. Write to another file.")
    with no_empty_folders(place.parent):
        write_adapter(adapter, place, config, layout)
    echo(f"adapter → {layout}, {place}", err=True)


def _others(source: Path, converted: set[str]) -> list[Path]:
    """The folders and JSON files of a model folder that are not converted, model_index.json last."""
    found = sorted(source.iterdir(), key=lambda entry: (entry.name == "model_index.json", entry.name))
    found = [entry for entry in found if entry.name not in converted and not entry.name.startswith(".")]
    return [entry for entry in found if entry.is_dir() or entry.suffix == ".json" or not entry.exists()]


def _check_replaceable(source: Path, target: Path) -> None:
    """Raises StditError if a folder that exists holds a file that its new copy would not have."""
    for file in target.rglob("*") if target.is_dir() and not target.is_symlink() else []:
        if not file.is_dir() and not (source / file.relative_to(target)).exists():
            raise StditError(f"{file}: would be lost, as {source} has no such file. Remove it, or choose another OUT.")


def _sources(path: Path, trust_pickle: bool, strict: bool, heads: int | None) -> dict[str, Source]:
    """The models at `path`: transformer (or two experts, high and low) and vae. Raises StditError if there is none."""
    from stdit.weights.families import FAMILIES, titles
    from stdit.weights.sources import expert_places, find, holds, other_vae

    experts = expert_places(path.expanduser())
    there: dict[str, Callable[[], Source]] = {}
    problems: list[StditError] = []
    for part, place in {**(experts or {"transformer": path}), "vae": path}.items():
        kind, given_heads = ("vae", None) if part == "vae" else ("transformer", heads)
        try:
            if part == "vae" and there and other_vae(place):
                continue  # run by diffusers, so nothing is renamed: see `_parts`
            if holds(kind, place, trust_pickle):
                there[part] = partial(find, kind, place, trust_pickle, strict, given_heads)
        except StditError as error:
            problems.append(error)
    if not there:
        known = ", ".join(title for kind in FAMILIES for title in titles(kind))
        raise problems[0] if problems else StditError(f"{path}: holds no model of a known family: {known}.")
    for problem in problems:
        echo(f"left out: {problem}", err=True)
    return {part: read() for part, read in there.items()}


def _description(part: str, source: Source) -> dict[str, Any]:
    from stdit.models import transformer
    from stdit.vae import autoencoder
    from stdit.weights.families import objective_of, release_of

    differences = source.table.differences(source.files.shapes)
    entries = source.files.entries.values()
    denoises = source.kind == "transformer"
    release = release_of(source.config) if denoises else None  # None for sizes that nobody released, too
    presets: dict[str, Any] = transformer.PRESETS if denoises else autoencoder.PRESETS
    return {
        "part": part,
        "kind": source.kind,
        "family": source.family.title,
        "dialect": source.dialect,
        "preset": next((name for name, config in presets.items() if config == source.config), None),
        "objective": objective_of(source.config) if denoises else None,
        "release": release and release.name,
        "expects_vae": release and release.vae,
        "expects_text": release and release.text,
        "parameters": source.parameters,
        "bytes": sum(entry.stop - entry.start for entry in entries),
        "tensors": len(entries),
        "dtypes": Counter(entry.dtype for entry in entries),
        "files": [str(file) for file in source.files.files],
        "config_path": str(source.config_path) if source.config_path else None,
        "config": asdict(source.config),
        "missing": differences.missing,
        "unexpected": differences.unexpected,
        "misshaped": {name: list(map(list, shapes)) for name, shapes in differences.misshaped.items()},
    }


def _parts(path: Path) -> dict[str, str]:
    """The other folders of a model folder, and the class that each one's config names."""
    from stdit.weights.sources import other_vae
    from stdit.weights.tensor_files import read_json

    documents = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    found = {"vae": other.name} if (path / "vae").is_dir() and (other := other_vae(path)) else {}
    for name in ("text_encoder", "tokenizer", "scheduler", "image_encoder", "image_processor", "transformer_2"):
        if not (path / name).is_dir():
            continue
        document = path / name / documents.get(name, "config.json")
        config = read_json(document) if document.is_file() else {}
        listed = config.get("architectures")
        names = [config.get("_class_name"), config.get("tokenizer_class")]
        names += listed if isinstance(listed, list) else []
        shift = config.get("shift") or config.get("flow_shift")
        named = next((each for each in names if each and isinstance(each, str)), "unnamed")
        found[name] = named + (f", shift {shift}" if shift else "")
    return found


def _show_adapter(adapter: dict[str, Any]) -> None:
    rows = [("fits", ", ".join(adapter["fits"]) or "no family's names")]
    for what in ("ranks", "alphas", "dtypes", "targets"):
        rows.append((what, ", ".join(f"{value} ({count})" for value, count in adapter[what].items())))
    rows.append(("size", f"{adapter['parameters']:,} parameters, {adapter['differences']} tensors added as a whole"))
    print_table(f"adapter (LoRA): {adapter['path']}", ("", ""), rows)


def _show_model(model: dict[str, Any]) -> None:
    size = f"{model['parameters'] / 1e9:.2f} B" if model["parameters"] >= 1e8 else f"{model['parameters']:,}"
    preset = f", preset {model['preset']}" if model["preset"] else ""
    rows: list[tuple[str, str | Text]] = [("size", f"{size} parameters{preset}")]
    if model["release"]:
        rows.append(("release", model["release"]))
        rows.append(("takes", f"VAE: {model['expects_vae']}\ntext: {model['expects_text']}"))
    if model["objective"]:
        rows.append(("trained for", model["objective"]))
    rows += [
        ("dialect", model["dialect"]),
        ("dtypes", ", ".join(f"{name} ({count} tensors)" for name, count in model["dtypes"].items())),
        ("files", "\n".join(model["files"][:4]) + ("\n…" if len(model["files"]) > 4 else "")),
        ("config", model["config_path"] or "none beside the weights: from the file's metadata or the shapes"),
        ("", ", ".join(f"{name} {value}" for name, value in model["config"].items() if value is not None)),
    ]
    for what in ("missing", "unexpected", "misshaped"):
        names = list(model[what])
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        rows.append((what, Text.assemble((str(len(names)), "red"), f": {shown}") if names else "none"))
    print_table(f"{model['part']}: {model['family']}", ("", ""), rows)
