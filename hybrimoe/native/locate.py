"""Where the compiled libraries of this package are."""

from __future__ import annotations

from pathlib import Path


def installed_library(name: str) -> Path:
    """The library `name` of this package; the file need not exist.

    In an editable install the modules are in the source tree and the compiled files in site-packages: both are looked
    into.
    """
    import hybrimoe.native

    for folder in hybrimoe.native.__path__:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    return Path(__file__).with_name(name)
