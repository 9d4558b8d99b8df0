from __future__ import annotations

import numpy as np
import pytest
import torch

from stdit.errors import StditError
from stdit.sampling import filters

FRAMES = np.zeros((9, 32, 32, 3), np.uint8)


@pytest.fixture
def functions(tmp_path, monkeypatch):
    (tmp_path / "my_filters.py").write_text(
        "def refuse(value):\n    return len(value) > 5 and 'too long'\n\nnothing = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    return "my_filters"


def test_words_are_found_in_any_case_accent_and_width_but_not_inside_others(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("bad\nvery  Wrong\n\ncafé\n")
    refuse = filters.prompt_filter(str(file))
    for text in ("a BAD dog", "ｂａｄ", "very\twrong thing", "a Cafe\u0301", "cafe"):
        assert str(file) in (refuse(text) or ""), text
    for text in ("a badge", "very", "wrong", "cafeteria", ""):
        assert refuse(text) is None, text
    file.write_text("\n")
    with pytest.raises(StditError, match=r"words\.txt has no words"):
        filters.prompt_filter(str(file))


def test_functions(functions):
    assert filters.prompt_filter(f"{functions}:refuse")("abcdef") == "too long"
    assert filters.prompt_filter(f"{functions}:refuse")("abc") is None
    assert filters.frame_filter(f"{functions}:refuse")(FRAMES) == "too long"
    with pytest.raises(StditError, match=r"my_filters:refuse failed: TypeError"):
        filters.prompt_filter(f"{functions}:refuse")(3)
    for given, says in (
        ("nowhere", "not MODULE:FUNCTION"), ("nowhere:f", "No module named"), (f"{functions}:gone", "no attribute"),
        (f"{functions}:nothing", "must be a function"),
    ):  # fmt: skip
        with pytest.raises(StditError, match=says):
            filters.frame_filter(given)


def classifier(folder, labels, answer):
    """A ViT that always gives one label."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=16, patch_size=8,
        id2label=dict(enumerate(labels)), label2id={label: n for n, label in enumerate(labels)},
    )  # fmt: skip
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.bias.zero_()[labels.index(answer)] = 100.0
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return str(folder)


def test_a_classifier_refuses_what_it_does_not_take_for_safe(tmp_path):
    bad = filters.frame_filter(classifier(tmp_path / "bad", ["normal", "nsfw"], "nsfw"))
    good = filters.frame_filter(classifier(tmp_path / "good", ["nsfw", "Normal"], "Normal"))
    assert good(FRAMES) is None and "takes it for nsfw (100%)" in bad(FRAMES)
    chunks = [FRAMES[:1], FRAMES[1:]]
    assert [len(chunk) for chunk in filters.checked(chunks, [good])] == [1, 8]
    with pytest.raises(StditError, match=r"its frames are refused: .*nsfw"):
        list(filters.checked(chunks, [good, bad]))
    with pytest.raises(StditError, match="has the labels cat, dog; one must be"):
        filters.frame_filter(classifier(tmp_path / "cats", ["cat", "dog"], "cat"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StditError, match="not an image classifier"):
        filters.frame_filter(str(tmp_path / "empty"))
