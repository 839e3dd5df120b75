"""The decoder: the stated rule for every colour mode, orientation, limits, and always an image or a reason."""

import functools
import io
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from curation.images.decode import (
    EXTENSION_OF_FORMAT,
    ImageLimits,
    ImageRejected,
    RejectReason,
    decode,
    decode_picture,
    decode_rgb,
    read_header,
    to_shape,
    upright,
)

# Pillow warns of damage before it raises, and of sizes that ImageLimits then refuses.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

LIMITS = ImageLimits(min_side=1)
ORIENTATION = 0x0112
# Decibels between a JPEG scaled by `decode_picture` and `to_shape` and the same JPEG scaled by Pillow.
MIN_PSNR = 42.0


def picture(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """A smooth RGB picture without symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def pixels(image: Image.Image) -> NDArray[np.int64]:
    return np.asarray(image).astype(np.int64)


def png(width: int, height: int, depth: int, color_type: int, rows: bytes, **chunks: bytes) -> bytes:
    """A PNG written by hand, for variants that Pillow does not write. `rows` lack the filter bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, depth, color_type, 0, 0, 0)
    stride = len(rows) // height
    filtered = b"".join(b"\0" + rows[row * stride : (row + 1) * stride] for row in range(height))
    extra = b"".join(chunk(name.encode(), content) for name, content in chunks.items())
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(filtered)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def reason_of(data: bytes, limits: ImageLimits = LIMITS) -> RejectReason:
    with pytest.raises(ImageRejected) as caught:
        decode_rgb(data, limits)
    return caught.value.reason


# --- colour modes


