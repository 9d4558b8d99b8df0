"""Finds texts that are too long for their encoder, and what is dropped of them. Opens no weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stdit.text.encoders import CLEANERS, ReasonEncoder, TextEncoder, chat_ids
from stdit.text.loading import load_tokenizer
from stdit.text.places import Treatment, find_text_encoder
from stdit.text.small import build_word_tokenizer

MOST = 10_000  # texts to tokenize, which takes seconds; a larger set is sampled evenly
SHOWN = 100  # characters of a text in a message


@dataclass(frozen=True)
class LongText:
    """A text with more tokens than `limit`. dropped: its end, which the encoder does not see."""

    text: str
    tokens: int
    limit: int
    dropped: str

    def __str__(self) -> str:
        dropped = self.dropped if len(self.dropped) <= SHOWN else self.dropped[: SHOWN - 1] + "…"
        return f"{self.tokens:,} tokens, and {self.limit:,} are used: {dropped!r} is dropped"


@dataclass(frozen=True)
class LongTexts:
    """Among `texts` texts, `looked` were tokenized; `count` of these are too long, `longest` is the longest."""

    texts: int
    looked: int
    count: int
    limit: int
    longest: LongText | None

    def __str__(self) -> str:
        looked = "" if self.looked == self.texts else f" looked at (of {self.texts:,})"
        return (
            f"{self.count:,} of {self.looked:,} captions{looked} have more than {self.limit:,} tokens and are cut. "
            f"The longest has {self.longest}."
        )


@dataclass(frozen=True)
class TextLimit:
    """A tokenizer, a treatment and a limit. chat: the text is the user's part of a chat."""

    tokenizer: Any
    treatment: Treatment
    max_length: int
    chat: bool = False

    @classmethod
    def of_folder(cls, folder: str | Path, treatment: Treatment, max_length: int | None = None) -> TextLimit:
        """For a folder that `load_text_encoder` takes. max_length: replaces the treatment's."""
        encoder, tokenizer = find_text_encoder(folder)
        try:
            chat = json.loads((encoder / "config.json").read_text("utf-8")).get("model_type") == "qwen2_5_vl"
        except (OSError, ValueError, AttributeError):
            chat = False
        return cls(load_tokenizer(tokenizer), treatment, max_length or treatment.max_length, chat)

    @classmethod
    def of_words(cls, max_length: int) -> TextLimit:
        """For the small encoder that trains with the model, whose tokens are words."""
        return cls(build_word_tokenizer([]), Treatment(), max_length)

    @classmethod
    def of_encoder(cls, encoder: TextEncoder, max_length: int | None = None) -> TextLimit:
        chat = isinstance(encoder, ReasonEncoder)
        return cls(encoder.tokenizer, encoder.treatment, max_length or encoder.max_length, chat)

    def count(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text before truncation, including the end token."""
        return [len(ids) for ids in self._ids(texts)] if texts else []

    def long(self, text: str) -> LongText | None:
        """Describes a text if it is too long."""
        ids = self._ids([text])[0]
        if len(ids) <= self.max_length:
            return None
        return LongText(text, len(ids), self.max_length, self._dropped(text, ids))

    def among(self, texts: Sequence[str]) -> LongTexts:
        """Counts texts that are too long. If more than MOST may be, only MOST are tokenized."""
        doubtful = [text for text in texts if self._may_be_long(text)]
        step = -(-len(doubtful) // MOST) or 1
        looked = doubtful[::step]
        counts = [tokens for i in range(0, len(looked), 256) for tokens in self.count(looked[i : i + 256])]
        longest = max(zip(counts, looked), default=None)
        return LongTexts(
            texts=len(texts),
            looked=len(texts) if step == 1 else len(looked),
            count=sum(tokens > self.max_length for tokens in counts),
            limit=self.max_length,
            longest=self.long(longest[1]) if longest else None,
        )

    def _may_be_long(self, text: str) -> bool:
        """Whether it must be tokenized to know: ASCII text has at most one token per character and two more. `&` may
        begin an HTML entity for a non-ASCII character."""
        return self.chat or len(text) + 2 > self.max_length or not text.isascii() or "&" in text

    def _cleaned(self, text: str) -> str:
        return CLEANERS[self.treatment.clean](text)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if self.chat:
            return chat_ids(self.tokenizer, texts)
        return self.tokenizer(list(map(self._cleaned, texts)), add_special_tokens=True, verbose=False).input_ids

    def _dropped(self, text: str, ids: list[int]) -> str:
        if self.chat or not self.tokenizer.is_fast:
            end = -1 if not self.chat and ids[-1] == self.tokenizer.eos_token_id else len(ids)
            return self.tokenizer.decode(ids[self.max_length - (end == -1) : end]).strip()
        cleaned = self._cleaned(text)
        places = self.tokenizer(
            cleaned, truncation=True, max_length=self.max_length, add_special_tokens=True, return_offsets_mapping=True
        ).offset_mapping
        return cleaned[max(end for _, end in places) :].strip()
