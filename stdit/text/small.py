"""A small text encoder that trains with the model: a word tokenizer built from the captions, and a fresh UMT5."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFKC, Lowercase
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from stdit.errors import StditError
from stdit.keyed.weights import ONE, Start, StartingWeights
from stdit.text.cleaning import clean_prompt

PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"  # ids 0, 1, 2, as in T5


def build_word_tokenizer(captions: Iterable[str], max_words: int = 32_000) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per lower-cased word or run of punctuation in the captions; it appends the end token.

    Words are sorted by falling frequency, then alphabetically, so equal captions give equal ids. AutoTokenizer opens
    what it saves.
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
    """A fresh UMT5 encoder without dropout. Equal seeds give equal weights; the global generator does not change."""
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
        model = UMT5EncoderModel(config)
    starting_weights(model, seed).fill(model)
    return model


def starting_weights(model: UMT5EncoderModel, seed: int) -> StartingWeights:
    """transformers' own distributions, keyed by name."""
    config = model.config
    d, inner = config.d_model, config.num_heads * config.d_kv
    deviations = {
        "shared": 1.0, "q": (d * config.d_kv) ** -0.5, "k": d**-0.5, "v": d**-0.5, "o": inner**-0.5,
        "relative_attention_bias": d**-0.5, "wi_0": d**-0.5, "wi_1": d**-0.5, "wo": config.d_ff**-0.5,
    }  # fmt: skip
    found: dict[str, Start] = {}
    for name, _ in model.named_parameters():
        layer = name.split(".")[-2]
        found[name] = ONE if layer.endswith("layer_norm") else Start("normal", deviations[layer])
    return StartingWeights(found, "text encoder", seed)
