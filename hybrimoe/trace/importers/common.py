"""What importers share: their result, CSV reading with line numbers, and assembling tokens."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe import files
from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.trace.errors import TraceError
from hybrimoe.trace.format import ModelIdentity

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_INTEGER = re.compile(r"-?[0-9]{1,18}")
_MOST = (1 << 31) - 1
_MAX_LAYERS = _MAX_TOP_K = 1024
# Cells of the array of ids for each id that the file names: layers that a token did not run are few.
_CELLS_PER_ID, _FREE_CELLS = 64, 1 << 20


@dataclass(frozen=True)
class ImportOptions:
    """What the user says that a file may lack. None: as in the file, or the least that fits."""

    name: str | None = None
    n_expert: int | None = None
    top_k: int | None = None
    expert_bytes: int | None = None


@dataclass
class Imported:
    """A trace in memory. `notes` are what was assumed, for the user."""

    model: ModelIdentity
    experts: npt.NDArray[np.int32]
    prompt: npt.NDArray[np.int32]
    is_decode: npt.NDArray[np.uint8] | None = None
    weights: npt.NDArray[np.float32] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def identity(
    options: ImportOptions,
    experts: npt.NDArray[np.int32],
    layers: Sequence[int],
    notes: list[str],
    *,
    name: str = "",
    n_expert: int = 0,
    expert_bytes: Sequence[int] = (),
) -> ModelIdentity:
    """The model of an import: what the user says goes before the file, and the file before a guess.

    Raises UsageError for an id above the number of experts that the user gave.
    """
    highest = int(experts.max(initial=-1))
    given = options.n_expert or n_expert
    if not given:
        given = highest + 1
        notes.append(f"the number of experts is not in the file: {given} assumed, from the highest id; --n-expert says")
    if highest >= given:
        raise UsageError(f"expert {highest} is in the file, but there are {given} experts", "give --n-expert")
    sizes = tuple(int(b) for b in expert_bytes)
    if options.expert_bytes is not None:
        sizes = (options.expert_bytes,) * len(layers)
    return ModelIdentity(
        options.name or name or "unknown model",
        n_layers=len(layers),
        n_expert=given,
        top_k=experts.shape[2],
        layers=tuple(int(layer) for layer in layers),
        expert_bytes=sizes,
    )


def read_text(path: Path) -> str:
    try:
        return files.read_text(path, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise TraceError(f"'{path}' is no UTF-8 text at byte {error.start}") from error
    except OSError as error:
        raise from_os_error(error, f"read '{path}'") from error


def header_of(start: bytes) -> list[str]:
    """Lower-case column names of a CSV file's first line that is no comment; empty for what is no text."""
    try:
        text = start.decode("utf-8-sig", "strict" if len(start) < 1024 else "ignore")
    except UnicodeDecodeError:
        return []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            try:
                return [cell.strip().lower() for cell in next(csv.reader([line]))]
            except csv.Error:
                return []
    return []


def rows(text: str, path: Path, needed: Sequence[str]) -> Iterator[tuple[int, Mapping[str, str]]]:
    """Rows of a CSV text as (line number, cells by lower-case column name). Comment lines begin with '#'."""
    lines = [("" if line.startswith("#") else line) for line in text.splitlines()]
    reader = csv.reader(io.StringIO("\n".join(lines)))
    try:
        yield from _cells(reader, path, needed)
    except csv.Error as error:
        raise bad_line(path, reader.line_num, str(error)) from error


def _cells(reader: Any, path: Path, needed: Sequence[str]) -> Iterator[tuple[int, Mapping[str, str]]]:
    names: list[str] = []
    for cells in reader:
        if not cells:
            continue
        if not names:
            names = [cell.strip().lower() for cell in cells]
            missing = [name for name in needed if name not in names]
            if missing:
                raise TraceError(f"'{path}' lacks the column '{missing[0]}'")
            continue
        if len(cells) != len(names):
            raise bad_line(path, reader.line_num, f"{len(cells)} cells for {len(names)} columns")
        yield reader.line_num, dict(zip(names, cells, strict=True))
    if not names:
        raise TraceError(f"'{path}' has no rows")


def bad_line(path: Path, line: int, what: str) -> TraceError:
    return TraceError(f"'{path}' line {line}: {what}", "every row must be whole; mend or cut the file")


def integer(path: Path, line: int, row: Mapping[str, str], name: str) -> int:
    """A whole number of at least 0."""
    try:
        value = int(row[name])
    except ValueError:
        raise bad_line(path, line, f"'{row[name]}' is no {name}") from None
    if not 0 <= value <= _MOST:
        raise bad_line(path, line, f"{name} {value} is {'below 0' if value < 0 else 'too large'}")
    return value


def check_size(path: Path, n_tokens: int, n_layers: int, top_k: int, n_ids: int) -> None:
    """Raises TraceError where `n_ids` ids in a file would become an array that no model's routing needs."""
    if n_layers > _MAX_LAYERS or not 1 <= top_k <= _MAX_TOP_K:
        raise TraceError(f"'{path}' has {n_layers} layers and top-{top_k}: no model has so many")
    if n_tokens * n_layers * top_k > _FREE_CELLS + _CELLS_PER_ID * n_ids:
        raise TraceError(f"'{path}' has {n_tokens} tokens and {n_layers} layers, but only {n_ids} expert ids")


def integers(path: Path, line: int, text: str) -> list[int]:
    """Ids in a cell such as '[8, 26, 56]' or '8 26 56'; they must be different and at least 0."""
    found = [int(number) for number in _INTEGER.findall(text)]
    sound = bool(found) and not _INTEGER.sub("", text).strip(" []();,")
    if not sound or min(found) < 0 or max(found) > _MOST or len(set(found)) < len(found):
        raise bad_line(path, line, f"'{text}' are no expert ids")
    return found
