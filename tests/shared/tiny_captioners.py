"""Folders of tiny vision-language models with random weights, as transformers writes them."""

from __future__ import annotations

import torch
import transformers as t
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

WORDS = "a the red blue green round square thing moves rests left right up down slowly and then stops in front of"
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'video' %}VIDEO{% else %}IMAGE{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %} and then{% endif %}"
)
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"image_size": 28, "patch_size": 14}
TEXT = VISION | {"max_position_embeddings": 256}
RESIZE = {"size": {"height": 28, "width": 28}}


def save(kind, folder):
    """Writes a model of this kind and its processor, or the parts that stand for one."""
    model, *parts = KINDS[kind]()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.35)
    model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return folder


def tokenizer(*special, wrapped=False):
    """One token a word. wrapped: texts stand between <s> and </s>, as BERT's do."""
    names = ["<pad>", "<s>", "</s>", "<unk>", *special]
    built = Tokenizer(WordLevel({word: i for i, word in enumerate([*names, *WORDS.split()])}, unk_token="<unk>"))
    built.pre_tokenizer = Whitespace()
    if wrapped:
        built.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return t.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=list(special),
    )  # fmt: skip


def llava():
    """Several images, by a chat template."""
    words = tokenizer("<image>")
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**VISION, **SQUARE),
        text_config=t.LlamaConfig(**TEXT, vocab_size=len(words), pad_token_id=0),
        image_token_index=4, image_seq_length=4,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = t.LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=CHAT.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(config), processor


def qwen2_vl():
    """Videos and images, of any size."""
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    words = tokenizer(*names)
    ids = dict(zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), range(4, 8)))
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = {**TEXT, "num_key_value_heads": 2, "vocab_size": len(words), "rope_parameters": rope}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = t.Qwen2VLConfig(text_config={**text, "bos_token_id": 1, "eos_token_id": 2}, vision_config=vision, **ids)
    pixels = {"patch_size": 4, "min_pixels": 64, "max_pixels": 1024}
    template = CHAT.replace("IMAGE", "".join(names[2:3] + names[:1] + names[3:]))
    template = template.replace("VIDEO", "".join(names[2:3] + names[1:2] + names[3:]))
    processor = t.Qwen2VLProcessor(
        t.Qwen2VLImageProcessor(**pixels), words, t.Qwen2VLVideoProcessor(**pixels), chat_template=template
    )
    return t.Qwen2VLForConditionalGeneration(config), processor


def blip():
    """One image, and perhaps the beginning of the caption."""
    words = tokenizer(wrapped=True)
    text = {**TEXT, "encoder_hidden_size": 16, "vocab_size": len(words)}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "pad_token_id": 0}
    config = t.BlipConfig(text_config=text, vision_config={**VISION, **SQUARE}, projection_dim=16)
    return t.BlipForConditionalGeneration(config), t.BlipProcessor(t.BlipImageProcessor(**RESIZE), words)


def git(frames=None):
    words = tokenizer(wrapped=True)
    config = t.GitConfig(
        vision_config={**VISION, **SQUARE}, **TEXT, vocab_size=len(words), bos_token_id=1, eos_token_id=2,
        num_image_with_embedding=frames,
    )  # fmt: skip
    images = t.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return t.GitForCausalLM(config), t.GitProcessor(images, words)


def vit_gpt2():
    """No processor, only its parts."""
    words = tokenizer()
    decoder = t.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=64, vocab_size=len(words), bos_token_id=1, eos_token_id=2,
        is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(t.ViTConfig(**VISION, **SQUARE), decoder)
    model = t.VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    return model, t.ViTImageProcessor(**RESIZE), words


KINDS = {
    "llava": llava, "qwen2_vl": qwen2_vl, "blip": blip, "git": git, "git_video": lambda: git(4), "vit_gpt2": vit_gpt2,
}  # fmt: skip
