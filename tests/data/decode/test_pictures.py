"""Picture files as a browser shows them: what moves, tiles, orientation, depth, profiles, transparency, or a reason."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from pictures import on_white, save_moving, see_through, write_with_alpha
from PIL import Image, ImageCms

from stdit.data.decode.checks import Limits, VideoError
from stdit.data.decode.pixels import light_to_pq
from stdit.data.decode.video import probe, read_frames

RED_BLUE = np.zeros((48, 64, 3), np.uint8)
RED_BLUE[:, :32], RED_BLUE[:, 32:] = (255, 0, 0), (0, 0, 255)


def shown(path):
    """The one frame of a picture."""
    found = probe(str(path))
    assert found.image and found.frames == 1
    return read_frames(str(path), 1)[0]


def refused(path):
    """The reason and message of a file that no frame is read of."""
    for read in (lambda: probe(str(path)), lambda: read_frames(str(path), 1)):
        with pytest.raises(VideoError) as error:
            read()
    return error.value.reason, error.value.message


def near(found, wanted, by):
    return found.shape == wanted.shape and np.abs(found.astype(int) - wanted).max() <= by


def box(kind, content):
    return struct.pack(">I4s", len(content) + 8, kind) + content


def full(kind, version, flags, content):
    return box(kind, struct.pack(">I", (version << 24) | flags) + content)


def boxes(data, first, end):
    while first < end:
        size, kind = struct.unpack(">I4s", data[first : first + 8])
        yield kind, first, first + size
        first += size


def coded(colour, suffix):
    """The bitstream and the properties of a tile's coded picture, taken out of a file of its own."""
    file = io.BytesIO()
    options = {"subsampling": "4:4:4"} if suffix == "AVIF" else {"chroma": 444}
    Image.new("RGB", (64, 64), colour).save(file, suffix, quality=90, **options)
    data = file.getvalue()
    found = {kind: (a, b) for kind, a, b in boxes(data, 0, len(data))}
    start, end = found[b"mdat"]
    meta = {kind: (a, b) for kind, a, b in boxes(data, found[b"meta"][0] + 12, found[b"meta"][1])}
    inner = {kind: (a, b) for kind, a, b in boxes(data, meta[b"iprp"][0] + 8, meta[b"iprp"][1])}
    a, b = inner[b"ipco"]
    return data[start + 8 : end], {kind: data[x:y] for kind, x, y in boxes(data, a + 8, b)}


def tiled(suffix, turns=0):
    """128×64 made of two coded tiles, left red and right blue, to be turned anticlockwise (ISO/IEC 23008-12)."""
    kinds = {"AVIF": (b"avif", b"av01", b"av1C"), "HEIF": (b"heic", b"hvc1", b"hvcC")}
    brand, item, configuration = kinds[suffix]
    (left, ours), (right, theirs) = coded((255, 0, 0), suffix), coded((0, 0, 255), suffix)
    size = lambda width, height: full(b"ispe", 0, 0, struct.pack(">II", width, height))  # noqa: E731
    properties = [size(128, 64), size(64, 64), ours[configuration], theirs[configuration], box(b"irot", bytes([turns]))]
    shared = [ours[kind] for kind in (b"pixi", b"colr") if kind in ours]
    more = list(range(6, 6 + len(shared)))
    linked = {1: [1, 0x80 | 5, *more], 2: [2, 0x80 | 3, *more], 3: [2, 0x80 | 4, *more]}
    entries = b"".join(struct.pack(">HB", number, len(of)) + bytes(of) for number, of in linked.items())
    associations = full(b"ipma", 0, 0, struct.pack(">I", 3) + entries)
    items = [(1, b"grid", 0), (2, item, 1), (3, item, 1)]
    infos = b"".join(full(b"infe", 2, hid, struct.pack(">HH4s", n, 0, kind) + b"\0") for n, kind, hid in items)
    grid = struct.pack(">BBBBHH", 0, 0, 0, 1, 128, 64)

    def meta(first):
        places = [(1, first, 8), (2, first + 8, len(left)), (3, first + 8 + len(left), len(right))]
        located = b"".join(struct.pack(">HHHII", n, 0, 1, at, length) for n, at, length in places)
        return full(
            b"meta", 0, 0,
            full(b"hdlr", 0, 0, b"\0\0\0\0pict" + bytes(13))
            + full(b"pitm", 0, 0, struct.pack(">H", 1))
            + full(b"iloc", 0, 0, struct.pack(">BBH", 0x44, 0, 3) + located)
            + full(b"iinf", 0, 0, struct.pack(">H", 3) + infos)
            + full(b"iref", 0, 0, box(b"dimg", struct.pack(">HHHH", 1, 2, 2, 3)))
            + box(b"iprp", box(b"ipco", b"".join(properties + shared)) + associations),
        )  # fmt: skip

    kind = box(b"ftyp", brand + bytes(4) + brand + b"mif1miaf")
    return kind + meta(len(kind) + len(meta(0)) + 8) + box(b"mdat", grid + left + right)


