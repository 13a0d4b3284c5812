"""The arguments of a llama.cpp program, read as common/arg.cpp and llama-bench read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hybrimoe.errors import UsageError
from hybrimoe.hosts.help_page import Grammar

__all__ = ["Arguments", "Flag", "Item", "is_truthy"]


@dataclass(frozen=True)
class Flag:
    """One setting: its names through llama.cpp's releases, and its environment variables."""

    names: tuple[str, ...]
    variables: tuple[str, ...] = ()


MODEL = Flag(("-m", "--model"), ("LLAMA_ARG_MODEL",))
HUB_REPO = Flag(("-hf", "-hfr", "--hf-repo"), ("LLAMA_ARG_HF_REPO",))
HUB_FILE = Flag(("-hff", "--hf-file"), ("LLAMA_ARG_HF_FILE",))
MODEL_URL = Flag(("-mu", "--model-url"), ("LLAMA_ARG_MODEL_URL",))
DOCKER_REPO = Flag(("-dr", "--docker-repo"), ("LLAMA_ARG_DOCKER_REPO",))
DRAFT_MODEL = Flag(
    ("-md", "--model-draft", "--spec-draft-model"), ("LLAMA_ARG_SPEC_DRAFT_MODEL", "LLAMA_ARG_MODEL_DRAFT")
)
DRAFT_HUB_REPO = Flag(
    ("-hfd", "-hfrd", "--hf-repo-draft", "--spec-draft-hf"), ("LLAMA_ARG_SPEC_DRAFT_HF_REPO", "LLAMA_ARG_HFD_REPO")
)
SPEC_TYPE = Flag(("--spec-type",), ("LLAMA_ARG_SPEC_TYPE",))
OVERRIDE = Flag(("-ot", "--override-tensor"), ("LLAMA_ARG_OVERRIDE_TENSOR",))
DRAFT_OVERRIDE = Flag(("-otd", "--override-tensor-draft", "--spec-draft-override-tensor"))
CPU_MOE = Flag(("-cmoe", "--cpu-moe"), ("LLAMA_ARG_CPU_MOE",))
N_CPU_MOE = Flag(("-ncmoe", "--n-cpu-moe"), ("LLAMA_ARG_N_CPU_MOE",))
DRAFT_CPU_MOE = Flag(
    ("-cmoed", "--cpu-moe-draft", "--spec-draft-cpu-moe",
     "-ncmoed", "--n-cpu-moe-draft", "--spec-draft-n-cpu-moe", "--spec-draft-ncmoe"),
    ("LLAMA_ARG_SPEC_DRAFT_CPU_MOE", "LLAMA_ARG_SPEC_DRAFT_N_CPU_MOE",
     "LLAMA_ARG_CPU_MOE_DRAFT", "LLAMA_ARG_N_CPU_MOE_DRAFT"),
)  # fmt: skip
FIT = Flag(("-fit", "--fit"), ("LLAMA_ARG_FIT",))
FIT_TARGET = Flag(("-fitt", "--fit-target"), ("LLAMA_ARG_FIT_TARGET",))
FIT_CTX = Flag(("-fitc", "--fit-ctx"), ("LLAMA_ARG_FIT_CTX",))
MOE_CACHE = Flag(("--moe-cache-mib",), ("LLAMA_ARG_MOE_CACHE_MIB",))
CTX_SIZE = Flag(("-c", "--ctx-size"), ("LLAMA_ARG_CTX_SIZE",))
THREADS = Flag(("-t", "--threads"), ("LLAMA_ARG_THREADS",))
THREADS_BATCH = Flag(("-tb", "--threads-batch"))
BATCH = Flag(("-b", "--batch-size"), ("LLAMA_ARG_BATCH",))
UBATCH = Flag(("-ub", "--ubatch-size"), ("LLAMA_ARG_UBATCH",))
DEVICE = Flag(("-dev", "--device"), ("LLAMA_ARG_DEVICE",))
N_GPU_LAYERS = Flag(("-ngl", "--gpu-layers", "--n-gpu-layers"), ("LLAMA_ARG_N_GPU_LAYERS",))
SPLIT_MODE = Flag(("-sm", "--split-mode"), ("LLAMA_ARG_SPLIT_MODE",))
# With these a program says something and ends, whatever else it is given.
INFORMATION = Flag(
    ("-h", "--help", "--usage", "--version", "--list-devices", "-cl", "--cache-list", "--completion-bash", "--license")
)
SERVER_BASE = Flag(("--server-base",))


