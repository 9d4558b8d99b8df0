"""Text encoders: texts to the embeddings that cross-attention sees.

`TextEncoder` returns what diffusers' pipelines have before they pad: each text's last hidden states at the valid
positions, including the end token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stdit.errors import StditError
from stdit.text.cleaning import clean_prompt, lower_prompt, strip_caption
from stdit.text.places import Treatment
from stdit.text.pretrained import quiet

CLEANERS: dict[str, Callable[[str], str]] = {
    "mend": clean_prompt,
    "lower": lower_prompt,
    "strip": strip_caption,
    "none": str,
}
REASON_SYSTEM = "You are a helpful assistant who will provide prompts to an image generator."


class TextEncoder(nn.Module):
    """An encoder and its tokenizer. Trains like any module; has no dropout.

    max_length: in place of the treatment's.
    load: reads the weights on first use; until then `encoder` is on the meta device. Such an encoder does not train.
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
        # a mismatched vocabulary is much smaller or larger; the right one is padded by less than a tenth
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
        """Reads deferred weights, then moves and casts them as the module was meanwhile."""
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
        """The token ids of cleaned texts, including the end token, without padding."""
        if not texts:
            return []
        cleaned = [CLEANERS[self.treatment.clean](text) for text in texts]
        return self.tokenizer(cleaned, truncation=True, max_length=self.max_length, add_special_tokens=True).input_ids

    def forward(self, ids: Sequence[Sequence[int]], at_least: int = 0) -> list[Tensor]:
        """Token ids to embeddings with gradients: one (L, D) per text, L its number of ids.

        at_least: return at least so many positions of every text, including padding.
        """
        if not ids:
            return []
        self.ready()
        device = next(self.encoder.parameters()).device
        longest = self.max_length if self.treatment.sees_padding else max(at_least, *map(len, ids))
        padded = torch.full((len(ids), longest), self.tokenizer.pad_token_id, dtype=torch.long)
        mask = torch.zeros(len(ids), longest, dtype=torch.long)
        for row, text in enumerate(ids):
            padded[row, : len(text)] = torch.tensor(text, dtype=torch.long)
            mask[row, : len(text)] = 1
        seen = torch.ones_like(mask) if self.treatment.sees_padding else mask
        hidden = self._hidden(padded.to(device), seen.to(device))
        return [hidden[row, : max(at_least, len(text))] for row, text in enumerate(ids)]

    def _hidden(self, ids: Tensor, seen: Tensor) -> Tensor:
        """ids (texts, L) and their attention mask to (texts, L, D)."""
        return self.encoder(ids, seen).last_hidden_state

    @torch.no_grad()
    def encode(self, texts: Sequence[str], at_least: int = 0) -> list[Tensor]:
        """Texts to embeddings without gradients: one (L, D) per text. at_least: as in `forward`."""
        return self(self.tokenize(texts), at_least)

    @property
    def tokenizer_class(self) -> str:
        """The tokenizer's class name that both transformers 4 and 5 know."""
        name = type(self.tokenizer).__name__
        return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name

    def save(self, text_encoder: str | Path, tokenizer: str | Path) -> None:
        """Writes both folders of a model folder, in transformers' layout."""
        self.ready()
        with quiet():
            self.encoder.save_pretrained(text_encoder)
        self.tokenizer.save_pretrained(tokenizer)
        config = Path(tokenizer) / "tokenizer_config.json"
        config.write_text(config.read_text().replace('"TokenizersBackend"', f'"{self.tokenizer_class}"'))


class ReasonEncoder(TextEncoder):
    """Cosmos-Reason1, a Qwen2.5-VL: the text encoder of Cosmos-Predict2.5, used as in diffusers 0.42.

    There (`pipelines/cosmos/pipeline_cosmos2_5_predict.py`, `_get_prompt_embeds`) a text is the user's part of a chat,
    uncleaned and padded to max_length; the transformer sees the padding's embeddings too. These are the hidden states
    after every layer, each normalised over its width, one beside the other.
    """

    @property
    def dim(self) -> int:
        config = self.encoder.config.get_text_config()
        return int(config.hidden_size * config.num_hidden_layers)

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        return chat_ids(self.tokenizer, texts, self.max_length) if texts else []

    def _hidden(self, ids: Tensor, seen: Tensor) -> Tensor:
        model = self.encoder.model.language_model  # type: ignore[union-attr]
        layers = model(ids, output_hidden_states=True, use_cache=False).hidden_states[1:]  # the last one after its norm
        return torch.cat([(x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-8) for x in layers], dim=-1)


def chat_ids(tokenizer: Any, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """The ids of chats with Cosmos-Reason1 about texts, cut or padded to max_length; None leaves them whole."""
    if tokenizer.chat_template is None:
        raise StditError(
            "the tokenizer has no chat template, which Cosmos-Reason1 needs: get chat_template.jinja, or the "
            "chat_template of tokenizer_config.json, from the source of its weights."
        )

    def says(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    chats = [[says("system", REASON_SYSTEM), says("user", text)] for text in texts]
    cut = {} if max_length is None else {"truncation": True, "padding": "max_length", "max_length": max_length}
    return tokenizer.apply_chat_template(
        chats, add_generation_prompt=False, add_vision_id=False, return_dict=True, **cut
    )["input_ids"]
