"""What the README and docs/ tell people to type exists, and the walk-throughs work in the order that they stand in."""

from __future__ import annotations

import dataclasses
import re
import shlex
import shutil
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import every_command

from stdit.cli.common.lazy import as_command
from stdit.cli.main import app, run_command
from stdit.data.toy import ToySettings, make_toy
from stdit.settings import SettingsOf
from stdit.shipped import CONFIGS, find_shipped
from stdit.training import trainer as trainer_module
from stdit.training.config import RunConfig, load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name not in ("log.md", "versions.md")]  # what was done, not what to type
COMMANDS = {path: command for path, command in every_command(as_command(app))}
OPTIONS = {
    path: {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    for path, command in COMMANDS.items()
}
PLANNED = ("stdit serve",)  # the README says that they are not there yet
QUICK = {
    "train": "schedule.steps=2 eval.every=0 eval.prompts=[] log.tensorboard=false checkpoint.every=2",
    "sample": "--steps 1",
}


def blocks(page: Path) -> Iterator[str]:
    yield from re.findall(r"^```sh\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def lines(page: Path) -> list[list[str]]:
    """The commands of a page as lists of words: of its blocks, of `$ …` in what was printed, and `stdit …` in text."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    found = [line for block in blocks(page) for line in block.replace("\\\n", " ").splitlines()]
    found += re.findall(r"^\$ (.*)$", text, re.M)
    found += re.findall(r"`(stdit [^`]*)`", text)
    return [words for line in found if (words := shlex.split(line, comments=True)) and words[0] == "stdit"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page: Path) -> None:
    for words in lines(page):
        if " ".join(words) in PLANNED:
            continue
        path = tuple(words[: next((i for i, word in enumerate(words) if tuple(words[: i + 1]) not in COMMANDS), 99)])
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= OPTIONS[path], f"{' '.join(words)}: {path} has no {given - OPTIONS[path]}"
        assert not hasattr(COMMANDS[path], "commands") or len(words) == len(path) or "…" in words[len(path)], words
    everywhere = set().union(*OPTIONS.values())
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", page.read_text("utf-8")))
    assert named <= everywhere, f"no command has {named - everywhere}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_and_files_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    sections = "|".join(field.name for field in dataclasses.fields(RunConfig))
    for key in re.findall(rf"`((?:{sections})(?:\.[a-z_0-9]+)+)[`:=]", text):
        if not key.endswith((".md", ".py", ".yaml", ".json", ".jsonl", ".html")):
            assert is_setting(RunConfig, key.split(".")), f"{page.name}: {key} is not a setting"
    for file in re.findall(r"\b(?:stdit/configs|benchmarks)/[\w/.-]+\.(?:yaml|json|py)", text):
        assert (ROOT / file).is_file(), f"{page.name}: {file} is not there"
    for name in re.findall(r"(?:stdit train|train\.py|--config) ([a-z][\w/.-]*\w)", text):
        assert find_shipped(name, CONFIGS, ".yaml").is_file()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), f"{page.name}: {link} is not there"


def is_setting(kind: type, names: list[str]) -> bool:
    hints = typing.get_type_hints(kind, include_extras=True)
    others = [mark.kind for hint in hints.values() for mark in typing.get_args(hint) if isinstance(mark, SettingsOf)]
    if names[0] not in hints:  # a setting of the network or the VAE
        return any(is_setting(other, names) for other in others)
    inner = [one for one in (hints[names[0]], *typing.get_args(hints[names[0]])) if dataclasses.is_dataclass(one)]
    return len(names) == 1 or not inner or any(is_setting(one, names[1:]) for one in inner)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_read(config: Path) -> None:
    load_config(config)


@pytest.mark.parametrize(
    ("page", "heading"), [("README.md", "## Train on your own videos"), ("docs/pretraining.md", "# From a folder")]
)
def test_the_commands_of_a_walk_through_work_one_after_the_other(
    page: str, heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with a few small videos, two steps a run; what is optional or for GPUs is left out."""
    toy = ToySettings(clips=4, held_out=1, shapes=("80x64",), scales=(1.0,), seconds=(1.7,), fps=(8,), image_share=0)
    make_toy(tmp_path / "toy", toy)
    shutil.move(tmp_path / "toy" / "train", tmp_path / "videos")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer_module, "measure_peak", lambda *_: 1e12)
    text = (ROOT / page).read_text("utf-8")
    block = re.search(r"^```sh\n(.*?)^```", text[text.index(heading) :], re.S | re.M)
    assert block is not None
    done = []
    for line in block[1].replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words or words[0] != "stdit" or "optional" in line:
            continue
        assert run_command(app, [*words[1:], *QUICK.get(words[1], "").split()], prog="stdit") == 0, line
        done.append(words[2] if words[1] == "data" else words[1])
    assert [name for name in done if name != "plan"] == ["scan", "train", "encode", "train", "sample"]
    assert "plan" in done
    assert list((tmp_path / "runs/mine/samples").glob("*.mp4"))


def test_the_tour_names_files_that_are_there_and_short_enough_to_read() -> None:
    text = (ROOT / "docs" / "tour.md").read_text("utf-8")
    rows = re.findall(r"^\| \d+ \| `([\w/.]+)` \| (\d+) \|", text, re.M)
    lengths = [len((ROOT / name).read_text("utf-8").splitlines()) for name, _ in rows]
    assert len(rows) >= 10 and sum(lengths) <= 2700
    for (name, stated), length in zip(rows, lengths):
        assert abs(length - int(stated)) <= max(10, length // 5), f"docs/tour.md: {name} has {length} lines by now"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_that_a_page_names_is_there(page: Path) -> None:
    for name in re.findall(r"`((?:stdit|tests)/[\w/.-]+)`", page.read_text("utf-8")):
        if "NAME" not in name and page.name != "adding-a-family.md":  # which makes new ones
            assert (ROOT / name).exists(), f"{page.name}: {name} is not there"
