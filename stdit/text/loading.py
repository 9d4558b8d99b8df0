"""Loads text encoders and tokenizers from local folders; nothing is downloaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from stdit.errors import StditError
from stdit.text.encoders import ReasonEncoder, TextEncoder
from stdit.text.places import Treatment, find_text_encoder
from stdit.text.pretrained import check_weights, load_weights, read_part, said

ENCODERS = {  # transformers' classes by the model_type in config.json
    "umt5": "UMT5EncoderModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",  # Cosmos-Reason1
}


def load_text_encoder(
    folder: str | Path,
    treatment: Treatment,
    *,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    deferred: bool = False,
) -> TextEncoder:
    """A T5, mT5 or UMT5 encoder, or Cosmos-Reason1 (a Qwen2.5-VL), from a model folder or one that transformers reads.

    treatment: how texts are brought to it; of a model folder see `stdit.weights.families.treatment_of`.
    dtype: None keeps the stored one.
    deferred: read no weights until they are needed (see `TextEncoder`).
    """
    folder, words = find_text_encoder(folder)
    config = _encoder_config(folder)
    kind = ReasonEncoder if config.model_type == "qwen2_5_vl" else TextEncoder
    model_class = getattr(transformers, ENCODERS[config.model_type])

    def load() -> PreTrainedModel:
        return load_weights(model_class, folder, "the text encoder", config=config, dtype=dtype or "auto")

    if not deferred:
        return kind(load(), load_tokenizer(words), max_length, treatment).to(device)
    check_weights(folder, "the text encoder")
    try:
        with torch.device("meta"):
            empty = model_class(config).eval()
    except Exception as error:  # of any type, for impossible sizes
        raise StditError(f"{folder / 'config.json'}: makes no text encoder: {said(error)}") from error
    return kind(empty, load_tokenizer(words), max_length, treatment, load).to(device)


def load_tokenizer(folder: str | Path) -> Any:
    """A tokenizer from a local folder. Raises StditError without a vocabulary: transformers would make one up."""
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file() and (models := sorted(folder.glob("*.model"))):
        _check_sentencepiece(models[0])
    remedy = " Is it whole, with tokenizer.json or else spiece.model? Download the folder again."
    tokenizer = read_part(AutoTokenizer, folder, "a tokenizer", remedy)
    names = dict(type(tokenizer).vocab_files_names)
    whole = names.pop("tokenizer_file", "tokenizer.json")
    missing = [name for name in names.values() if not (folder / name).is_file()]
    if not names and type(tokenizer).vocab_files_names and not any(folder.glob("*.model")):
        missing = [whole]
    if missing and not (folder / whole).is_file():
        either = "" if missing == [whole] else f", nor {whole} in its place"
        raise StditError(
            f"{folder}: the tokenizer's vocabulary is missing: {' and '.join(missing)} is not there{either}. Was the "
            f"download broken off? Download the folder again."
        )
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise StditError(f"{folder / whole}: a vocabulary without one word. Download the folder again.")
    try:  # wrong values of tokenizer_config.json show only in use
        tokenizer(["a word"], add_special_tokens=True)
    except Exception as error:  # of any type
        raise StditError(f"{folder}: this tokenizer reads no text ({said(error)[:200]}).{remedy}") from error
    return tokenizer


def _check_sentencepiece(vocabulary: Path) -> None:
    """Raises StditError if a package for such files is broken; transformers would ask for tiktoken instead."""
    for module, package in (("sentencepiece", "sentencepiece"), ("google.protobuf", "protobuf")):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise StditError(
                f"{vocabulary}: reading it needs the package {package}, which cannot be imported here ({error}). "
                f"Install it again: pip install --force-reinstall {package}. (Or put the tokenizer.json of the same "
                f"tokenizer beside it.)"
            ) from error


def _encoder_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise StditError(f"{folder}: holds no config.json, which says what encoder it is. Download the folder again.")
    config = read_part(AutoConfig, folder, "config.json")
    if config.model_type not in ENCODERS:
        raise StditError(
            f"{folder / 'config.json'}: model_type {config.model_type!r} is no text encoder known here "
            f"({', '.join(ENCODERS)})."
        )
    if hasattr(config, "dropout_rate"):
        config.dropout_rate = 0.0  # a dropout that is not keyed could not be resumed
    return config
