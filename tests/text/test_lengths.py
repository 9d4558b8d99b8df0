"""Texts that are cut: counted as the encoder's own tokenization cuts them, and named with what is dropped."""

from __future__ import annotations

import pytest

from stdit.text import lengths
from stdit.text.encoders import TextEncoder
from stdit.text.lengths import TextLimit
from stdit.text.places import Treatment
from stdit.text.small import build_word_tokenizer, small_umt5

WORDS = "a red dog runs over the hill and on"


@pytest.mark.parametrize("clean", ["none", "lower", "mend"])
def test_what_is_dropped_is_what_the_encoder_does_not_see(clean):
    tokenizer = build_word_tokenizer([WORDS])
    encoder = TextEncoder(small_umt5(len(tokenizer), 8, 1, 1), tokenizer, 6, Treatment(clean=clean))
    limit = TextLimit.of_encoder(encoder)
    for text in (
        WORDS,
        "A  Red dog",
        "a red dog runs over",
        "red &amp; dog " * 5,
        "",
        "ein Käfer läuft\u2028über den Berg",
    ):
        kept = encoder.tokenize([text])[0]
        found = limit.long(text)
        (whole,) = tokenizer([lengths.CLEANERS[clean](text)]).input_ids
        assert limit.count([text]) == [len(whole)] and (found is None) == (len(whole) <= 6) == (kept == whole)
        if found is not None:
            cleaned = lengths.CLEANERS[clean](text).rstrip()
            assert cleaned.endswith(found.dropped)
            start = cleaned[: len(cleaned) - len(found.dropped)]
            assert tokenizer([start]).input_ids[0] == kept  # nothing is lost between the two
    assert str(limit.long(WORDS)) == "10 tokens, and 6 are used: 'the hill and on' is dropped"


def test_many_are_counted_and_of_too_many_some(monkeypatch):
    limit = TextLimit.of_words(6)
    texts = [WORDS[: 2 * n] for n in range(16)] + ["é" * n for n in range(1, 9)]
    found = limit.among(texts)
    wanted = [text for text in texts if len(text.split()) + 1 > 6]
    assert (found.count, found.looked, found.texts) == (len(wanted), 24, 24)
    assert found.longest.tokens == max(len(text.split()) + 1 for text in texts)
    assert f"{len(wanted)} of 24 captions have more than 6 tokens" in str(found)
    monkeypatch.setattr(lengths, "MOST", 5)
    few = limit.among([WORDS] * 23)
    assert (few.count, few.looked, few.texts) == (5, 5, 23) and "5 of 5 captions looked at (of 23)" in str(few)
    assert limit.among([]).count == limit.among(["short"]).count == 0 and limit.among([]).longest is None