@pytest.mark.parametrize("image_format", sorted(EXTENSION_OF_FORMAT))
def test_every_format_decodes(image_format: str) -> None:
    data = encoded(picture(), image_format)
    header, image = decode(data, LIMITS)
    assert (header.format, header.num_frames, image.mode, image.size) == (image_format, 1, "RGB", (60, 40))
    assert read_header(data, LIMITS) == header
    assert np.array_equal(pixels(image), pixels(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [("1", "PNG"), ("L", "PNG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "PNG"), ("CMYK", "TIFF")],
)
def test_opaque_modes_are_converted_as_by_pillow(mode: str, image_format: str) -> None:
    image = picture().convert(mode)
    assert np.array_equal(pixels(decode_rgb(encoded(image, image_format), LIMITS)), pixels(image.convert("RGB")))


@pytest.mark.parametrize(("mode", "image_format"), [("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_alpha_is_composed_onto_white(mode: str, image_format: str) -> None:
    image = picture().convert(mode)
    image.putalpha(picture(seed=1).convert("L"))
    rgba = pixels(image.convert("RGBA")).astype(np.float64)
    expected = rgba[..., :3] * rgba[..., 3:] / 255 + 255 - rgba[..., 3:]
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    decoded = pixels(decode_rgb(encoded(image, image_format, **options), LIMITS))
    assert np.abs(decoded - expected).max() <= 1


def test_invisible_colours_become_white() -> None:
    image = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    assert decode_rgb(encoded(image, "PNG"), LIMITS).getcolors() == [(400, (255, 255, 255))]


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [
        (None, [(10, 20, 30), (200, 100, 0), (0, 0, 255)]),
        (1, [(10, 20, 30), (255, 255, 255), (0, 0, 255)]),
        (bytes([255, 0, 51]), [(10, 20, 30), (255, 255, 255), (204, 204, 255)]),
    ],
)
def test_palettes_with_and_without_transparency(
    transparency: int | bytes | None, expected: list[tuple[int, int, int]]
) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 200, 100, 0, 0, 0, 255])
    options = {} if transparency is None else {"transparency": transparency}
    decoded = pixels(decode_rgb(encoded(image, "PNG", **options), LIMITS))
    assert np.abs(decoded[0] - np.array(expected)).max() <= 1


WHITE = (255, 255, 255)


@pytest.mark.parametrize(
    ("depth", "color_type", "row", "key", "expected"),
    [
        (1, 0, bytes([0b01000000]), struct.pack(">H", 1), [(0, 0, 0), WHITE]),
        (2, 0, bytes([0b01_10_0000]), struct.pack(">H", 1), [WHITE, (170, 170, 170)]),
        (4, 0, bytes([0x3C]), struct.pack(">H", 3), [WHITE, (204, 204, 204)]),
        (8, 0, bytes([7, 9]), struct.pack(">H", 7), [WHITE, (9, 9, 9)]),
        (16, 0, bytes([7, 0, 99, 0]), struct.pack(">H", 0x0700), [WHITE, (99, 99, 99)]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">HHH", 1, 2, 3), [WHITE, (4, 5, 6)]),
        (16, 2, bytes([1, 0, 2, 0, 3, 0, 99, 0, 5, 0, 6, 0]), struct.pack(">HHH", 256, 512, 768), [WHITE, (99, 5, 6)]),
    ],
)
def test_a_transparent_colour_is_applied_at_every_bit_depth(
    depth: int, color_type: int, row: bytes, key: bytes, expected: list[tuple[int, int, int]]
) -> None:
    decoded = decode_rgb(png(2, 1, depth, color_type, row, tRNS=key), LIMITS)
    assert [decoded.getpixel((x, 0)) for x in range(2)] == expected


def wide_values() -> NDArray[np.uint16]:
    return np.random.default_rng(0).integers(0, 65536, (40, 60), dtype=np.uint16)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_keep_their_high_byte(image_format: str) -> None:
    decoded = pixels(decode_rgb(encoded(Image.fromarray(wide_values()), image_format), LIMITS))
    assert np.array_equal(decoded, np.repeat((wide_values() >> 8)[..., None], 3, axis=2))


def test_sixteen_bits_of_colour_keep_their_high_byte() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    decoded = pixels(decode_rgb(png(7, 5, 16, 2, values.astype(">u2").tobytes()), LIMITS))
    assert np.array_equal(decoded, values >> 8)


def test_eight_bits_widened_to_sixteen_are_unchanged() -> None:
    grey = picture().convert("L")
    widened = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert np.array_equal(pixels(decode_rgb(encoded(widened, "PNG"), LIMITS)), pixels(grey.convert("RGB")))


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_other_integers_and_floats_are_stretched(kind: type[np.generic]) -> None:
    values = np.random.default_rng(0).normal(0, 1e6, (40, 60)).astype(kind)
    low, high = float(values.min()), float(values.max())
    expected = (values.astype(np.float64) - low) * 255 / (high - low)
    decoded = pixels(decode_rgb(encoded(Image.fromarray(values), "TIFF"), LIMITS))
    assert (decoded.min(), decoded.max()) == (0, 255)
    assert np.abs(decoded[..., 0] - expected).max() <= 0.51


def test_a_float_image_of_equal_values_is_black_and_one_of_nan_is_corrupt() -> None:
    flat = Image.new("F", (20, 20), 3.5)
    assert decode_rgb(encoded(flat, "TIFF"), LIMITS).getcolors() == [(400, (0, 0, 0))]
    assert reason_of(encoded(Image.new("F", (20, 20), float("nan")), "TIFF")) == RejectReason.CORRUPT


def test_inverted_cmyk_jpeg_has_its_colours() -> None:
    image = picture()
    data = encoded(image.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(pixels(decode_rgb(data, LIMITS)) - pixels(image)).mean() < 3


def test_lab_becomes_srgb() -> None:
    gray = Image.fromarray(np.full((20, 20, 3), (255, 0, 0), dtype=np.uint8), "LAB")
    decoded = pixels(decode_rgb(encoded(gray, "TIFF"), LIMITS))
    assert decoded.min() >= 253


def test_the_first_frame_of_an_animation_is_decoded() -> None:
    first, second, third = (picture(seed=seed).convert("P").convert("RGB") for seed in (1, 2, 3))
    for image_format, options in [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})]:
        data = encoded(first, image_format, save_all=True, append_images=[second, third], **options)
        header, image = decode(data, LIMITS)
        assert header.num_frames == 3
        assert np.array_equal(pixels(image), pixels(first))


def test_a_jpeg_followed_by_further_images_is_a_jpeg() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    header, image = decode(data, LIMITS)
    assert (header.format, header.num_frames) == ("JPEG", 2)
    assert np.array_equal(pixels(image), pixels(decode_rgb(encoded(picture(), "JPEG"), LIMITS)))


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:2", "4:2:0", "progressive", "restarts", "grey", "RGB", "odd sides"])
def test_a_jpeg_at_full_size_has_the_pixels_of_pillow(kind: str) -> None:
    expected = Image.open(io.BytesIO(jpeg(kind))).convert("RGB")
    assert np.array_equal(pixels(decode_rgb(jpeg(kind), LIMITS)), pixels(expected))


def test_the_result_has_no_metadata() -> None:
    exif = Image.Exif()
    exif[0x010E] = "a secret"
    data = encoded(picture(), "PNG", exif=exif, icc_profile=b"profile")
    assert b"secret" not in encoded(decode_rgb(data, LIMITS), "PNG")
    assert decode_rgb(data, LIMITS).info == {}


# --- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied(image_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(picture(), image_format, exif=exif)
    header, image = decode(data, LIMITS)
    plain = decode_rgb(encoded(picture(), image_format), LIMITS)
    tagged = plain.copy()
    tagged.getexif()[ORIENTATION] = orientation
    assert np.array_equal(pixels(image), pixels(ImageOps.exif_transpose(tagged)))
    assert (header.width, header.height) == image.size == ((60, 40) if orientation < 5 else (40, 60))
    assert read_header(data, LIMITS) == header


@pytest.mark.parametrize("orientation", range(1, 9))
def test_oriented_jpegs_agree_with_opencv(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(picture(), "JPEG", exif=exif, quality=95)
    expected = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))[..., ::-1]
    assert np.abs(pixels(decode_rgb(data, LIMITS)) - expected.astype(np.int64)).max() <= 2


