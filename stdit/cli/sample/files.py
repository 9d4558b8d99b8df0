"""The files of a sampled clip: their names, which no other clip has, and what is written into them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stdit.errors import StditError
from stdit.files import publish, publish_text

if TYPE_CHECKING:
    import numpy as np

SLUG = 80  # bytes of a prompt in a file's name: file systems take 143 (encrypted ones) or 255 in all
_WEIGHTS = {".safetensors", ".json", ".model", ".txt"}
_BLOCK, _BLOCKS = 4096, 64
# Settings that are no option, or follow from others.
_NO_OPTION = {"dtype", "dtype_option", "model_hash", "lora_hashes", "known_hash", "known_frames", "stdit"}


@dataclass
class Written:
    """The paths of a clip's files. made: False for one that was there before."""

    prompt: str
    video: str | None  # None for an image
    image: str  # the contact sheet, or the image itself
    settings: str
    made: bool


@dataclass(frozen=True)
class ClipFiles:
    """A clip to be: what makes it, and where its files go."""

    out: Path
    prompt: str
    index: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """NUMBER-WORDS-SEED-HASH: of equal settings always the same, of others another."""
        words = slug(self.prompt)
        parts = (f"{self.index:03d}", words, f"seed{self.settings['seed']}", self.hash)
        return "-".join(part for part in parts if part)

    @property
    def hash(self) -> str:
        """Eight hex digits over all that decides the frames: of models and known frames the content, not the path."""
        unseen = {"model", "image", "last", "video", "loras", "loras_2"}
        about = {key: value for key, value in self._about().items() if key not in unseen}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]

    def _about(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "index": self.index, **self.settings}

    @property
    def _paths(self) -> tuple[Path | None, Path, Path]:
        """Video (None for an image), contact sheet or image, settings."""
        video = None if self.settings["frames"] == 1 else self.out / f"{self.name}.mp4"
        return video, self.out / f"{self.name}.png", self.out / f"{self.name}.json"

    def there(self) -> Written | None:
        """The clip, if an earlier command has made it. Its settings are written last."""
        video, image, note = self._paths
        if not all(path.is_file() for path in (video, image, note) if path is not None):
            return None
        return self._written(made=False)

    def write(self, frames: Iterator[np.ndarray], fps: float) -> Written:
        """Writes the files. Frames go to the disk as they come; only those of the contact sheet are kept."""
        import numpy as np

        from stdit.data.decode.write import contact_sheet, sheet_frames, write_video

        video, image, note = self._paths
        if video is None:
            from PIL import Image

            with publish(image) as part:
                Image.fromarray(next(frames)).save(part, format="PNG")
        else:
            picks, kept = set(sheet_frames(self.settings["frames"])), []

            def keeping() -> Iterator[np.ndarray]:
                for number, frame in enumerate(frames):
                    if number in picks:
                        kept.append(frame.copy())  # not a view that holds its whole chunk
                    yield frame

            write_video(video, keeping(), fps)
            contact_sheet([np.stack(kept)], image)
        about = {**self._about(), "command": self.command()}
        publish_text(note, json.dumps(about, indent=2, ensure_ascii=False) + "\n")
        return self._written(made=True)

    def _written(self, made: bool) -> Written:
        video, image, note = self._paths
        return Written(self.prompt, str(video) if video else None, str(image), str(note), made)

    def command(self) -> str:
        """The command that makes this clip again, alone."""
        words = ["stdit", "sample"]
        given = {"prompt": self.prompt, "index": self.index, **self.settings, "out": str(self.out)}
        for key, value in given.items():
            option = f"--{key.replace('_', '-')}"
            if key in ("loras", "loras_2"):
                words += [f"{option.replace('loras', 'lora')}={file}:{weight:g}" for file, weight in value]
            elif key == "known_frames" and given["video"]:
                words.append(f"--video-frames={value}")
            elif key == "dtype_option" and value is not None:
                words.append(f"--dtype={value}")
            elif isinstance(value, bool):  # a flag
                words += [option] if value else []
            elif key not in _NO_OPTION and value is not None and isinstance(value, str | int | float):
                words.append(f"{option}={value}")
        return shlex.join(words)


def slug(prompt: str, most: int = SLUG) -> str:
    """A prompt's letters, marks and digits of any script, in lower case, with "-" between words: at most `most` bytes
    of UTF-8. No separators, dots or control characters, so that it is no path."""
    text = unicodedata.normalize("NFC", prompt).lower()
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else "-" for letter in text)
    words = re.sub("-+", "-", words).strip("-")
    return words.encode()[:most].decode(errors="ignore").rstrip("-")


def content_hash(places: Iterable[Path]) -> str:
    """Sixteen hex digits of the weights, configs and vocabularies in files and folders with their subfolders.

    Of a large file 64 blocks spread over it and its size are read: training changes every tensor, and tens of GB are
    not to be read twice. Where a folder lies does not matter.
    """
    total = hashlib.sha256()
    for place in dict.fromkeys(places):
        files = [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.suffix in _WEIGHTS)
        for file in files:
            relative = file.relative_to(place) if file != place else Path(file.suffix)
            if file.is_file() and not any(part.startswith(".") for part in relative.parts):
                size = file.stat().st_size
                total.update(f"{relative.as_posix()}\0{size}\0".encode(errors="surrogateescape"))
                with open(file, "rb") as opened:
                    last = max(0, size - _BLOCK)
                    for start in sorted({last * block // _BLOCKS for block in range(_BLOCKS + 1)}):
                        opened.seek(start)
                        total.update(opened.read(_BLOCK))
    return total.hexdigest()[:16]


def frames_hash(known: Mapping[str, np.ndarray] | None) -> str | None:
    """Of known frames, sixteen hex digits."""
    if known is None:
        return None
    total = hashlib.sha256()
    for name, frames in sorted(known.items()):
        total.update(f"{name}{frames.shape}".encode())
        total.update(frames.tobytes())
    return total.hexdigest()[:16]


def check_text(text: str, option: str) -> None:
    """Raises for bytes that are no text, which Python keeps as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StditError(f"{option}: character {error.start + 1} of {text[:40]!r} is not valid Unicode.") from None
