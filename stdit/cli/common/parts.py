"""A command that does one part of its work: which one, the record that it leaves, and what it says."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from stdit.cli.common.lazy import WORDS
from stdit.data.parts import Part, PartRecord, choose_part, finish, unfinish


def take_part(given: str | None, out: str, kind: str) -> Part:
    """The part to do (see `choose_part`), which it says. The part counts as unfinished from now on."""
    part = choose_part(given)
    if not part.is_whole:
        print(f"part {part}, chosen by {part.chosen_by}", file=sys.stderr, flush=True)
        unfinish(out, part, kind)
    return part


def finish_part(
    part: Part,
    out: str,
    kind: str,
    settings: Mapping[str, Any],
    paths: Sequence[str] = (),
    found: Mapping[str, Any] | None = None,
) -> str:
    """Records that the part is done (see `PartRecord`). Returns what to do when all are."""
    words = WORDS.get()
    kept = [word for before, word in zip(["", *words], words) if "--part" not in (before, word)]
    command = [word for word in kept if not word.startswith("--part=")]
    finish(out, PartRecord(part, kind, command, settings, paths, found or {}))
    return f"When all {part.of} parts are: stdit data merge {out}"


def part_answer(part: Part, answer: Mapping[str, Any]) -> dict[str, Any]:
    """The answer for --json, with the part that was done."""
    return dict(answer) if part.is_whole else {"part": part.number, "parts": part.of, **answer}
