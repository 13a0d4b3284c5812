"""Proof that llama.cpp survives a model file's header: it is loaded in a child process before it is loaded here.

llama.cpp checks much of a file with assertions that end the process. Nobody foresees all of them, so a header that was
never loaded on this machine is first loaded, without weights, where that costs nothing but a child. A proof is
remembered by the header's hash and llama.cpp's release.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from hybrimoe.errors import HybrimoeError, ModelError, PluginError
from hybrimoe.expert_options import default_state_dir
from hybrimoe.files import open_regular
from hybrimoe.gguf_header import DOWNLOAD_HINT, read_header
from hybrimoe.private_files import make_private_folder, private_opener

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

__all__ = ["header_hash", "kept_proofs", "prove"]

# Small: a context costs time, and its size is the user's affair.
_N_CTX, _N_BATCH = 256, 32


def header_hash(model: GgufModel) -> str:
    """Of everything before the weights in all parts, the parts' sizes, and llama.cpp's release."""
    import llama_cpp

    digest = hashlib.sha256(llama_cpp.__version__.encode())
    for part in model.parts:
        end = read_header(part).data_offset
        with open_regular(part) as file:
            digest.update(f"\n{part.stat().st_size} {end}\n".encode())
            while end > 0 and (chunk := file.read(min(end, 1 << 20))):
                digest.update(chunk)
                end -= len(chunk)
    return digest.hexdigest()


def kept_proofs() -> Path:
    """The folder of the user's proofs."""
    return default_state_dir() / "proofs"


def prove(model: GgufModel, folder: Path) -> bool:
    """Loads the header in a child, unless that was done before; proofs are kept in `folder`. Returns whether it ran.

    Raises ModelError when the child was ended by llama.cpp, PluginError when llama.cpp is not for this CPU. What it
    merely refuses is left to the real load, which says why; so is a file for which no child can be started.
    """
    from hybrimoe.dry_load import LlamaCrashError, LoadShape, dry_load

    try:
        proof = folder / header_hash(model)
    except OSError:
        return False
    if proof.exists():
        return False
    try:
        dry_load(model, LoadShape(n_ctx=_N_CTX, n_batch=_N_BATCH, n_ubatch=_N_BATCH))
    except LlamaCrashError as error:
        raise ModelError(
            f"'{model.path.name}' makes llama.cpp end the process: {error.reason}", DOWNLOAD_HINT
        ) from error
    except PluginError:
        raise
    except HybrimoeError:
        return True
    # Without a place to remember it, the proof is made again the next time.
    with contextlib.suppress(OSError):
        make_private_folder(folder)
        os.close(private_opener(str(proof), os.O_CREAT | os.O_WRONLY))
    return True