@dataclass(frozen=True)
class Item:
    """A flag as the program knows it, its values, and the words as they were typed."""

    flag: str
    values: tuple[str, ...]
    words: tuple[str, ...]


@dataclass(frozen=True)
class Arguments:
    """What a program is given. `environment` is empty for a program that reads none (llama-bench)."""

    items: tuple[Item, ...]
    environment: Mapping[str, str]

    @classmethod
    def read(cls, words: Sequence[str], grammar: Grammar, environment: Mapping[str, str]) -> Arguments:
        """Words that belong to no flag become separate items; the program judges them."""
        items = []
        rest = list(words)
        while rest:
            word = rest.pop(0)
            # arg.cpp and llama-bench: an underscore in a long flag is a dash.
            flag = word.replace("_", "-") if word.startswith("--") else word
            n = grammar.n_values.get(flag, 0)
            values, rest = rest[:n], rest[n:]
            items.append(Item(flag, tuple(values), (word, *values)))
        return cls(tuple(items), environment)

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(word for item in self.items for word in item.words)

    def typed(self, flag: Flag) -> list[Item]:
        """Where the flag stands among the arguments."""
        return [item for item in self.items if item.flag in flag.names]

    def values(self, flag: Flag) -> list[str]:
        """Its first value wherever it was typed."""
        return [item.values[0] for item in self.typed(flag) if item.values]

    def variable(self, flag: Flag) -> str | None:
        """The name of the flag's environment variable that is set."""
        return next((name for name in flag.variables if name in self.environment), None)

    def value(self, flag: Flag) -> str | None:
        """The last one typed, else the environment's."""
        if typed := self.values(flag):
            return typed[-1]
        name = self.variable(flag)
        return None if name is None else self.environment[name]

    def spelling(self, flag: Flag) -> str:
        """The flag or variable that the user gave, for messages; the flag's first name if neither was given."""
        typed = self.typed(flag)
        return typed[-1].flag if typed else self.variable(flag) or flag.names[0]

    def is_on(self, flag: Flag) -> bool:
        """Whether a flag without a value was typed, or its variable says yes."""
        name = self.variable(flag)
        return bool(self.typed(flag)) or (name is not None and is_truthy(self.environment[name]))

    def number(self, flag: Flag, default: int) -> int:
        """Raises UsageError for a value that is not an integer."""
        text = self.value(flag)
        if text is None:
            return default
        try:
            return int(text)
        except ValueError:
            raise UsageError(
                f"{self.spelling(flag)}: '{text}' is not an integer", "one number holds for the whole run"
            ) from None

    def without(self, *flags: Flag) -> Arguments:
        names = {name for flag in flags for name in flag.names}
        return replace(self, items=tuple(item for item in self.items if item.flag not in names))

    def adding(self, *words: str) -> Arguments:
        return replace(self, items=(*self.items, Item(words[0], tuple(words[1:]), words)))

    def with_values(self, flag: Flag, change: Callable[[str], str], *, only_last: bool) -> Arguments:
        """The flag's values changed where they were typed: all, or the last one alone."""
        typed = [item for item in self.typed(flag) if item.values]
        chosen = typed[-1:] if only_last else typed
        items = []
        for item in self.items:
            if any(item is one for one in chosen):
                value = change(item.values[0])
                item = Item(item.flag, (value, *item.values[1:]), (item.words[0], value, *item.words[2:]))
            items.append(item)
        return replace(self, items=tuple(items))


def is_truthy(text: str) -> bool:
    """llama.cpp's words for yes (`is_truthy` in common/arg.cpp)."""
    return text in ("on", "enabled", "true", "1")
