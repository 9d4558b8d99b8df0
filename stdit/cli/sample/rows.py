"""The settings of each clip of `stdit sample`: from its options, and from the rows of a file of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import BadParameter, Context

from stdit.cli.sample.arguments import (
    parse_interval,
    parse_levels,
    parse_projection,
    parse_ratio,
    parse_seconds,
    parse_size,
    parse_skip,
)
from stdit.errors import StditError
from stdit.text_files import csv_rows, fault_in, json_rows, read_lines, shortened

if TYPE_CHECKING:
    from stdit.diffusion.guidance import GuidanceOptions


@dataclass(frozen=True)
class ClipSettings:
    """What one clip is made with, as a user gives it: the options of these names. `where` begins its errors."""

    where: str
    prompt: str
    negative: str = ""
    size: str | None = None
    aspect: str | None = None
    resolution: int | None = None
    duration: str | None = None
    frames: int | None = None
    fps: float | None = None
    steps: int = 30
    guidance: float = 5.0
    guidance_2: float | None = None
    guidance_interval: str | None = None
    guidance_rescale: float = 0.0
    zero_star: int | None = None
    apg: str | None = None
    skip_layers: str | None = None
    seed: int = 0
    solver: str | None = None
    shift: float | None = None
    levels: str | None = None
    reuse: float = 0.0
    window: int | None = None
    init: Path | None = None
    strength: float = 0.8
    image: Path | None = None
    last: Path | None = None
    video: Path | None = None
    video_frames: int | None = None

    def __post_init__(self) -> None:
        """Raises BadParameter for settings that contradict each other, and StditError for missing files."""
        for wrong, message in (
            (self.image and self.video, "--image and --video both say how the clip begins: give one."),
            (self.last and not self.source, "--last goes with --image or --video: how the clip begins."),
            (self.video_frames and not self.video, "--video-frames says how much of --video to take: give --video."),
            (
                self.size and (self.aspect or self.resolution),
                "--size already says the size: leave out --aspect and --resolution.",
            ),
            (self.frames and self.duration, "--frames and --duration say the same thing: give one."),
        ):
            if wrong:
                raise BadParameter(message)
        self.exact_size, self.ratio, self.seconds, self.noise_levels, self.guidance_options  # noqa: B018  (each raises BadParameter for a bad text)
        for name, text in (("--prompt", self.prompt), ("--negative", self.negative)):
            _check_text(text, name)
        for file in (self.source, self.last, self.init):
            if file is not None and not file.is_file():
                raise StditError(f"{file} is not a file.")

    @property
    def source(self) -> Path | None:
        """What the clip begins with."""
        return self.image or self.video

    @property
    def exact_size(self) -> tuple[int, int] | None:
        return parse_size(self.size) if self.size else None

    @property
    def ratio(self) -> float | None:
        return parse_ratio(self.aspect) if self.aspect else None

    @property
    def noise_levels(self) -> tuple[float, ...] | None:
        return parse_levels(self.levels) if self.levels else None

    @property
    def guidance_options(self) -> GuidanceOptions:
        """Raises StditError for values out of range."""
        from stdit.diffusion.guidance import GuidanceOptions

        options: dict[str, Any] = {"rescale": self.guidance_rescale}
        if self.guidance_interval is not None:
            options["interval"] = parse_interval(self.guidance_interval, "--guidance-interval")
        if self.zero_star is not None:
            options |= {"zero_star": True, "zero_steps": self.zero_star}
        if self.apg is not None:
            options |= parse_projection(self.apg)
        if self.skip_layers is not None:
            options |= parse_skip(self.skip_layers)
        return GuidanceOptions(**options)

    @property
    def seconds(self) -> float | None:
        return parse_seconds(self.duration) if self.duration else None


NAMES = [name for name in ClipSettings.__dataclass_fields__ if name != "where"]
# Settings of the command that contradict one of a row, whose place they leave to it.
REPLACES = {
    "size": {"aspect", "resolution"}, "aspect": {"size"}, "resolution": {"size"}, "frames": {"duration"},
    "duration": {"frames"}, "image": {"video", "video_frames"}, "video": {"image"},
}  # fmt: skip


def settings_of(prompts: Path | None, context: Context) -> list[ClipSettings]:
    """The clips that the options of a command ask for: one of --prompt, or one for each row of --prompts.

    A row is a line of text, or of JSONL or CSV, where any of `NAMES` can stand and counts instead of the command's.
    Each value is checked as that of the option of its name. Raises StditError naming file and line.
    """
    options = {name: context.params[name] for name in NAMES}
    if prompts is None:
        return [ClipSettings("", **{**options, "prompt": options["prompt"] or ""})]
    if not prompts.is_file():  # a pipe would block
        raise StditError(f"{prompts} is not a file. --prompts takes text, one prompt a line, or .jsonl or .csv.")
    found = []
    for line, row in _rows(prompts):
        where = f"{prompts}, line {line}"
        try:
            own = {name: _value(name, value, context) for name, value in row.items() if value not in (None, "")}
            if not str(own.get("prompt", "")).strip():
                raise StditError("there is no prompt: write one, or delete the line.")
            replaced = {other for name in own for other in REPLACES.get(name, ())}
            kept = {name: value for name, value in options.items() if name not in replaced}
            found.append(ClipSettings(f"{where}: ", **{**kept, **own}))
        except BadParameter as error:
            raise StditError(f"{where}: {error.message}") from None
        except StditError as error:
            raise StditError(f"{where}: {error}") from None
    if not found:
        raise StditError(f"{prompts} is empty: it should hold one prompt per line.")
    return found


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, settings) of each row."""
    kind = file.suffix.lower()
    if kind not in (".jsonl", ".csv", ".tsv"):
        for number, line in enumerate(read_lines(file), 1):
            if not line.strip():
                raise StditError(
                    f"{file}, line {number} is empty. Every line is a prompt: write one there or delete it."
                )
            yield number, {"prompt": line.strip()}
        return
    if kind == ".jsonl":
        rows = json_rows(file)
    else:
        names, rows = csv_rows(file, lambda names: "prompt" in names, lambda row: False)
        if "prompt" not in names:
            raise StditError(f"{file}: no column is called prompt; its first line has {shortened(names)}.")
        if twice := [name for name in names if names.count(name) > 1]:
            raise StditError(f"{file}: two columns are called {twice[0]!r}. Rename or delete one.")
    for row in rows:
        if row.fault:
            raise StditError(f"{file}, line {row.line} {row.fault}.")
        yield row.line, row.values


def _value(name: str, value: Any, context: Context) -> Any:
    """A row's value, as the option of its name reads it. Raises StditError."""
    parameters = {parameter.name: parameter for parameter in context.command.params}
    option = f"--{name.replace('_', '-')}"
    if name not in NAMES:
        if name in parameters:
            raise StditError(f"{option} is for the whole command: give it there.")
        near = get_close_matches(name, NAMES, 1)
        raise StditError(
            f"{shortened(name)} is no setting" + (f"; {near[0]} is." if near else f": {', '.join(NAMES)}.")
        )
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise StditError(f"{option} {shortened(value)}: write a text or a number.")
    if fault := fault_in(str(value)):
        raise StditError(f"{option} {fault}.")
    try:
        return parameters[name].process_value(context, str(value))
    except BadParameter as error:
        raise StditError(f"{option} {shortened(value)}: {error.message}") from None


def _check_text(text: str, option: str) -> None:
    """Raises StditError for bytes that are not valid text, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StditError(f"{option}: character {error.start + 1} of {text[:40]!r} is not valid Unicode.") from None
