"""Pictures on their way into a prompt: bounded before they are decoded, rid of metadata, scaled.

A leaf that every tier shares, so that all of them see the same pixels. Pillow and numpy are imported with the
first picture. Reads a file only where a path is given, and nothing from a network.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from longshore.errors import ConfigError, InvalidImageError
from longshore.image_header import MAX_PIXELS, MAX_WIRE_PIXELS, ImageHeader, check_pixels, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    ImageSource = Image.Image | bytes | bytearray | memoryview | str | Path

__all__ = [
    "MAX_PIXELS",
    "MAX_SIDE_PX",
    "MAX_WIRE_PIXELS",
    "data_url",
    "image_bytes",
    "image_size",
    "pixel_values",
    "rgb_pixels",
]

MAX_SIDE_PX = 1536
MAX_SOURCE_BYTES = 64 * 1024 * 1024
_MAX_PNG_BYTES = 1024 * 1024  # what is larger is a photograph, of which JPEG keeps enough in a tenth
_SMALL_PIXELS = 2**18
_MAX_COLOURS = 4096
_JPEG_QUALITY = 90
_FORMATS = ("PNG", "JPEG", "WEBP")
_FOR_PHOTOS = ("JPEG", "MPO", "WEBP")  # MPO is a JPEG with more pictures behind the first, as phones write it
_ORIENTATION = 0x0112
_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.ASCII | re.IGNORECASE)
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{1,20}://")


# -- for the wire ------------------------------------------------------------------------------


def data_url(source: ImageSource, *, max_side_px: int = MAX_SIDE_PX) -> str:
    """A picture as a data: URL that holds its pixels and nothing else.

    `source` is a PIL image, the bytes of a PNG, JPEG or WebP file, the path of one, or a data: URL. The
    picture is turned upright as its EXIF data says, laid over white where it is transparent, and scaled down
    until neither side is over `max_side_px`; then it is written anew, as PNG or, for photographs, as JPEG.
    Raises InvalidImageError, or ConfigError where Pillow is not installed.
    """
    image, is_photo = _load(source, max_side_px)
    scale = max_side_px / max(image.size)
    if scale < 1:
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, _pillow().Resampling.BICUBIC)
    image.info = {}  # what a writer finds here it writes: colour profile, comment
    body = b"" if is_photo or not _suits_png(image) else _written(image, "PNG")
    if 0 < len(body) <= _MAX_PNG_BYTES:
        return _url("png", body)
    return _url("jpeg", _written(image, "JPEG", quality=_JPEG_QUALITY, subsampling=0))


def _suits_png(image: Image.Image) -> bool:
    """A small picture or a drawing; a large photograph takes half a second as PNG and comes out too large."""
    return image.width * image.height <= _SMALL_PIXELS or image.getcolors(_MAX_COLOURS) is not None


def _url(kind: str, body: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(body).decode()}"


def image_bytes(url: str) -> bytes:
    """The bytes in a data: URL of base64; InvalidImageError where it is anything else."""
    head = _DATA_URL.match(url)
    if head is None:
        raise InvalidImageError("the picture is not a data:image/...;base64 URL")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise InvalidImageError("the picture's base64 is broken") from None


# -- for a model -------------------------------------------------------------------------------


def image_size(data: bytes, max_pixels: int = MAX_WIRE_PIXELS) -> tuple[int, int]:
    """Width and height in pixels of the upright picture; no pixel is decoded. Raises InvalidImageError."""
    image = _open(data, read_header(data, max_pixels))
    return image.size if _orientation(image) < 5 else (image.height, image.width)


def rgb_pixels(data: bytes, width_px: int, height_px: int, max_pixels: int = MAX_WIRE_PIXELS) -> bytes:
    """The upright picture, stretched to exactly this size: height x width x 3 bytes, row by row.

    Raises InvalidImageError for what can't be decoded within `max_pixels`.
    """
    image = _decoded(data, max_pixels, 2 * max(width_px, height_px))
    return image.resize((width_px, height_px), _pillow().Resampling.BICUBIC).tobytes()


def pixel_values(
    data: bytes, width_px: int, height_px: int, max_pixels: int = MAX_WIRE_PIXELS
) -> NDArray[np.float32]:
    """The same as [3, height, width] from -1 to 1, which is what an encoder takes."""
    import numpy as np

    rows = np.frombuffer(rgb_pixels(data, width_px, height_px, max_pixels), np.uint8)
    planes = rows.reshape(height_px, width_px, 3).transpose(2, 0, 1).astype(np.float32)
    return np.ascontiguousarray(planes / np.float32(127.5) - np.float32(1))


# -- decoding ----------------------------------------------------------------------------------


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError('pictures need Pillow: `pip install pillow`, or "longshore[device]"') from None
    return Image


def _load(source: ImageSource, least_side_px: int) -> tuple[Image.Image, bool]:
    """(the upright picture in RGB, whether its format is one for photographs)."""
    pillow = _pillow()
    if isinstance(source, pillow.Image):
        image = cast("Image.Image", source)
        check_pixels(*image.size, MAX_PIXELS)
        return _guarded(lambda: _upright(image)), image.format in _FOR_PHOTOS
    data = _source_bytes(source)
    return _decoded(data, MAX_PIXELS, least_side_px), read_header(data, MAX_PIXELS).kind != "png"


def _source_bytes(source: object) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return image_bytes(source)
    if isinstance(source, str) and _SCHEME.match(source):
        raise InvalidImageError("a picture is not fetched: give its bytes or a path")
    if not isinstance(source, str | Path):
        raise InvalidImageError(f"a picture can't be a {type(source).__name__}")
    return _file_bytes(Path(source))


def _file_bytes(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidImageError(f"{path} is not a plain file")
        with path.open("rb") as stream:
            data = stream.read(MAX_SOURCE_BYTES + 1)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidImageError(f"the picture {str(path)[:200]} can't be read: {why}") from None
    if len(data) > MAX_SOURCE_BYTES:
        raise InvalidImageError(f"the picture {path} has more than {MAX_SOURCE_BYTES} bytes")
    return data


def _open(data: bytes, header: ImageHeader) -> Image.Image:
    """The picture, its pixels not yet read."""
    image = cast("Image.Image", _guarded(lambda: _pillow().open(io.BytesIO(data), formats=_FORMATS)))
    if image.size != (header.width_px, header.height_px):  # two headers, and the decoder takes the other
        raise InvalidImageError("the picture contradicts itself about its size")
    return image


def _decoded(data: bytes, max_pixels: int, least_side_px: int) -> Image.Image:
    """The upright picture in RGB; of a JPEG a half, a quarter or an eighth, no side under `least_side_px`."""
    image = _open(data, read_header(data, max_pixels))

    def decode() -> Image.Image:
        image.draft(None, (least_side_px, least_side_px))  # None keeps the mode
        return _upright(image)

    return cast("Image.Image", _guarded(decode))


def _guarded(work: Any) -> Any:
    """What `work` gives; whatever a decoder raises on bad input is InvalidImageError."""
    try:
        return work()
    except (InvalidImageError, ConfigError):
        raise
    except MemoryError:
        raise InvalidImageError("the picture needs more memory than there is") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError and more
        raise InvalidImageError(f"the picture can't be decoded: {str(error)[:200]}") from None


def _upright(image: Image.Image) -> Image.Image:
    turn, flat = _turn(_orientation(image)), _flat(image)
    return flat if turn is None else flat.transpose(turn)


def _orientation(image: Image.Image) -> int:
    """EXIF's 1 to 8; 1 where it says nothing that can be read."""
    try:
        # PNG's own method would decode the pixels to look for a chunk behind them.
        value = _pillow().Image.getexif(image).get(_ORIENTATION, 1)
    except Exception:  # broken metadata is no reason to refuse a picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(orientation: int) -> Any:
    ways = _pillow().Transpose
    return {
        2: ways.FLIP_LEFT_RIGHT,
        3: ways.ROTATE_180,
        4: ways.FLIP_TOP_BOTTOM,
        5: ways.TRANSPOSE,
        6: ways.ROTATE_270,
        7: ways.TRANSVERSE,
        8: ways.ROTATE_90,
    }.get(orientation)


def _flat(image: Image.Image) -> Image.Image:
    """The picture in RGB; what is transparent lies over white."""
    if image.mode.startswith("I"):  # 16 bits of grey, of which RGB keeps the upper eight
        return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = _pillow().new("RGBA", layer.size, (255, 255, 255, 255))
    return cast("Image.Image", _pillow().alpha_composite(white, layer).convert("RGB"))


def _written(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
