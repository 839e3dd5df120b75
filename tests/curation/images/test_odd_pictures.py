"""Pictures stored in unusual ways: 16 bits, TIFF's layouts, ICC profiles, AVIF, frames smaller than their canvas."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from curation.images.color_profiles import MAX_PROFILE_BYTES
from curation.images.decode import ImageLimits, ImageRejected, RejectReason, decode, decode_picture, decode_rgb
from curation.images.sandbox import ImageSandbox
from tests.curation.images.odd_files import (
    ADOBE_PRIMARIES,
    P3_PRIMARIES,
    SRGB_PRIMARIES,
    animated_webp,
    rgb_profile,
    tiff,
    tiff_page,
)
from tests.curation.images.test_decode import encoded, picture, pixels, png

LIMITS = ImageLimits(min_side=1)


def rejection(data: bytes) -> ImageRejected:
    with pytest.raises(ImageRejected) as caught:
        decode_rgb(data, LIMITS)
    return caught.value


def values_up_to(largest: int, *shape: int) -> NDArray[np.uint16]:
    values = np.random.default_rng(0).integers(0, largest + 1, shape, dtype=np.uint16)
    values.flat[0] = largest
    return values


# --- 16 bits


@pytest.mark.parametrize(
    ("largest", "shift"),
    [(0, 0), (255, 0), (256, 2), (1023, 2), (1024, 4), (4095, 4), (10_000, 6), (16_383, 6), (16_384, 8), (65_535, 8)],
)
def test_sixteen_bits_keep_the_highest_bits_of_their_range(largest: int, shift: int) -> None:
    grey, color, transparent = (values_up_to(largest, 5, 7, *channels) for channels in ((), (3,), (4,)))
    transparent[..., 3] = 65_535
    expected = np.repeat((grey >> shift)[..., None], 3, axis=2)
    for image_format in ("PNG", "TIFF"):
        assert np.array_equal(pixels(decode_rgb(encoded(Image.fromarray(grey), image_format), LIMITS)), expected)
    big = color.astype(">u2").tobytes()
    files = [png(7, 5, 16, 2, big), png(7, 5, 16, 6, transparent.astype(">u2").tobytes())]
    files += [tiff(tiff_page(values, 2), order=order) for values in (color, transparent) for order in "<>"]
    for number, data in enumerate(files):
        values = color if number in (0, 2, 3) else transparent[..., :3]
        assert np.array_equal(pixels(decode_rgb(data, LIMITS)), values >> shift), number


def test_the_transparent_colour_of_a_dark_png_is_compared_in_its_range() -> None:
    grey = decode_rgb(png(2, 1, 16, 0, struct.pack(">HH", 3000, 4000), tRNS=struct.pack(">H", 3000)), LIMITS)
    assert [grey.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (250, 250, 250)]
    row, key = struct.pack(">6H", 3000, 2000, 1000, 4000, 2000, 1000), struct.pack(">3H", 3000, 2000, 1000)
    color = decode_rgb(png(2, 1, 16, 2, row, tRNS=key), LIMITS)
    assert [color.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (250, 125, 62)]


def test_a_ppm_states_its_range() -> None:
    values = (np.arange(4) * 1000).astype(">u2")
    decoded = decode_rgb(b"P5 2 2 4000\n" + values.tobytes(), LIMITS)
    assert pixels(decoded)[..., 0].ravel().tolist() == [0, 64, 128, 191]


# --- TIFF


@pytest.mark.parametrize("kind", ["<u2", "<f4", ">f4"])
def test_white_is_zero_is_inverted(kind: str) -> None:
    values = values_up_to(65_535, 5, 7).astype(np.dtype(kind[1:]))
    sample_format = 3 if "f" in kind else 1
    black, white = (
        pixels(decode_rgb(tiff(tiff_page(values, photometric, sample_format=sample_format), order=kind[0]), LIMITS))
        for photometric in (1, 0)
    )
    assert black.max() == 255
    assert np.array_equal(white, 255 - black)


def test_unsigned_integers_of_32_bits_do_not_wrap() -> None:
    values = np.array([[0, 1 << 30, 3 << 30, (1 << 32) - 1]], np.uint32)
    assert pixels(decode_rgb(tiff(tiff_page(values, 1)), LIMITS))[0, :, 0].tolist() == [0, 64, 191, 255]
    near = values[:, 3:] - np.arange(4, dtype=np.uint32)
    assert pixels(decode_rgb(tiff(tiff_page(near, 1)), LIMITS))[0, :, 0].tolist() == [255, 170, 85, 0]


def test_signed_integers_of_8_bits_do_not_wrap() -> None:
    values = np.array([[-128, -1, 0, 127]], np.int8)
    decoded = pixels(decode_rgb(tiff(tiff_page(values, 1, sample_format=2)), LIMITS))
    assert decoded[0, :, 0].tolist() == [0, 127, 128, 255]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tiff(tiff_page(np.zeros((20, 20, 5), np.uint16), 1)), "TIFF of 5 channels of 16 bits"),
        (tiff(tiff_page(np.zeros((20, 20, 13), np.uint8), 1)), "TIFF of 13 channels of 8 bits"),
        (tiff(tiff_page(np.zeros((20, 20), np.float64), 1, sample_format=3)), "TIFF of 1 channels of 64 bits"),
        (tiff(tiff_page(np.zeros((20, 20), np.uint16), 0), order=">"), "PhotometricInterpretation 0"),
        (tiff(tiff_page(np.zeros((20, 20), np.uint8), 1, t259=33_005)), "Compression 33005"),
        (tiff(tiff_page(np.zeros((20, 20, 3), np.uint16), 2, planar=2)), "PlanarConfiguration 2"),
        (tiff(tiff_page(np.zeros((20, 20, 1), np.uint16), 1, planar=2)), "PlanarConfiguration 2"),
    ],
)
def test_a_tiff_of_other_pixels_is_a_named_reject(data: bytes, words: str) -> None:
    rejected = rejection(data)
    assert rejected.reason == RejectReason.UNSUPPORTED_PIXELS
    assert words in rejected.detail and "convert such files" in rejected.detail


def test_a_stack_is_a_named_reject_and_smaller_copies_and_masks_are_no_pages() -> None:
    page = tiff_page(np.full((40, 60), 7, np.uint8), 1)
    rejected = rejection(tiff(page, page, page))
    assert rejected.reason == RejectReason.SEVERAL_PAGES
    assert "3 pages" in rejected.detail and "write each page to its own file" in rejected.detail
    further = [tiff_page(np.zeros((20, 30), np.uint8), 1, t254=kind) for kind in (1, 4, 5)]
    header, image = decode(tiff(page, *further), LIMITS)
    assert (header.num_frames, image.size, image.getcolors()) == (4, (60, 40), [(2400, (7, 7, 7))])


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (bytes(128) + b"DICM" + bytes(200), "DICOM"),
        (b"SIMPLE  =                    T", "FITS"),
        (b"\x89HDF\r\n\x1a\n" + bytes(200), "HDF5"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIF"),
        (b"\xff\x0a\xfa\x7f\x01\x90\x08\x06", "JPEGXL"),
    ],
)
def test_formats_that_are_not_decoded_are_named(data: bytes, name: str) -> None:
    rejected = rejection(data)
    assert (rejected.reason, rejected.detail) == (
        RejectReason.UNSUPPORTED_FORMAT,
        f"{name}; convert such files to PNG or JPEG",
    )


# --- AVIF


def test_an_avif_is_decoded_in_the_decoding_process() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rgba = picture().convert("RGBA")
    rgba.putalpha(picture(seed=1).convert("L"))
    with ImageSandbox(LIMITS) as sandbox:
        facts = sandbox.probe(encoded(picture(), "AVIF", exif=exif))
        assert (facts.width, facts.height, facts.format, facts.mode, facts.num_frames) == (40, 60, "AVIF", "RGB", 1)
        assert sandbox.probe(encoded(rgba, "AVIF")).mode == "RGBA"
        animation = encoded(picture(), "AVIF", save_all=True, append_images=[picture(seed=1)])
        assert sandbox.probe(animation).num_frames == 2
        data = encoded(picture(), "AVIF")
        with pytest.raises(ImageRejected, match=r"truncated|corrupt"):
            sandbox.probe(data[: len(data) // 2])
        assert sandbox.probe(data.replace(b"ftypavif", b"ftypmif1", 1)).format == "AVIF"
    decoded = pixels(decode_rgb(encoded(picture(), "AVIF", quality=95), LIMITS))
    assert np.abs(decoded - pixels(picture())).mean() < 3


# --- alpha and canvases


def test_a_bmp_whose_alpha_is_zero_everywhere_is_opaque() -> None:
    for alpha, expected in ((0, (200, 30, 40)), (255, (200, 30, 40)), (51, (244, 210, 212))):
        image = Image.new("RGBA", (20, 20), (200, 30, 40, alpha))
        data = encoded(image, "BMP")
        masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        header = struct.pack("<IiiHHIIiiII", 56, 20, -20, 1, 32, 3, 1600, 0, 0, 0, 0) + masks
        body = np.asarray(image)[..., [2, 1, 0, 3]].tobytes()
        data = b"BM" + struct.pack("<IHHI", 70 + len(body), 0, 0, 70) + header + body
        assert decode_rgb(data, LIMITS).getcolors() == [(400, expected)], alpha


@pytest.mark.parametrize("image_format", ["GIF", "WEBP"])
def test_a_first_frame_smaller_than_its_canvas_lies_on_white(image_format: str) -> None:
    frame = Image.new("P" if image_format == "GIF" else "RGB", (20, 10))
    frame.paste(0 if image_format == "GIF" else (200, 30, 40), (0, 0, 20, 10))
    if image_format == "GIF":
        frame.putpalette([200, 30, 40, 1, 2, 3])
        data = bytearray(encoded(frame, "GIF"))
        data[6:10] = struct.pack("<HH", 60, 40)
        start = data.index(b"\x2c")
        data[start + 1 : start + 5] = struct.pack("<HH", 6, 4)
    else:
        data = bytearray(animated_webp(frame, encoded(frame, "WEBP"), 6, 4, (60, 40)))
    expected = np.full((40, 60, 3), 255)
    expected[4:14, 6:26] = (200, 30, 40)
    assert np.abs(pixels(decode_rgb(bytes(data), LIMITS)) - expected).max() <= 2


# --- ICC profiles


P3 = rgb_profile(P3_PRIMARIES)


def srgb_of_p3(values: NDArray[np.generic]) -> NDArray[np.float64]:
    """Colours of Display P3 in sRGB, in float64. Cited: CSS Color 4, sample code for colour conversions."""
    encoded_values = values / 255
    linear = np.where(encoded_values <= 0.04045, encoded_values / 12.92, ((encoded_values + 0.055) / 1.055) ** 2.4)
    p3 = np.array([[0.4865709, 0.2656677, 0.1982173], [0.2289746, 0.6917385, 0.0792869], [0, 0.0451134, 1.0439444]])
    srgb = np.array(
        [[3.2409699, -1.5373832, -0.4986108], [-0.9692436, 1.8759675, 0.0415551], [0.0556301, -0.2039770, 1.0569715]]
    )
    linear = np.clip(linear @ (srgb @ p3).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_a_wide_gamut_becomes_srgb_on_every_path(image_format: str) -> None:
    options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "AVIF": {"quality": 95}}.get(image_format, {})
    plain, tagged = (encoded(picture(), image_format, **more) for more in (options, {**options, "icc_profile": P3}))
    expected = srgb_of_p3(pixels(decode_rgb(plain, LIMITS)))
    assert np.abs(expected - pixels(decode_rgb(plain, LIMITS))).max() > 20
    for decoded in (
        decode_rgb(tagged, LIMITS),
        decode_rgb(tagged, LIMITS, target_side=30),
        Image.fromarray(decode_picture(tagged, LIMITS, target_side=30).pixels),
    ):
        assert np.abs(pixels(decoded) - expected).max() <= 2


def test_a_scaled_jpeg_and_colours_with_alpha_are_converted() -> None:
    flat = Image.new("RGB", (400, 400), (200, 50, 60))
    expected = srgb_of_p3(np.array([200, 50, 60]))
    scaled = decode_picture(encoded(flat, "JPEG", quality=95, icc_profile=P3), LIMITS, target_side=100).pixels
    assert scaled.shape == (100, 100, 3) and np.abs(scaled - expected).max() <= 3
    flat.putalpha(51)
    mixed = pixels(decode_rgb(encoded(flat, "PNG", icc_profile=P3), LIMITS))
    assert np.abs(mixed - (0.2 * expected + 0.8 * 255)).max() <= 1
    indexed = Image.new("P", (20, 20))
    indexed.putpalette([200, 50, 60])
    assert np.abs(pixels(decode_rgb(encoded(indexed, "PNG", icc_profile=P3), LIMITS)) - expected).max() <= 1


def test_adobe_rgb_is_converted_and_srgb_and_useless_profiles_change_nothing() -> None:
    plain = pixels(decode_rgb(encoded(picture(), "PNG"), LIMITS))

    def decoded(profile: bytes, mode: str = "RGB") -> NDArray[np.int64]:
        return pixels(decode_rgb(encoded(picture().convert(mode), "PNG", icc_profile=profile), LIMITS))

    adobe = rgb_profile(ADOBE_PRIMARIES, gamma=2.2)
    assert np.abs(decoded(adobe) - plain).max() > 20
    for unused in (rgb_profile(SRGB_PRIMARIES), b"", b"no profile", P3[:300], P3.replace(b"RGB ", b"CMYK", 1)):
        assert np.array_equal(decoded(unused), plain)
    assert np.array_equal(decoded(P3, "L"), pixels(picture().convert("L").convert("RGB")))
    for size, equal in ((MAX_PROFILE_BYTES - len(P3), False), (MAX_PROFILE_BYTES - len(P3) + 1, True)):
        padded = encoded(picture(), "TIFF", icc_profile=rgb_profile(P3_PRIMARIES, size=size))
        assert np.array_equal(pixels(decode_rgb(padded, LIMITS)), plain) == equal


def test_colours_are_converted_to_the_same_pixels_in_any_thread() -> None:
    data = [encoded(picture(90, 80, seed), "JPEG", icc_profile=P3) for seed in range(4)]
    expected = [decode_rgb(encoded_jpeg, LIMITS).tobytes() for encoded_jpeg in data] * 16
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda jpeg: decode_rgb(jpeg, LIMITS).tobytes(), data * 16)) == expected


def test_a_bomb_of_a_profile_is_rejected() -> None:
    bomb = png(20, 20, 8, 2, bytes(1200), iCCP=b"name\0\0" + zlib.compress(bytes(60_000_000)))
    assert rejection(bomb).reason == RejectReason.CORRUPT


def test_a_profile_of_any_type_in_a_tiff_is_ignored() -> None:
    data = encoded(picture(), "TIFF", tiffinfo={34675: 7})
    assert np.array_equal(pixels(decode_rgb(data, LIMITS)), pixels(picture()))
