"""What the test device has counted in this process; see native/tests/device/test_device.h and counts.def there."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path


class DeviceCalls:
    """The counts of a loaded test device; `module` is its path."""

    def __init__(self, module: Path | str) -> None:
        self._library = ctypes.CDLL(str(module))
        # int64_t test_device_counts(char * json, size_t size)
        self._library.test_device_counts.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
        self._library.test_device_counts.restype = ctypes.c_int64

    def reset(self) -> None:
        """Begin a new window."""
        self._library.test_device_reset_counts()

    def stand_first(self) -> None:
        """Put the device before the CPU in ggml's list, as a GPU that llama.cpp is compiled for; before it is used."""
        self._library.test_device_stand_first()

    def window(self) -> dict[str, int]:
        """Counts since the last reset."""
        return self._read("window")

    def total(self) -> dict[str, int]:
        """Counts since the module was loaded."""
        return self._read("total")

    def _read(self, part: str) -> dict[str, int]:
        text = ctypes.create_string_buffer(self._library.test_device_counts(None, 0) + 1)
        self._library.test_device_counts(text, len(text))
        counts: dict[str, int] = json.loads(text.value)[part]
        return counts
