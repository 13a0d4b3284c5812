"""Where -hf finds a model without a download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hybrimoe.hosts.hub_cache import cached_model, cached_url

COMMIT, OTHER = "a" * 40, "b" * 40


def put(hub: Path, *names: str, commit: str = COMMIT, ref: str = "main") -> Path:
    repo = hub / "models--user--repo-GGUF"
    (repo / "refs").mkdir(parents=True, exist_ok=True)
    (repo / "refs" / ref).write_text(commit)
    for name in names:
        path = repo / "snapshots" / commit / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blob = repo / "blobs" / path.name
        blob.parent.mkdir(exist_ok=True)
        blob.write_text(name)
        path.symlink_to(blob)
    return repo / "snapshots" / commit


@pytest.mark.parametrize(
    ("names", "repo", "file", "chosen"),
    [
        (["x-Q8_0.gguf", "x-Q4_K_M.gguf", "x-F16.gguf"], "user/repo-GGUF", None, "x-Q4_K_M.gguf"),
        (["x-Q8_0.gguf", "x-F16.gguf"], "user/repo-GGUF", None, "x-Q8_0.gguf"),
        (["x-F16.gguf", "x-IQ1_S.gguf"], "user/repo-GGUF", None, "x-F16.gguf"),
        (["x-Q8_0.gguf", "x-Q4_K_M.gguf"], "user/repo-GGUF:q8_0", None, "x-Q8_0.gguf"),
        (["x-Q8_0.gguf"], "user/repo-GGUF:Q4_K_M", None, None),
        (["mmproj-Q8_0.gguf", "x-F16.gguf"], "user/repo-GGUF:Q8_0", None, None),
        (["mtp-x-Q4_K_M.gguf", "imatrix-Q4_K_M.gguf", "x-Q8_0.gguf"], "user/repo-GGUF", None, "x-Q8_0.gguf"),
        (["Q8_0/x-Q8_0-00002-of-00002.gguf", "Q8_0/x-Q8_0-00001-of-00002.gguf"], "user/repo-GGUF:Q8_0", None,
         "Q8_0/x-Q8_0-00001-of-00002.gguf"),
        (["x-Q8_0.gguf", "deep/y.gguf"], "user/repo-GGUF", "deep/y.gguf", "deep/y.gguf"),
        (["x-Q8_0.gguf"], "user/repo-GGUF", "y.gguf", None),
        (["x-Q8_0.gguf"], "user/other-GGUF", None, None),
        (["README.md"], "user/repo-GGUF", None, None),
    ],
)  # fmt: skip
def test_llama_cpps_choice(tmp_path: Path, names: list[str], repo: str, file: str | None, chosen: str | None) -> None:
    snapshot = put(tmp_path, *names)
    found = cached_model(repo, file, {"HF_HUB_CACHE": str(tmp_path)})
    assert found == (None if chosen is None else snapshot / chosen)


@pytest.mark.parametrize(
    ("variable", "below"),
    [
        ("LLAMA_CACHE", ""),
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
        ("HOME", ".cache/huggingface/hub"),
    ],
)
def test_the_folders_in_llama_cpps_order(tmp_path: Path, variable: str, below: str) -> None:
    snapshot = put(tmp_path / below, "x-Q8_0.gguf")
    nowhere = {"HOME": str(tmp_path / "nobody")} if variable != "HOME" else {}
    assert cached_model("user/repo-GGUF", None, {**nowhere, variable: str(tmp_path)}) == snapshot / "x-Q8_0.gguf"
    first = {"LLAMA_CACHE": str(tmp_path / "empty")}
    if variable != "LLAMA_CACHE":
        assert cached_model("user/repo-GGUF", None, {**nowhere, variable: str(tmp_path), **first}) is None


def test_main_is_the_revision_that_counts(tmp_path: Path) -> None:
    put(tmp_path, "x-Q8_0.gguf", commit=OTHER, ref="a-branch")
    snapshot = put(tmp_path, "x-Q8_0.gguf")
    assert cached_model("user/repo-GGUF", None, {"LLAMA_CACHE": str(tmp_path)}) == snapshot / "x-Q8_0.gguf"
    (tmp_path / "models--user--repo-GGUF" / "refs" / "main").write_text("no commit")
    found = cached_model("user/repo-GGUF", None, {"LLAMA_CACHE": str(tmp_path)})
    assert found is not None and OTHER in found.parts


def test_a_download_that_was_interrupted_is_no_model(tmp_path: Path) -> None:
    snapshot = put(tmp_path, "x-Q8_0.gguf")
    (snapshot / "x-Q8_0.gguf").resolve().unlink()
    assert cached_model("user/repo-GGUF", None, {"LLAMA_CACHE": str(tmp_path)}) is None


def test_the_flat_folder_of_older_releases(tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path)}
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    kept = folder / "user_repo-GGUF_x-Q4_K_M.gguf"
    kept.write_text("")
    (folder / "user_repo-GGUF_Q8_0_y-Q8_0-00001-of-00002.gguf").write_text("")
    assert cached_model("user/repo-GGUF", None, environment) == kept
    assert cached_model("user/repo-GGUF", "x-Q4_K_M.gguf", environment) == kept
    assert cached_model("user/repo-GGUF", "z.gguf", environment) is None
    manifest = folder / "manifest=user=repo-GGUF=Q8_0.json"
    manifest.write_text(json.dumps({"ggufFile": {"rfilename": "Q8_0/y-Q8_0-00001-of-00002.gguf"}}))
    found = cached_model("user/repo-GGUF:Q8_0", None, environment)
    assert found is not None and found.name == "user_repo-GGUF_Q8_0_y-Q8_0-00001-of-00002.gguf"
    manifest.write_text("{")
    assert cached_model("user/repo-GGUF:Q8_0", None, environment) == found


def test_what_a_url_is_kept_as(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_text("")
    environment = {"LLAMA_CACHE": str(tmp_path)}
    assert cached_url("https://example.org/a/x.gguf?download=true#part", environment) == tmp_path / "x.gguf"
    assert cached_url("https://example.org/a/y.gguf", environment) is None
