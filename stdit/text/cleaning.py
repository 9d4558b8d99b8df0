"""Cleans texts as the families' pipelines do before encoding them."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from urllib.parse import unquote_plus

import ftfy

_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
_DASHES = r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0"
_DASHES += r"\uFE31\uFE32\uFE58\uFE63\uFF0D"
_URLS = tuple((rf"\b(?:{scheme}:(?:/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN})", "") for scheme in ("https?", "www"))
_MARKS = (
    (r"@\w+\b", ""),
    ("[\u31c0-\u9fff]+", ""),  # Chinese and Japanese characters
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?|&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # IP addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # written out
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"\S+\.(?:{_FILES})", ""),
    ("[\"']{2,}", '"'),
    (r"\.{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
_CODES = (  # product codes, shop phrases and file names; then spaces
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simages?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+:\s+", ": "),
    (r"(\D[,./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)


def clean_prompt(text: str) -> str:
    """Mends broken Unicode, unescapes HTML twice and folds white space, as diffusers' WanPipeline does."""
    return re.sub(r"\s+", " ", _mended(text)).strip()


def lower_prompt(text: str) -> str:
    """Lower-cases, as diffusers' pipelines of PixArt, Latte and Allegro do without `clean_caption`."""
    return text.lower().strip()


def strip_caption(text: str) -> str:
    """Removes addresses, tags, file names, codes and odd punctuation, in two passes, as Open-Sora 1.2 does
    (opensora/models/text_encoder/t5.py)."""
    return _stripped(_stripped(text))


def _stripped(text: str) -> str:
    text = unquote_plus(text).strip().lower().replace("<person>", "person")
    text = _replaced(_without_tags(_replaced(text, _URLS)), _MARKS)
    if len(re.findall("[-_]", text)) > 3:  # this-is-one-name
        text = re.sub("[-_]", " ", text)
    return _replaced(_mended(text), _CODES).strip()


def _replaced(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _mended(text: str) -> str:
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


class _Words(HTMLParser):
    """Collects the visible text between HTML tags."""

    UNSEEN = ("script", "style", "template")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.unseen = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.unseen += tag in self.UNSEEN

    def handle_endtag(self, tag: str) -> None:
        self.unseen -= tag in self.UNSEEN and self.unseen > 0

    def handle_data(self, data: str) -> None:
        if not self.unseen:
            self.found.append(data)


def _without_tags(text: str) -> str:
    words = _Words()
    words.feed(text)
    words.close()
    return "".join(words.found)