@pytest.mark.parametrize("suffix", ["AVIF", "HEIF"])
@pytest.mark.parametrize("turns", [0, 1, 2])
def test_a_tiled_picture_is_whole_and_upright(tmp_path, suffix, turns):
    if suffix == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    path = tmp_path / "photo.bin"
    path.write_bytes(tiled(suffix, turns))
    wanted = np.zeros((64, 128, 3), np.uint8)
    wanted[:, :64], wanted[:, 64:] = (255, 0, 0), (0, 0, 255)
    assert near(shown(path), np.rot90(wanted, turns), 6)


def test_heic_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    (tmp_path / "photo.heic").write_bytes(box(b"ftyp", b"heic" + bytes(4) + b"mif1heic") + bytes(100))
    reason, message = refused(tmp_path / "photo.heic")
    assert reason == "unsupported" and "stdit[pictures]" in message


VIDEOS = {
    "vp9.webm": ("libvpx-vp9", "yuva420p", {"auto-alt-ref": "0", "crf": "10"}),
    "vp8.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0", "crf": "4", "b": "2M"}),
    "prores.mov": ("prores_ks", "yuva444p10le", {"profile": "4"}),
    "animation.mov": ("qtrle", "argb", None),
    "png.mov": ("png", "rgba", None),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_what_is_transparent_in_a_video_is_white(tmp_path, name):
    codec, pixels, options = VIDEOS[name]
    frames = see_through()
    write_with_alpha(tmp_path / name, codec, pixels, frames, options)
    read = read_frames(str(tmp_path / name), len(frames))
    by = 2 if pixels in ("argb", "rgba") else 24  # edges of halved chroma aside
    inside = np.r_[2:30, 34:62]
    assert np.abs(read.astype(int) - on_white(frames))[:, 2:6, inside].max() <= by
    assert np.abs(read.astype(int) - on_white(frames))[:, 40:46, inside].max() <= by
    late = read_frames(str(tmp_path / name), 3, None, 10.0, 1.5)  # sought to
    assert np.array_equal(late, read[15:18])


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.apng", "a.avif", "a.gif"])
def test_pictures_that_move_are_videos(tmp_path, name):
    frames = see_through()
    options = {
        "a.webp": {"lossless": True},
        "a.avif": {"quality": 100, "subsampling": "4:4:4"},
        "a.gif": {"disposal": 2},
    }
    if name == "a.gif":
        frames[..., 3] = np.where(frames[..., 3] > 0, 255, 0)
    save_moving(tmp_path / name, frames, **options.get(name, {}))
    found = probe(str(tmp_path / name))
    assert (found.frames, found.width, found.height, found.image) == (24, 64, 48, False)
    assert found.fps == pytest.approx(10) and found.end == pytest.approx(2.4)
    read = read_frames(str(tmp_path / name), 24)
    assert near(read, on_white(frames), 3 if name == "a.avif" else 1)
    assert np.array_equal(read_frames(str(tmp_path / name), 4, None, 5.0, 1.2), read[[12, 14, 16, 18]])
    (tmp_path / "clip").write_bytes((tmp_path / name).read_bytes())
    assert np.array_equal(read_frames(str(tmp_path / "clip"), 24), read)  # whatever it is called


@pytest.mark.parametrize("name", ["a.webp", "a.png", "a.avif"])
def test_frames_of_a_picture_have_their_own_durations(tmp_path, name):
    frames = see_through(5)
    save_moving(tmp_path / name, frames, duration=[100, 300, 50, 100, 100])
    at_20 = read_frames(str(tmp_path / name), 12, None, 20.0, 0.03)
    each = read_frames(str(tmp_path / name), 5)

    wanted = [int(np.abs(np.array([0, 0.1, 0.4, 0.45, 0.55]) - (0.03 + n / 20)).argmin()) for n in range(12)]
    assert np.array_equal(at_20, each[wanted])


def test_an_apng_is_composed_as_its_specification_says(tmp_path):
    """Half transparent over opaque stays opaque; a first picture outside of the animation is not shown."""
    ground = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    over = Image.new("RGBA", (32, 32))
    over.paste((0, 0, 255, 128), (8, 8, 24, 24))
    ground.save(tmp_path / "over.png", save_all=True, append_images=[over], duration=100, blend=1)
    read = read_frames(str(tmp_path / "over.png"), 2)
    assert near(read[1, 16, 16], np.array([127, 0, 128]), 1) and near(read[1, 0, 0], np.array([255, 0, 0]), 0)
    green = Image.new("RGBA", (32, 32), (0, 255, 0, 255))
    green.save(tmp_path / "b.png", save_all=True, append_images=[ground, ground.rotate(0)], default_image=True)
    assert near(read_frames(str(tmp_path / "b.png"), 1)[0, 0, 0], np.array([255, 0, 0]), 0)


