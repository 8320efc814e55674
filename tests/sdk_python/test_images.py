"""Pictures as people and attackers have them: bounded before decoding, nothing but pixels left, upright."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from longshore import images
from longshore.errors import InvalidImageError
from longshore.image_header import MAX_PIXELS, MAX_WIRE_PIXELS, read_header
from longshore.images import data_url, image_bytes, image_size, pixel_values
from longshore.wire import ImageUrl, limits

GPS, ORIENTATION, DESCRIPTION = 0x8825, 0x0112, 0x010E
SECRET = b"51.5007N 0.1246W"


def photo(width: int = 60, height: int = 40, seed: int = 1) -> Image.Image:
    """Colours that no turn leaves as they were, smooth enough for JPEG."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(url: str) -> Image.Image:
    image = Image.open(io.BytesIO(image_bytes(url)))
    image.load()
    return image


def far(left: Image.Image, right: Image.Image) -> float:
    """The mean difference of two pictures of one size, in steps of 256."""
    assert left.size == right.size
    pair = [np.asarray(image.convert("RGB"), np.float32) for image in (left, right)]
    return float(np.abs(pair[0] - pair[1]).mean())


def tagged() -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    exif[DESCRIPTION] = SECRET.decode()
    exif.get_ifd(GPS)[2] = (51.0, 30.0, 2.5)
    return exif


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, *, before: bytes = b"", rows: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + before + body


# -- what is taken -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_kind_of_source_gives_the_same_picture(kind: str, tmp_path: Path) -> None:
    data = saved(photo(), kind)
    (tmp_path / "picture").write_bytes(data)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    sources = [data, bytearray(data), memoryview(data), tmp_path / "picture", str(tmp_path / "picture"), url]
    found = {data_url(source) for source in [*sources, Image.open(io.BytesIO(data))]}
    assert len(found) == 1
    whole = found.pop()
    assert ImageUrl(whole).url == whole
    assert far(opened(whole), Image.open(io.BytesIO(data))) < 2


def test_a_lossless_picture_keeps_every_pixel() -> None:
    assert far(opened(data_url(photo())), photo()) == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F", "HSV", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.asarray(photo().convert("L"), np.uint16) * 257)
    else:
        image = photo().convert(mode)
    found = opened(data_url(image))
    assert found.mode == "RGB" and far(found, photo() if mode not in "1" else found) < 60
    if mode in ("I;16", "L", "F"):
        assert far(found, photo().convert("L")) < 1


def test_what_is_transparent_is_white() -> None:
    image = photo().convert("RGBA")
    image.putalpha(0)
    assert opened(data_url(image)).getcolors() == [(60 * 40, (255, 255, 255))]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putpixel((1, 0), 1)
    found = pixel_values(saved(palette, "PNG", transparency=0), 2, 1)
    assert found[:, 0, 0].tolist() == [1, 1, 1] and found[:, 0, 1].tolist() == [-1, 1, -1]


def test_a_large_picture_is_scaled_down_and_a_small_one_never_up() -> None:
    assert opened(data_url(photo(3000, 1000), max_side_px=600)).size == (600, 200)
    assert opened(data_url(saved(photo(3000, 1000), "JPEG"), max_side_px=600)).size == (600, 200)
    assert opened(data_url(photo(8, 5), max_side_px=600)).size == (8, 5)


def test_a_drawing_stays_exact_however_large() -> None:
    drawing = Image.new("RGB", (1400, 1400), (250, 250, 240))
    drawing.paste((10, 60, 200), (100, 100, 700, 300))
    assert far(opened(data_url(drawing)), drawing) == 0


def test_a_noisy_picture_is_sent_as_jpeg_within_the_wires_bound() -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (1600, 1600, 3), np.uint8))
    url = data_url(noise)
    assert url.startswith("data:image/jpeg;base64,") and len(url) < limits.MAX_IMAGE_URL_CHARS


