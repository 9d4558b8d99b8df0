"""Finds a text encoder's folders, and defines how texts are treated. Opens no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from stdit.errors import StditError

_PARTS = ("tokenizer", "transformer", "vae", "scheduler")  # of a model folder
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


@dataclass(frozen=True)
class Treatment:
    """How a pipeline prepares a text for its encoder.

    max_length: texts are truncated to this many tokens, including the end token.
    clean: how a text is cleaned first, a key of `encoders.CLEANERS`.
    sees_padding: the encoder attends to padding up to max_length; the padding is not returned.
    """

    max_length: int = 512
    clean: str = "mend"
    sees_padding: bool = False


class TextPlaces(NamedTuple):
    """The folders of a text encoder and of its tokenizer."""

    encoder: Path
    tokenizer: Path


def find_text_encoder(folder: str | Path) -> TextPlaces:
    """Those of a model folder with text_encoder/ and tokenizer/, or of a folder that transformers reads.

    Its tokenizer lies in it or beside it. Raises StditError if one is missing.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise StditError(
            f"{folder} is not a folder. Text encoders are read from local folders, nothing is downloaded: "
            "download it first (hf download NAME --local-dir FOLDER) and give that folder."
        )
    if (folder / "text_encoder").is_dir():
        encoder, tokenizer = folder / "text_encoder", folder / "tokenizer"
    elif not (folder / "config.json").is_file() and (
        (folder / "model_index.json").is_file() or any((folder / part).is_dir() for part in _PARTS)
    ):
        raise StditError(
            f"{folder}: this model folder has no text_encoder/. Download that folder too (hf download NAME "
            f"--include 'text_encoder/*' --local-dir {folder}), or set text.path to a folder that has one."
        )
    else:
        inside = any((folder / name).is_file() for name in _TOKENIZER_FILES)
        encoder, tokenizer = folder, folder if inside else folder.parent / "tokenizer"
    if not tokenizer.is_dir():
        raise StditError(
            f"{encoder}: no tokenizer in it or beside it ({tokenizer} is not there). Download that folder too "
            f"(hf download NAME --include 'tokenizer/*' --local-dir {tokenizer.parent})."
        )
    return TextPlaces(encoder, tokenizer)
