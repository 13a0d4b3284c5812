"""The demo model's recipe: data in `models/demo/recipe.toml`, installed beside the package as `recipes/demo/`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrimoe.errors import HybrimoeError, UsageError

__all__ = ["DemoOptions", "Recipe", "load_recipe"]

_MAX_EXPERTS = 256


@dataclass(frozen=True)
class DemoOptions:
    """What may be chosen about a demo model; `None` is the recipe's default (layers: all of the source model)."""

    n_experts: int | None = None
    top_k: int | None = None
    type: str | None = None
    n_layers: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe with its options filled in."""

    folder: Path
    version: int
    name: str
    n_experts: int
    top_k: int
    type: str
    n_layers: int | None
    noise: float
    seed: int
    source: Mapping[str, str]
    chat: Mapping[str, str]
    router: Mapping[str, Any]
    corpus: Mapping[str, list[str]]
    is_default: bool

    @property
    def stem(self) -> str:
        """The model's name in the store."""
        if self.is_default:
            return "demo"
        layers = f"-l{self.n_layers}" if self.n_layers else ""
        return f"demo-e{self.n_experts}-k{self.top_k}-{self.type}{layers}"

    @property
    def signature(self) -> str:
        """Recorded in the built file: two files of one signature are the same model."""
        return json.dumps(
            {
                "version": self.version, "source": self.source["gguf_sha256"][:16], "n_experts": self.n_experts,
                "top_k": self.top_k, "type": self.type, "n_layers": self.n_layers,
            },
            sort_keys=True,
        )  # fmt: skip

    def texts(self, part: str) -> dict[str, str]:
        """The corpus by file name; `part` is `train` or `heldout`. No text is in both."""
        try:
            return {name: (self.folder / "corpus" / name).read_text(encoding="utf-8") for name in self.corpus[part]}
        except OSError as error:
            raise _missing(self.folder) from error


def load_recipe(options: DemoOptions | None = None) -> Recipe:
    """Reads the recipe and applies `options`. Raises `UsageError` for impossible options."""
    folder = _folder()
    try:
        data = _read_toml(folder / "recipe.toml")
    except OSError as error:
        raise _missing(folder) from error
    options = options or DemoOptions()
    model = data["model"]
    n_experts: int = model["n_experts"] if options.n_experts is None else options.n_experts
    top_k: int = model["top_k"] if options.top_k is None else options.top_k
    type_name: str = (options.type or model["type"]).upper()
    _check(n_experts, top_k, type_name, options.n_layers)
    defaults = (model["n_experts"], model["top_k"], model["type"], None)
    return Recipe(
        folder=folder,
        version=data["version"],
        name=model["name"],
        n_experts=n_experts,
        top_k=top_k,
        type=type_name,
        n_layers=options.n_layers,
        noise=data["experts"]["noise"],
        seed=data["experts"]["seed"],
        source=data["source"],
        chat=data["chat"],
        router=data["router"],
        corpus=data["corpus"],
        is_default=(n_experts, top_k, type_name, options.n_layers) == defaults,
    )


def _check(n_experts: int, top_k: int, type_name: str, n_layers: int | None) -> None:
    from hybrimoe.models.quantise import type_of

    if not 2 <= n_experts <= _MAX_EXPERTS:
        raise UsageError(f"{n_experts} experts are impossible", f"choose 2 to {_MAX_EXPERTS}")
    if not 1 <= top_k <= n_experts:
        raise UsageError(f"top-{top_k} of {n_experts} experts is impossible", f"choose 1 to {n_experts}")
    if n_layers is not None and n_layers < 1:
        raise UsageError(f"{n_layers} layers are impossible", "choose 1 or more")
    type_of(type_name)


def _folder() -> Path:
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "recipes" / "demo", package.parent / "models" / "demo"):
        if (folder / "recipe.toml").is_file():
            return folder
    raise _missing(package / "recipes" / "demo")


def _missing(folder: Path) -> HybrimoeError:
    return HybrimoeError(f"the demo model's recipe is incomplete: '{folder}'", "reinstall hybrimoe")


def _read_toml(path: Path) -> dict[str, Any]:
    toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    data: dict[str, Any] = toml.loads(path.read_text(encoding="utf-8"))
    return data