# -- metadata ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_nothing_but_pixels_leaves(kind: str) -> None:
    profile = b"profile of " + SECRET + bytes(120)
    options: dict[str, Any] = {"exif": tagged(), "icc_profile": profile, "xmp": b"<x>" + SECRET + b"</x>"}
    if kind == "PNG":
        options["pnginfo"] = info = PngImagePlugin.PngInfo()
        info.add_text("Comment", SECRET.decode())
    if kind == "JPEG":
        options["comment"] = SECRET
    data = saved(photo(), kind, **options) + SECRET  # and something behind its end
    assert data.count(SECRET) >= 3 or kind == "PNG"  # whose profile is compressed
    for source in (data, Image.open(io.BytesIO(data))):
        body = image_bytes(data_url(source))
        assert SECRET not in body
        with Image.open(io.BytesIO(body)) as found:
            found.load()
            assert not found.getexif() and not {"icc_profile", "xmp", "comment", "Comment"} & set(found.info)
            assert found.size == (40, 60)  # EXIF's turn was carried out


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_pictures_are_turned_as_exif_says(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = saved(photo(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert image_size(data) == expected.size
    assert far(opened(data_url(data)), expected) < 2
    planes = pixel_values(data, *expected.size)
    assert far(Image.fromarray(((planes.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)), expected) < 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_reason_to_refuse() -> None:
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff"):
        data = saved(photo(), "JPEG", exif=exif)
        assert image_size(data) == (60, 40)
        assert opened(data_url(data)).size == (60, 40)


# -- attacks -----------------------------------------------------------------------------------


def vp8x(width: int, height: int, flags: int = 0) -> bytes:
    body = bytes([flags, 0, 0, 0]) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"VP8X" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks


def resized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose frame header claims another size."""
    data = bytearray(saved(photo(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def twice_framed() -> bytes:
    """A frame header of a small size, and behind it one that the decoder would take."""
    data = saved(photo(), "JPEG")
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 2 + struct.unpack_from(">H", data, at + 2)[0]]
    return (
        data[:at]
        + frame
        + frame[:5]
        + struct.pack(">HH", 60_000, 60_000)
        + frame[9:]
        + data[at + len(frame) :]
    )


def many_scans() -> bytes:
    data = saved(photo(), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * 120 + data[-2:]


ANIMATED_WEBP = saved(photo(), "WEBP", save_all=True, append_images=[photo(seed=2)])
ANIMATED_PNG = saved(photo(), "PNG", save_all=True, append_images=[photo(seed=2)])
ATTACKS: dict[str, bytes] = {
    "nothing": b"",
    "one byte": b"\x89",
    "text": b"<svg xmlns='http://www.w3.org/2000/svg'/>" * 10,
    "GIF": saved(photo(), "GIF"),
    "BMP": saved(photo(), "BMP"),
    "TIFF": saved(photo(), "TIFF"),
    "PNG magic alone": b"\x89PNG\r\n\x1a\n",
    "JPEG magic alone": b"\xff\xd8\xff",
    "WebP magic alone": b"RIFF\0\0\0\0WEBP",
    "PNG bomb": png(60_000, 60_000),
    "PNG bomb of one row": png(2**31 - 1, 1),
    "PNG of no width": png(0, 10),
    "PNG whose header comes late": b"\x89PNG\r\n\x1a\n" + chunk(b"tEXt", b"a\0b") + png(4, 4)[8:],
    "PNG without pixels": png(50, 50)[:33],
    "PNG with a text bomb": png(2, 1, before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**27)))),
    "PNG of endless chunks": png(4, 4, before=chunk(b"tEXt", b"a\0b") * 5000),
    "animated PNG": ANIMATED_PNG,
    "JPEG bomb": resized_jpeg(65_535, 65_535),
    "JPEG of no height": resized_jpeg(60, 0),
    "JPEG of two frames": twice_framed(),
    "JPEG of many scans": many_scans(),
    "JPEG without a frame": b"\xff\xd8\xff\xd9",
    "JPEG that is all padding": b"\xff\xd8" + b"\xff" * 100_000,
    "WebP bomb": vp8x(2**24, 2**24),
    "WebP bomb that says it is lossless": b"RIFF\x20\0\0\0WEBPVP8L\x14\0\0\0\x2f" + b"\xff" * 20,
    "WebP of an odd chunk": b"RIFF\x20\0\0\0WEBPALPH" + bytes(24),
    "animated WebP": ANIMATED_WEBP,
    **{f"half a {kind}": saved(photo(), kind)[:-400] for kind in ("PNG", "JPEG")},
    "half a WEBP": saved(photo(), "WEBP")[:-60],
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused_without_decoding(name: str) -> None:
    data = ATTACKS[name]
    tracemalloc.start()
    for work in (
        lambda: data_url(data),
        lambda: pixel_values(data, 16, 16),
        lambda: data_url("data:image/png;base64," + base64.b64encode(data).decode()),
    ):
        with pytest.raises(InvalidImageError):
            work()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 8 * 2**20


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_anywhere_is_refused_or_whole(kind: str) -> None:
    data = saved(photo(), kind)
    for end in range(0, len(data), max(1, len(data) // 150)):
        try:
            found = opened(data_url(data[:end]))
        except InvalidImageError:
            continue
        assert far(found, photo()) < 20  # only what follows the pixels was missing


@pytest.mark.fuzz
@settings(max_examples=100)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "WEBP"]),
    edits=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
)
@example(kind="PNG", edits=[(0.1, 255)])
def test_damaged_pictures_are_refused_or_taken(kind: str, edits: list[tuple[float, int]]) -> None:
    data = bytearray(_SAVED[kind])
    for share, value in edits:
        data[int(share * (len(data) - 1))] = value
    try:
        size = image_size(bytes(data))
        planes = pixel_values(bytes(data), 8, 4)
    except InvalidImageError:
        return
    assert size[0] * size[1] <= MAX_WIRE_PIXELS
    assert planes.shape == (3, 4, 8) and bool(np.isfinite(planes).all())


_SAVED = {kind: saved(photo(), kind) for kind in ("PNG", "JPEG", "WEBP")}


@given(
    data=st.binary(max_size=60),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFFxxxxWEBP"]),
)
def test_any_bytes_have_a_header_or_are_refused(data: bytes, head: bytes) -> None:
    try:
        header = read_header(head + data, 1000)
    except InvalidImageError:
        return
    assert 1 <= header.width_px * header.height_px <= 1000


def test_the_bounds_are_the_bounds() -> None:
    for most in (MAX_PIXELS, MAX_WIRE_PIXELS):
        side = int(most**0.5)
        assert read_header(png(side, side), most).width_px == side
        with pytest.raises(InvalidImageError, match=f"more than the {most}"):
            read_header(png(side, side + 1), most)
    with pytest.raises(InvalidImageError, match="pixels"):
        data_url(Image.new("1", (10_000, 10_000)))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (65_000, 2)])
def test_odd_shapes_are_taken(size: tuple[int, int]) -> None:
    data = saved(Image.new("RGB", size, (10, 200, 30)), "PNG")
    assert image_size(data) == size
    found = opened(data_url(data))
    assert max(found.size) <= images.MAX_SIDE_PX and min(found.size) >= 1
    planes = pixel_values(data, 32, 16)
    assert np.allclose(planes.mean((1, 2)), np.array([10, 200, 30]) / 127.5 - 1, atol=0.01)


def test_a_jpeg_of_several_pictures_is_its_first() -> None:
    data = saved(photo(), "MPO", save_all=True, append_images=[photo(seed=2)])
    assert far(opened(data_url(data)), photo()) < 4


@pytest.mark.parametrize(
    "source",
    [None, 5, [1], object(), "https://example.org/a.png", "file:///etc/passwd", "no/such/file.png", "a\0b"],
)
def test_what_is_no_picture_is_refused(source: Any) -> None:
    with pytest.raises(InvalidImageError):
        data_url(source)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png,AAAA",
        "data:text/plain;base64,AAAA",
        "data:image/png;base64,A",
        "data:image/png;base64,\u0661",
    ],
)
def test_broken_data_urls_are_refused(url: str) -> None:
    with pytest.raises(InvalidImageError):
        image_bytes(url)


def test_only_plain_files_of_a_bounded_size_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(InvalidImageError, match="plain file"):
            data_url(path)
    (tmp_path / "large.png").write_bytes(saved(photo(), "PNG"))
    monkeypatch.setattr(images, "MAX_SOURCE_BYTES", 100)
    with pytest.raises(InvalidImageError, match="more than 100 bytes"):
        data_url(tmp_path / "large.png")


# -- pixels ------------------------------------------------------------------------------------


def test_pixels_are_pillows_bicubic_from_minus_one_to_one() -> None:
    image = photo(300, 200)
    planes = pixel_values(saved(image, "PNG"), 48, 32)
    expected = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC), np.float64) / 127.5 - 1
    assert planes.dtype == np.float32 and planes.flags.c_contiguous
    assert np.abs(planes - expected.transpose(2, 0, 1)).max() < 1e-6
    assert planes.min() >= -1 and planes.max() <= 1


def test_a_large_jpeg_is_decoded_small_and_looks_the_same() -> None:
    image = photo(2048, 1536)
    planes = pixel_values(saved(image, "JPEG"), 64, 48)
    assert np.abs(planes - pixel_values(saved(image, "PNG"), 64, 48)).mean() < 0.02


def test_without_pillow_the_error_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from longshore.errors import ConfigError\n"
        "from longshore.images import data_url\n"
        "try: data_url(b'x')\n"
        "except ConfigError as error: print(error.message)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "longshore[device]" in done.stdout, done.stderr
