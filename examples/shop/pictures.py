"""Product photos: one product in one colour on some background, with a price tag, drawn by Pillow and numpy.

A photo is its words and a seed. Owns what is drawn and the train/held-out split by words; the same photo is
the same picture on one version of Pillow. Downloads nothing and asks nothing. `python -m shop.pictures SHEET`
draws a few held-out photos as models see them, at three sizes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from math import cos, exp, log, radians, sin
from random import Random

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from shop.picture_shapes import COLOUR_RGB, PRODUCTS, Tone
from shop.sheet import HELDOUT_ONE_IN, MAX_PRICE, MIN_PRICE, Split, split_rng

RGB = tuple[int, int, int]
ASPECTS = (1.0, 1.0, 4 / 3, 3 / 4, 3 / 2, 2 / 3)
LONG_SIDE_PX = (400, 520)
TEXT_SHARE = (0.045, 0.13)
"""Size of the tag's font as a share of the shorter side: the smallest digits are 10 pixels high at a side of
320 and 2 at a side of 64, where nobody can read them."""
EASY_TEXT_SHARE = (0.10, 0.20)
MAX_TAG_DEGREES = 25.0
LEAST_COLOUR_DISTANCE = 90.0
NOISE_SIDE = 640


@dataclass(frozen=True, slots=True)
class Photo:
    """What stands in a picture, `price` in whole dollars; `seed` decides how it looks."""

    name: str
    colour: str
    price: int
    seed: int
    is_easy: bool = False  # larger, straighter text; to learn from, never to evaluate

    @property
    def split(self) -> Split:
        """By words alone: no product in a colour at a price is both trained on and held out."""
        digest = blake2b(f"{self.colour} {self.name} ${self.price}".encode(), digest_size=4).digest()
        return "heldout" if int.from_bytes(digest) % HELDOUT_ONE_IN == 0 else "train"


@dataclass(frozen=True, slots=True)
class Digit:
    """Where a digit of the price stands: centre and extent as shares of width and height; 1 for tens."""

    value: int
    place: int
    x: float
    y: float
    width: float
    height: float


def make_photo(rng: Random, split: Split, is_easy: bool = False) -> Photo:
    """Draw the words of a photo from one side of the split."""
    while True:
        photo = Photo(
            rng.choice(list(PRODUCTS)),
            rng.choice(list(COLOUR_RGB)),
            rng.randint(MIN_PRICE, MAX_PRICE),
            rng.getrandbits(48),
            is_easy,
        )
        if photo.split == split:
            return photo


def draw_photo(photo: Photo) -> Image.Image:
    """The picture in RGB, 400 to 520 pixels on its long side, in one of five aspects."""
    return draw_with_digits(photo)[0]


def draw_with_digits(photo: Photo) -> tuple[Image.Image, tuple[Digit, ...]]:
    """The picture, and where the digits of its price stand in it."""
    rng = Random(f"photo/{photo.seed}")
    long_side, aspect = rng.randint(*LONG_SIDE_PX), rng.choice(ASPECTS)
    width = long_side if aspect >= 1 else round(long_side * aspect)
    height = round(long_side / aspect) if aspect >= 1 else long_side
    body = _jittered(rng, COLOUR_RGB[photo.colour], 8)
    image = _background(rng, width, height, body)
    _product(rng, image, photo.name, body)
    digits = _tag(rng, image, photo)
    if rng.random() < 0.5 and not photo.is_easy:
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.2, 0.7)))
    return _noisy(rng, image), digits


def contact_sheet(num_photos: int, sizes_px: tuple[int, ...], seed: int, side_px: int = 200) -> Image.Image:
    """Held-out photos side by side, one row a size, each squeezed to it and then shown at `side_px`."""
    rng = split_rng("heldout", seed)
    sheet = Image.new("RGB", (num_photos * side_px, len(sizes_px) * side_px))
    for column in range(num_photos):
        image = draw_photo(make_photo(rng, "heldout"))
        for row, size in enumerate(sizes_px):
            seen = image.resize((size, size), Image.Resampling.BICUBIC)
            shown = seen.resize((side_px, side_px), Image.Resampling.NEAREST)
            sheet.paste(shown, (column * side_px, row * side_px))
    return sheet


def _jittered(rng: Random, colour: RGB, most: int) -> RGB:
    red, green, blue = (min(255, max(0, value + rng.randint(-most, most))) for value in colour)
    return red, green, blue


def _shade(colour: RGB, factor: float) -> RGB:
    """Towards black below 1, towards white above."""
    red, green, blue = (
        round(value * factor if factor < 1 else value + (255 - value) * (factor - 1)) for value in colour
    )
    return red, green, blue


def _distance(one: RGB, two: RGB) -> float:
    return sum((a - b) ** 2 for a, b in zip(one, two, strict=True)) ** 0.5


def _muted(rng: Random, unlike: RGB) -> RGB:
    """A greyish colour that stands off from `unlike`."""
    while True:
        level = rng.randint(60, 235)
        colour = _jittered(rng, (level, level, level), 22)
        if _distance(colour, unlike) >= LEAST_COLOUR_DISTANCE:
            return colour


def _background(rng: Random, width: int, height: int, body: RGB) -> Image.Image:
    """A soft patchwork of a few muted colours, often with a table top below, sometimes with stripes."""
    base = _muted(rng, body)
    columns, rows = rng.randint(2, 7), rng.randint(2, 7)
    cells = Image.new("RGB", (columns, rows))
    cells.putdata([_jittered(rng, base, 16) for _ in range(columns * rows)])
    smooth = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.NEAREST
    image = cells.resize((width, height), smooth)
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.5:
        draw.rectangle((0, round(height * rng.uniform(0.55, 0.8)), width, height), fill=_muted(rng, body))
    if rng.random() < 0.3:
        step, stripe = rng.randint(24, 70), _jittered(rng, base, 25)
        for x in range(rng.randrange(step), width + height, step):
            draw.line((x, 0, x - rng.choice((0, height // 3)), height), fill=stripe, width=rng.randint(1, 4))
    return image


def _product(rng: Random, image: Image.Image, name: str, body: RGB) -> None:
    """The product's outlines, turned and stretched a little, somewhere in the picture."""
    shorter = min(image.size)
    size = shorter * rng.uniform(0.5, 0.78)
    stretch, angle = rng.uniform(0.85, 1.15), radians(rng.uniform(-14, 14))
    x0 = rng.uniform(0.5 * size, image.width - 0.5 * size)
    y0 = rng.uniform(0.5 * size, image.height - 0.5 * size)
    c, s = cos(angle) * size, sin(angle) * size
    grey = rng.randint(90, 200)
    tones: dict[Tone, RGB] = {
        "body": body,
        "dark": _shade(body, rng.uniform(0.6, 0.8)) if sum(body) > 180 else _shade(body, 1.18),
        "light": _shade(body, rng.uniform(1.15, 1.35)) if sum(body) < 660 else _shade(body, 0.9),
        "trim": (grey, grey, grey),
    }
    edge = _shade(body, 0.45) if sum(body) > 240 else _shade(body, 1.35)
    draw = ImageDraw.Draw(image)
    for tone, points in PRODUCTS[name]:
        moved = [((x - 0.5) * stretch, y - 0.5) for x, y in points]
        outline = [(x0 + c * x - s * y, y0 + s * x + c * y) for x, y in moved]
        draw.polygon(outline, fill=tones[tone], outline=edge if tone == "body" else None)


