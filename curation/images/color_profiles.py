"""The ICC profiles of images: conversion of their colours to sRGB. LittleCMS, which Pillow carries, applies them.

    embedded profile                                    colours
    none, sRGB and its close variants                   unchanged
    another RGB space: Display P3, Adobe RGB, ...       converted to sRGB at 8 bits, by perceptual intent
    above MAX_PROFILE_BYTES, or unreadable              unchanged: the profile counts as absent

Colours that sRGB lacks are clipped, channel by channel. A profile is untrusted
input: ingest applies it in its decoding process before a later stage does.
"""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

# Assumed: above the tables of scanners (0.5 MB), far below a worker's memory.
MAX_PROFILE_BYTES = 1 << 20
# Largest difference from sRGB, in levels of 255, of a profile that counts as sRGB. Measured 2026-11: 0 to 1 for four
# profiles of sRGB, 9 for sRGB's primaries with gamma 2.2, 116 for Display P3.
MAX_SRGB_DIFFERENCE = 3


def conversion_to_srgb(profile: bytes | None) -> ImageCms.ImageCmsTransform | None:
    """The conversion of RGB pixels, for `convert`; None for colours that stay unchanged."""
    return _conversion(profile) if profile and len(profile) <= MAX_PROFILE_BYTES else None


def convert(image: Image.Image, conversion: ImageCms.ImageCmsTransform) -> Image.Image:
    """An image of mode RGB, converted in place."""
    assert image.mode == "RGB"
    return conversion.apply_in_place(image)


# A pool repeats few profiles. Reading one takes 3 ms, and finding it again microseconds (measured 2026-11).
@functools.lru_cache(maxsize=64)
def _conversion(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        conversion = ImageCms.ImageCmsTransform(source, target, "RGB", "RGB", ImageCms.Intent.PERCEPTUAL)
    except (OSError, ValueError):  # as LittleCMS refuses a damaged profile, and one of grey or of inks
        return None
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(64, 64, 3)
    converted = np.asarray(convert(Image.fromarray(grid), conversion))
    difference = np.abs(converted.astype(np.int16) - grid).max()
    return conversion if difference > MAX_SRGB_DIFFERENCE else None