def test_orientation_behind_the_pixels_of_a_png_is_applied() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    data = encoded(picture(), "PNG", exif=exif)
    start = data.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(data[start : start + 4], "big")
    end = data.index(b"IEND") - 4
    moved = data[:start] + data[stop:end] + data[start:stop] + data[end:]
    header, image = decode(moved, LIMITS)
    assert (header.width, header.height) == image.size == (40, 60)
    assert np.array_equal(pixels(image), pixels(decode_rgb(data, LIMITS)))


def test_exif_that_cannot_be_parsed_counts_as_absent() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\0\0nonsense that is no TIFF header")
    assert np.array_equal(pixels(decode_rgb(data, LIMITS)), pixels(decode_rgb(encoded(picture(), "JPEG"), LIMITS)))


# --- reduced decoding


@functools.cache
def photograph(width: int = 500, height: int = 400, seed: int = 0) -> Image.Image:
    """Texture at every scale, hard edges, strong colours and grain."""
    generator = np.random.default_rng(seed)
    values = np.zeros((height, width, 3))
    cell = max(width, height)
    while cell >= 2:
        grid = generator.normal(0, 0.6 * cell**0.7, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        for channel in range(3):
            smooth = Image.fromarray(grid[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            values[..., channel] += np.asarray(smooth)
        cell //= 2
    values = 110 + values * 45 / max(values.std(), 1)
    for _ in range(20):
        left, top = generator.integers(0, (width, height))
        right, bottom = generator.integers(0, (width, height)) // 4 + (left, top) + 1
        values[top:bottom, left:right] += generator.normal(0, 45, 3)
    values += generator.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))


def psnr(first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
    return float(10 * np.log10(255**2 / np.mean((first.astype(np.float64) - second.astype(np.float64)) ** 2)))


def pillow_square(data: bytes, side: int = 224) -> NDArray[np.uint8]:
    """The image as most loaders scale it: (side, side, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))


def scaled_square(data: bytes, side: int = 224) -> NDArray[np.uint8]:
    return to_shape(decode_picture(data, LIMITS, target_side=side), (side, side)).transpose(1, 2, 0)


def segments(data: bytes) -> list[bytes]:
    """A JPEG's marker segments up to its first scan, and then the remaining bytes."""
    parts, position = [data[:2]], 2
    while data[position + 1] != 0xDA:
        length = 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        parts.append(data[position : position + length])
        position += length
    return [*parts, data[position:]]


def rgb_jpeg() -> bytes:
    """A JPEG whose components are red, green and blue."""
    data = encoded(photograph(), "JPEG", quality=90, keep_rgb=True)
    assert b"JFIF" not in data
    return data


def ycck_jpeg() -> bytes:
    """A CMYK JPEG whose Adobe marker states YCCK; its colours are wrong, equally for all decoders."""
    data = encoded(photograph().convert("CMYK"), "JPEG", quality=90)
    adobe = next(segment for segment in segments(data) if segment.startswith(b"\xff\xee"))
    return data.replace(adobe, adobe[:-1] + b"\2")


def lossless_jpeg(width: int, height: int) -> bytes:
    """A grey JPEG of process 14 (SOF3), which cannot be scaled; every difference is 0, so every pixel is 128."""
    frame = b"\xff\xc3" + struct.pack(">HBHHBBBB", 11, 8, height, width, 1, 1, 0x11, 0)
    table = b"\xff\xc4" + struct.pack(">HB16sB", 20, 0, bytes([1, *[0] * 15]), 0)
    scan = b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, 1, 0, 1, 0, 0)
    return b"\xff\xd8" + frame + table + scan + bytes(-(-width * height // 8)) + b"\xff\xd9"


JPEGS = {
    "4:4:4": lambda: encoded(photograph(), "JPEG", quality=90, subsampling="4:4:4"),
    "4:2:2": lambda: encoded(photograph(), "JPEG", quality=90, subsampling="4:2:2"),
    "4:2:0": lambda: encoded(photograph(), "JPEG", quality=90, subsampling="4:2:0"),
    "progressive": lambda: encoded(photograph(), "JPEG", quality=90, progressive=True),
    "restarts": lambda: encoded(photograph(), "JPEG", quality=90, restart_marker_blocks=7),
    "grey": lambda: encoded(photograph().convert("L"), "JPEG", quality=90),
    "RGB": rgb_jpeg,
    "CMYK": lambda: encoded(photograph().convert("CMYK"), "JPEG", quality=90),
    "YCCK": ycck_jpeg,
    "MPO": lambda: encoded(photograph(), "MPO", quality=90, save_all=True, append_images=[photograph(seed=1)]),
    "large": lambda: encoded(photograph(2000, 1500), "JPEG", quality=90),
    "upright": lambda: encoded(photograph(600, 1400), "JPEG", quality=90),
    "odd sides": lambda: encoded(photograph(1117, 903), "JPEG", quality=90),
    "small": lambda: encoded(photograph(200, 150), "JPEG", quality=90),
}


@functools.cache
def jpeg(kind: str) -> bytes:
    return JPEGS[kind]()


@pytest.mark.parametrize("kind", JPEGS)
def test_a_scaled_jpeg_is_close_to_pillows(kind: str) -> None:
    data = jpeg(kind)
    expected = pillow_square(data)
    assert psnr(scaled_square(data), expected) > MIN_PSNR
    # The bound excludes the results of wrong decoders.
    assert kind == "grey" or psnr(expected[..., ::-1], expected) < MIN_PSNR
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    nearest = whole.resize((224, 224), Image.Resampling.NEAREST)
    assert psnr(np.asarray(nearest), expected) < MIN_PSNR
    pitch = whole.width / 224
    box = (0.5 * pitch, 0, 223.5 * pitch, whole.height)
    shifted = whole.resize((223, 224), Image.Resampling.BICUBIC, box=box)
    assert psnr(np.asarray(shifted), expected[:, :223]) < MIN_PSNR


@pytest.mark.parametrize("kind", JPEGS)
def test_a_scaled_jpeg_has_the_header_and_at_least_the_target(kind: str) -> None:
    data = jpeg(kind)
    whole = decode(data, LIMITS)
    for target in (1, 47, 224, 300, 5000):
        header, image = decode(data, LIMITS, target_side=target)
        assert header == whole[0]
        assert (image.mode, image.info) == ("RGB", {})
        assert any(image.size == tuple(-(-side // by) for side in whole[1].size) for by in (1, 2, 4, 8))
        assert min(image.size) >= min(target, *whole[1].size)
        # The smallest possible size that is large enough. Pillow, which decodes CMYK, rounds sizes down.
        smaller = min(-(-side // 2) for side in image.size)
        assert smaller < target or max(image.size) * 8 < max(whole[1].size) + 8 or kind in ("CMYK", "YCCK")


def test_a_jpeg_that_cannot_become_smaller_is_the_same_with_a_target() -> None:
    for width, height in [(500, 400), (17, 31), (8, 8), (9, 7), (5, 300), (2, 3), (1, 1), (1, 600)]:
        for options in ({}, {"subsampling": "4:4:4"}, {"progressive": True}):
            data = encoded(photograph(width, height), "JPEG", quality=90, **options)
            scaled = decode_rgb(data, LIMITS, target_side=min(width, height))
            assert scaled.size == (width, height)
            assert np.array_equal(pixels(scaled), pixels(Image.open(io.BytesIO(data)).convert("RGB")))
    for kind in ("CMYK", "YCCK"):
        assert np.array_equal(
            pixels(decode_rgb(jpeg(kind), LIMITS, target_side=400)), pixels(decode_rgb(jpeg(kind), LIMITS))
        )


def test_a_large_jpeg_is_decoded_at_a_reduced_size_and_other_formats_at_full_size() -> None:
    data = encoded(picture(1600, 1200), "JPEG")
    assert decode_rgb(data, LIMITS, target_side=224).size == (400, 300)
    assert decode_rgb(encoded(picture(1600, 1200), "PNG"), LIMITS, target_side=224).size == (1600, 1200)
    for image_format in sorted(set(EXTENSION_OF_FORMAT) - {"JPEG"}):
        data = encoded(picture(), image_format)
        assert np.array_equal(pixels(decode_rgb(data, LIMITS, target_side=8)), pixels(decode_rgb(data, LIMITS)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_scaled_decoding_keeps_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = photograph(800, 600)
    header, image = decode(encoded(stored, "JPEG", exif=exif, quality=90), LIMITS, target_side=100)
    size = (800, 600) if orientation < 5 else (600, 800)
    assert ((header.width, header.height), image.size) == (size, (size[0] // 4, size[1] // 4))
    tagged = decode_rgb(encoded(stored, "JPEG", quality=90), LIMITS, target_side=100)
    tagged.getexif()[ORIENTATION] = orientation
    assert np.array_equal(pixels(image), pixels(ImageOps.exif_transpose(tagged)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_square_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    data = encoded(photograph(1003, 759), "JPEG", exif=exif, quality=90)
    whole = decode_rgb(data, LIMITS)
    expected = np.asarray(whole.resize((100, 100), Image.Resampling.BICUBIC))
    assert psnr(scaled_square(data, 100), expected) > MIN_PSNR
    picture = decode_picture(data, LIMITS, target_side=100)
    assert np.array_equal(pixels(upright(picture)), pixels(decode_rgb(data, LIMITS, target_side=100)))


@pytest.mark.parametrize("image_format", ["JPEG", "PNG"])
@pytest.mark.parametrize(("width", "height"), [(1000, 760), (760, 1000), (1117, 903), (300, 240), (100, 80), (80, 80)])
def test_a_square_may_be_the_middle_of_the_image(image_format: str, width: int, height: int) -> None:
    image = photograph(width, height)
    data = encoded(image, image_format, **({"quality": 90} if image_format == "JPEG" else {}))
    side, whole = min(width, height), Image.open(io.BytesIO(data))
    box = ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2)
    expected = np.asarray(whole.resize((96, 96), Image.Resampling.BICUBIC, box=box))
    square = to_shape(decode_picture(data, LIMITS, target_side=96), (96, 96), crop=True)
    assert (square.shape, square.dtype, square.flags.c_contiguous) == ((3, 96, 96), np.uint8, True)
    assert psnr(square.transpose(1, 2, 0), expected) > 30  # up to one pixel of shift


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (49, 103), (224, 224), (223, 225), (300, 900), (3000, 70)])
def test_a_square_is_close_to_pillows_bicubic(size: tuple[int, int]) -> None:
    image = photograph(*size)
    for side in (8, 50, 224):
        picture = decode_picture(encoded(image, "PNG"), LIMITS, target_side=side)
        square = to_shape(picture, (side, side)).transpose(1, 2, 0)
        error = square.astype(np.int64) - pixels(image.resize((side, side), Image.Resampling.BICUBIC))
        assert np.mean(error**2) < 0.33  # 53 dB; Pillow rounds between its two passes
        assert np.abs(error).max() <= 8


def test_a_jpeg_that_cannot_be_scaled_is_decoded_at_full_size() -> None:
    data = lossless_jpeg(600, 400)
    scaled, whole = decode_rgb(data, LIMITS, target_side=50), decode_rgb(data, LIMITS)
    assert scaled.getcolors() == whole.getcolors() == [(600 * 400, (128, 128, 128))]


def outcome(data: bytes, target: int | None) -> str:
    """The rejection, or the header of the accepted image."""
    try:
        return str(decode(data, LIMITS, target_side=target)[0])
    except ImageRejected as rejected:
        return str(rejected)


def pillow_decodes(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data), formats=["JPEG"]).load()
    except Exception:  # Pillow documents no list
        return False
    return True


@pytest.mark.parametrize("kind", ["4:4:4", "4:2:0", "progressive", "restarts", "grey", "CMYK", "MPO"])
def test_pillow_decides_on_acceptance_and_a_target_changes_neither_it_nor_reasons(kind: str) -> None:
    data = np.frombuffer(jpeg(kind), np.uint8)
    header = sum(map(len, segments(data.tobytes())[:-1]))
    outcomes = []
    for seed in range(40):
        generator = np.random.default_rng(seed)
        damaged = data.copy()
        match seed % 4:
            case 0:  # cut off anywhere; in one of three cases, within the last bytes
                length = generator.integers(3, len(data)) if seed % 3 else len(data) - generator.integers(1, 40)
                damaged = damaged[:length]
            case 1:  # bytes of the header
                damaged[generator.integers(2, header, 2)] = generator.integers(0, 256, 2)
            case 2:  # bytes of the pixels
                damaged[generator.integers(header, len(data), 3)] = generator.integers(0, 256, 3)
            case 3:  # a hole
                start = generator.integers(2, len(data))
                damaged = np.delete(damaged, slice(start, start + generator.integers(1, 2000)))
        expected = outcome(damaged.tobytes(), None)
        outcomes.append(expected)
        assert outcome(damaged.tobytes(), 100) == expected, seed
        assert expected.startswith("ImageHeader") == pillow_decodes(damaged.tobytes()), seed
    accepted = sum(text.startswith("ImageHeader") for text in outcomes)
    assert 3 < accepted < 40


def test_limits_are_checked_before_pixels_are_decoded_with_a_target() -> None:
    data = encoded(picture(), "JPEG")
    frame = data.index(b"\xff\xc0")
    for width, height, reason in [
        (65_000, 65_000, RejectReason.TOO_MANY_PIXELS),
        (65_000, 1_000, RejectReason.TOO_MANY_PIXELS),
        (5_000, 5_000, RejectReason.TRUNCATED),
        (5, 5_000, RejectReason.TOO_SMALL),
    ]:
        claimed = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 : -2]
        with pytest.raises(ImageRejected) as caught:
            decode_rgb(claimed, ImageLimits(min_side=16), target_side=8)
        assert caught.value.reason == reason


def test_scaled_decoding_gives_the_same_pixels_from_any_thread() -> None:
    data = [jpeg(kind) for kind in ("4:2:0", "progressive", "grey", "RGB")] * 16
    expected = [scaled_square(encoded_jpeg).tobytes() for encoded_jpeg in data[:4]] * 16
    with ThreadPoolExecutor(4) as threads:
        assert [pixels.tobytes() for pixels in threads.map(scaled_square, data)] == expected


# --- limits and bad bytes


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", RejectReason.EMPTY),
        (b"This is a text file named .jpg.", RejectReason.NOT_AN_IMAGE),
        (b"<!DOCTYPE html><html></html>", RejectReason.NOT_AN_IMAGE),
        (b"BMW builds cars and Bitmaps begin like this sentence.", RejectReason.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", RejectReason.UNSUPPORTED_FORMAT),
        (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', RejectReason.UNSUPPORTED_FORMAT),
        (b"\0\0\0\x1cftypavif\0\0\0\0", RejectReason.CORRUPT),
        (b"\x89PNG\r\n\x1a\nrubbish, and more of it", RejectReason.CORRUPT),
        (b"II\x2a\0\xff\xff\xff\xff", RejectReason.CORRUPT),
    ],
)
def test_bytes_that_are_no_image_have_a_reason(data: bytes, reason: RejectReason) -> None:
    assert reason_of(data) == reason
    with pytest.raises(ImageRejected, match=reason):
        read_header(data, LIMITS)


def test_limits_are_exact() -> None:
    data = encoded(picture(60, 40), "PNG")
    for exact, below, reason in [
        ({"max_bytes": len(data)}, {"max_bytes": len(data) - 1}, RejectReason.TOO_MANY_BYTES),
        ({"max_pixels": 2400}, {"max_pixels": 2399}, RejectReason.TOO_MANY_PIXELS),
        ({"min_side": 40}, {"min_side": 41}, RejectReason.TOO_SMALL),
    ]:
        assert decode_rgb(data, ImageLimits(**exact)).size == (60, 40)
        assert reason_of(data, ImageLimits(**below)) == reason


@pytest.mark.parametrize("image_format", ["AVIF", "GIF", "WEBP", "PNG"])
def test_too_many_frames_are_rejected(image_format: str) -> None:
    frames = [picture(seed=seed) for seed in range(5)]
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:])
    assert decode_rgb(data, ImageLimits(max_frames=5)).size == (60, 40)
    assert reason_of(data, ImageLimits(max_frames=4)) == RejectReason.TOO_MANY_FRAMES


@pytest.mark.parametrize("side", [8_000, 12_000, 25_000, 2_000_000_000])
def test_a_bomb_is_rejected_by_its_header(side: int) -> None:
    bomb = png(side, 1, 8, 0, b"").replace(struct.pack(">II", side, 1), struct.pack(">II", side, side))
    start = bomb.index(b"IHDR")
    bomb = bomb[: start + 17] + struct.pack(">I", zlib.crc32(bomb[start : start + 17])) + bomb[start + 21 :]
    assert reason_of(bomb) == RejectReason.TOO_MANY_PIXELS
    with pytest.raises(ImageRejected, match="too_many_pixels"):
        read_header(bomb, LIMITS)


def test_a_bomb_of_compressed_text_is_rejected() -> None:
    bomb = png(20, 20, 8, 0, bytes(400), zTXt=b"Comment\0\0" + zlib.compress(bytes(50_000_000)))
    assert reason_of(bomb) == RejectReason.CORRUPT


ENCODINGS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("GIF", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("AVIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("PPM", {}),
]


@pytest.mark.parametrize(("image_format", "options"), ENCODINGS)
def test_a_truncated_file_is_rejected_at_every_length(image_format: str, options: dict[str, object]) -> None:
    data = encoded(picture(), image_format, **options)
    for length in np.linspace(32, len(data) * 0.95, 25).astype(int):
        assert reason_of(data[:length]) in (RejectReason.TRUNCATED, RejectReason.CORRUPT), length
    if image_format in ("PNG", "JPEG", "GIF", "BMP", "PPM"):
        assert reason_of(data[: int(len(data) * 0.9)]) == RejectReason.TRUNCATED


@pytest.mark.parametrize(("image_format", "options"), ENCODINGS)
def test_damaged_bytes_give_the_same_image_or_reason_each_time(image_format: str, options: dict[str, object]) -> None:
    def outcome(data: bytes) -> tuple[str, bytes]:
        try:
            return "", decode_rgb(data, LIMITS).tobytes()
        except ImageRejected as rejected:
            return str(rejected), b""

    data = np.frombuffer(encoded(picture(), image_format, **options), np.uint8)
    for seed in range(30):
        generator = np.random.default_rng(seed)
        damaged = data.copy()
        damaged[generator.integers(0, len(data), 6)] = generator.integers(0, 256, 6)
        assert outcome(damaged.tobytes()) == outcome(damaged.tobytes())


def test_reasons_are_text_in_a_table() -> None:
    assert str(RejectReason.TOO_SMALL) == "too_small"
    assert all(reason == reason.lower() for reason in RejectReason)


NOISY_IMAGES = r"""
import io, struct, zlib
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from curation.images.decode import ImageLimits, ImageRejected, decode_rgb

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

def saved(form, **options):
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, form, **options)
    return file.getvalue()

head = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
tiff = saved("TIFF")
at = tiff.index(struct.pack("<HHI", 277, 3, 1)) + 8
channels = tiff[:at] + struct.pack("<H", 9000) + tiff[at + 2:]
exif = saved("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\1\x12\0\3\0\0\0\1")

def outcome(data):
    try:
        return str(decode_rgb(data, ImageLimits()).size)
    except ImageRejected as rejected:
        return str(rejected.reason)

with ThreadPoolExecutor(4) as threads:
    print(sorted(set(threads.map(outcome, [bomb, channels, exif] * 8))))
"""


def test_images_that_pillow_warns_of_are_rejected_or_decoded_without_a_message() -> None:
    """In a process of its own, because pytest has its own filters of warnings."""
    done = subprocess.run([sys.executable, "-W", "always", "-c", NOISY_IMAGES], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['(32, 32)', 'too_many_pixels', 'unsupported_pixels']\n"
