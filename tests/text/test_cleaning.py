from __future__ import annotations

from open_sora_golden import TEXTS, kept

from stdit.text.cleaning import clean_prompt, strip_caption


def test_prompts_are_cleaned_as_wan_pipeline_does():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    for text in [" a \n b\tc ", "caf\u00c3\u00a9 &amp;amp; bar", "&lt;b&gt;bold", "\u201cquotes\u201d  x", ""]:
        assert clean_prompt(text) == prompt_clean(text)


def test_captions_are_stripped_as_open_sora_does():
    assert [strip_caption(text) for text in TEXTS] == kept()["texts"].tolist()
