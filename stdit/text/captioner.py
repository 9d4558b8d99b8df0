"""Captions clips with any image- or video-to-text model of transformers, from a local folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    ProcessorMixin,
)

from stdit.errors import StditError
from stdit.text.pretrained import load_weights, read_part

PROMPT = "Describe what can be seen, in one paragraph."  # for chat models


class Refused(StditError):
    """The model or its processor fails on these clips."""


class Captioner:
    """A model and its processor. The processor decides how a clip is passed: as a video; as several images to a chat
    model (with a chat template); else as one image. Captions are decoded greedily.

    prompt: None means PROMPT for a chat model and nothing for others. Other models get a prompt unchanged, so it must
        contain what they expect (such as <image>).
    max_new_tokens: longest caption.
    """

    def __init__(self, model: Any, processor: Any, prompt: str | None = None, max_new_tokens: int = 128) -> None:
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.template = getattr(processor, "chat_template", None)
        self.takes_video = getattr(processor, "video_processor", None) is not None
        # of frames that GIT for videos has positions for; 0 if any number is possible
        self.fixed_number = int(getattr(model.config, "num_image_with_embedding", None) or 0)
        self.prompt = PROMPT if prompt is None and self.template else prompt or None
        if self.prompt and model.config.model_type == "vision-encoder-decoder":
            raise StditError(f"--prompt {prompt!r}: a vision-encoder-decoder takes none. Leave it out.")
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not model.config.is_encoder_decoder:
            tokenizer.padding_side = "left"  # the caption continues from the last position
        for unused in ("temperature", "top_p", "top_k", "min_p", "typical_p", "max_length"):  # or conflicting
            setattr(model.generation_config, unused, None)

    def frames(self, wanted: int) -> int:
        """How many frames of a clip the model takes if `wanted` are available."""
        return self.fixed_number or (wanted if self.takes_video or self.template else 1)

    @torch.inference_mode()
    def caption(self, clips: Sequence[np.ndarray], fps: Sequence[float]) -> list[str]:
        """A caption for each clip, (T, H, W, 3) uint8 of any sizes; either all have one frame or none has.

        Raises Refused for clips that the model or its processor fails on.
        """
        try:
            inputs = self._inputs(clips, fps).to(device=self.model.device, dtype=self.model.dtype)
            made = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.max_new_tokens)
            return self._texts(made, inputs.get("input_ids"))
        except torch.OutOfMemoryError as error:
            raise StditError(f"the captioning model needs more memory: lower --batch or --frames. {error}") from error
        except Exception as error:  # any error of any of a hundred models
            raise Refused(f"the model fails on it ({type(error).__name__}: {error}).") from error

    def _inputs(self, clips: Sequence[np.ndarray], fps: Sequence[float]) -> Any:
        shown: dict[str, Any] = {}
        if self.fixed_number:
            clips = [clip[np.linspace(0, len(clip) - 1, self.fixed_number).round().astype(int)] for clip in clips]
        video = self.takes_video and len(clips[0]) > 1
        if video:
            shown["videos"] = list(clips)
            shown["do_sample_frames"] = False
            shown["video_metadata"] = [
                {"total_num_frames": len(c), "fps": f, "duration": len(c) / f, "frames_indices": list(range(len(c)))}
                for c, f in zip(clips, fps)
            ]
        else:
            images = [[Image.fromarray(frame) for frame in clip] for clip in clips]
            shown["images"] = images if self.template else [image for clip in images for image in clip]
        if self.template:
            asked = [{"type": "text", "text": self.prompt}] if self.prompt else []
            seen = [[{"type": "video"}] if video else [{"type": "image"}] * len(clip) for clip in clips]
            chats = [[{"role": "user", "content": parts + asked}] for parts in seen]
            texts = self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
            begin = self.processor.tokenizer.bos_token
            if begin is not None and texts[0].startswith(begin):  # add it only once
                shown["add_special_tokens"] = False
            shown |= {"text": texts, "padding": True}
        elif self.prompt:
            shown |= {"text": [self.prompt] * len(clips), "padding": True}
        inputs = self.processor(**shown, return_tensors="pt")
        if self.model.config.model_type == "git" and self.prompt:  # the caption continues it: no end token
            for name in ("input_ids", "attention_mask"):
                inputs[name] = inputs[name][:, :-1]
        if self.fixed_number:
            inputs["pixel_values"] = inputs["pixel_values"].unflatten(0, (len(clips), self.fixed_number))
        return inputs

    def _texts(self, made: torch.Tensor, given: torch.Tensor | None) -> list[str]:
        """The captions without the prompt, each on one line."""
        tokenizer = self.processor.tokenizer
        prompts = [""] * len(made)
        if given is not None and torch.equal(made[:, : given.shape[1]], given):
            made = made[:, given.shape[1] :]
        elif given is not None:  # some models tokenize the prompt again
            prompts = tokenizer.batch_decode(given, skip_special_tokens=True)
        texts = tokenizer.batch_decode(made, skip_special_tokens=True)
        return [" ".join(text.strip().removeprefix(prompt.strip()).split()) for text, prompt in zip(texts, prompts)]


class _Pair(ProcessorMixin):
    """A processor for folders that have only its two parts, such as ViT with GPT-2."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        super().__init__(image_processor, tokenizer)


def load_captioner(
    folder: str | Path,
    prompt: str | None = None,
    max_new_tokens: int = 128,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
) -> Captioner:
    """From a local folder in transformers' layout, safetensors only. dtype: a torch name; auto: the stored one."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise StditError(
            f"{folder} is not a folder. Models are read from local folders, nothing is downloaded: download one first "
            "(hf download NAME --local-dir FOLDER) and give that folder."
        )
    config = read_part(AutoConfig, folder, "config.json")
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise StditError(
            f"{folder / 'config.json'}: model_type {config.model_type!r} is no image- or video-to-text model of "
            f"transformers, such as qwen2_5_vl, llava_onevision, smolvlm, blip-2 and git are."
        )
    processor = _load_processor(folder)
    model = load_weights(AutoModelForImageTextToText, folder, "the captioning model", config=config, dtype=dtype)
    return Captioner(model.to(device), processor, prompt, max_new_tokens)


def _load_processor(folder: Path) -> Any:
    remedy = " Beside config.json there must be preprocessor_config.json or processor_config.json, and a tokenizer."
    processor = read_part(AutoProcessor, folder, "a processor", remedy)
    if isinstance(processor, ProcessorMixin):
        return processor
    return _Pair(*(read_part(kind, folder, "a processor", remedy) for kind in (AutoImageProcessor, AutoTokenizer)))
