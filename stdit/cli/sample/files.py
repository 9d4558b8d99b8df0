"""The files of a sampled clip: unique names, and their contents."""

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

from stdit.files import publish, publish_text, sha256_of

if TYPE_CHECKING:
    import numpy as np

SLUG = 80  # bytes of a prompt in a file name: file systems allow 143 (encrypted ones) or 255 bytes
_WEIGHTS = {".safetensors", ".json", ".model", ".txt"}
_BLOCK, _BLOCKS = 4096, 64
# Settings that are not options of the command, or follow from others.
# where things are, not what they are; and how they are written
_PATHS = {"model", "image", "last", "video", "init", "loras", "loras_2", "format"}
_NO_OPTION = {"dtype", "dtype_option", "model_hash", "lora_hashes", "known_hash", "known_frames", "stdit"}


@dataclass(frozen=True)
class ClipFiles:
    """The files of one clip.

    out: their folder.
    index: the clip's number among the prompts.
    settings: all that it is made with besides the prompt and index.
    """

    out: Path
    prompt: str
    index: int
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """NUMBER-WORDS-SEED-HASH, the same for equal settings only."""
        parts = (f"{self.index:03d}", slug(self.prompt), f"seed{self.settings['seed']}", self.hash)
        return "-".join(part for part in parts if part)

    @property
    def hash(self) -> str:
        """Eight hex digits of all that the frames depend on: the content of models and known frames, not the path."""
        hashed = self._hashed(self._all_settings())
        return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:8]

    def _hashed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in settings.items() if key not in _PATHS}

    def _all_settings(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "index": self.index, **self.settings}

    @property
    def video(self) -> Path | None:
        """None for an image. A folder of pictures, if that is the format."""
        if self.settings["frames"] == 1:
            return None
        kind = self.settings["format"]
        return self.out / (self.name if kind == "png" else f"{self.name}.{kind}")

    @property
    def image(self) -> Path:
        """The contact sheet, or the image itself."""
        return self.out / f"{self.name}.png"

    @property
    def note(self) -> Path:
        """The settings. They are written last."""
        return self.out / f"{self.name}.json"

    def differences(self, settings: Mapping[str, Any]) -> list[str]:
        """The names of settings that the frames depend on and that a sidecar says otherwise."""
        mine = self._hashed(json.loads(json.dumps(self._all_settings())))
        return [name for name, value in mine.items() if settings.get(name) != value]

    def exist(self) -> bool:
        """Whether an earlier command made the clip: its files are as they were when its settings were written."""
        try:
            found = json.loads(self.note.read_text())
            return not self.differences(found) and found["files"] == self._digests()
        except (OSError, ValueError, KeyError, AttributeError):
            return False

    def _digests(self) -> dict[str, str]:
        """The SHA-256 of each file but the settings. Raises OSError if one is missing."""
        found = {}
        for path in filter(None, (self.video, self.image)):
            for one in sorted(path.iterdir()) if self.settings["format"] == "png" and path == self.video else [path]:
                with open(one, "rb") as file:
                    found[one.relative_to(self.out).as_posix()] = sha256_of(file)
        return found

    def as_json(self, made: bool) -> dict[str, Any]:
        """made: by this command."""
        video = str(self.video) if self.video else None
        return {
            "prompt": self.prompt, "video": video, "image": str(self.image), "settings": str(self.note), "made": made
        }  # fmt: skip

    def write(self, frames: Iterator[np.ndarray], fps: float) -> None:
        """Writes the files. Frames are written as they arrive; only those of the contact sheet stay in memory."""
        import numpy as np

        from stdit.data.decode.write import contact_sheet, picture_comment, sheet_frames, write_video

        settings = {**self._all_settings(), "command": self.command()}
        about = json.dumps({"made_by": "stdit", **settings}, ensure_ascii=False)
        if self.video is None:
            from PIL import Image

            with publish(self.image) as part:
                Image.fromarray(next(frames)).save(part, format="PNG", pnginfo=picture_comment(about))
        else:
            picks, kept = set(sheet_frames(self.settings["frames"])), []

            def keeping_picks() -> Iterator[np.ndarray]:
                for number, frame in enumerate(frames):
                    if number in picks:
                        kept.append(frame.copy())  # a view would keep its whole chunk in memory
                    yield frame

            write_video(self.video, keeping_picks(), fps, about=about)
            contact_sheet([np.stack(kept)], self.image)
        settings["files"] = self._digests()
        publish_text(self.note, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def command(self) -> str:
        """The command that makes this clip again, alone."""
        words = ["stdit", "sample"]
        given = {**self._all_settings(), "out": str(self.out)}
        for key, value in given.items():
            option = f"--{key.replace('_', '-')}"
            if key in ("loras", "loras_2"):
                words += [f"{option.replace('loras', 'lora')}={file}:{weight:g}" for file, weight in value]
            elif key == "known_frames" and given["video"]:
                words.append(f"--video-frames={value}")
            elif key == "dtype_option" and value is not None:
                words.append(f"--dtype={value}")
            elif key == "solver" and isinstance(value, Mapping):
                continue  # the model folder's own: no option chose it
            elif key not in _NO_OPTION and value is not None and value is not False:
                assert isinstance(value, str | int | float), f"{option}: no text is known for {value!r}"
                words.append(option if value is True else f"{option}={value}")
        return shlex.join(words)


def slug(prompt: str) -> str:
    """A prompt's letters, marks and digits of any script, in lower case, with "-" between words.

    At most SLUG bytes of UTF-8. It has no separators, dots or control characters, so it is never a path.
    """
    text = unicodedata.normalize("NFC", prompt).lower()
    words = "".join(letter if unicodedata.category(letter)[0] in "LMN" else "-" for letter in text)
    words = re.sub("-+", "-", words).strip("-")
    return words.encode()[:SLUG].decode(errors="ignore").rstrip("-")


def content_hash(places: Iterable[Path]) -> str:
    """Sixteen hex digits of the weights, configs and vocabularies in files, and in folders with their subfolders.

    Only the size and 64 blocks of a large file are read, spread over it: training changes every tensor, and reading
    tens of GB twice takes too long. The location of a folder does not matter.
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


def frames_hash(known: Mapping[str, np.ndarray]) -> str | None:
    """Sixteen hex digits of known frames."""
    if not known:
        return None
    total = hashlib.sha256()
    for name, frames in sorted(known.items()):
        total.update(f"{name}{frames.shape}".encode())
        total.update(frames.tobytes())
    return total.hexdigest()[:16]
