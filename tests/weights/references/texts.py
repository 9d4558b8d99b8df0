"""A small Cosmos-Reason1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from references.base import randomise

CHAT = "{% for one in messages %}{{ one.role }}: {% for part in one.content %}{{ part.text }}{% endfor %}\n{% endfor %}"


def small_reason(captions: Sequence[str]) -> tuple[Any, Any]:
    """A Qwen2.5-VL of two layers of width 16, and a tokenizer of these captions' words with a chat template."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from stdit.text.small import build_word_tokenizer

    tokenizer = build_word_tokenizer([*captions, "system: user: you are a helpful assistant who will provide prompts"])
    tokenizer.chat_template = CHAT
    text = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_window_layers": 2, "bos_token_id": 0,
        "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return randomise(Qwen2_5_VLForConditionalGeneration(config), 9), tokenizer
