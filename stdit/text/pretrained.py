"""Weights of transformers' models from local folders: safetensors alone, nothing downloaded, none of them missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.utils import logging

from stdit.errors import StditError

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # of every `from_pretrained`


def load_weights(kind: Any, folder: Path, what: str, **settings: Any) -> Any:
    """`kind.from_pretrained(folder, …)` in evaluation mode. kind: a model's class of transformers, or an Auto one.

    what: the model in an error's words. Raises StditError where the folder or weights are missing, or of another shape.
    """
    if not folder.is_dir():
        raise StditError(f"{folder}: no such folder; {what} is read from there.")
    try:
        with no_bars():
            model, info = kind.from_pretrained(
                str(folder), **LOCAL, use_safetensors=True, output_loading_info=True, **settings
            )
    except StditError:
        raise
    except Exception as error:  # of any kind: transformers does not check all of a stranger's config.json
        raise StditError(f"{folder}: {what}'s weights cannot be read: {error}") from error
    lost = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys") if info.get(key)}
    if lost:
        raise StditError(f"{folder}: {what}'s weights do not fit its config.json: {lost}.")
    return model.eval()


@contextmanager
def no_bars() -> Iterator[None]:
    """Without transformers' own progress bars, which cannot be told apart from the command's."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
