"""Filters against misuse: of prompts, before anything is sampled, and of frames, before they are written.

A filter takes a text, or frames (T, H, W, 3) uint8, and returns why it refuses them, or None.
"""

from __future__ import annotations

import importlib
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stdit.errors import StditError
from stdit.text_files import read_lines

PromptFilter = Callable[[str], str | None]
FrameFilter = Callable[[np.ndarray], str | None]
SAFE = {"normal", "safe", "sfw", "neutral", "drawings"}  # labels of classifiers that refuse nothing
EVERY = 4  # frames, of which a classifier sees one


def prompt_filter(given: str) -> PromptFilter:
    """given: a file with a word or phrase a line, which a prompt may not have; or MODULE:FUNCTION."""
    if not Path(given).is_file():
        return _function(given, "a file of words")
    words = [folded for line in read_lines(Path(given)) if (folded := _folded(line))]
    if not words:
        raise StditError(f"{given} has no words: write one, or a phrase, a line.")
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in sorted(words, key=len, reverse=True)))

    def refuse(text: str) -> str | None:
        found = pattern.search(_folded(text))
        return found and f"{given} does not allow {found[0]!r}"

    return refuse


def frame_filter(given: str, device: Any = "cpu") -> FrameFilter:
    """given: the folder of an image classifier that transformers loads, which refuses what it takes for anything but
    one of `SAFE`; or MODULE:FUNCTION."""
    if not Path(given).is_dir():
        return _function(given, "a folder with an image classifier")
    import torch
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    try:
        processor = AutoImageProcessor.from_pretrained(given, local_files_only=True)
        model = AutoModelForImageClassification.from_pretrained(given, local_files_only=True).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        raise StditError(f"{given} is not an image classifier that transformers loads: {error}") from error
    labels = {number: str(label).lower() for number, label in model.config.id2label.items()}
    if not SAFE & {*labels.values()}:
        told = ", ".join(labels.values())
        raise StditError(
            f"{given} has the labels {told}; one must be {', '.join(sorted(SAFE))}, which refuses nothing."
        )

    @torch.no_grad()
    def refuse(frames: np.ndarray) -> str | None:
        inputs = processor(list(frames[::EVERY]), return_tensors="pt").to(device)
        shares = model(**inputs).logits.float().softmax(-1)
        for share, number in zip(*(x.tolist() for x in shares.max(-1))):
            if labels[number] not in SAFE:
                return f"{given} takes it for {labels[number]} ({share:.0%})"
        return None

    return refuse


def checked(frames: Iterable[np.ndarray], filters: Iterable[FrameFilter]) -> Iterator[np.ndarray]:
    """The chunks of frames (t, H, W, 3) that pass. Raises StditError at the first that is refused."""
    for chunk in frames:
        for refuse in filters:
            if reason := refuse(chunk):
                raise StditError(f"its frames are refused: {reason}.")
        yield chunk


def _folded(text: str) -> str:
    """Without case, accents, width and spaces that only look different."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


def _function(given: str, what: str) -> Callable[[Any], str | None]:
    module, colon, name = given.partition(":")
    if not colon or not name:
        raise StditError(f"{given} is not {what}, and not MODULE:FUNCTION.")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules of the current folder, as with python -m
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise StditError(f"{given}: {error}.") from error
    if not callable(found):
        raise StditError(f"{given} is {type(found).__name__}; it must be a function.")

    def refuse(value: Any) -> str | None:
        try:
            reason = found(value)
        except Exception as error:  # somebody else's code: a filter that fails lets nothing pass
            raise StditError(f"{given} failed: {error!r}.") from error
        return str(reason) if reason else None

    return refuse
