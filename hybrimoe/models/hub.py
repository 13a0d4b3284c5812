"""Models from a Hugging Face hub: what a repository offers, whether it fits, downloads that can go on later.

The hub's own package knows addresses, tokens and redirects. Downloads are ours: its own start anew when they were
interrupted, and do not compare hashes.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import DoesNotFitError, HybrimoeError, ModelError, UsageError, from_os_error
from hybrimoe.files import read_text

if TYPE_CHECKING:
    from hybrimoe.gguf_model import GgufModel

__all__ = ["Offer", "Reference", "Repository", "check_fits", "pull"]

Progress = Callable[[str, float], None]

# llama.cpp takes this quantisation of `-hf` when none is named (common/arg.cpp), and then the first file.
_USUAL_QUANT = "Q4_K_M"
_QUANT = re.compile(
    r"(?:^|[-._])((?:UD-)?(?:IQ|TQ|Q)\d(?:_[A-Z0-9]+)*|BF16|F16|F32|MXFP4(?:_MOE)?|NVFP4)(?=$|[-.])", re.IGNORECASE
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
_NOT_MODELS = ("mmproj*", "*imatrix*")
# A header is read in steps of this size at first; those of large vocabularies take some.
_FIRST_BYTES, _MAX_HEADER_BYTES = 1 << 20, 256 << 20
_CHUNK_BYTES = 1 << 20
# A context to judge "fits" by; models' own are often larger than anyone needs.
_USUAL_CTX = 4096
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Reference:
    """`user/repo[:quant]`."""

    repo: str
    quant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Raises UsageError."""
        repo, colon, quant = text.removeprefix("hf.co/").removeprefix("https://huggingface.co/").partition(":")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or (colon and not re.fullmatch(r"[\w.-]+", quant)):
            raise UsageError(
                f"'{text}' is not of the form user/repo or user/repo:quant", "for example user/repo:Q4_K_M"
            )
        return cls(repo, quant or None)

    def __str__(self) -> str:
        return f"{self.repo}:{self.quant}" if self.quant else self.repo


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository. `sha256` is None for the few that the hub keeps in git itself."""

    name: str
    n_bytes: int
    sha256: str | None


@dataclass(frozen=True)
class Offer:
    """A model that a repository offers: one file, or all parts of a split one in order."""

    quant: str
    files: tuple[RemoteFile, ...]

    @property
    def n_bytes(self) -> int:
        return sum(f.n_bytes for f in self.files)

    @property
    def name(self) -> str:
        """The model's name in the store."""
        return PurePosixPath(self.files[0].name).stem


