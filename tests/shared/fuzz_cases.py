"""Hostile command lines: commands' own options and a config's own fields, with values that nobody should give."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import random
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
import yaml

from stdit.training.config import RunConfig

NUMBERS = ["nan", "inf", "-inf", "1e300", "-1e300", "1e-300", "-1", "0", "-0.0", "1", "2", "3", "0.5", "2147483648"]
NUMBERS += ["9223372036854775807", "9223372036854775808", "9" * 400, "1_000", "0x10", "١٢", "1,5", "NaN%", "1e", "+-1"]
WORDS = ["", " ", ".", "..", "/", "//", "~", "-", "--", "=", ":", "a" * 300, "a/" * 200, "é" * 130, "狗" * 90, "\udcff"]
WORDS += [
    "a\ud800b",
    "\u202egnp",
    "a\nb",
    "a\tb",
    "%s%n{}",
    "[red]x[/]",
    "[/]",
    "*",
    "?",
    "$(id)",
    "`id`",
    "'",
    '"',
    "\\",
]
WORDS += [
    "NUL",
    "con.mp4",
    "null",
    "true",
    "no",
    "[]",
    "{}",
    "!!python/object:os.system",
    "&a *a",
    "a: b: c",
    "16x16x1x1",
]
WORDS += [
    "0x0",
    "16x",
    "x16",
    "99999999x16",
    "16x16x0",
    "-16x16",
    "1:0",
    "0:1",
    "1e9:1",
    "nan:1",
    "3s",
    "-1s",
    "1e300s",
]
WORDS += [
    "1,0.9,0.5",
    "0.5,0.9",
    "0.2:0.9",
    "0:15:-0.5",
    "0:1",
    "0,0:1:0:1",
    "7:1",
    "dpm++",
    "heun",
    "LCMScheduler",
    "webm",
    "gif",
]
WORDS += ["png", "1/2", "3/2", "math:sqrt", "json:loads", "nowhere:f", "a:"]
WORDS += ["s3://nowhere.invalid/a", "https://nowhere.invalid/a.parquet", "http://[::1", "file:///nowhere", "memory://a"]
WORDS += ["unknown://a", "s3://", "gs://a/b", "zip://a::b", "cuda", "cuda:99", "meta", "cpu:7", "mps", "tpu", "float64"]
# What lies in the folder that a case runs in: of the right kind here, of the wrong kind there.
PLACES = ["model", "model/vae", "model/transformer", "model/text_encoder", "model/tokenizer", "model/model_index.json"]
PLACES += ["videos", "videos/a.mp4", "videos/b.png", "videos/captions.csv", "manifest.parquet", "dit.yaml", "vae.yaml"]
PLACES += ["lora.safetensors", "prompts.txt", "empty", "empty.mp4", "empty.safetensors", "empty.parquet", "empty.yaml"]
PLACES += [
    "noise.bin",
    "noise.safetensors",
    "noise.mp4",
    "noise.parquet",
    "text.json",
    "list.json",
    "folder",
    "dangling",
]
PLACES += [
    "loop",
    "folder/none/none",
    "empty/below",
    "nowhere",
    "/dev/null",
    "/dev/full",
    "/proc/self/mem",
    "/dev/zero/x",
]
PLACES += ["ds.json", "bad.jsonl", "bad.csv", "latin.txt", "nul.txt", "fifo"]
YAML: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    0.5,
    2**31,
    2**63,
    2**63 - 1,
    -(2**63),
    10**30,
    1e300,
    -1e300,
    1e-300,
]
YAML += [float("nan"), float("inf"), float("-inf"), [], [[]], [None], [1], [1, 2, 3], ["a"], [1e300, -1], {}, {"a": 1}]
YAML += [{"a": {"b": []}}, {1: 2}, "1e-8", "nan", "\0", "a\0b", "auto", "adamw", "16x16x1", "16x16x5", ["16x16"], "toy"]

Case = dict[str, Any]  # args: the command line; edits: [(file, JSON path, value)] made before it


def _options(function: Any) -> list[tuple[str, Any, bool]]:
    """(option, kind, whether it repeats) of a typer function; arguments are left out, a baseline has them."""
    found = []
    for name, hint in typing.get_type_hints(inspect.unwrap(function), include_extras=True).items():
        if name == "return":
            continue
        kind, *notes = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        info = next((note for note in notes if isinstance(note, typer.models.OptionInfo)), None)
        if info is None:
            continue
        kinds = [one for one in typing.get_args(kind) if one is not type(None)] or [kind]
        repeats = typing.get_origin(kinds[0]) is list
        words = [*(info.param_decls or ()), *([info.default] if isinstance(info.default, str) else [])]  # "--json"
        names = [part for word in words for part in word.split("/") if part.startswith("--")]
        found.append((names[0] if names else "--" + name.replace("_", "-"), kinds[0], repeats))
    return found


def commands() -> dict[str, Any]:
    """The functions behind the commands that are fuzzed, by their words."""
    places = {
        "train": "stdit.cli.train:train", "data scan": "stdit.cli.data.scan:scan",
        "data plan": "stdit.cli.data.plan:plan", "data encode": "stdit.cli.data.encode:encode",
        "sample": "stdit.cli.sample.command:sample", "eval vae": "stdit.cli.eval.vae:vae",
        "eval captions": "stdit.cli.eval.captions:captions", "eval toy": "stdit.cli.eval.toy:toy",
        "weights inspect": "stdit.cli.weights:inspect", "weights convert": "stdit.cli.weights:convert",
    }  # fmt: skip
    return {
        words: getattr(importlib.import_module(place.partition(":")[0]), place.partition(":")[2])
        for words, place in places.items()
    }


# A command that works on the files beside it, in a second or so. Each word is one argument.
BASES = {
    "train": ["dit.yaml", "run=run"],
    "data scan": ["videos", "--out", "out.parquet", "--workers", "1", "--quick"],
    "data plan": ["manifest.parquet", "--config", "dit.yaml", "--steps", "2"],
    "data encode": ["manifest.parquet", "--config", "dit.yaml", "--out", "cache", "--device", "cpu"],
    "sample": ["--model", "model", "--prompt", "a red circle", "--out", "clips", "--size", "16x16", "--frames", "5",
               "--steps", "1", "--device", "cpu"],
    "eval vae": ["videos", "--model", "model", "--out", "eval", "--limit", "2", "--device", "cpu"],
    "eval captions": ["--model", "model", "--out", "eval", "--config", "dit.yaml", "--clips", "2", "--levels", "1",
                      "--draws", "1", "--steps", "1", "--device", "cpu"],
    "eval toy": ["--model", "model", "--out", "eval", "--prompts", "1", "--shape", "16x16x1", "--steps", "1",
                 "--device", "cpu"],
    "weights inspect": ["model"],
    "weights convert": ["model", "converted"],
}  # fmt: skip
# Numbers that are legal and take long: a case is to fail fast or to be small.
SMALL = {"--steps", "--frames", "--prompts", "--draws", "--levels", "--clips", "--resolution", "--video-frames"}
LONG = {"schedule.steps", "eval.steps", "eval.every", "eval.clips", "eval.frames", "plan.largest_clips_per_step"}


def config_fields(kind: Any = RunConfig, before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every setting, and of every section."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if "rest_of" in field.metadata:
            module, _, name = field.metadata["rest_of"].partition(":")
            other = getattr(importlib.import_module(module), name)
            yield from ((before + key, hint) for key, hint in typing.get_type_hints(other).items())
            continue
        hint = hints[field.name]
        yield before + field.name, hint
        inner = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)
        if inner is not None:
            yield from config_fields(inner, f"{before}{field.name}.")


class Cases:
    """An endless, seeded sequence of cases."""

    def __init__(self, seed: int, template: Path) -> None:
        self.random = random.Random(seed)
        self.options = {words: _options(function) for words, function in commands().items()}
        self.fields = list(config_fields())
        self.documents = sorted(
            file.relative_to(template).as_posix()
            for pattern in ("*.yaml", "*.json")
            for file in template.rglob(pattern)
            if file.name not in ("empty.yaml", "tokenizer.json", "text.json", "list.json")
        )
        self.template = template

    def next(self) -> Case:
        words = self.random.choice(list(BASES))
        args = list(BASES[words])
        edits: list[tuple[str, list[Any], Any]] = []
        takes_config = words in ("train", "data plan", "data encode")
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            what = self.random.random()
            if takes_config and what < 0.6:
                args.append(self.override())
            elif what < 0.75 or not self.options[words]:
                if self.random.random() < 0.5 or words == "train":
                    edits.append(self.edit(words))
                else:
                    self.replace(args)
            else:
                self.option(words, args)
        if words == "train":
            args[:1] = ["vae.yaml"] if args[:1] == ["dit.yaml"] and self.random.random() < 0.2 else args[:1]
            args += ["parallel.deepspeed=ds.json"] if self.random.random() < 0.1 else []
            args += ["--dry-run"] if self.random.random() < 0.5 else ["schedule.steps=1"]
        return {"args": [*words.split(), *args], "edits": edits}

    def value(self, kind: Any, option: str) -> str:
        choice = self.random.random()
        if kind in (int, float) and choice < 0.8:
            small = option in SMALL
            return self.random.choice([one for one in NUMBERS if not (small and "21474" in one)])
        if choice < 0.4:
            return self.random.choice(PLACES)
        return self.random.choice(WORDS if choice < 0.85 else NUMBERS)

    def option(self, words: str, args: list[str]) -> None:
        """Sets an option to something; one that is there already in its place, mostly."""
        name, kind, repeats = self.random.choice(self.options[words])
        if kind is bool:
            args.append(name)
            return
        value = self.value(kind, name)
        if name in args[:-1] and not repeats and self.random.random() < 0.9:
            args[args.index(name) + 1] = value
        elif self.random.random() < 0.1:
            args.append(name)  # without a value
        else:
            args += [f"{name}={value}"] if self.random.random() < 0.3 else [name, value]

    def replace(self, args: list[str]) -> None:
        """Drops an argument or puts something else in its place."""
        if not args:
            return
        place = self.random.randrange(len(args))
        if self.random.random() < 0.3:
            del args[place]
        else:
            args[place] = self.random.choice(PLACES if self.random.random() < 0.6 else WORDS)

    def override(self) -> str:
        key, _ = self.random.choice(self.fields)
        if self.random.random() < 0.05:
            key += self.random.choice((".", ".x", "[0]", "=", "\0", " ", ".x.y.z"))
        value = self.tree_value()
        if key in LONG and isinstance(value, int | float) and not isinstance(value, bool) and 3 < value < 1e12:
            value = 2
        text = json.dumps(value) if not isinstance(value, float) else yaml.safe_dump(value).split("\n")[0]
        if isinstance(value, str) and self.random.random() < 0.5:
            text = value.replace("\0", "")  # not quoted: YAML's own rules
        return f"{key}={text}"

    def tree_value(self) -> Any:
        choice = self.random.random()
        if choice < 0.65:
            return self.random.choice(YAML)
        return self.random.choice(WORDS if choice < 0.85 else PLACES)

    def edit(self, words: str) -> tuple[str, list[Any], Any]:
        """Another value at a random place of a YAML or JSON file that the command reads."""
        config = words.startswith(("train", "data", "eval captions"))
        model = [file for file in self.documents if file.startswith("model/")]
        file = self.random.choice(["dit.yaml"] * 2 * len(model) + self.documents if config else model)
        text = (self.template / file).read_text()
        tree = yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)
        paths = [path for path, _ in _leaves(tree)]
        return file, self.random.choice(paths), self.tree_value()


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[list[Any], Any]]:
    yield list(path), tree
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in inner:
        yield from _leaves(value, (*path, key))


def apply(folder: Path, edits: list[tuple[str, list[Any], Any]]) -> None:
    """Makes a case's edits in its copy of the template."""
    for file, path, value in edits:
        place = folder / file
        text = place.read_text()
        tree = yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)
        if path:
            part = tree
            for key in path[:-1]:
                part = part[key] if isinstance(part, dict | list) else {}
            if isinstance(part, dict) or (
                isinstance(part, list) and isinstance(path[-1], int) and path[-1] < len(part)
            ):
                part[path[-1]] = value
        else:
            tree = value
        place.write_text(json.dumps(tree), errors="surrogatepass")  # JSON is YAML
