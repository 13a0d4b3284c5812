"""Where llama.cpp keeps models of Hugging Face's hub: the hub's own cache, and the flat folder of releases before that.

Rules are those of common/hf-cache.cpp and common/download.cpp of the pinned release; the flat names are those of the
releases that wrote `manifest=USER=REPO=TAG.json` files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybrimoe.files import read_text

__all__ = ["cached_model", "cached_url"]

_COMMIT = re.compile(r"[0-9A-Fa-f]{40}")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_USUAL_TAGS = ("Q4_K_M", "Q8_0")


def cached_model(repo: str, file: str | None, environment: Mapping[str, str]) -> Path | None:
    """The file that `-hf repo[:tag]` (with `-hff file`) means, if it is on this machine; of a split model its first."""
    name, _, tag = repo.partition(":")
    folder = _hub_folder(environment) / f"models--{name.replace('/', '--')}"
    if commit := _commit(folder):
        snapshot = folder / "snapshots" / commit
        paths = {p.relative_to(snapshot).as_posix(): p for p in _files(snapshot)}
        chosen = _choose(list(paths), tag, file)
        if chosen is not None and paths[chosen].exists():
            return paths[chosen]
    return _in_flat_folder(name, tag, file, environment)


def cached_url(url: str, environment: Mapping[str, str]) -> Path | None:
    """The file that `-mu url` is kept in, if it is there."""
    name = url.split("#")[0].split("?")[0].rpartition("/")[2]
    path = _flat_folder(environment) / name
    return path if name and path.is_file() else None


def _home(environment: Mapping[str, str]) -> Path:
    return Path(environment.get("HOME") or Path.home())


def _hub_folder(environment: Mapping[str, str]) -> Path:
    for variable, below in (
        ("LLAMA_CACHE", ""),
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if environment.get(variable):
            return Path(environment[variable]) / below
    return _home(environment) / ".cache" / "huggingface" / "hub"


def _flat_folder(environment: Mapping[str, str]) -> Path:
    if environment.get("LLAMA_CACHE"):
        return Path(environment["LLAMA_CACHE"])
    cache = environment.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else _home(environment) / ".cache") / "llama.cpp"


def _commit(repo: Path) -> str | None:
    """What `refs/main` points to, else the first of the other branches."""
    refs = repo / "refs"
    names = sorted(_files(refs), key=lambda path: (path.name != "main", path.name))
    for path in names:
        try:
            commit = read_text(path).partition("\n")[0].strip()
        except (OSError, ValueError):
            continue
        if _COMMIT.fullmatch(commit):
            return commit
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if not path.is_dir()) if folder.is_dir() else []


def _choose(names: Sequence[str], tag: str, file: str | None) -> str | None:
    """llama.cpp's choice among the files of a repository."""
    if file:
        return file if file in names else None
    models = [name for name in names if _is_model(name)]
    for wanted in [tag] if tag else _USUAL_TAGS:
        pattern = re.compile(rf"{re.escape(wanted)}[.-]", re.IGNORECASE)
        for name in models:
            if pattern.search(name):
                return name
    return models[0] if models and not tag else None


def _is_model(name: str) -> bool:
    last = name.rpartition("/")[2]
    split = _SPLIT.fullmatch(last)
    is_first = split is None or int(split[3]) <= 1 or int(split[2]) == 1
    return last.endswith(".gguf") and is_first and not any(word in last for word in _NO_MODEL)


def _in_flat_folder(name: str, tag: str, file: str | None, environment: Mapping[str, str]) -> Path | None:
    folder = _flat_folder(environment)
    prefix = f"{name.replace('/', '_')}_"
    if file is None:
        manifest = folder / f"manifest={name.replace('/', '=')}={tag or 'latest'}.json"
        try:
            file = json.loads(read_text(manifest))["ggufFile"]["rfilename"]
        except (OSError, ValueError, KeyError, TypeError):
            file = None
    if isinstance(file, str):
        path = folder / (prefix + file.replace("/", "_").replace("\\", "_"))
        return path if path.is_file() else None
    names = [p.name.removeprefix(prefix) for p in _files(folder) if p.parent == folder and p.name.startswith(prefix)]
    chosen = _choose(names, tag, None)
    return None if chosen is None else folder / (prefix + chosen)