class Repository:
    """One repository, as it was when this was made. Raises ModelError when it does not exist, HybrimoeError."""

    def __init__(self, repo: str) -> None:
        hub = _hub()
        try:
            info = hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None).model_info(
                repo, files_metadata=True, timeout=_TIMEOUT_S
            )
        except Exception as error:
            raise _hub_error(error, repo) from error
        self.repo = repo
        self.revision = str(info.sha or "main")
        files = []
        for sibling in info.siblings or ():
            lfs = sibling.lfs or {}
            sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
            files.append(RemoteFile(sibling.rfilename, int(sibling.size or 0), sha256))
        self._offers = _offers(files)

    def offers(self) -> list[Offer]:
        """All GGUF models of the repository, smallest first, whatever they hold."""
        return self._offers

    def choose(self, quant: str | None) -> Offer:
        """The model of a quantisation; for None llama.cpp's choice. Raises ModelError."""
        if not self._offers:
            raise ModelError(f"'{self.repo}' holds no GGUF file", "look for a repository whose name ends in -GGUF")
        wanted = quant or _USUAL_QUANT
        for offer in self._offers:
            if wanted.lower() in (offer.quant.lower(), offer.name.lower()):
                return offer
        if quant is None:
            return self._offers[0]
        raise ModelError(
            f"'{self.repo}' has no {quant}", f"it has {', '.join(dict.fromkeys(o.quant for o in self._offers))}"
        )

    def inspect(self, offer: Offer, progress: Progress = lambda label, share: None) -> GgufModel:
        """What the model is, from its header alone, which is kept for next time. Raises ModelError."""
        from hybrimoe.gguf_model import inspect

        folder = self._header_folder(offer)
        paths = [folder / PurePosixPath(f.name).name for f in offer.files]
        for i, (path, file) in enumerate(zip(paths, offer.files, strict=True)):
            progress(f"reading the header of {PurePosixPath(file.name).name}", i / len(paths))
            if not path.is_file():
                self._fetch_header(file, path)
        return inspect(paths[0], header_only=True)

    def download(self, offer: Offer, target: Path, progress: Progress) -> Path:
        """Fetches the files into `target` and returns the first one's path. What is there already is not fetched again.

        Raises HybrimoeError; what has arrived by then is kept, and the next call goes on from there.
        """
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise from_os_error(error, f"make '{target}'") from error
        paths = [target / PurePosixPath(f.name).name for f in offer.files]
        missing = [(f, p) for f, p in zip(offer.files, paths, strict=True) if not _is_there(f, p)]
        _check_disk(target, sum(f.n_bytes - _size(_part_path(p)) for f, p in missing))
        n_done = offer.n_bytes - sum(f.n_bytes for f, _ in missing)
        for file, path in missing:
            start = n_done
            label = f"downloading {path.name}"
            self._download(file, path, lambda n, s=start, t=label: progress(t, (s + n) / max(1, offer.n_bytes)))  # type: ignore[misc]
            n_done += file.n_bytes
        return paths[0]

    def _download(self, file: RemoteFile, path: Path, on_bytes: Callable[[int], None]) -> None:
        part = _part_path(path)
        digest = hashlib.sha256()
        try:
            with part.open("ab") as out:
                _lock(out, path)
                with part.open("rb") as there:
                    while chunk := there.read(_CHUNK_BYTES):
                        digest.update(chunk)
                n_bytes = out.tell()
                on_bytes(n_bytes)
                if n_bytes < file.n_bytes:
                    for chunk in self._stream(file.name, n_bytes):
                        out.write(chunk)
                        digest.update(chunk)
                        n_bytes += len(chunk)
                        on_bytes(min(n_bytes, file.n_bytes))
                out.flush()
                os.fsync(out.fileno())
            if n_bytes < file.n_bytes:
                raise HybrimoeError(f"the download of '{file.name}' broke off", "the same command goes on from there")
            if n_bytes != file.n_bytes or (file.sha256 and digest.hexdigest() != file.sha256):
                part.unlink(missing_ok=True)
                raise HybrimoeError(f"'{file.name}' arrived damaged: its hash is wrong", "try again")
            part.replace(path)
        except OSError as error:
            raise from_os_error(error, f"write '{path}'") from error

    def _stream(self, name: str, first: int, last: int | None = None) -> Iterator[bytes]:
        """Bytes of a file from `first` on, up to `last`. Raises HybrimoeError."""
        hub = _hub()
        from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

        url = hub.hf_hub_url(self.repo, name, revision=self.revision, endpoint=os.environ.get("HF_ENDPOINT") or None)
        span = f"bytes={first}-{'' if last is None else last}"
        headers = {**build_hf_headers(), "Range": span, "Accept-Encoding": "identity"}
        try:
            with get_session().stream(
                "GET", url, headers=headers, follow_redirects=True, timeout=_TIMEOUT_S
            ) as response:
                if response.status_code == 416:  # nothing is left to fetch
                    return
                response.raise_for_status()
                skip = 0 if response.status_code == 206 else first
                for chunk in response.iter_bytes(_CHUNK_BYTES):
                    if skip:  # a server that knows no ranges sends all of it
                        chunk, skip = chunk[skip:], max(0, skip - len(chunk))
                    if chunk:
                        yield chunk
        except OSError:
            raise
        except HybrimoeError:
            raise
        except Exception as error:
            raise _hub_error(error, self.repo) from error

    def _header_folder(self, offer: Offer) -> Path:
        from hybrimoe.models.source import cache_dir

        key = hashlib.sha256(f"{self.repo}\n{offer.files[0].name}\n{self.revision}".encode()).hexdigest()[:16]
        return cache_dir() / "hub" / key

    def _fetch_header(self, file: RemoteFile, path: Path) -> None:
        """A file that ends soon after the header: nobody shall take it for the whole."""
        from hybrimoe.gguf_header import read_header

        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            have, want = 0, min(_FIRST_BYTES, file.n_bytes)
            with part.open("wb") as out:
                while True:
                    for chunk in self._stream(file.name, have, want - 1):
                        out.write(chunk[: want - have])
                        have += len(chunk)
                        if have >= want:
                            break
                    out.flush()
                    if self._is_whole(part, file, want, read_header):
                        break
                    if have < want:
                        raise HybrimoeError(f"the header of '{file.name}' broke off", "try again")
                    have, want = want, min(4 * want, file.n_bytes)
            part.replace(path)
        except OSError as error:
            raise from_os_error(error, f"write to '{path.parent}'") from error
        finally:
            part.unlink(missing_ok=True)

    @staticmethod
    def _is_whole(part: Path, file: RemoteFile, want: int, read_header: Callable[[Path], Any]) -> bool:
        """Whether the header is all there; raises ModelError when it is wrong and more of it would not mend that."""
        try:
            read_header(part)
        except ModelError as error:
            if want >= file.n_bytes or want >= _MAX_HEADER_BYTES or "truncated" not in error.message:
                raise
            return False
        return True


