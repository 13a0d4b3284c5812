"""The tokens that a test feeds: real text by default, because random tokens spread over more experts than text does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hybrimoe.errors import UsageError, from_os_error
from hybrimoe.files import open_regular, read_bytes

__all__ = ["CORPUS", "RANDOM", "check_source", "token_stream"]

CORPUS, RANDOM = "corpus", "random"
_SEED = 1


def check_source(source: str) -> str:
    """`corpus`, `random`, or a file that can be read. Raises UsageError and HybrimoeError."""
    if source in (CORPUS, RANDOM):
        return source
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"--prompt-source: there is no file '{source}'", "give corpus, random or a text file")
    try:
        with open_regular(path) as file:
            file.read(1)
    except OSError as error:
        raise from_os_error(error, f"read '{source}'") from error
    return source


def token_stream(source: str, n: int, tokenize: Callable[[str], list[int]], n_vocab: int) -> list[int]:
    """`n` tokens of a source; a text that is shorter begins again.

    Args:
        tokenize: text to tokens, without a token that marks the beginning.
    Raises:
        UsageError: the file holds no text.
    """
    if source == RANDOM:
        import numpy as np

        # llama-bench, too, draws from the whole vocabulary.
        return [int(t) for t in np.random.default_rng(_SEED).integers(0, n_vocab, n)]
    if source == CORPUS:
        from hybrimoe.corpus import texts

        text = "\n\n".join(t.text for t in texts())
    else:
        try:
            # More than n tokens never need more than so many bytes.
            text = read_bytes(source)[: 64 * n].decode("utf-8", "replace")
        except OSError as error:
            raise from_os_error(error, f"read '{source}'") from error
    tokens = tokenize(text)
    if not tokens:
        raise UsageError(f"'{source}' holds no text", "give a text file with --prompt-source")
    return (tokens * (n // len(tokens) + 1))[:n]
