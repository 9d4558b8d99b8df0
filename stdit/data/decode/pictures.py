"""Reads still and animated pictures with Pillow as a browser shows them: upright, on white, in 8-bit sRGB."""

from __future__ import annotations

import importlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from io import BytesIO
from typing import Any

import av
import numpy as np
import PIL
from PIL import Image, ImageCms, UnidentifiedImageError

from stdit.data.decode.checks import Limits, VideoError, error_text
from stdit.data.decode.formats import IMAGE_SUFFIXES, MOVING, NOT_READ, STILL, content_of_file, png_chunk, suffix_of
from stdit.data.decode.pixels import HLG, PQ, hdr_to_srgb
from stdit.data.decode.source import Source
from stdit.data.remote.paths import open_bytes
from stdit.errors import StditError

# Pillow plugins, from `stdit[pictures]`
_PLUGINS = {"heif": ("HEIC or HEIF", "pillow_heif"), "jxl": ("JPEG XL", "pillow_jxl")}
_ORIENTATION, _SUBFILE, _BITS, _PHOTOMETRIC, _DNG = 0x0112, 254, 258, 262, 50706  # tags of TIFF and EXIF
_REDUCED, _MASK = 1, 4  # bits of _SUBFILE: the page is a smaller copy, or a mask, of another
_PAGES = 100  # of a TIFF that are checked
# how to transpose a picture, by EXIF's orientation
_TURNS = {exif: Image.Transpose(turn) for exif, turn in {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.items()}
_TOO_SHORT, _DEFAULT_DURATION = 10, 100  # ms: browsers show a frame of at most the first for the second


def content_of_path(path: str) -> str | None:
    """As `formats.content_of_file`. Raises VideoError for formats that are not read."""
    with open_bytes(path) as file:
        content = content_of_file(file, path)
    if content in NOT_READ:
        message = f"is {NOT_READ[content]}, which is not supported: save it as PNG, JPEG, TIFF or WebP."
        raise VideoError(path, "unsupported", message)
    if content is None and suffix_of(path) in IMAGE_SUFFIXES:
        raise VideoError(path, "not_media", "is not an image that can be opened.")
    return content


@contextmanager
def open_picture(path: str, content: str, limits: Limits) -> Iterator[Image.Image]:
    """Opens a picture. Any error of Pillow, while the context is open too, becomes a VideoError."""
    name = {**STILL, **MOVING}[content]
    _prepare_plugin(path, content)
    try:
        # only the detected format: some of Pillow's formats start programs
        with open_bytes(path) as file, Image.open(file, formats=[name]) as image:
            if image.width * image.height > limits.pixels:
                message = f"is {image.width}x{image.height}; the limit is {limits.pixels} pixels."
                raise VideoError(path, "too_large", message)
            yield image
    except (StditError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        message = f"is damaged {name}, or a kind of it that Pillow {PIL.__version__} does not read."
        raise VideoError(path, "not_media", message) from error
    except Exception as error:  # a dozen libraries, each with its own
        raise VideoError(path, "damaged", f"cannot be decoded ({error_text(error)}).") from error


def _prepare_plugin(path: str, content: str) -> None:
    if "avif" in content:
        with suppress(ImportError):
            from PIL import AvifImagePlugin

            AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # one per core exceeds a worker's address space
    if content in _PLUGINS:
        name, module = _PLUGINS[content]
        try:
            plugin = importlib.import_module(module)
        except ImportError as error:
            message = f"is {name}, which needs {module.replace('_', '-')}: pip install 'stdit[pictures]'."
            raise VideoError(path, "unsupported", message) from error
        if content == "heif":
            plugin.register_heif_opener(thumbnails=False)


def decode_image(path: str, content: str, limits: Limits) -> np.ndarray:
    """A still picture as (H, W, 3) uint8. content: a key of STILL."""
    with open_picture(path, content, limits) as image:
        if content == "tiff":
            _seek_only_page(path, image)
        rgb = displayed_rgb(path, image)
        if (transfer := _transfer(path, content)) in (PQ, HLG):
            rgb = hdr_to_srgb(rgb.astype(np.uint16) * 257, transfer)
        return rgb


def displayed_rgb(path: str, image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 of an opened picture's current frame: upright, on white, in sRGB.

    16-bit integers are scaled by their range. 32-bit integers and floats are refused: their white level is unknown.
    """
    image.load()
    turn = None
    with suppress(Exception):  # damaged EXIF must not cost the picture
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    icc = image.info.get("icc_profile")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        image = _from_16_bits(image)
    elif image.mode in ("I", "F"):
        kind = "floating-point numbers" if image.mode == "F" else "32-bit or signed integers"
        message = f"is a picture of {kind}, whose white level is unknown: save it with 8 or 16 bits."
        raise VideoError(path, "unsupported", message)
    if turn is not None:
        image = image.transpose(turn)
    if not image.has_transparency_data:
        return np.array(_in_srgb(image, icc))
    image = image.convert("RGBA")
    rgb = _in_srgb(image, icc)
    rgb.putalpha(image.getchannel("A"))
    white = Image.new("RGBA", rgb.size, "white")
    return np.array(Image.alpha_composite(white, rgb).convert("RGB"))


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Grey of 8 bits, scaled by the depth that the file declares. In TIFF, 0 may be white."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS, (16,))[0] if image.format == "TIFF" else 16
    most = (1 << bits) - 1 if 8 < bits <= 16 else 0xFFFF
    values = np.minimum(np.asarray(image).astype(np.int64), most)
    transparent = image.info.get("transparency") if image.format == "PNG" else None
    grey = ((values * 255 + most // 2) // most).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    if isinstance(transparent, int):
        grey[values == transparent] = 255  # on white
    return Image.fromarray(grey)


def _in_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Converts to sRGB by the picture's own colour profile, if it has a usable one."""
    if image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("RGB")
    lab = image.mode == "LAB"
    space = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}.get(image.mode)
    try:
        if lab:
            profile: Any = ImageCms.createProfile("LAB")
        else:
            profile = ImageCms.ImageCmsProfile(BytesIO(icc)).profile if icc else None
        if lab or (profile and profile.xcolor_space.strip() == space and not _is_srgb(profile)):
            intent = ImageCms.Intent.PERCEPTUAL if lab else profile.rendering_intent
            source = ImageCms.ImageCmsProfile(profile)
            shown = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), intent, "RGB")
            assert shown is not None
            return shown
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        if lab:
            raise
    return image.convert("RGB")


