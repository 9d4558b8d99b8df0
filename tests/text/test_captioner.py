"""Captions against transformers' own: its pipeline, or generate on what its processor makes of the same frames."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_captioners
import torch
import transformers
from PIL import Image

from stdit.errors import StditError
from stdit.text.captioner import Refused, load_captioner

SIZES = [(32, 48), (48, 32), (40, 40)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tiny_captioners.save(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


def clips(count):
    """Three clips of `count` frames and different sizes and colours."""
    drawn = np.random.default_rng(0)
    colours = drawn.integers(0, 200, (3, count, 1, 1, 3))
    return [
        (colour + drawn.integers(0, 56, (count, *size, 3))).astype(np.uint8) for colour, size in zip(colours, SIZES)
    ]


def in_pipeline(folder, clip, prompt):
    """A chat with images, or one image and the words before."""
    pipe = transformers.pipeline("image-text-to-text", model=str(folder), device="cpu")
    images = [Image.fromarray(frame) for frame in clip]
    if pipe.processor.chat_template is None:
        given = {"images": images[0], "text": prompt}
    else:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
        given = {"text": [{"role": "user", "content": parts}]}
    found = pipe(**given, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})
    return found[0]["generated_text"]


def by_generate(folder, clip, prompt):
    """As the model's documentation shows it."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    if model.config.model_type == "qwen2_vl":
        processor = transformers.AutoProcessor.from_pretrained(folder)
        content = [{"type": "video", "video": clip}, {"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
    else:
        inputs = transformers.AutoImageProcessor.from_pretrained(folder)(images=list(clip), return_tensors="pt")
        if len(clip) > 1:
            inputs["pixel_values"] = inputs.pixel_values[None]
        if prompt:  # https://huggingface.co/docs/transformers/model_doc/git: no end after the question
            ids = [words.convert_tokens_to_ids("<s>"), *words(prompt, add_special_tokens=False).input_ids]
            inputs["input_ids"] = torch.tensor([ids])
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    length = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    return words.decode(made[0, length:], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("kind", "frames", "prompt", "reference"),
    [
        ("llava", 3, "red thing", in_pipeline),
        ("llava", 1, "red thing", in_pipeline),
        ("qwen2_vl", 4, "red thing", by_generate),
        ("qwen2_vl", 3, "red thing", by_generate),
        ("qwen2_vl", 1, "red thing", in_pipeline),
        ("blip", 1, "a red", in_pipeline),
        ("blip", 1, None, by_generate),
        ("git", 1, None, by_generate),
        ("git", 1, "a red", by_generate),
        ("git_video", 4, None, by_generate),
        ("vit_gpt2", 1, None, by_generate),
    ],
)
def test_a_clip_alone_and_in_a_batch_is_captioned_as_by_transformers(folders, kind, frames, prompt, reference):
    folder = folders(kind)
    captioner = load_captioner(folder, prompt, max_new_tokens=6)
    assert captioner.frames(frames) == frames
    shown = clips(frames)
    wanted = [" ".join(reference(folder, clip, prompt).split()) for clip in shown]
    assert all(wanted) and len(set(wanted)) > 1  # something is said, and it depends on what is seen
    assert [captioner.caption([clip], [2.0])[0] for clip in shown] == wanted
    assert captioner.caption(shown, [2.0] * 3) == wanted


@pytest.mark.parametrize(
    ("kind", "frames"), [("llava", 5), ("qwen2_vl", 5), ("blip", 1), ("git", 1), ("git_video", 4), ("vit_gpt2", 1)]
)
def test_how_many_frames_a_model_is_shown(folders, kind, frames):
    assert load_captioner(folders(kind)).frames(5) == frames


def test_a_model_that_is_talked_to_is_asked_to_describe(folders):
    assert load_captioner(folders("llava")).prompt == "Describe what can be seen, in one paragraph."
    assert load_captioner(folders("blip")).prompt is None
    with pytest.raises(StditError, match="takes none"):
        load_captioner(folders("vit_gpt2"), "a red")


def test_the_type_of_the_weights(folders):
    assert load_captioner(folders("git")).model.dtype == torch.float32
    captioner = load_captioner(folders("git"), dtype="bfloat16", max_new_tokens=3)
    assert captioner.model.dtype == torch.bfloat16 and captioner.caption(clips(1)[:1], [1.0])


def test_what_the_model_fails_on_is_refused(folders):
    captioner = load_captioner(folders("qwen2_vl"), max_new_tokens=2)
    with pytest.raises(Refused, match="aspect ratio"):
        captioner.caption([np.zeros((2, 2, 900, 3), np.uint8)], [1.0])


def test_errors_say_what_to_do(tmp_path, folders):
    with pytest.raises(StditError, match="hf download NAME"):
        load_captioner("Qwen/Qwen2.5-VL-7B-Instruct")
    with pytest.raises(StditError, match=r"config\.json"):
        load_captioner(tmp_path)
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(StditError, match="'t5' is no image- or video-to-text model"):
        load_captioner(tmp_path)
    whole = tiny_captioners.save("blip", tmp_path / "blip")
    settings = json.loads((whole / "config.json").read_text())
    (whole / "config.json").write_text(
        json.dumps({**settings, "vision_config": {**settings["vision_config"], "num_hidden_layers": 3}})
    )
    with pytest.raises(StditError, match="do not fit its config"):
        load_captioner(whole)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (whole / name).unlink(missing_ok=True)
    with pytest.raises(StditError, match="cannot read a processor"):
        load_captioner(whole)
    (whole / "model.safetensors").rename(whole / "pytorch_model.bin")
    tiny_captioners.KINDS["blip"]()[1].save_pretrained(whole)
    with pytest.raises(StditError, match="weights cannot be read"):
        load_captioner(whole)


def test_a_model_of_so_many_frames_is_shown_an_image_as_often(folders):
    captioner, (clip, *_) = load_captioner(folders("git_video"), max_new_tokens=6), clips(1)
    assert captioner.caption([clip], [1.0]) == captioner.caption([np.repeat(clip, 4, axis=0)], [1.0])
