"""The package's defaults are llama.cpp's. Those of common/common.h are written out: pip does not install that file."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from hybrimoe.cli.flags import RUN_COMMAND_OPTIONS
from hybrimoe.config import Sources, resolve
from hybrimoe.engine import KV_TYPES, EngineOptions
from hybrimoe.expert_options import ExpertOptions
from hybrimoe.generation import RANDOM_SEED, Sampling
from hybrimoe.llama_seam import FLASH_ATTENTION, LOAD_MODES
from hybrimoe.machine import host

# common_params of common/common.h, llama.cpp 0.5.0-dev as in llama-cpp-python 0.3.36
COMMON = {
    "n_predict": -1,
    "n_ctx": 0,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_gpu_layers": -1,
    "warmup": True,
}
# common_params_sampling of the same file
COMMON_SAMPLING = {
    "temp": 0.80,
    "top_k": 40,
    "top_p": 0.95,
    "min_p": 0.05,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "repeat_last_n": 64,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "seed": 0xFFFFFFFF,
}


def test_engine_options_equal_common_params() -> None:
    options = EngineOptions()
    assert {name: getattr(options, name) for name in COMMON if name != "n_predict"} == {
        name: value for name, value in COMMON.items() if name != "n_predict"
    }


def test_sampling_equals_common_params_sampling() -> None:
    sampling = Sampling()
    assert {name: getattr(sampling, name) for name in COMMON_SAMPLING} == COMMON_SAMPLING
    assert RANDOM_SEED == llama_cpp.LLAMA_DEFAULT_SEED


def test_context_parameters_equal_the_library(open_engine: Any) -> None:
    """What reaches llama_init_from_model is llama_context_default_params(), but for common.h's batch sizes."""
    engine = open_engine(n_ctx=0)
    stock = llama_cpp.llama_context_default_params()
    ours = engine.context_params
    chosen = {"n_ctx", "n_batch", "n_ubatch", "n_threads", "n_threads_batch", "n_seq_max", "no_perf"}
    different = {
        name
        for name, kind in stock._fields_
        if issubclass(kind, ctypes._SimpleCData)
        and kind is not ctypes.c_void_p
        and name not in chosen
        and getattr(stock, name) != getattr(ours, name)
    }
    # llama-cpp-python writes explicit values where the library has markers for "from the model".
    assert different <= {"yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow"}
    assert ours.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_AUTO
    assert engine.n_ctx() == engine.info.n_ctx_train
    assert (llama_cpp.llama_n_batch(engine.ctx), llama_cpp.llama_n_ubatch(engine.ctx)) == (
        min(2048, engine.n_ctx()),
        min(512, engine.n_ctx()),
    )


def test_model_parameters_equal_the_library(open_engine: Any) -> None:
    engine = open_engine()
    stock, ours = llama_cpp.llama_model_default_params(), engine.model_params
    for name in ("n_gpu_layers", "split_mode", "main_gpu", "load_mode", "lazy_mode", "use_extra_bufts", "no_host"):
        assert getattr(ours, name) == getattr(stock, name), name


def test_threads_are_physical_cores() -> None:
    n = host.n_physical_cores()
    assert EngineOptions().threads() == (n, n)
    assert EngineOptions(n_threads=3).threads() == (3, 3)
    assert EngineOptions(n_threads=3, n_threads_batch=5).threads() == (3, 5)
    # llama.cpp: 0 and below take every hardware thread.
    assert EngineOptions(n_threads=0).threads()[0] == host.n_logical_cpus()


def test_physical_cores_share_sibling_masks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu, mask in enumerate(["05", "0a", "05", "0a"]):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings").write_text(mask + "\n")
    monkeypatch.setattr(host, "_CPU_FOLDER", tmp_path)
    monkeypatch.setattr(host, "_allowed_cpus", lambda: 64)
    assert host.n_physical_cores() == 2
    performance = tmp_path / "performance"
    performance.write_text("0,2\n")
    monkeypatch.setattr(host, "_PERFORMANCE_CPUS", performance)
    assert host.n_physical_cores() == 1


def test_physical_cores_respect_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_allowed_cpus", lambda: 1)
    assert host.n_physical_cores() == 1


def test_flags_agree_with_the_engine() -> None:
    """The flags' table repeats the defaults; both must stay the same."""
    settings = resolve(RUN_COMMAND_OPTIONS, {}, Sources(environment={}))
    from hybrimoe.cli.loading import engine_options, sampling

    found = engine_options(settings)
    # 'hybrimoe top' may watch the program; a library counts nothing unless asked to.
    assert found == EngineOptions(placement=found.placement, experts=found.experts, observe=True)
    # Only commands keep residency; a library writes nothing unasked.
    assert replace(found.experts, state_dir=None) == ExpertOptions()
    assert sampling(settings) == Sampling()
    assert settings.n_predict == COMMON["n_predict"]


def test_every_choice_of_a_flag_is_known_to_the_engine() -> None:
    options = {option.key: option for option in RUN_COMMAND_OPTIONS}
    for key, table in (
        ("flash-attn", FLASH_ATTENTION),
        ("load-mode", LOAD_MODES),
        ("cache-type-k", KV_TYPES),
        ("cache-type-v", KV_TYPES),
    ):
        for word in table:
            assert options[key].value(word, key) == word


@pytest.mark.parametrize("name", list(KV_TYPES))
def test_kv_types_are_ggmls(name: str) -> None:
    """Type numbers and sizes, against ggml itself."""
    from hybrimoe.native.plugin import ggml_library

    ggml = ggml_library()
    ggml.ggml_type_name.restype = ctypes.c_char_p
    ggml.ggml_row_size.restype = ctypes.c_size_t
    ggml.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    number, size = KV_TYPES[name]
    assert ggml.ggml_type_name(number).decode() == name
    assert ggml.ggml_row_size(number, 1024) == 1024 * size


def test_chat_completion_has_llama_cpps_defaults(open_engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-cpp-python's own would be temperature 0.2 and a fixed seed."""
    engine = open_engine()
    seen: dict[str, Any] = {}

    original = llama_cpp.Llama.generate

    def generate(self: Any, tokens: Any, **arguments: Any) -> Any:
        seen.update(arguments, seed=engine._seed)
        return original(self, tokens, **arguments)

    monkeypatch.setattr(llama_cpp.Llama, "generate", generate)
    engine.create_chat_completion([{"role": "user", "content": "hi"}], max_tokens=1)
    assert (seen["temp"], seen["top_k"], seen["min_p"], seen["repeat_penalty"]) == (0.8, 40, 0.05, 1.0)
    assert seen["seed"] == RANDOM_SEED
