"""Content hashes of what is no image."""

import hashlib
import json
from typing import Any


def hash_json(value: Any) -> str:
    """The SHA-256 of `value` as canonical JSON (sorted keys, no spaces), as 64 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
