"""`stdit weights`: what a file or folder of weights is, and the same weights in another program's layout."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stdit.cli.common.outputs import out_path

if TYPE_CHECKING:
    from stdit.weights.sources import Source

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Inspect and convert weights.")
_Model = Annotated[Path | None, typer.Option(help="For an adapter (LoRA): the model that it is for.")]
_Heads = Annotated[int | None, typer.Option(help="Of a transformer, where its tensors do not tell their number.")]
_Pickle = Annotated[bool, typer.Option("--trust-pickle", help="Also open .pth and .bin files (tensors only).")]


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A model folder, transformer/ or vae/, a Wan release, or a file; or a LoRA file.")
    ],
    model: _Model = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    trust_pickle: _Pickle = False,
    heads: _Heads = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Instead: hash the files and compare with the SHA-256 that is beside them.")
    ] = False,
) -> int:
    """Family, dialect, size, dtype, and what is missing or unexpected, without reading a tensor.

    Exit status 1 where anything is missing, unexpected or misshaped, or, with --verify, where a file differs from its
    published checksum: FILE.sha256 or SHA256SUMS beside it, or what the hub's download noted.

    Example: stdit weights inspect Wan2.1-T2V-1.3B-Diffusers
    """
    import json as format

    from stdit.weights.lora.info import describe
    from stdit.weights.lora.read import is_adapter
    from stdit.weights.sources import find

    if verify:
        return _verify(path, json)

    if is_adapter(path):
        config = None if model is None else find("transformer", model, trust_pickle).config
        adapter = describe(path, config)
        if json:
            print(format.dumps({"path": str(path), "models": [adapter]}, indent=2))
        else:
            _show_adapter(adapter)
        return 0
    found = [
        _description(part, source) for part, source in _sources(path, trust_pickle, strict=False, heads=heads).items()
    ]
    if json:
        print(format.dumps({"path": str(path), "models": found, "parts": _parts(path)}, indent=2))
    else:
        _show(found, _parts(path))
    return int(any(model["missing"] or model["unexpected"] or model["misshaped"] for model in found))


def _verify(path: Path, json: bool) -> int:
    """Prints a line a file: ok, differs, or nothing to check against."""
    import json as format

    from rich.console import Console
    from rich.table import Table

    from stdit.errors import StditError
    from stdit.weights.checksums import check, weight_files

    files = weight_files(path.expanduser())
    if not path.expanduser().exists() or not files:
        raise StditError(f"{path}: no file of weights is there.")
    found = []
    with Console(stderr=True).status("reading") as status:
        for file in files:
            status.update(f"{file}: {file.stat().st_size / 1e9:.1f} GB")
            found.append(check(file))
    if json:
        rows = [{"file": str(one.file), **one.__dict__, "verdict": one.verdict} for one in found]
        print(format.dumps({"path": str(path), "checksums": rows}, indent=2, default=str))
    else:
        table = Table(title=f"checksums: {path}", title_justify="left")
        for column in ("file", "is", "by"):
            table.add_column(column, overflow="fold")
        for one in found:
            name = str(one.file.relative_to(path)) if path.is_dir() else str(one.file)
            details = (
                f"{one.source}\nwanted {one.wanted}\nfound  {one.found}" if one.verdict == "differs" else one.source
            )
            table.add_row(name, one.verdict, details)
        Console().print(table)
    return int(any(one.verdict == "differs" for one in found))


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="What `inspect` takes.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", parser=out_path, help="A folder, made if it is not there.")],
    layout: Annotated[
        str,
        typer.Option(
            help='"diffusers", "original" (a release\'s) or "comfyui"; a LoRA also "common", "kohya" or "peft". '
            "Unset: diffusers; of a LoRA common, which most programs read."
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="bf16 or fp32; otherwise, and for adapters, as they are stored.")] = "",
    model: _Model = None,
    trust_pickle: _Pickle = False,
    heads: _Heads = None,
) -> None:
    """Write weights in another layout or dtype; in the same dtype bit for bit. A tensor in memory at a time.

    A transformer or VAE alone goes straight into OUT; both, in diffusers' layout, into OUT/transformer and OUT/vae,
    and the other parts of a model folder beside them as they are.

    An adapter (LoRA) needs --model and becomes one file.

    Example: stdit weights convert Wan2.1-T2V-1.3B wan-diffusers --layout diffusers
    """
    from rich.console import Console

    from stdit.errors import StditError
    from stdit.files import check_copyable, no_empty_folders, within
    from stdit.heartbeat import HEARTBEAT
    from stdit.locks import locked
    from stdit.vae.config import VaeConfig
    from stdit.weights import io
    from stdit.weights.expert_folders import EXPERT_NAMES, expert_folders
    from stdit.weights.layouts import check_layout, dialect_in
    from stdit.weights.lora.read import FILES, is_adapter, read_adapter
    from stdit.weights.lora.write import ALIASES, write_adapter
    from stdit.weights.sources import find

    if is_adapter(source):
        if model is None:
            raise StditError(f"{source}: is an adapter; say by --model which model it is for: its sizes are needed.")
        config = find("transformer", model, trust_pickle).config
        layout = ALIASES.get(layout, layout) or "common"
        adapter = read_adapter(source, config)
        place = out if out.suffix == ".safetensors" else out / FILES.get(layout, "lora.safetensors")
        if place.exists() and place.samefile(source):
            raise StditError(f"{place}: is the adapter itself, which would be replaced. Write to another file.")
        with no_empty_folders(place.parent):
            write_adapter(adapter, place, config, layout)
        return Console(stderr=True).print(f"adapter → {layout}, {place}", highlight=False)
    layout = layout or "diffusers"
    dialect_in(layout)  # raises for one that does not exist
    import torch

    dtypes = {"": None, "bf16": torch.bfloat16, "fp32": torch.float32}
    if dtype not in dtypes:
        raise StditError(f"dtype {dtype!r} is not one to convert to. Known: bf16, fp32.")
    found = _sources(source, trust_pickle, strict=True, heads=heads)
    for one, other, how in ((out, source, "is or lies in"), (source, out, "holds")):
        if source.is_dir() and within(one, other):
            raise StditError(f"{out}: {how} {source}, which is read. Write to another folder.")
    named = "vae" in found and isinstance(found["vae"].config, VaeConfig)  # in an original layout, by a name of its own

    def place_of(part: str) -> Path:
        if part in EXPERT_NAMES:
            return out / expert_folders(layout)[part]
        return out / part if len(found) > 1 and (layout == "diffusers" or not named) else out

    for converted in found.values():  # before anything is written: the second may be the one that is refused
        check_layout(converted.config, layout)
    places = {part: place_of(part) for part in found}
    for part, place in places.items():
        if place.resolve() in {file.parent.resolve() for one in found.values() for file in one.files.files}:
            raise StditError(f"{place}: is where {part} is read from. Write to another folder.")
    others: list[Path] = []
    if len(found) > 1 and layout == "diffusers" and (source / "model_index.json").is_file():
        others = _others(source, {place.name for place in places.values()})
    for entry in others:
        check_copyable(entry)
        _check_replaceable(entry, out / entry.name)
    console = Console(stderr=True)
    remedy = "Wait for its end, or write to another folder."
    with no_empty_folders(out, *places.values()), locked(out, "stdit weights convert", remedy):
        for part, converted in found.items():
            HEARTBEAT.doing(f"{part}: {converted.parameters:,} parameters to {places[part]}")
            with console.status(f"{part}: {converted.parameters:,} parameters to {places[part]}"):
                io.convert(converted, places[part], layout, dtype=dtypes[dtype])
            console.print(f"{part}: {converted.dialect} → {layout}, {places[part]}", highlight=False)
        with console.status("the other parts, as they are"):
            _copy(others, out)


def _others(source: Path, converted: set[str]) -> list[Path]:
    """The folders and JSON files of a model folder that are not converted; its index comes last."""
    found = sorted(source.iterdir(), key=lambda entry: (entry.name == "model_index.json", entry.name))
    found = [entry for entry in found if entry.name not in converted and not entry.name.startswith(".")]
    return [entry for entry in found if entry.is_dir() or entry.suffix == ".json" or not entry.exists()]


def _check_replaceable(source: Path, target: Path) -> None:
    """Raises StditError where a folder that is there already holds what its new copy would not."""
    from stdit.errors import StditError

    for file in target.rglob("*") if target.is_dir() and not target.is_symlink() else []:
        if not file.is_dir() and not (source / file.relative_to(target)).exists():
            raise StditError(f"{file}: would be lost, as {source} has no such file. Remove it, or choose another OUT.")


def _copy(entries: list[Path], out: Path) -> None:
    from stdit.files import copy_folder, publish_folder, publish_text, remove_folder

    for entry in entries:
        if entry.is_dir():
            part = out / f".{entry.name}.part"
            remove_folder(part)
            try:
                copy_folder(entry, part)
                publish_folder(part, out / entry.name)
            finally:
                with suppress(OSError):
                    remove_folder(part)
        else:
            publish_text(out / entry.name, entry.read_text("utf-8"))


def _sources(path: Path, trust_pickle: bool, strict: bool, heads: int | None = None) -> dict[str, Source]:
    """What is at `path`: transformer (or two experts, high and low) and vae; or the error that says why nothing is."""
    from stdit.errors import StditError
    from stdit.weights.expert_folders import expert_places
    from stdit.weights.families import KINDS, titles
    from stdit.weights.sources import find, holds, other_vae

    experts = expert_places(path.expanduser())
    parts: list[tuple[str, str, Path]] = []
    problems: list[StditError] = []
    for part, place in {**(experts or {"transformer": path}), "vae": path}.items():
        kind = "vae" if part == "vae" else "transformer"
        try:
            if part == "vae" and parts and other_vae(place):
                continue  # diffusers', of which nothing is renamed: `_parts` has it
            parts += [(part, kind, place)] if holds(kind, place, trust_pickle) else []
        except StditError as error:
            problems.append(error)
    if not parts and problems:
        raise problems[0]
    if not parts:
        known = " nor a ".join(title for kind in KINDS for title in titles(kind))
        raise StditError(f"{path}: holds neither a {known}.")
    for problem in problems:
        typer.echo(f"left out: {problem}", err=True)
    return {
        part: find(kind, place, trust_pickle, strict, heads if kind == "transformer" else None)
        for part, kind, place in parts
    }


def _description(part: str, source: Source) -> dict[str, Any]:
    import dataclasses

    differences = source.table.differences(source.files.shapes)
    dtypes: dict[str, int] = {}
    size = 0
    for entry in source.files.entries.values():
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + 1
        size += entry.stop - entry.start
    return {
        "part": part,
        "kind": source.kind,
        "family": source.family.title,
        "dialect": source.dialect,
        "preset": _preset(source),
        **_trained_for(source),
        "parameters": source.parameters,
        "bytes": size,
        "tensors": len(source.files.entries),
        "dtypes": dtypes,
        "files": [str(file) for file in source.files.files],
        "config_path": str(source.config_path) if source.config_path else None,
        "config": dataclasses.asdict(source.config),
        "missing": differences.missing,
        "unexpected": differences.unexpected,
        "misshaped": {name: list(map(list, shapes)) for name, shapes in differences.misshaped.items()},
    }


def _preset(source: Source) -> str | None:
    """The preset with this very config."""
    from stdit.models import transformer
    from stdit.vae import autoencoder

    presets: dict[str, Any] = transformer.PRESETS if source.kind == "transformer" else autoencoder.PRESETS
    return next((name for name, config in presets.items() if config == source.config), None)


def _show_adapter(adapter: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"adapter (LoRA): {adapter['path']}", show_header=False, title_justify="left")
    table.add_row("fits", ", ".join(adapter["fits"]) or "no family's names")
    for what in ("ranks", "alphas", "dtypes", "targets"):
        table.add_row(what, ", ".join(f"{value} ({count})" for value, count in adapter[what].items()))
    table.add_row("size", f"{adapter['parameters']:,} parameters, {adapter['differences']} tensors added as a whole")
    Console().print(table)


def _trained_for(source: Source) -> dict[str, str | None]:
    """What a transformer was trained to put out, and which release it is; that is None for sizes nobody released."""
    if source.kind != "transformer":
        return dict.fromkeys(("release", "objective", "expects_vae", "expects_text"))
    from stdit.weights.families import release_of
    from stdit.weights.schedulers import objective_of

    found = release_of(source.config)
    release = (found.name, found.vae, found.text) if found else (None,) * 3
    return {"objective": objective_of(source.config), **dict(zip(("release", "expects_vae", "expects_text"), release))}


def _parts(path: Path) -> dict[str, str]:
    """What else a model folder holds, by its folders: the class that each one's config names."""
    from stdit.weights.sources import other_vae
    from stdit.weights.tensor_files import read_json

    documents = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
    found = {"vae": other.name} if (path / "vae").is_dir() and (other := other_vae(path)) else {}
    for name in ("text_encoder", "tokenizer", "scheduler", "image_encoder", "image_processor", "transformer_2"):
        if not (path / name).is_dir():
            continue
        document = path / name / documents.get(name, "config.json")
        about = read_json(document) if document.is_file() else {}
        kind = (
            about.get("_class_name") or about.get("tokenizer_class") or next(iter(about.get("architectures") or ()), "")
        )
        shift = about.get("shift") or about.get("flow_shift")
        found[name] = f"{kind or 'unnamed'}" + (f", shift {shift}" if shift else "")
    return found


