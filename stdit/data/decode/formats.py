"""Detects file formats by their first bytes, since suffixes are often wrong; by suffix where the bytes do not tell."""

from __future__ import annotations

import os
import re
import struct
from typing import BinaryIO

HEAD = 400  # bytes needed to detect a format


def _suffixes(text: str) -> frozenset[str]:
    return frozenset(text.split())


_RAW_SUFFIXES = _suffixes(".dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw")
_UNREAD_SUFFIXES = _suffixes(".pfm .exr .hdr .psd .psb .ico .cur .svg .dds .xcf")  # listed so that a scan names them
_READ_SUFFIXES = _suffixes(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .bmp .dib .tif .tiff .avif .avifs .heic .heif .hif .heics .heifs .jp2 "
    ".j2k .j2c .jpc .jpf .jpx .jxl .pbm .pgm .ppm .pnm .tga .qoi"
)
IMAGE_SUFFIXES = _READ_SUFFIXES | _UNREAD_SUFFIXES | _RAW_SUFFIXES
VIDEO_SUFFIXES = _suffixes(
    ".mp4 .m4v .mov .qt .mkv .webm .avi .3gp .3g2 .mpg .mpeg .mpe .m1v .m2v .mp4v .ts .m2ts .m2t .mts .vob .ogv .ogm "
    ".flv .f4v .wmv .asf .gif .mxf .mj2 .divx .y4m .ivf .h264 .264 .h265 .265 .hevc .nut .rm .rmvb .dv"
)
MEDIA = IMAGE_SUFFIXES | VIDEO_SUFFIXES
# Never opened to check for media: captions, tables, archives, weights, sound.
OTHER_SUFFIXES = _suffixes(
    ".txt .json .jsonl .csv .tsv .parquet .md .yaml .yml .toml .xml .html .htm .srt .vtt .ass .py .sh .ipynb .log .pdf "
    ".doc .docx .xls .xlsx .npy .npz .pt .pth .bin .safetensors .pkl .h5 .zip .gz .tgz .bz2 .xz .zst .7z .rar .tar "
    ".wav .mp3 .m4a .aac .flac .opus .sqlite .db .lock .part"
)

# Still and animated pictures, and Pillow's names for them. FFmpeg reads the rest, except for NOT_READ.
STILL = {
    name: name.upper()
    for name in ["png", "jpeg", "webp", "avif", "heif", "jxl", "jpeg2000", "tiff", "bmp", "tga", "qoi"]
}
STILL["netpbm"] = "PPM"
MOVING = {"animated webp": "WEBP", "animated avif": "AVIF"}
NOT_READ = {
    "heif sequence": "a HEIF image sequence",
    "exr": "OpenEXR",
    "hdr": "Radiance HDR",
    "pfm": "a float map (PFM)",
    "psd": "a Photoshop file",
    "icon": "an icon",
    "raw": "a camera's raw file",
    "svg": "a vector graphic",
    "dds": "a DirectDraw texture",
    "xcf": "a GIMP file",
}
_NOT_READ_SUFFIXES = dict.fromkeys(_RAW_SUFFIXES, "raw") | {f".{name}": name for name in ("svg", "dds", "xcf", "pfm")}

_BEGINNINGS = {
    "png": (b"\x89PNG\r\n\x1a\n",),
    "jpeg": (b"\xff\xd8\xff",),
    "tiff": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "jpeg2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "jxl": (b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"),
    "qoi": (b"qoif",),
    "exr": (b"\x76\x2f\x31\x01",),
    "hdr": (b"#?RADIANCE", b"#?RGBE"),
    "psd": (b"8BPS",),
    "dds": (b"DDS ",),
    "xcf": (b"gimp xcf",),
    "raw": (b"FUJIFILMCCD-RAW",),
    "icon": (b"\0\0\1\0",),
    "video": (
        b"GIF87a", b"GIF89a", b"FLV\1", b"OggS", b"DKIF", b"YUV4MPEG2", b".RMF",
        b"\x1aE\xdf\xa3",  # Matroska, WebM
        b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # ASF
        b"\0\0\1\xba",  # MPEG program stream
        b"\0\0\1\xb3",  # MPEG video
        b"\x06\x0e\x2b\x34\x02\x05\x01\x01",  # MXF
    ),
}  # fmt: skip
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_SOUND = {b"M4A ", b"M4B ", b"M4P ", b"F4A ", b"F4B "}
_BOXES = {b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot"}  # possible first boxes of a QuickTime file
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of a bitmap's second header


def content_of(head: bytes) -> str | None:
    """The format of a file with these first `HEAD` bytes: "video" or a key of STILL, MOVING or NOT_READ, if known."""
    for name, beginnings in _BEGINNINGS.items():
        if head.startswith(beginnings):
            return "raw" if name == "tiff" and head[8:10] == b"CR" else name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "animated webp" if head[12:16] == b"VP8X" and len(head) > 20 and head[20] & 2 else "webp"
    if head[:4] == b"RIFF" and head[8:11] == b"AVI":
        return "video"
    if head[4:8] == b"ftyp":
        return _of_brands(head)
    if head[4:8] in _BOXES:
        return "video"
    if head[:2] == b"BM" and head[6:10] == bytes(4) and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if re.match(rb"P[1-6]\s", head):
        return "netpbm"
    if re.match(rb"P[fF]\s", head):
        return "pfm"
    if any(len(head) > at + 192 and head[at] == head[at + step] == 0x47 for at, step in ((0, 188), (4, 192))):
        return "video"  # MPEG transport stream
    return None


def _of_brands(head: bytes) -> str | None:
    size = max(16, min(len(head), int.from_bytes(head[:4], "big")))
    first, brands = head[8:12], {head[8:12], *(head[at : at + 4] for at in range(16, size - 3, 4))}
    if first == b"crx ":
        return "raw"
    if first in _SOUND:
        return None
    if first in (b"avif", b"avis") or (first in _HEIF and brands & {b"avif", b"avis"}):
        return "animated avif" if b"avis" in brands else "avif"
    if first in (b"hevc", b"hevx", b"msf1"):
        return "heif sequence"
    return "heif" if first in _HEIF else "video"


def content_of_file(file: BinaryIO, name: str) -> str | None:
    """As `content_of`, but also tells animated PNGs ("video": FFmpeg reads them) and formats known by suffix only."""
    suffix = suffix_of(name)
    content = _NOT_READ_SUFFIXES.get(suffix) or content_of(file.read(HEAD))
    if content == "png" and png_chunk(file, b"acTL"):  # animated; Pillow 13 blends its half-transparent pixels wrongly
        return "video"
    return "tga" if content is None and suffix == ".tga" else content


def png_chunk(png: BinaryIO, wanted: bytes) -> bytes | None:
    """The first bytes of a chunk that precedes a PNG's pixel data; None if there is none."""
    at = 8
    for _ in range(1000):
        png.seek(at)
        length, kind = struct.unpack(">I4s", png.read(8).ljust(8, b"\0"))
        if kind == wanted:
            return png.read(min(length, HEAD))
        if kind in (b"IDAT", b"IEND", bytes(4)):
            break
        at += 12 + length
    return None


def suffix_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()