@pytest.mark.parametrize("name", ["a.webp", "a.png"])
def test_one_frame_is_an_image(tmp_path, name):
    Image.fromarray(RED_BLUE).save(tmp_path / name, save_all=True, append_images=[], lossless=True)
    assert near(shown(tmp_path / name), RED_BLUE, 2)


@pytest.mark.parametrize("suffix", ["jpg", "tiff", "png", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, suffix, orientation):
    picture = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.stack([picture] * 3, -1)).save(tmp_path / f"a.{suffix}", exif=exif, quality=98)
    turned = {1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.T}
    turned |= {6: np.rot90(picture, -1), 7: picture[::-1, ::-1].T, 8: np.rot90(picture)}
    assert near(shown(tmp_path / f"a.{suffix}")[..., 0], turned[orientation], 8)


RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (48, 1))


def twelve_bits(path):
    """A TIFF of 12 bits: 64×48 grey, packed, the high bits first."""
    values = (RAMP >> 4).astype(np.uint32)
    pairs = (values[:, ::2] << 12) | values[:, 1::2]
    data = np.stack([pairs >> 16, (pairs >> 8) & 255, pairs & 255], -1).astype(np.uint8).tobytes()
    tags = [(256, 64), (257, 48), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 48), (279, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + bytes(4))


def test_sixteen_and_twelve_bits_are_divided_by_their_range(tmp_path):
    wanted = np.stack([np.round(RAMP / 65535 * 255)] * 3, -1)
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    Image.fromarray(RAMP).save(tmp_path / "a.tiff")
    (tmp_path / "a.pgm").write_bytes(b"P5 64 48 65535\n" + RAMP.astype(">u2").tobytes())
    twelve_bits(tmp_path / "b.tiff")
    for name in ("a.png", "a.tiff", "a.pgm", "b.tiff"):
        assert near(shown(tmp_path / name), wanted, 1), name
    Image.fromarray(RAMP).save(tmp_path / "white_is_zero.tiff", tiffinfo={262: 0})
    assert near(shown(tmp_path / "white_is_zero.tiff"), 255 - wanted, 1)


def test_numbers_without_a_white_are_refused_by_name(tmp_path):
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "a.tiff")
    Image.fromarray(RAMP.astype(np.int32)).save(tmp_path / "b.tiff")
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "c.pfm")
    for name, says in (("a.tiff", "floating-point"), ("b.tiff", "32-bit"), ("c.pfm", "float map")):
        reason, message = refused(tmp_path / name)
        assert reason == "unsupported" and says in message


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "LAB"])
def test_every_kind_of_pixel(tmp_path, mode):
    picture = Image.fromarray(RED_BLUE)
    wanted = picture.convert(mode).convert("RGB") if mode in ("1", "L", "LA") else picture
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        ImageCms.profileToProfile(picture, *profiles, outputMode="LAB").save(tmp_path / "a.tiff")
    else:
        picture.convert(mode).save(tmp_path / "a.tiff")
    assert near(shown(tmp_path / "a.tiff"), np.array(wanted), 24 if mode == "LAB" else 1)
    if mode == "CMYK":
        picture.convert(mode).save(tmp_path / "a.jpg", quality=95)
        assert near(shown(tmp_path / "a.jpg")[:, np.r_[:24, 40:64]], RED_BLUE[:, np.r_[:24, 40:64]], 4)