def _is_srgb(profile: Any) -> bool:
    return str(profile.profile_description or "").startswith(("sRGB IEC61966", "sRGB built-in"))


def _seek_only_page(path: str, image: Image.Image) -> None:
    """Seeks to a TIFF's only page, not counting smaller copies and masks. Raises VideoError if there are several."""
    if _DNG in image.tag_v2:  # type: ignore[attr-defined]
        message = f"is {NOT_READ['raw']}, which is not supported: save it as PNG, JPEG or TIFF."
        raise VideoError(path, "unsupported", message)
    pages = []
    for page in range(min(_PAGES, getattr(image, "n_frames", 1))):
        image.seek(page)
        if not image.tag_v2.get(_SUBFILE, 0) & (_REDUCED | _MASK):  # type: ignore[attr-defined]
            pages.append(page)
    if len(pages) != 1:
        found = f"has {len(pages)} pages" if pages else "has only previews"
        raise VideoError(path, "unsupported", f"{found}: save each picture as a separate file.")
    image.seek(pages[0])


def _transfer(path: str, content: str) -> int | None:
    """The transfer characteristics (ITU-T H.273) declared by an AVIF, HEIF or PNG."""
    with open_bytes(path) as file:
        if content in ("avif", "heif"):
            _, _, found = file.read(1 << 16).partition(b"colrnclx")
            return int.from_bytes(found[2:4], "big") if found else None
        found = (content == "png" and png_chunk(file, b"cICP")) or b""
        return found[1] if len(found) > 1 else None


class PictureSource(Source):
    """An animated picture (WebP, AVIF), composed by Pillow, with the frame times that browsers use."""

    def __init__(self, path: str, content: str, image: Image.Image, limits: Limits) -> None:
        super().__init__(path, limits, content.split()[-1], None)
        self.image = image

    def frames(self) -> Generator[tuple[float, av.VideoFrame], None, None]:
        time = 0
        for number in range(getattr(self.image, "n_frames", 1)):
            self.check_time()
            self.check_count(number + 1)
            try:
                self.image.seek(number)
                rgb = displayed_rgb(self.path, self.image)
            except StditError:
                raise
            except (OSError, RuntimeError, SyntaxError, ValueError, EOFError) as error:
                message = f"cannot be decoded after {number} frames ({error_text(error)})."
                raise VideoError(self.path, "damaged" if number else "undecodable", message) from error
            duration = round(self.image.info.get("duration", 0))
            duration = duration if duration > _TOO_SHORT else _DEFAULT_DURATION
            frame = av.VideoFrame.from_ndarray(rgb, "rgb24")
            frame.pts, frame.time_base, frame.duration = time, Fraction(1, 1000), duration
            yield time / 1000, frame
            time += duration
