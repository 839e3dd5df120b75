"""The edits that people and programs make to pictures, by name, with random strength.

They make copies whose original is known, so that copy detection can be measured. KINDS is the whole list; a new edit is
a function and a row of it. An edit depends on the picture and on the generator alone. Sizes are in pixels, shares in
[0, 1]. All strengths are assumed: they are common on the web.

Legend: h, w the sides of a picture.
"""

import io
import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

Edit = Callable[[Image.Image, np.random.Generator], Image.Image]
Color = tuple[int, int, int]

MIN_SIDE = 32  # of an edited picture: a smaller one has nothing left to recognise
WORDS = (
    "SAMPLE",
    "example.org",
    "Look at this!",
    "NEW",
    "when the food is ready",
    "50% OFF",
    "Holiday 2019",
    "me:",
    "no",
)


def edit(picture: Image.Image, kind: str, generator: np.random.Generator) -> Image.Image:
    """An edited copy of `picture` (RGB), of one of KINDS."""
    return KINDS[kind](picture, generator)


def jpeg(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Stored as JPEG, of quality 15 to 80."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=int(generator.integers(15, 80, endpoint=True)))
    return Image.open(buffer).convert("RGB")


def resize(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """At 0.25 to 2 times the size; the ratio of the sides changes by up to 10%."""
    scale = math.exp(generator.uniform(math.log(0.25), math.log(2)))
    stretch = math.exp(generator.uniform(-0.1, 0.1) / 2)
    width, height = picture.width * scale * stretch, picture.height * scale / stretch
    filter_ = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)[generator.integers(3)]
    return picture.resize((max(MIN_SIDE, round(width)), max(MIN_SIDE, round(height))), filter_)


def colour(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Other brightness, contrast and saturation, by a factor of 0.6 to 1.5, and a cast of colour."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(math.exp(generator.uniform(math.log(0.6), math.log(1.5))))
    pixels = np.asarray(picture) * generator.uniform(0.85, 1.15, size=3)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def grey(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Without colour, or in one tone such as sepia."""
    copy = ImageOps.grayscale(picture)
    if generator.random() < 0.5:
        return copy.convert("RGB")
    return ImageOps.colorize(copy, _color(generator, 0, 60), _color(generator, 200, 255))


def mirror(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Left and right exchanged."""
    return ImageOps.mirror(picture)


def flip(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Top and bottom exchanged."""
    return ImageOps.flip(picture)


def turn(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Turned by 90, 180 or 270 degrees."""
    turns = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    return picture.transpose(turns[generator.integers(3)])


def blur(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Blurred, with a standard deviation of 0.5% to 2% of the shorter side."""
    return picture.filter(ImageFilter.GaussianBlur(generator.uniform(0.005, 0.02) * min(picture.size)))


def noise(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """With noise of each pixel, with a standard deviation of 5 to 25 of 255."""
    pixels = np.asarray(picture) + generator.normal(0, generator.uniform(5, 25), size=(*picture.size[::-1], 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def border(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """In a plain frame; half of the frames are wider above and below, as of a letterbox."""
    across, down = (max(1, round(share * min(picture.size))) for share in generator.uniform(0.03, 0.2, size=2))
    if generator.random() < 0.5:
        across, down = 0, max(down, round(0.1 * picture.height))
    return ImageOps.expand(picture, (across, down), _color(generator))


def crop(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A part with 70% to 95% of the area."""
    return _crop(picture, generator, 0.7, 0.95)


def strong_crop(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A part with 40% to 70% of the area."""
    return _crop(picture, generator, 0.4, 0.7)


def rotation(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Turned by 3 to 25 degrees, on a ground of black, white or grey."""
    degrees = generator.uniform(3, 25) * generator.choice([-1, 1])
    grounds = ("black", "white", (128, 128, 128))
    return picture.rotate(
        degrees, Image.Resampling.BICUBIC, expand=bool(generator.integers(2)), fillcolor=grounds[generator.integers(3)]
    )


def text(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """With one to three lines of large text: half of them with a rim, a quarter on a plain bar."""
    copy = picture.copy()
    draw = ImageDraw.Draw(copy)
    style, share = generator.random(), generator.uniform(0.5, 0.95)
    lines = [str(generator.choice(WORDS)) for _ in range(generator.integers(1, 3, endpoint=True))]
    ink, ground = [(255, 255, 255), (0, 0, 0)][:: int(generator.choice([-1, 1]))]
    longest = max(ImageFont.load_default(100).getlength(line) for line in lines)
    size = min(100 * share * picture.width / longest, picture.height / 4)
    font = ImageFont.load_default(max(6.0, size))
    top = generator.choice([0.02, 0.95 - 1.2 * len(lines) * size / picture.height, generator.uniform(0.1, 0.6)])
    y = max(0.0, float(top)) * picture.height
    if style < 0.25:
        draw.rectangle((0, y, picture.width, y + 1.25 * len(lines) * size), fill=ground)
    for line in lines:
        x = (picture.width - font.getlength(line)) / 2
        draw.text((x, y), line, ink, font, stroke_width=0 if style < 0.5 else max(1, size / 15), stroke_fill=ground)
        y += 1.2 * size
    return copy


def emoji(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """With one to four drawn faces, each with 2% to 12% of the area."""
    copy = picture.copy()
    for _ in range(generator.integers(1, 4, endpoint=True)):
        side = math.sqrt(generator.uniform(0.02, 0.12) * picture.width * picture.height)
        side = max(6, round(min(side, 0.6 * min(picture.size))))
        _paste(copy, _face(4 * side, generator).resize((side, side), Image.Resampling.LANCZOS), generator)
    return copy


def logo(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """With a mark in a corner or over the middle, opaque or half transparent, with 4% to 20% of the area."""
    copy = picture.copy()
    area = generator.uniform(0.04, 0.2) * picture.width * picture.height
    aspect = generator.uniform(1, 4)
    width = max(8, round(min(math.sqrt(area * aspect), 0.9 * picture.width)))
    height = max(6, round(min(math.sqrt(area / aspect), 0.5 * picture.height)))
    mark = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    draw = ImageDraw.Draw(mark)
    alpha = int(generator.choice([110, 255]))
    draw.rounded_rectangle((0, 0, width - 1, height - 1), height / 4, fill=(*_color(generator), alpha))
    word = str(generator.choice(["stock", "ACME", "Photo24", "daily", "TV"]))
    font = ImageFont.load_default(
        max(6.0, min(0.6 * height, 100 * 0.8 * width / ImageFont.load_default(100).getlength(word)))
    )
    draw.text((width / 2, height / 2), word, (*_color(generator), 255), font, anchor="mm")
    _paste(copy, mark, generator, corner=bool(generator.integers(2)))
    return copy


def screenshot(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """In a page with a bar, lines of text and buttons; the picture has 25% to 65% of the area."""
    share = generator.uniform(0.25, 0.65)
    across = generator.uniform(0.6, 1.0)  # share of the width of the page
    width = round(picture.width / across)
    height = max(round(picture.height + 0.06 * width), round(picture.width * picture.height / share / width))
    dark = generator.random() < 0.4
    page = Image.new("RGB", (width, height), _color(generator, 0, 40) if dark else _color(generator, 235, 255))
    ink = (210, 210, 210) if dark else (50, 50, 50)
    draw = ImageDraw.Draw(page)
    bar = max(3, round(0.05 * width))
    draw.rectangle((0, 0, width, bar), fill=_color(generator))
    draw.text(
        (bar / 2, bar / 2), "news   photos   sign in", ink, ImageFont.load_default(max(6.0, bar / 2)), anchor="lm"
    )
    left = int(generator.choice([0, (width - picture.width) // 2, width - picture.width]))
    room = height - bar - picture.height
    top = bar + int(generator.integers(0, max(1, room), endpoint=False))
    _write_lines(draw, (0, bar, width, top), ink, generator)
    _write_lines(draw, (0, top + picture.height, width, height), ink, generator)
    page.paste(picture, (left, top))
    if max(page.size) > 2 * max(picture.size):
        page.thumbnail((2 * max(picture.size),) * 2)
    return page


def collage(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Beside a second picture, smooth areas of random colours; the first has 45% to 70% of the area."""
    share = generator.uniform(0.45, 0.7)
    upright = generator.random() < 0.5
    length = max(1, round((1 / share - 1) * (picture.height if upright else picture.width)))
    size = (picture.width, length) if upright else (length, picture.height)
    cells = generator.integers(0, 256, size=(int(generator.integers(3, 9)), int(generator.integers(3, 9)), 3))
    other = Image.fromarray(cells.astype(np.uint8)).resize(size, Image.Resampling.BICUBIC)
    other = noise(other, generator)
    first = generator.random() < 0.5
    total = (size[0], picture.height + length) if upright else (picture.width + length, size[1])
    result = Image.new("RGB", total)
    step = size if first else picture.size
    place = (0, step[1]) if upright else (step[0], 0)
    result.paste(other if first else picture, (0, 0))
    result.paste(picture if first else other, place)
    return result


def combined(picture: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Two different edits, one after the other."""
    names = [name for name in KINDS if name not in ("combined", "collage")]
    for position in generator.permutation(len(names))[:2]:
        picture = KINDS[names[position]](picture, generator)
    return picture


KINDS: dict[str, Edit] = {
    kind.__name__: kind
    for kind in (
        *(jpeg, resize, colour, grey, mirror, blur, noise, text, emoji, logo, border, crop, rotation, strong_crop),
        *(flip, turn, screenshot, collage, combined),
    )
}
"""All edits by name."""


def _crop(picture: Image.Image, generator: np.random.Generator, least: float, most: float) -> Image.Image:
    area = generator.uniform(least, most)
    stretch = math.exp(generator.uniform(-0.2, 0.2) / 2)
    sides = (min(1.0, math.sqrt(area) * stretch), min(1.0, math.sqrt(area) / stretch))
    width, height = (max(1, round(share * length)) for share, length in zip(sides, picture.size, strict=True))
    left = int(generator.integers(0, picture.width - width, endpoint=True))
    top = int(generator.integers(0, picture.height - height, endpoint=True))
    return picture.crop((left, top, left + width, top + height))


def _color(generator: np.random.Generator, least: int = 0, most: int = 255) -> Color:
    red, green, blue = (int(value) for value in generator.integers(least, most, size=3, endpoint=True))
    return red, green, blue


def _paste(copy: Image.Image, mark: Image.Image, generator: np.random.Generator, corner: bool = False) -> None:
    """Paste `mark` (RGBA) into `copy`, at a random place or in a corner."""
    x, y = generator.random(2).round() if corner else generator.random(2)
    place = (round(x * (copy.width - mark.width)), round(y * (copy.height - mark.height)))
    copy.paste(mark, place, mark)


def _face(side: int, generator: np.random.Generator) -> Image.Image:
    """A round drawn face with two eyes and a mouth, (side, side) RGBA."""
    face = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    draw = ImageDraw.Draw(face)
    skin = (255, int(generator.integers(170, 230)), int(generator.integers(0, 90)), 255)
    ink = (60, 40, 20, 255)
    draw.ellipse((0, 0, side - 1, side - 1), fill=skin, outline=(200, 140, 0, 255), width=max(1, side // 40))
    for x in (0.33, 0.67):
        radius = generator.uniform(0.05, 0.1)
        draw.ellipse([side * value for value in (x - radius, 0.36 - radius, x + radius, 0.36 + radius)], fill=ink)
    box = [side * value for value in (0.28, 0.4, 0.72, 0.8)]
    if generator.random() < 0.5:
        draw.arc(box, 10, 170, fill=ink, width=max(1, side // 18))
    else:
        draw.chord(box, 10, 170, fill=ink)
    return face


def _write_lines(
    draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], ink: Color, generator: np.random.Generator
) -> None:
    """Fill `box` (left, top, right, bottom) with lines of words, as far as its height allows."""
    left, top, right, bottom = box
    size = max(6.0, generator.uniform(0.025, 0.05) * (right - left))
    font = ImageFont.load_default(size)
    y = top + size / 2
    while y + 1.5 * size < bottom:
        line = ""
        while font.getlength(line) < generator.uniform(0.4, 0.85) * (right - left):
            line += str(generator.choice(WORDS)) + " "
        draw.text((left + size, y), line, ink, font)
        y += 1.5 * size
