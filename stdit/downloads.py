"""Files that were not downloaded whole: Git LFS pointers, error pages, downloads that go on or broke off."""

from __future__ import annotations

from pathlib import Path

from stdit.errors import StditError

_SUFFIXES = (".incomplete", ".part", ".crdownload", ".download", ".aria2", ".tmp")  # of hf, curl, wget, browsers, aria2
_PAGE = "is a web page, not the file: the download was answered by an error or a login. Download it again"
_STARTS = {  # lower-case first bytes of files that are not what their name says
    b"version https://git-lfs": "is a Git LFS pointer, not the file. Fetch the file: `git lfs pull` in its "
    "repository, or download it again",
    b"<!doctype": _PAGE,
    b"<html": _PAGE,
    b"gguf": "is a GGUF file, quantised for other programs. stdit reads safetensors: take the release's own weights",
    b"pk\x03\x04": "is a pickle of torch.save, whatever its name says. Rename it to .pth if you trust where it is "
    "from, or take safetensors",
}


def check_downloaded(path: Path) -> None:
    """Raises StditError for a file that is empty, a Git LFS pointer, of another format than its name says, or cannot be
    read."""
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError as error:
        raise StditError(f"{path}: cannot be read ({error.strerror}).") from error
    if not start:
        raise StditError(f"{path}: is empty. Download it again.")
    for known, what in _STARTS.items():
        if start.lstrip().lower().startswith(known):
            raise StditError(f"{path}: {what}.")


def unfinished(folder: Path) -> str:
    """A sentence for errors, with a space before it, that names an unfinished download into a folder; "" if none."""
    local = Path(".cache", "huggingface", "download")  # of hf download --local-dir
    for place in (folder, folder / local, folder.parent / local / folder.name):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix in _SUFFIXES and not path.name.startswith(".") and path.is_file():
                return f" {path} is a download that has not finished: let it finish."
    return ""