def test_a_colour_profile_is_followed(tmp_path):
    """A grey profile of gamma 1: half the light is 188 in sRGB. One that is not of the picture's kind is left alone."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, 256) + bytes(2)  # u8Fixed8 of 1.0
    white = b"XYZ " + bytes(4) + struct.pack(">iii", 63190, 65536, 54061)
    table = struct.pack(">I", 2) + b"kTRC" + struct.pack(">II", 156, len(curve)) + b"wtpt" + struct.pack(">II", 172, 20)
    body = table + curve + white
    header = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02100000, b"mntr", b"GRAY", b"XYZ ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    profile = header.ljust(128, b"\0") + body
    Image.new("L", (16, 16), 128).save(tmp_path / "a.png", icc_profile=profile)
    assert near(shown(tmp_path / "a.png"), np.full((16, 16, 3), 188), 2)
    Image.new("RGB", (16, 16), (10, 128, 200)).save(tmp_path / "b.png", icc_profile=profile)
    Image.new("RGB", (16, 16), (10, 128, 200)).save(tmp_path / "c.png", icc_profile=b"no profile")
    for name in ("b.png", "c.png"):
        assert near(shown(tmp_path / name), np.broadcast_to((10, 128, 200), (16, 16, 3)), 0)


def test_an_hdr_picture_is_shown_as_a_video_is(tmp_path):
    """203 cd/m² is white's place in SDR: PQ's code for it is light grey, not the dull grey that its number is."""
    code = round(float(light_to_pq(203)) * 255)
    Image.new("RGB", (16, 16), (code,) * 3).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    chunk = b"cICP" + bytes([9, 16, 0, 1])
    at = 8 + 25  # behind the header
    crc = struct.pack(">I", __import__("zlib").crc32(chunk))
    (tmp_path / "b.png").write_bytes(data[:at] + struct.pack(">I", 4) + chunk + crc + data[at:])
    assert near(shown(tmp_path / "a.png"), np.full((16, 16, 3), code), 0)
    assert shown(tmp_path / "b.png").min() > code + 60


def test_what_is_known_and_not_read_is_named(tmp_path):
    picture = Image.fromarray(RED_BLUE)
    picture.save(tmp_path / "pages.tiff", save_all=True, append_images=[picture])
    picture.save(tmp_path / "raw.tiff", tiffinfo={50706: bytes([1, 4, 0, 0])})
    picture.save(tmp_path / "preview.tiff", tiffinfo={254: 1})
    picture.save(tmp_path / "photo.nef", "TIFF")
    picture.save(tmp_path / "icon.ico")
    (tmp_path / "a.exr").write_bytes(b"\x76\x2f\x31\x01" + bytes(40))
    (tmp_path / "a.png").write_text("no picture")
    for name, says in [
        ("pages.tiff", "2 pages"), ("raw.tiff", "raw file"), ("preview.tiff", "only previews"),
        ("photo.nef", "raw file"), ("icon.ico", "an icon"), ("a.exr", "OpenEXR"),
    ]:  # fmt: skip
        reason, message = refused(tmp_path / name)
        assert reason == "unsupported" and says in message, name
    assert refused(tmp_path / "a.png")[0] == "not_media"


def test_a_page_with_a_smaller_copy_and_a_photo_with_a_film_are_pictures(tmp_path):
    picture = Image.fromarray(RED_BLUE)
    small = picture.resize((32, 24))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    picture.save(tmp_path / "pyramid.tiff", save_all=True, append_images=[small])
    assert near(shown(tmp_path / "pyramid.tiff"), RED_BLUE, 0)
    picture.save(tmp_path / "stereo.jpg", "MPO", save_all=True, append_images=[small], quality=95)
    picture.save(tmp_path / "film.jpg", quality=95)
    with open(tmp_path / "film.jpg", "ab") as file:
        file.write(box(b"ftyp", b"mp42" + bytes(4)) + bytes(1000))
    for name in ("stereo.jpg", "film.jpg"):
        assert near(shown(tmp_path / name)[:, np.r_[:24, 40:64]], RED_BLUE[:, np.r_[:24, 40:64]], 4)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff", "jp2", "bmp"])
def test_a_cut_off_picture_is_named(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"a.{suffix}")
    data = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"b.{suffix}").write_bytes(data[: len(data) // 2])
    assert refused(tmp_path / f"b.{suffix}")[0] in ("damaged", "not_media")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff", "jp2", "bmp", "moving.webp", "moving.avif"])
def test_whatever_bytes_are_wrong_the_error_is_the_files(tmp_path, suffix):
    rng = np.random.default_rng(0)
    path = tmp_path / f"a.{suffix}"
    if suffix.startswith("moving"):
        save_moving(path, see_through(4))
    else:
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(path)
    good = np.frombuffer(path.read_bytes(), np.uint8)
    failed = 0
    for number in range(60):
        bad = good.copy()
        places = rng.integers(0, len(bad) if number % 2 else min(len(bad), 300), 4)
        bad[places] = rng.integers(0, 256, 4)
        path.write_bytes(bad.tobytes())
        for read in (probe, lambda file: read_frames(file, 1)):
            try:
                read(str(path))
            except VideoError:
                failed += 1
    assert failed


def test_sizes_from_one_pixel_to_the_limit(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "a.png")
    assert shown(tmp_path / "a.png").shape == (1, 1, 3)
    Image.new("RGB", (65535, 2), "red").save(tmp_path / "b.png")
    assert read_frames(str(tmp_path / "b.png"), 1, (64, 16)).shape == (1, 16, 64, 3)
    save_moving(tmp_path / "c.webp", see_through(3))
    for name in ("b.png", "c.webp"):
        with pytest.raises(VideoError) as error:
            probe(str(tmp_path / name), limits=Limits(pixels=1000))
        assert error.value.reason == "too_large"
    with pytest.raises(VideoError) as error:
        probe(str(tmp_path / "c.webp"), limits=Limits(frames=2))
    assert error.value.reason == "too_long"
