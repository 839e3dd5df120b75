"""Curation's only door to OpenCV."""

from typing import Any

from curation.errors import DeviceError


def load_opencv() -> Any:
    """The module cv2, with one thread. Raises DeviceError where OpenCV is not installed."""
    try:
        import cv2
    except ModuleNotFoundError:
        raise DeviceError(
            "pairs.verification needs OpenCV, which is not installed. Install it with: "
            "pip install opencv-python-headless"
        ) from None
    cv2.setNumThreads(1)  # the runner's workers already use all processors
    return cv2
