"""Cosmos-Reason1, a Qwen2.5-VL: the text encoder of Cosmos-Predict2.5, used as in diffusers 0.42.

There (`pipelines/cosmos/pipeline_cosmos2_5_predict.py`, `_get_prompt_embeds`) a text is the user's part of a chat,
padded to max_length; the transformer sees the padding's embeddings too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stdit.errors import StditError
from stdit.text.encoders import TextEncoder

SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."


class ReasonEncoder(TextEncoder):
    """Concatenates the hidden states after every layer, each normalised over its width."""

    @property
    def dim(self) -> int:
        config = self.encoder.config.get_text_config()
        return int(config.hidden_size * config.num_hidden_layers)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Uncleaned texts to the ids of their chats, each padded to max_length."""
        if not texts:
            return []
        if self.tokenizer.chat_template is None:
            raise StditError(
                "the tokenizer has no chat template, which Cosmos-Reason1 needs: get chat_template.jinja, or the "
                "chat_template of tokenizer_config.json, from the source of its weights."
            )
        found = self.tokenizer.apply_chat_template(
            chats(texts), add_generation_prompt=False, add_vision_id=False, truncation=True, padding="max_length",
            max_length=self.max_length, return_dict=True,
        )  # fmt: skip
        return found["input_ids"]

    def _hidden(self, ids: Tensor, seen: Tensor) -> Tensor:
        model = self.encoder.model.language_model  # type: ignore[union-attr]
        layers = model(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]  # the last one after its norm
        return torch.cat([(x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-8) for x in layers], dim=-1)


def chats(texts: Sequence[str]) -> list[list[dict[str, Any]]]:
    """Texts as chats with the model."""
    return [[_says("system", SYSTEM), _says("user", text)] for text in texts]


def _says(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": text}]}