def pull(reference: Reference, progress: Progress, *, force: bool = False) -> Path:
    """The model's file in the store, downloaded where it is missing.

    Raises ModelError for what does not exist or has no experts, DoesNotFitError before anything is downloaded (not
    with `force`), HybrimoeError for a hub that cannot be reached; a model that was pulled before is used then.
    """
    from hybrimoe.models.store import models_dir

    record = models_dir() / ".pulled" / f"{str(reference).replace('/', '--').replace(':', '--')}.json"
    try:
        repository = Repository(reference.repo)
        offer = repository.choose(reference.quant)
    except ModelError:
        raise
    except HybrimoeError:
        if (known := _recorded(record)) is not None:
            return known
        raise
    path = models_dir() / PurePosixPath(offer.files[0].name).name
    if not all(_is_there(f, models_dir() / PurePosixPath(f.name).name) for f in offer.files):
        model = repository.inspect(offer, progress).require_moe()
        if not force:
            check_fits(model, offer)
        path = repository.download(offer, models_dir(), progress)
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        names = [PurePosixPath(f.name).name for f in offer.files]
        record.write_text(json.dumps({"files": names, "revision": repository.revision}))
    return path


def check_fits(model: GgufModel, offer: Offer) -> None:
    """Raises DoesNotFitError when this machine cannot run the model even with a small context."""
    from hybrimoe.machine import here
    from hybrimoe.planning import Setting, measure_needs, plan_memory

    setting = Setting(n_ctx=min(_USUAL_CTX, model.n_ctx_train or _USUAL_CTX)).of_model(model)
    memory = plan_memory(model, measure_needs(model, setting), setting, here.this_machine())
    if not memory.fits:
        raise DoesNotFitError(
            f"'{offer.name}' would not run here: {memory.reason}", "hybrimoe models pull --list shows smaller ones"
        )


def _recorded(record: Path) -> Path | None:
    from hybrimoe.models.store import models_dir

    try:
        paths = [models_dir() / str(name) for name in json.loads(read_text(record))["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return paths[0] if paths and all(path.is_file() for path in paths) else None


def _offers(files: Sequence[RemoteFile]) -> list[Offer]:
    groups: dict[str, list[RemoteFile]] = {}
    for file in sorted(files, key=lambda f: f.name):
        path = PurePosixPath(file.name)
        if path.suffix.lower() != ".gguf" or any(fnmatch.fnmatch(path.name.lower(), p) for p in _NOT_MODELS):
            continue
        groups.setdefault(str(path.parent / _PART.sub("", path.stem)), []).append(file)
    offers = []
    for name, parts in groups.items():
        found = _PART.search(PurePosixPath(parts[0].name).stem)
        if found and (int(found[1]) != 1 or len(parts) != int(found[2])):
            continue  # parts are missing in the repository
        quants = _QUANT.findall(PurePosixPath(name).name) or _QUANT.findall(str(PurePosixPath(name).parent))
        offers.append(Offer(quants[-1].upper() if quants else PurePosixPath(name).name, tuple(parts)))
    return sorted(offers, key=lambda o: (o.n_bytes, o.name))


def _part_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _is_there(file: RemoteFile, path: Path) -> bool:
    """Raises UsageError when another file has taken the name."""
    if not path.exists():
        return False
    if _size(path) == file.n_bytes:
        return True
    raise UsageError(f"'{path}' exists and is another file than the hub's", "move it away")


def _check_disk(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise HybrimoeError(
            f"the download takes {n_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in '{folder}'",
            "free some space, or set HYBRIMOE_MODELS to another folder",
        )


def _lock(file: Any, path: Path) -> None:
    """One process downloads a file at a time. Raises HybrimoeError."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise HybrimoeError(f"another process is downloading '{path.name}'", "wait until it has ended") from None


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise HybrimoeError("downloads need the package huggingface-hub", "pip install 'hybrimoe[hub]'") from None
    return huggingface_hub


def _hub_error(error: Exception, repo: str) -> HybrimoeError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return ModelError(f"'{repo}' is given to those only who accepted its terms", "accept them, then set HF_TOKEN")
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return ModelError(
            f"the hub has no repository '{repo}', or not for you", "check the name; HF_TOKEN for private ones"
        )
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"'{repo}' is no name of a repository", "for example user/repo:Q4_K_M")
    reason = f"it answers {status}" if status else (str(error).splitlines() or [type(error).__name__])[0]
    return HybrimoeError(f"the hub cannot be reached: {reason}", "check the network, and HF_ENDPOINT if you set it")
