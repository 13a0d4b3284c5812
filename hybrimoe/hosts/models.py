"""The models that a program's arguments name, as files on this machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrimoe.errors import HybrimoeError, ModelError, UsageError
from hybrimoe.gguf_model import GgufModel, inspect
from hybrimoe.hosts import arguments as flags
from hybrimoe.hosts.arguments import Arguments
from hybrimoe.hosts.hub_cache import cached_model, cached_url

__all__ = ["Models", "find_models"]


@dataclass(frozen=True)
class Models:
    """`main` are the models to answer with (llama-bench: several), `draft` is the one that guesses ahead."""

    main: tuple[GgufModel, ...] = ()
    draft: GgufModel | None = None

    @property
    def with_experts(self) -> tuple[GgufModel, ...]:
        """Those whose experts can be shared, each once."""
        named = [*self.main, *([self.draft] if self.draft else [])]
        return tuple({model.path: model for model in named if model.is_moe}.values())


def find_models(arguments: Arguments, environment: Mapping[str, str], *, several: bool) -> Models:
    """Reads the headers of all models that the arguments name.

    Raises ModelError for a main model that is missing or damaged and for any model that would have to be downloaded;
    UsageError for one that cannot be known beforehand.
    """
    paths = _several(arguments, environment) if several else _one(arguments, environment)
    return Models(tuple(inspect(path) for path in dict.fromkeys(paths)), _draft(arguments, environment))


def _one(arguments: Arguments, environment: Mapping[str, str]) -> Sequence[Path]:
    path = arguments.value(flags.MODEL)
    repo = arguments.value(flags.HUB_REPO)
    url = arguments.value(flags.MODEL_URL)
    if arguments.value(flags.DOCKER_REPO) is not None:
        raise UsageError(
            f"{arguments.spelling(flags.DOCKER_REPO)} names a model whose file only the program finds",
            "run the program once by itself, then name the file with -m",
        )
    if repo is not None:
        # A file that -m names beside -hf was where older releases put the download.
        found = cached_model(repo, arguments.value(flags.HUB_FILE), environment)
        if found is None and path is not None and Path(path).is_file():
            found = Path(path)
        if found is None:
            raise _not_here(repo, arguments.value(flags.HUB_FILE))
        return [found]
    if url is not None:
        kept = Path(path) if path is not None else cached_url(url, environment)
        if kept is None or not kept.is_file():
            raise ModelError(f"the model of {url} is not on this machine", f"curl -LO {url}, then name the file by -m")
        return [kept]
    return [] if path is None else [Path(path)]


def _several(arguments: Arguments, environment: Mapping[str, str]) -> Sequence[Path]:
    """llama-bench: lists with commas, and flags given several times, add up."""

    def listed(flag: flags.Flag) -> list[str]:
        return [part for value in arguments.values(flag) for part in value.split(",")]

    paths = [Path(part) for part in listed(flags.MODEL)]
    files = listed(flags.HUB_FILE)
    for i, repo in enumerate(listed(flags.HUB_REPO)):
        file = files[i] if i < len(files) and files[i] else None
        found = cached_model(repo, file, environment)
        if found is None:
            raise _not_here(repo, file)
        paths.append(found)
    return paths


def _not_here(repo: str, file: str | None) -> ModelError:
    what = f"{repo}, {file}" if file else repo
    fetch = f"hf download {repo.partition(':')[0]} {file}" if file else f"hybrimoe models pull {repo}"
    return ModelError(f"'{what}' is not on this machine yet", f"{fetch}, then name the file that it prints with -m")


def _draft(arguments: Arguments, environment: Mapping[str, str]) -> GgufModel | None:
    """A draft may be a special head that only the program understands: then it is left to the program."""
    repo, name = arguments.value(flags.DRAFT_HUB_REPO), arguments.value(flags.DRAFT_MODEL)
    if repo:
        path = cached_model(repo, None, environment)
        if path is None and name and Path(name).is_file():
            path = Path(name)
        if path is None:
            what = f"{arguments.spelling(flags.DRAFT_HUB_REPO)} {repo}"
            raise ModelError(
                f"the draft of {what} is not on this machine yet",
                f"hybrimoe models pull {repo}, then name the file that it prints with -md",
            )
    elif name:
        path = Path(name)
        if not path.exists():
            raise ModelError(
                f"there is no draft '{name}' ({arguments.spelling(flags.DRAFT_MODEL)})",
                "ls -l *.gguf; hybrimoe models list",
            )
    else:
        return None
    try:
        return inspect(path)
    except HybrimoeError:
        return None