@cache
def _font(size_px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size_px)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow is built with FreeType
    return font


def _tag_colours(rng: Random) -> tuple[RGB, RGB]:
    """Paper and ink, the one at least 80 levels lighter than the other."""
    contrast = rng.randint(80, 215)
    low = rng.randint(5, 240 - contrast)
    dark, light = (_jittered(rng, (level, level, level), 14) for level in (low, low + contrast))
    return (light, dark) if rng.random() < 0.75 else (dark, light)


def _tag(rng: Random, image: Image.Image, photo: Photo) -> tuple[Digit, ...]:
    """Paste the tag, turned, wholly inside the picture; returns where its digits came to stand."""
    low, high = EASY_TEXT_SHARE if photo.is_easy else TEXT_SHARE
    size = max(8, round(min(image.size) * exp(rng.uniform(log(low), log(high)))))
    degrees = rng.uniform(-1, 1) * MAX_TAG_DEGREES * (0.3 if photo.is_easy else 1.0)
    paper, ink = _tag_colours(rng)
    text, font, pad = f"${photo.price}", _font(size), max(2, round(size * rng.uniform(0.2, 0.5)))
    left, top, right, bottom = font.getbbox(text)
    width, height = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
    tag = Image.new("RGBA", (width, height), (*paper, 255))
    draw = ImageDraw.Draw(tag)
    if rng.random() < 0.5:
        draw.rectangle((0, 0, width - 1, height - 1), outline=(*ink, 255))
    draw.text((pad - left, pad - top), text, font=font, fill=(*ink, 255))
    turned = tag.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    x = rng.randint(0, max(0, image.width - turned.width))
    y = rng.randint(0, max(0, image.height - turned.height))
    image.paste(turned, (x, y), turned)
    middle = (x + turned.width / 2, y + turned.height / 2)
    centres = _digit_centres(text, font, pad - left, (width, height))
    turn, digit_height = radians(-degrees), (bottom - top)
    out = []
    for index, (dx, dy, digit_width) in enumerate(centres):
        cx = middle[0] + dx * cos(turn) - dy * sin(turn)
        cy = middle[1] + dx * sin(turn) + dy * cos(turn)
        place = len(text) - 2 - index
        out.append(
            Digit(
                int(text[1 + index]), place, cx / image.width, cy / image.height,
                digit_width / image.width, digit_height / image.height,
            )
        )  # fmt: skip
    return tuple(out)


def _digit_centres(
    text: str, font: ImageFont.FreeTypeFont, origin: float, size: tuple[int, int]
) -> list[tuple[float, float, float]]:
    """(x, y, width) of each digit's centre, from the middle of the tag before it is turned."""
    out = []
    for index in range(1, len(text)):
        start, end = font.getlength(text[:index]), font.getlength(text[: index + 1])
        out.append((origin + (start + end) / 2 - size[0] / 2, 0.0, end - start))
    return out


@cache
def _noise(strength: int) -> Image.Image:
    """One sheet of noise around 128 for all pictures, of which each takes its own cut."""
    drawn = np.random.default_rng(7).standard_normal((NOISE_SIDE, NOISE_SIDE, 3), np.float32)
    return Image.fromarray((drawn * strength + 128).round().clip(0, 255).astype(np.uint8))


def _noisy(rng: Random, image: Image.Image) -> Image.Image:
    """Brighter or darker, with noise of up to 9 levels."""
    strength, gain = rng.randint(1, 9), rng.uniform(0.82, 1.12)
    x, y = (rng.randint(0, NOISE_SIDE - side) for side in image.size)
    cut = _noise(strength).crop((x, y, x + image.width, y + image.height))
    brightened = image.point([min(255, round(value * gain)) for value in range(256)] * 3)
    return ImageChops.add(brightened, cut, 1, -128)


if __name__ == "__main__":
    contact_sheet(5, (64, 128, 320), seed=4).save(sys.argv[1], quality=88)
