"""The decoder: every colour mode by its stated rule, orientation, limits, and no way out but an image or a reason."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from curation.images import (
    EXTENSION_OF_FORMAT,
    ImageLimits,
    ImageRejected,
    RejectReason,
    decode,
    decode_rgb,
    read_header,
)

# Pillow warns of damage before it raises, and of sizes that ImageLimits then refuses.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")

LIMITS = ImageLimits(min_side=1)
ORIENTATION = 0x0112


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
    """A PNG written by hand, for what Pillow does not write. `rows` lack the filter bytes."""

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
def test_opaque_modes_are_what_pillow_converts(mode: str, image_format: str) -> None:
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


def test_invisible_colours_do_not_show() -> None:
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
        (16, 0, bytes([7, 0, 9, 0]), struct.pack(">H", 0x0700), [WHITE, (9, 9, 9)]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">HHH", 1, 2, 3), [WHITE, (4, 5, 6)]),
        (16, 2, bytes([1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0]), struct.pack(">HHH", 256, 512, 768), [WHITE, (4, 5, 6)]),
    ],
)
def test_a_transparent_colour_counts_at_every_bit_depth(
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


def test_eight_bits_survive_widening_to_sixteen() -> None:
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


def test_a_float_image_of_one_value_is_black_and_one_of_no_number_is_corrupt() -> None:
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


def test_the_first_frame_of_an_animation_counts() -> None:
    first, second, third = (picture(seed=seed).convert("P").convert("RGB") for seed in (1, 2, 3))
    for image_format, options in [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})]:
        data = encoded(first, image_format, save_all=True, append_images=[second, third], **options)
        header, image = decode(data, LIMITS)
        assert header.num_frames == 3
        assert np.array_equal(pixels(image), pixels(first))


def test_a_jpeg_with_further_pictures_behind_it_is_a_jpeg() -> None:
    data = encoded(picture(), "MPO", save_all=True, append_images=[picture(seed=1)])
    header, image = decode(data, LIMITS)
    assert (header.format, header.num_frames) == ("JPEG", 2)
    assert np.array_equal(pixels(image), pixels(decode_rgb(encoded(picture(), "JPEG"), LIMITS)))


def test_the_result_carries_no_metadata() -> None:
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
    theirs = np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR))[..., ::-1]
    assert np.abs(pixels(decode_rgb(data, LIMITS)) - theirs.astype(np.int64)).max() <= 2


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


def test_a_large_jpeg_is_decoded_reduced_and_never_below_the_target() -> None:
    data = encoded(picture(1600, 1200), "JPEG")
    for target in (100, 224, 300, 599, 601, 1300):
        header, image = decode(data, LIMITS, target_side=target)
        assert (header.width, header.height) == (1600, 1200)
        assert min(image.size) >= min(target, 1200)
    assert decode_rgb(data, LIMITS, target_side=224).size == (400, 300)
    assert decode_rgb(encoded(picture(1600, 1200), "PNG"), LIMITS, target_side=224).size == (1600, 1200)


def test_reduced_decoding_keeps_orientation() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 8
    header, image = decode(encoded(picture(1600, 1200), "JPEG", exif=exif), LIMITS, target_side=300)
    assert ((header.width, header.height), image.size) == ((1200, 1600), (300, 400))


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
        (b"\0\0\0\x1cftypavif\0\0\0\0", RejectReason.UNSUPPORTED_FORMAT),
        (b"\x89PNG\r\n\x1a\nrubbish, and more of it", RejectReason.CORRUPT),
        (b"II\x2a\0\xff\xff\xff\xff", RejectReason.CORRUPT),
    ],
)
def test_what_is_no_image_has_a_reason(data: bytes, reason: RejectReason) -> None:
    assert reason_of(data) == reason
    with pytest.raises(ImageRejected, match=reason):
        read_header(data, LIMITS)


def test_limits_hold_at_their_edges() -> None:
    data = encoded(picture(60, 40), "PNG")
    for exact, below, reason in [
        ({"max_bytes": len(data)}, {"max_bytes": len(data) - 1}, RejectReason.TOO_MANY_BYTES),
        ({"max_pixels": 2400}, {"max_pixels": 2399}, RejectReason.TOO_MANY_PIXELS),
        ({"min_side": 40}, {"min_side": 41}, RejectReason.TOO_SMALL),
    ]:
        assert decode_rgb(data, ImageLimits(**exact)).size == (60, 40)
        assert reason_of(data, ImageLimits(**below)) == reason


@pytest.mark.parametrize("image_format", ["GIF", "TIFF", "WEBP", "PNG"])
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


def test_compressed_text_that_swells_is_rejected() -> None:
    bomb = png(20, 20, 8, 0, bytes(400), zTXt=b"Comment\0\0" + zlib.compress(bytes(50_000_000)))
    assert reason_of(bomb) == RejectReason.CORRUPT


ENCODINGS = [
    ("PNG", {}),
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("GIF", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("PPM", {}),
]


@pytest.mark.parametrize(("image_format", "options"), ENCODINGS)
def test_a_truncated_file_is_rejected_wherever_it_ends(image_format: str, options: dict[str, object]) -> None:
    data = encoded(picture(), image_format, **options)
    for length in np.linspace(32, len(data) * 0.95, 25).astype(int):
        assert reason_of(data[:length]) in (RejectReason.TRUNCATED, RejectReason.CORRUPT), length
    if image_format in ("PNG", "JPEG", "GIF", "BMP", "PPM"):
        assert reason_of(data[: int(len(data) * 0.9)]) == RejectReason.TRUNCATED


@pytest.mark.parametrize(("image_format", "options"), ENCODINGS)
def test_damaged_bytes_give_an_image_or_a_reason_and_the_same_one_again(
    image_format: str, options: dict[str, object]
) -> None:
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


def test_reasons_read_as_text_in_a_table() -> None:
    assert str(RejectReason.TOO_SMALL) == "too_small"
    assert all(reason == reason.lower() for reason in RejectReason)
