"""Loads transformers models from local folders: safetensors only, nothing downloaded, every weight present."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from stdit.downloads import check_downloaded, unfinished
from stdit.errors import StditError

LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # for every `from_pretrained`
_CHECKED = (".safetensors", ".json", ".model", ".txt", ".jinja")


def load_weights(kind: Any, folder: Path, what: str, **settings: Any) -> Any:
    """`kind.from_pretrained(folder, …)` in evaluation mode. Raises StditError, which calls the model `what`."""
    if not folder.is_dir():
        raise StditError(f"{folder}: no such folder; {what} is read from there.")
    check_files(folder)
    check_weights(folder, what)
    try:
        with quiet():
            model, info = kind.from_pretrained(
                str(folder), **LOCAL, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
                **settings,
            )  # fmt: skip
    except StditError:
        raise
    except Exception as error:  # safetensors, torch and transformers have different ones
        raise StditError(f"{folder}: {what}'s weights cannot be read: {said(error)}") from error
    lost = {key: sorted(map(str, info[key])) for key in ("missing_keys", "mismatched_keys") if info.get(key)}
    if lost:
        first = "; ".join(f"{len(names)} {key}, such as {names[0]}" for key, names in lost.items())
        raise StditError(
            f"{folder}: {what}'s weights do not fit its config.json: {first}. Is that file of another model?"
        )
    return model.eval()


def read_part(kind: Any, folder: Path, what: str, remedy: str = "") -> Any:
    """`kind.from_pretrained(folder)` of a config, tokenizer or processor. Raises StditError."""
    check_files(folder)
    try:
        return kind.from_pretrained(str(folder), **LOCAL)
    except ImportError as error:
        raise StditError(f"{folder}: reading {what} there needs a package that is not here: {said(error)}") from error
    except Exception as error:  # of any type: transformers and tokenizers have none of their own for this
        raise StditError(f"{folder}: transformers cannot read {what} there ({said(error)[:200]}).{remedy}") from error


def check_files(folder: Path) -> None:
    """Raises StditError if one of a folder's files was not downloaded whole."""
    for path in sorted(folder.iterdir()):
        if path.suffix in _CHECKED and not path.name.startswith(".") and path.is_file():
            check_downloaded(path)


def check_weights(folder: Path, what: str) -> None:
    """Raises StditError if shards are missing, or a file of weights is truncated or damaged."""
    found = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith("."))
    for index in sorted(folder.glob("*.safetensors.index.json")):
        try:
            shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StditError(f"{index}: cannot be read ({said(error)}). Download it again.") from error
        missing = [str(name) for name in shards if not (folder / str(name)).is_file()]
        if missing:
            raise StditError(
                f"{folder}: {what} lacks {len(missing)} of its {len(shards)} files, such as {missing[0]}."
                f"{unfinished(folder)} Download the folder again."
            )
    if not found:
        pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
        why = f"no .safetensors file is there.{unfinished(folder)} Download the folder again."
        if pickles:
            why = f"there is only {pickles[0]}, a pickle, which may run anything. Convert it with save_pretrained."
        raise StditError(f"{folder}: {what}'s weights cannot be read: {why}")
    for path in found:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise StditError(
                f"{path}: is cut short or damaged ({said(error)}).{unfinished(folder)} Download it again."
            ) from error


def said(error: BaseException) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars, which look like the command's own, and its warnings, which our errors say."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
