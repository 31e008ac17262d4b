"""Small arrays in JSON: base64 of zlib of little-endian numbers. Nothing is unpickled."""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

DTYPES = ("bool", "int8", "int32", "float32")


def pack_array(values: np.ndarray, dtype: str) -> dict[str, str]:
    """A one-dimensional array as ``{"dtype": ..., "data": ...}``.

    Raises:
        ValueError: on a type that is none of :data:`DTYPES`, or one that can't hold the values.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; allowed: {', '.join(DTYPES)}.")
    packed = np.asarray(values).astype(np.dtype(dtype).newbyteorder("<"))
    if not dtype.startswith("float") and not np.array_equal(packed, values):
        raise ValueError(f"{dtype} can't hold values from {np.min(values)} to {np.max(values)}.")
    return {"dtype": dtype, "data": base64.b64encode(zlib.compress(packed.tobytes(), 9)).decode()}


def unpack_array(packed: Mapping[str, Any]) -> np.ndarray:
    """What :func:`pack_array` packed.

    Raises:
        ValueError: if it is damaged, or of a type that it does not pack.
    """
    if packed["dtype"] not in DTYPES:
        raise ValueError(f"dtype={packed['dtype']!r}; allowed: {', '.join(DTYPES)}.")
    try:
        content = zlib.decompress(base64.b64decode(packed["data"], validate=True))
        return np.frombuffer(content, np.dtype(packed["dtype"]).newbyteorder("<")).astype(packed["dtype"])
    except (binascii.Error, zlib.error, ValueError) as error:
        raise ValueError(f"an array of a record is damaged ({error}).") from None
