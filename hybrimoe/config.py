"""Settings: one table of options, each from its flag, llama.cpp's environment variable, the config file or a default.

The table is the only place that knows an option's names; the commands' flags, the environment, the config file and
`--print-config` all come from it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import read_text

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_BINARY_UNITS = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in a size such as '6GiB', '512M' or '1.5 GB'. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"'{text}' is no size such as 6GiB")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_BINARY_UNITS.get(unit) or _UNITS[unit]))


def parse_bool(text: str) -> bool:
    """llama.cpp's words for yes and no (`is_truthy`, `is_falsey` in common/arg.cpp). Raises ValueError."""
    word = text.strip().lower()
    if word in ("on", "enabled", "true", "1", "yes"):
        return True
    if word in ("off", "disabled", "false", "0", "no"):
        return False
    raise ValueError(f"'{text}' is neither on nor off")


def integer(least: int | None = None, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers within bounds."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(f"'{text}' is no whole number") from None
        if least is not None and value < least:
            raise ValueError(f"{value} is below {least}")
        if most is not None and value > most:
            raise ValueError(f"{value} is above {most}")
        return value

    return parse


def number(least: float | None = None, most: float | None = None) -> Callable[[str], float]:
    """A parser of finite numbers within bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"'{text}' is no number") from None
        if not math.isfinite(value):
            raise ValueError(f"'{text}' is not finite")
        if least is not None and value < least:
            raise ValueError(f"{text} is below {least:g}")
        if most is not None and value > most:
            raise ValueError(f"{text} is above {most:g}")
        return value

    return parse


def choice(*words: str) -> Callable[[str], str]:
    """A parser of one of `words`; upper and lower case are the same."""

    def parse(text: str) -> str:
        if text.strip().lower() in words:
            return text.strip().lower()
        raise ValueError(f"'{text}' is none of {', '.join(words)}")

    return parse


def flash_attention(text: str) -> str:
    """'on', 'off' or 'auto' in llama.cpp's words. Raises ValueError."""
    if text.strip().lower() in ("auto", "-1"):
        return "auto"
    try:
        return "on" if parse_bool(text) else "off"
    except ValueError:
        raise ValueError(f"'{text}' is none of on, off, auto") from None


def gpu_layers(text: str) -> int:
    """A number of layers, 'auto' or 'all'. Raises ValueError."""
    # llama.cpp: -1 is auto, -2 and below all.
    words = {"auto": -1, "all": -2}
    word = text.strip().lower()
    return words[word] if word in words else integer()(text)


def cpu_range(text: str) -> str:
    """Processors as 'first-last' or one number. Raises ValueError."""
    first, dash, last = text.strip().partition("-")
    if not first.isdigit() or (dash and not last.isdigit()) or (dash and int(last) < int(first)):
        raise ValueError(f"'{text}' is no range of processors, such as 0-7")
    return text.strip()


def seed(text: str) -> int:
    """A seed as llama.cpp takes it: -1 is the one that means random. Raises ValueError."""
    return integer(-1, 0xFFFFFFFF)(text)


@dataclass(frozen=True)
class Option:
    """One setting. `flags` as the user types them, `no_flags` their negative forms (for switches).

    The first long flag without its dashes is the key in the config file, `--print-config` and `Settings`. `parse` is
    None for switches; `repeats` for options that may be given several times. `unset` says what a default of None
    means; `section` groups options in the help.
    """

    flags: tuple[str, ...]
    help: str
    default: Any = None
    parse: Callable[[str], Any] | None = str
    metavar: str | None = None
    environment: str | None = None
    no_flags: tuple[str, ...] = ()
    repeats: bool = False
    section: str = "Options"
    unset: str = "none"
    in_file: bool = True
    is_secret: bool = False

    @property
    def key(self) -> str:
        return self.long_names[0]

    @property
    def name(self) -> str:
        """The key as a Python name."""
        return self.key.replace("-", "_")

    @property
    def long_names(self) -> list[str]:
        return [flag[2:] for flag in self.flags if flag.startswith("--")]

    @property
    def is_switch(self) -> bool:
        return self.parse is None

    def value(self, given: Any, where: str) -> Any:
        """`given` (text, a list of texts, or a bool for switches), parsed. Raises UsageError naming `where`."""
        if self.repeats:
            items = given if isinstance(given, list) else [given]
            return tuple(self._one(item, where) for item in items)
        return self._one(given, where)

    def _one(self, given: Any, where: str) -> Any:
        try:
            if self.is_switch:
                return given if isinstance(given, bool) else parse_bool(str(given))
            assert self.parse is not None
            return self.parse(given)
        except ValueError as error:
            raise UsageError(f"{where}: {error}", f"{self.flags[-1]}: {self.help}") from None


@dataclass(frozen=True)
class Settings:
    """Resolved options. Read one as an attribute: `settings.ctx_size`."""

    options: tuple[Option, ...]
    values: Mapping[str, Any]
    sources: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def is_default(self, name: str) -> bool:
        return self.sources[name] == "default"

    def describe(self) -> str:
        """The settings as a config file that would give them again, with the source of each as a comment."""
        lines = []
        for option in self.options:
            value, source = self.values[option.name], self.sources[option.name]
            if value is None:
                lines.append(f"# {option.key}: {option.unset} ({source})")
            elif option.is_secret:
                lines.append(f"# {option.key}: given, not shown ({source})")
            elif not option.in_file:
                lines.append(f"# {option.key}: {_toml(value)} ({source})")
            else:
                lines.append(f"{option.key} = {_toml(value)}  # {source}")
        return "\n".join(lines)


def _toml(value: Any) -> str:
    # JSON's strings and numbers are TOML's too.
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


@dataclass
class Sources:
    """Where settings come from, besides the flags."""

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    file: Path | None = None

    @classmethod
    def of_user(cls) -> Sources:
        return cls(file=config_path())


def config_path() -> Path:
    """`config.toml` in the user's configuration folder, which need not exist."""
    import platformdirs

    return Path(platformdirs.user_config_dir("hybrimoe", appauthor=False)) / "config.toml"


def resolve(
    options: Sequence[Option],
    flags: Mapping[str, Any],
    sources: Sources | None = None,
    known: Sequence[Option] | None = None,
) -> Settings:
    """Settings from `flags` (by Python name; None or absent: not given), environment, config file and defaults.

    The config file may also have keys of `known`, the options of other commands. Raises UsageError for a value that
    cannot be understood, naming where it came from, and for keys of the file that no option has.
    """
    sources = sources or Sources.of_user()
    in_file = _read_file(sources.file, [*options, *(known or ())])
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for option in options:
        values[option.name], origins[option.name] = _resolve_one(option, flags, sources, in_file)
    return Settings(tuple(options), values, origins)


def _resolve_one(
    option: Option, flags: Mapping[str, Any], sources: Sources, in_file: Mapping[str, Any]
) -> tuple[Any, str]:
    given = flags.get(option.name)
    if given is not None and given != []:
        return option.value(given, "/".join(option.flags)), "flag"
    if option.environment:
        if option.is_switch:
            # llama.cpp: the variable with NO_ switches off, whatever its value.
            negative = option.environment.replace("LLAMA_ARG_", "LLAMA_ARG_NO_")
            if negative != option.environment and negative in sources.environment:
                return False, f"environment {negative}"
        if text := sources.environment.get(option.environment):
            return option.value(text, option.environment), f"environment {option.environment}"
    for name in option.long_names if option.in_file else ():
        if name in in_file:
            assert sources.file is not None
            value = _file_text(in_file[name], option, f"{sources.file}: '{name}'")
            return option.value(value, f"{sources.file}: {name}"), f"config file {sources.file}"
    return option.default, "default"


def _file_text(value: Any, option: Option, where: str) -> Any:
    """A value of the config file as the flag's text; only the option's own kind of value is accepted."""
    if option.is_switch:
        if isinstance(value, bool):
            return value
        raise UsageError(f"{where} must be true or false")
    if option.repeats and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise UsageError(f"{where} has a value of the wrong kind", option.help)


def _read_file(path: Path | None, options: Sequence[Option]) -> dict[str, Any]:
    """The config file's keys. Raises UsageError for a damaged file and for keys that none of `options` has."""
    if path is None:
        return {}
    try:
        text = read_text(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no UTF-8 text") from None
    except OSError as error:
        raise from_os_error(error, f"read {path}") from error
    try:
        toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        data: dict[str, Any] = toml.loads(text)
    except RecursionError:
        raise UsageError(f"{path} nests too deeply") from None
    except ValueError as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    known = {name for option in options if option.in_file for name in option.long_names}
    for key in data:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else "keys are the long flags of 'hybrimoe run --help'"
            raise UsageError(f"{path}: unknown key '{key}'", hint)
    return data
