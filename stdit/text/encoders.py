"""Text encoders: T5-like encoders and their tokenizers from local folders, and a small one to train along.

`TextEncoder` returns what diffusers' pipelines get before they pad: the last hidden states of the valid positions of
each text, the end token included. Nothing here is ever downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC, Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from stdit.errors import StditError
from stdit.text.cleaning import clean_prompt, lower_prompt, strip_caption
from stdit.text.places import Treatment, find_text_encoder
from stdit.text.pretrained import LOCAL, check_files, check_weights, load_weights, no_bars, said

ENCODERS = {  # transformers' classes by the model_type in config.json
    "umt5": "UMT5EncoderModel",
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",  # Cosmos-Reason1, see stdit/text/reason.py
}
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5


CLEANERS: dict[str, Callable[[str], str]] = {
    "mend": clean_prompt,
    "lower": lower_prompt,
    "strip": strip_caption,
    "none": str,
}


class TextEncoder(nn.Module):
    """An encoder and its tokenizer. Trains like any module; has no dropout.

    max_length: texts are cut to this many tokens, the end token included; by default the treatment's. load: reads the
    weights when a text is first encoded, or they are saved; until then `encoder` takes no memory. It does not train.
    """

    def __init__(
        self,
        encoder: PreTrainedModel,
        tokenizer: Any,
        max_length: int | None = None,
        treatment: Treatment | None = None,
        load: Callable[[], PreTrainedModel] | None = None,
    ) -> None:
        super().__init__()
        self._load, self._moves = load, list[Callable[[Tensor], Tensor]]()
        if tokenizer.pad_token_id is None:
            raise StditError("the tokenizer has no padding token; set pad_token in its tokenizer_config.json.")
        embeddings = encoder.config.get_text_config().vocab_size
        largest = max(tokenizer.get_vocab().values(), default=0)
        # other models' vocabularies are smaller or larger; their own is rounded up by less than a tenth
        if largest >= embeddings or (embeddings > 10_000 and largest < embeddings / 2):
            raise StditError(
                f"the tokenizer's largest id is {largest}, the text encoder has {embeddings} embeddings. "
                "Do the two folders belong together?"
            )
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.treatment = treatment or Treatment()
        self.max_length = max_length or self.treatment.max_length

    @property
    def dim(self) -> int:
        """Width D of the embeddings."""
        return int(self.encoder.config.d_model)

    def ready(self) -> None:
        """Reads the weights, if that was put off, to where the module was moved meanwhile."""
        if self._load is not None:
            self.encoder, self._load = self._load().requires_grad_(False), None
            for move in self._moves:
                self._apply(move)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TextEncoder:
        if self._load is not None:
            self._moves.append(fn)
            return self
        return super()._apply(fn, recurse)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Cleaned texts to token ids, the end token included, without padding."""
        if not texts:
            return []
        cleaned = [CLEANERS[self.treatment.clean](text) for text in texts]
        return self.tokenizer(cleaned, truncation=True, max_length=self.max_length, add_special_tokens=True).input_ids

    def forward(self, ids: Sequence[Sequence[int]], at_least: int = 0) -> list[Tensor]:
        """Token ids of several texts to their embeddings: one (L, D) a text, L its number of ids. Keeps gradients.

        at_least: as many positions of every text, those of padding too.
        """
        if not ids:
            return []
        self.ready()
        device = next(self.encoder.parameters()).device
        longest = self.max_length if self.treatment.sees_padding else max(at_least, *(len(one) for one in ids))
        padded = torch.full((len(ids), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, one in enumerate(ids):
            padded[row, : len(one)] = torch.tensor(one, dtype=torch.long)
            mask[row, : len(one)] = 1
        seen = torch.ones_like(mask) if self.treatment.sees_padding else mask
        hidden = self._hidden(padded.to(device), seen.to(device))
        return [hidden[row, : max(at_least, len(one))] for row, one in enumerate(ids)]

    def _hidden(self, ids: Tensor, seen: Tensor) -> Tensor:
        """(texts, L) ids, and which of them are attended to, to (texts, L, D)."""
        return self.encoder(ids, seen).last_hidden_state

    @torch.no_grad()
    def encode(self, texts: Sequence[str], at_least: int = 0) -> list[Tensor]:
        """Texts to embeddings without gradients: one (L, D) a text. at_least: as in `forward`."""
        return self(self.tokenize(texts), at_least)

    @property
    def tokenizer_class(self) -> str:
        """The tokenizer's class by the name that transformers 4 and 5 both know."""
        name = type(self.tokenizer).__name__
        return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name

    def save(self, text_encoder: str | Path, tokenizer: str | Path) -> None:
        """Writes both folders of a model folder; transformers opens them."""
        self.ready()
        with no_bars():
            self.encoder.save_pretrained(text_encoder)
        self.tokenizer.save_pretrained(tokenizer)
        config = Path(tokenizer) / "tokenizer_config.json"
        config.write_text(config.read_text().replace('"TokenizersBackend"', f'"{self.tokenizer_class}"'))


def load_text_encoder(
    folder: str | Path,
    tokenizer: str | Path | None = None,
    *,
    max_length: int | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    deferred: bool = False,
) -> TextEncoder:
    """A T5, mT5 or UMT5 encoder, or Cosmos-Reason1 (a Qwen2.5-VL), from a local folder.

    folder: a model folder with text_encoder/ and tokenizer/, or a folder transformers reads. tokenizer: its folder;
    by default the encoder's own, or the one beside it. Texts are treated as the pipeline of the model folder treats
    them. max_length: in place of its. dtype None keeps the stored one. deferred: read no weights until they are needed
    (see `TextEncoder`).
    """
    folder, words, treatment = find_text_encoder(folder, tokenizer)
    config, kind = _encoder_config(folder), TextEncoder
    model_class = getattr(transformers, ENCODERS[config.model_type])
    if config.model_type == "qwen2_5_vl":
        from stdit.text.reason import ReasonEncoder

        kind = ReasonEncoder

    def load() -> PreTrainedModel:
        return load_weights(model_class, folder, "the text encoder", config=config, dtype=dtype or "auto")

    if not deferred:
        return kind(load(), load_tokenizer(words), max_length, treatment).to(device)
    check_weights(folder, "the text encoder")
    try:
        with torch.device("meta"):
            empty = model_class(config).eval()
    except Exception as error:  # of sizes that make no model
        raise StditError(f"{folder / 'config.json'}: makes no text encoder: {said(error)}") from error
    return kind(empty, load_tokenizer(words), max_length, treatment, load).to(device)


def load_tokenizer(folder: str | Path) -> Any:
    """A tokenizer from a local folder, whatever class transformers' AutoTokenizer takes it for.

    Raises StditError where its vocabulary is missing: transformers would go on with one of its own making.
    """
    folder = Path(folder)
    check_files(folder)
    if not (folder / "tokenizer.json").is_file() and (models := sorted(folder.glob("*.model"))):
        _check_sentencepiece(models[0])
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **LOCAL)
    except Exception as error:  # transformers and tokenizers have no error of their own for what they cannot read
        raise StditError(
            f"{folder}: transformers cannot read a tokenizer there ({said(error)[:200]}). Is it whole, with "
            f"tokenizer.json or else spiece.model? Download the folder again."
        ) from error
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
    return tokenizer


def _check_sentencepiece(vocabulary: Path) -> None:
    """Raises StditError where what transformers reads such a file with is broken: it would ask for tiktoken instead."""
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
    check_files(folder)
    if not (folder / "config.json").is_file():
        raise StditError(f"{folder}: holds no config.json, which says what encoder it is. Download the folder again.")
    try:
        config = AutoConfig.from_pretrained(str(folder), **LOCAL)
    except Exception as error:  # of any kind, where config.json is another program's
        raise StditError(f"{folder}: transformers cannot read config.json there: {said(error)}") from error
    if config.model_type not in ENCODERS:
        raise StditError(
            f"{folder / 'config.json'}: model_type {config.model_type!r} is no text encoder known here "
            f"({', '.join(ENCODERS)})."
        )
    if hasattr(config, "dropout_rate"):
        config.dropout_rate = 0.0  # an unkeyed dropout could not be resumed
    return config


def build_word_tokenizer(captions: Iterable[str], max_words: int = 32_000) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word or run of punctuation of the captions, lower-cased; the end token is appended.

    Words come by falling frequency, then alphabetically, so equal captions give equal ids. Saved, it opens with
    AutoTokenizer.
    """
    normalizer, splitter = Normalizers([NFKC(), Lowercase()]), Whitespace()
    counts: dict[str, int] = {}
    for caption in captions:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(clean_prompt(caption))):
            counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda word: (-counts[word], word))[:max_words]
    vocabulary = {word: index for index, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = splitter
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, vocabulary[END])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def small_umt5(vocab_size: int, dim: int, layers: int, heads: int, seed: int = 0) -> UMT5EncoderModel:
    """A fresh UMT5 encoder without dropout, to be trained along; equal seeds give equal weights.

    The global generator is left as it was.
    """
    if dim % heads:
        raise StditError(f"text encoder: width {dim} is not divisible by {heads} heads.")
    config = UMT5Config(
        vocab_size=vocab_size,
        d_model=dim,
        d_kv=dim // heads,
        d_ff=4 * dim,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UMT5EncoderModel(config)
