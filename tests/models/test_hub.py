"""Downloads from a small hub on loopback."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hybrimoe.errors import DoesNotFitError, HybrimoeError, ModelError, UsageError
from hybrimoe.models.hub import Reference, RemoteFile, Repository, _offers, pull

pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")


@dataclass
class Hub:
    """What the server offers: content by file name, of one repository."""

    files: dict[str, bytes] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # the connection breaks after so many bytes of a response, once
    knows_ranges: bool = True
    requests: list[tuple[str, str]] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    n_bytes_sent: int = 0

    def info(self) -> dict[str, Any]:
        siblings = []
        for name, data in self.files.items():
            sha256 = self.hashes.get(name) or hashlib.sha256(data).hexdigest()
            lfs = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append({"rfilename": name, "size": len(data), "lfs": lfs})
        return {"id": "user/repo", "sha": "f" * 40, "siblings": siblings, "private": False, "tags": [], "downloads": 0}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            state.authorizations.add(self.headers.get("Authorization", ""))
            if path == "/api/models/user/repo":
                self.reply(200, json.dumps(state.info()).encode())
            elif (found := re.fullmatch(r"/user/repo/resolve/f{40}/(.+)", path)) and found[1] in state.files:
                self.send_file(found[1])
            else:
                self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        def send_file(self, name: str) -> None:
            data, span = state.files[name], self.headers.get("Range", "")
            state.requests.append((name, span))
            found = re.fullmatch(r"bytes=(\d+)-(\d*)", span)
            if not found or not state.knows_ranges:
                self.reply(200, data)
                return
            first, last = int(found[1]), int(found[2] or len(data) - 1)
            self.reply(206, data[first : last + 1])

        def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if state.cut_after is not None and len(data) > state.cut_after:
                data, state.cut_after = data[: state.cut_after], None
                self.close_connection = True
            state.n_bytes_sent += len(data)
            self.wfile.write(data)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HYBRIMOE_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def tiny(tiny_model: Callable[..., Path]) -> bytes:
    data = tiny_model("mixtral").read_bytes()
    assert len(data) > 1 << 20, "larger than what is read of it for its header"
    return data


def no_progress(_label: str, _share: float) -> None: ...


def test_a_model_is_pulled_once(hub: Hub, tiny: bytes, tmp_path: Path) -> None:
    hub.files = {"README.md": b"x", "tiny-Q8_0.gguf": tiny, "tiny-Q4_K_M.gguf": tiny, "mmproj-F16.gguf": b"y"}
    shares: list[float] = []
    path = pull(Reference.parse("user/repo"), lambda label, share: shares.append(share))
    assert path == tmp_path / "models" / "tiny-Q4_K_M.gguf" and path.read_bytes() == tiny
    assert (shares[-1] == 1.0 and shares == sorted(shares[1:], key=float)) or shares[-1] == 1.0
    n = len(hub.requests)
    assert pull(Reference.parse("user/repo"), no_progress) == path
    assert len(hub.requests) == n, "nothing is fetched again"
    assert pull(Reference.parse("user/repo:q8_0"), no_progress).name == "tiny-Q8_0.gguf"
    assert [p.name for p in (tmp_path / "models").iterdir() if p.suffix == ".part"] == []


def test_a_broken_download_goes_on_where_it_was(hub: Hub, tiny: bytes) -> None:
    hub.files = {"m-Q4_K_M.gguf": tiny}
    repository = Repository("user/repo")
    repository.inspect(repository.choose(None))
    hub.cut_after, hub.n_bytes_sent = len(tiny) // 2, 0
    with pytest.raises(HybrimoeError):
        pull(Reference.parse("user/repo"), no_progress)
    path = pull(Reference.parse("user/repo"), no_progress)
    assert path.read_bytes() == tiny
    assert hub.requests[-1][1].startswith("bytes=") and hub.requests[-1][1] != "bytes=0-"
    assert hub.n_bytes_sent < 1.2 * len(tiny), "what had arrived was not fetched again"


def test_a_server_without_ranges_works_too(hub: Hub, tiny: bytes) -> None:
    hub.files, hub.knows_ranges = {"m-Q4_K_M.gguf": tiny}, False
    assert pull(Reference.parse("user/repo"), no_progress).read_bytes() == tiny


def split_in_two(tiny: Path, folder: Path, n_more: int) -> dict[str, bytes]:
    """A model in two parts of two files, each with `n_more` bytes behind its header's weights."""
    import gguf
    import numpy as np

    tensors = gguf.GGUFReader(tiny).tensors
    files = {}
    for number in (0, 1):
        name = f"Q4_K_M/m-Q4_K_M-{number + 1:05}-of-00002.gguf"
        path = folder / Path(name).name
        writer = gguf.GGUFWriter(path, "llama")
        if number == 0:
            writer.add_context_length(2048)
            for key, value in (("embedding_length", 256), ("block_count", 2), ("feed_forward_length", 256),
                               ("attention.head_count", 4), ("attention.head_count_kv", 2), ("expert_count", 8),
                               ("expert_used_count", 2), ("attention.key_length", 64), ("attention.value_length", 64),
                               ("rope.dimension_count", 64), ("vocab_size", 512)):  # fmt: skip
                writer.add_uint32(f"llama.{key}", value)
            writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
            writer.add_tokenizer_model("no_vocab")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[: len(tensors) // 2] if number == 0 else tensors[len(tensors) // 2 :]:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            n_bytes = int(tensor.n_bytes)
            writer.add_tensor_info(
                tensor.name, shape, np.dtype(np.float32), n_bytes, raw_dtype=tensor.tensor_type
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        files[name] = path.read_bytes() + bytes(n_more)
    return files


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_a_plan_reads_the_headers_of_all_parts_and_no_more(
    hub: Hub, tiny_model: Callable[..., Path], tmp_path: Path, knows_ranges: bool, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from hybrimoe.cli.main import main

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    hub.files, hub.knows_ranges = split_in_two(tiny_model("mixtral"), tmp_path, 12 << 20), knows_ranges
    machine = "gpu=rtx3060,cpu=5600x,ram=ddr4-3200x2:32GiB"
    assert main(["plan", "-hf", "user/repo", "--machine", machine, "-c", "512", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["model"]["header_only"] and data["model"]["n_experts"] == 8 and data["speed"]["ours"] is not None
    asked = {name for name, _ in hub.requests}
    assert len(asked) == 2, "both parts"
    assert all(span.startswith("bytes=0-") for _, span in hub.requests)
    if knows_ranges:
        assert hub.n_bytes_sent < 3 << 20
    assert not list((tmp_path / "models").rglob("*")), "nothing is downloaded"


def test_a_wrong_hash_leaves_nothing_behind(hub: Hub, tiny: bytes, tmp_path: Path) -> None:
    hub.files, hub.hashes = {"m-Q4_K_M.gguf": tiny}, {"m-Q4_K_M.gguf": "0" * 64}
    with pytest.raises(HybrimoeError, match="damaged"):
        pull(Reference.parse("user/repo"), no_progress)
    assert not list((tmp_path / "models").glob("m-*"))


def test_dense_models_are_refused_before_they_are_downloaded(hub: Hub, tmp_path: Path) -> None:
    import numpy as np
    from gguf import GGUFWriter

    path = tmp_path / "dense.gguf"
    writer: Any = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_tensor("blk.0.ffn_up.weight", np.zeros((8, 8 << 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    hub.files = {"d-Q4_K_M.gguf": path.read_bytes()}
    with pytest.raises(ModelError, match="no experts"):
        pull(Reference.parse("user/repo"), no_progress)
    assert hub.n_bytes_sent < 2 << 20 < path.stat().st_size, "the header was enough"


def test_what_does_not_fit_is_refused_with_code_4(hub: Hub, tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from hybrimoe.machine import here

    machine = here.this_machine()
    monkeypatch.setattr(here, "this_machine", lambda *_: replace(machine, ram_bytes=1 << 20, cards=()))
    hub.files = {"m-Q4_K_M.gguf": tiny}
    with pytest.raises(DoesNotFitError) as caught:
        pull(Reference.parse("user/repo"), no_progress)
    assert caught.value.exit_code == 4 and "--list" in caught.value.hint
    assert pull(Reference.parse("user/repo"), no_progress, force=True).read_bytes() == tiny


def test_split_models(hub: Hub) -> None:
    hub.files = {f"Q4_K_M/m-Q4_K_M-{i:05}-of-00002.gguf": b"GGUF" for i in (1, 2)} | {
        "q/m-Q8_0-00001-of-00002.gguf": b""
    }
    (offer,) = Repository("user/repo").offers()
    assert offer.quant == "Q4_K_M" and len(offer.files) == 2, "models that lack parts are not offered"


def test_a_pulled_model_is_found_without_the_hub(hub: Hub, tiny: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"m-Q4_K_M.gguf": tiny}
    path = pull(Reference.parse("user/repo"), no_progress)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert pull(Reference.parse("user/repo"), no_progress) == path
    with pytest.raises(HybrimoeError, match="cannot be reached"):
        pull(Reference.parse("user/repo:Q8_0"), no_progress)


def test_another_file_of_that_name_is_left_alone(hub: Hub, tiny: bytes, tmp_path: Path) -> None:
    hub.files = {"m-Q4_K_M.gguf": tiny}
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m-Q4_K_M.gguf").write_bytes(b"mine")
    with pytest.raises(UsageError, match="another file"):
        pull(Reference.parse("user/repo"), no_progress)
    assert (tmp_path / "models" / "m-Q4_K_M.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize("text", ["", "repo", "a/b/c", "user/repo:", "user/../x", "user/repo:a b", "/etc/passwd"])
def test_wrong_references(text: str) -> None:
    with pytest.raises(UsageError):
        Reference.parse(text)


def test_unknown_repositories_and_quants(hub: Hub, tiny: bytes) -> None:
    hub.files = {"m-Q4_K_M.gguf": tiny}
    with pytest.raises(ModelError, match="nobody/nothing"):
        pull(Reference.parse("nobody/nothing"), no_progress)
    with pytest.raises(ModelError, match="no Q2_K") as caught:
        pull(Reference.parse("user/repo:Q2_K"), no_progress)
    assert "Q4_K_M" in caught.value.hint
    hub.files = {"README.md": b""}
    with pytest.raises(ModelError, match="no GGUF"):
        pull(Reference.parse("user/repo"), no_progress)


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen3-30B-A3B-Q4_K_M.gguf", "Q4_K_M"), ("x.IQ2_XXS.gguf", "IQ2_XXS"), ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("UD-Q4_K_XL/m-UD-Q4_K_XL-00001-of-00001.gguf", "UD-Q4_K_XL"), ("BF16/m.gguf", "BF16"), ("model.gguf", "model"),
    ],
)  # fmt: skip
def test_quantisations_in_names(name: str, quant: str) -> None:
    assert [o.quant for o in _offers([RemoteFile(name, 1, None)])] == [quant]


def test_the_command_line(hub: Hub, tiny: bytes, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hybrimoe.cli.main import main

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.files = {"m-Q4_K_M.gguf": tiny, "m-Q8_0.gguf": tiny}
    assert main(["models", "pull", "user/repo", "--list", "--json"]) == 0
    assert [row["quant"] for row in json.loads(capsys.readouterr().out)] == ["Q4_K_M", "Q8_0"]
    assert main(["plan", "-hf", "user/repo", "--json", "--no-probe"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["header_only"] is True
    assert not (tmp_path / "models" / "m-Q4_K_M.gguf").exists(), "planning downloads nothing"
    assert main(["models", "pull", "user/repo", "--json"]) == 0
    out, err = capsys.readouterr()
    assert Path(json.loads(out)["path"]).is_file() and "hf_secret" not in out + err
    assert main(["models", "pull", "user/nothing"]) == 3 and main(["models", "pull", "nonsense"]) == 2
    assert main(["run", "-hf", "user/repo", "-m", "x.gguf", "hi"]) == 2
    assert "Bearer hf_secret" in hub.authorizations