def _show(models: list[dict[str, Any]], parts: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for model in models:
        table = Table(title=f"{model['part']}: {model['family']}", show_header=False, title_justify="left")
        size = f"{model['parameters'] / 1e9:.2f} B" if model["parameters"] >= 1e8 else f"{model['parameters']:,}"
        table.add_row("size", f"{size} parameters" + (f", preset {model['preset']}" if model["preset"] else ""))
        if model["release"]:
            table.add_row("release", model["release"])
            table.add_row("takes", f"VAE: {model['expects_vae']}\ntext: {model['expects_text']}")
        if model["objective"]:
            table.add_row("trained for", model["objective"])
        table.add_row("dialect", model["dialect"])
        table.add_row("dtypes", ", ".join(f"{name} ({count} tensors)" for name, count in model["dtypes"].items()))
        table.add_row("files", "\n".join(model["files"][:4]) + ("\n…" if len(model["files"]) > 4 else ""))
        table.add_row(
            "config", model["config_path"] or "none beside the weights: carried in the file, or told by the shapes"
        )
        table.add_row("", ", ".join(f"{name} {value}" for name, value in model["config"].items() if value is not None))
        for what in ("missing", "unexpected", "misshaped"):
            names = list(model[what])
            shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            table.add_row(what, f"[red]{len(names)}[/]: {shown}" if names else "none")
        console.print(table)
    if parts:
        table = Table(title="beside it", show_header=False, title_justify="left")
        for name, about in parts.items():
            table.add_row(name, about)
        console.print(table)
