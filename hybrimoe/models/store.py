"""The models on this machine: built ones by name, others by path."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.errors import HybrimoeError, ModelError
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.models.recipe import DemoOptions, load_recipe

__all__ = [
    "DEMO_NAME",
    "ModelEntry",
    "build_demo",
    "is_known_name",
    "list_models",
    "model_info",
    "models_dir",
    "resolve",
]

DEMO_NAME = "demo"
_BUILD_HINT = "hybrimoe models build demo"

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class ModelEntry:
    """One model of the store. `path` is `None` while a known model is not built; `error` says why it cannot be read."""

    name: str
    path: Path | None
    model: GgufModel | None = None
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        info: dict[str, Any] = {"name": self.name, "path": str(self.path) if self.path else None, "error": self.error}
        if self.model:
            for key in (
                "architecture", "file_type", "n_layers", "n_experts", "n_experts_used", "file_bytes", "expert_bytes",
                "is_moe",
            ):  # fmt: skip
                info[key] = self.model.to_dict()[key]
        return info


def models_dir() -> Path:
    """The folder of built models: `HYBRIMOE_MODELS`, or `models` in the user's data folder (`XDG_DATA_HOME`)."""
    import platformdirs

    if chosen := os.environ.get("HYBRIMOE_MODELS"):
        return Path(chosen).expanduser()
    return Path(platformdirs.user_data_dir("hybrimoe", appauthor=False)) / "models"


def list_models() -> list[ModelEntry]:
    """All models of the store by name; the demo comes first, built or not. Later parts of split models are left out."""
    entries = [_entry(path) for path in sorted(models_dir().glob("*.gguf")) if not _is_later_part(path)]
    if all(entry.name != DEMO_NAME for entry in entries):
        entries.insert(0, ModelEntry(DEMO_NAME, None, error="not built yet"))
    return sorted(entries, key=lambda entry: (entry.name != DEMO_NAME, entry.name))


def _entry(path: Path) -> ModelEntry:
    try:
        return ModelEntry(path.stem, path, inspect(path))
    except HybrimoeError as error:
        return ModelEntry(path.stem, path, error=error.message)


def _is_later_part(path: Path) -> bool:
    return "-of-" in path.stem and not path.stem.rpartition("-of-")[0].endswith("-00001")


def is_known_name(name: str) -> bool:
    """Whether `name` is the demo (built or not) or a model of the store."""
    return name == DEMO_NAME or ("/" not in name and (models_dir() / f"{name}.gguf").is_file())


def resolve(name_or_path: str | Path) -> Path:
    """The file of a model given by name or path; an existing file goes before a name.

    Raises `ModelError` (exit code 3) when there is none, with the command that builds or lists models as hint.
    """
    text = str(name_or_path)
    path = Path(name_or_path)
    try:
        if path.exists():
            return path
    except ValueError:
        raise ModelError(f"not a usable file name: {text!r}", "hybrimoe models list") from None
    if "/" not in text:
        built = models_dir() / f"{text}.gguf"
        if built.is_file():
            return built
        if text == DEMO_NAME:
            raise ModelError("the demo model is not built yet", _BUILD_HINT)
    raise ModelError(f"no such model: '{text}'", "hybrimoe models list, or give the path of a .gguf file")


def build_demo(options: DemoOptions | None = None, progress: Progress | None = None, *, force: bool = False) -> Path:
    """Builds the demo model with these options and returns its path; one that is there already is not built again.

    `progress` is called with what is being done and the share of it that is done. Raises `UsageError` for impossible
    options and `HybrimoeError` when the source cannot be fetched or a file cannot be written; then, and on Ctrl-C, an
    earlier model stays as it was.
    """
    from hybrimoe.models.source import fetch_dense_model

    recipe = load_recipe(options)
    path = models_dir() / f"{recipe.stem}.gguf"
    if not force and _signature(path) == recipe.signature:
        return path
    from hybrimoe.models.demo import upcycle

    report = progress or (lambda label, share: None)
    return upcycle(fetch_dense_model(recipe, report), path, recipe, report)


def _signature(path: Path) -> str:
    from hybrimoe.models.demo import SIGNATURE_KEY

    if not path.is_file():
        return ""
    try:
        return str(inspect(path).metadata.get(SIGNATURE_KEY, ""))
    except HybrimoeError:
        return ""


def model_info(name_or_path: str | Path) -> dict[str, Any]:
    """What `hybrimoe models show` prints: JSON-able, with `path`. Raises `ModelError` like `resolve` and `inspect`."""
    return inspect(resolve(name_or_path)).to_dict()
