"""Importers of other trace formats, one file each. `import_files` looks at the content to choose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import open_regular
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.importers import layer_csv, moe_beyond, npz, route_csv
from hybrimoe.trace.importers.common import Imported, ImportOptions

__all__ = ["FORMATS", "ImportOptions", "Imported", "import_files"]

# Name: (does a file that begins like this have the format?, importer). The first that fits is taken.
FORMATS = {
    "npz": (npz.fits, npz.load),
    "moe-beyond": (moe_beyond.fits, moe_beyond.load),
    "route-csv": (route_csv.fits, route_csv.load),
    "layer-csv": (layer_csv.fits, layer_csv.load),
}
_SNIFFED_BYTES = 1 << 16


def import_files(paths: Sequence[Path], options: ImportOptions, format_name: str = "auto") -> Imported:
    """Reads traces of another format; several files are the prompts of one trace, in order.

    Raises:
        UsageError: the format is unknown, or files of different formats are mixed.
        TraceError: a file is missing, of no known format, or malformed; the line is named.
    """
    if format_name != "auto" and format_name not in FORMATS:
        raise UsageError(f"unknown trace format '{format_name}'", f"known are auto, {', '.join(FORMATS)}")
    names = {_format_of(path) if format_name == "auto" else format_name for path in paths}
    if len(names) > 1:
        raise UsageError(f"the files have different formats: {', '.join(sorted(names))}", "import them one by one")
    return FORMATS[names.pop()][1](paths, options)


def _format_of(path: Path) -> str:
    try:
        with open_regular(path) as file:
            start = file.read(_SNIFFED_BYTES)
    except FileNotFoundError as error:
        raise TraceError(f"no such file: '{path}'") from error
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error
    if not start:
        raise TraceError(f"'{path}' is empty")
    for name, (fits, _) in FORMATS.items():
        if fits(start):
            return name
    known = "npz with experts and prompt_offsets; CSV with Layer ID and Activated Expert IDs, with turn,phase,step,"
    raise TraceError(f"'{path}' has no known trace format", f"known are: {known}layer,slot,expert, with layer,expert")
