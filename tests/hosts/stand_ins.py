"""Stand-ins for llama.cpp's programs, which print what they were started with."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from cli.conftest import Outcome

from hybrimoe.errors import HybrimoeError

# Excerpts of what the programs of llama.cpp 0.7.0 print.
SERVER_HELP = """\
----- common params -----

-h,    --help, --usage                  print usage and exit
--version                               show version and build info
-t,    --threads N                      number of CPU threads to use during generation (default: <num_cpus>)
                                        (env: LLAMA_ARG_THREADS)
-tb,   --threads-batch N                number of threads to use during batch and prompt processing (default:
                                        same as --threads)
-c,    --ctx-size N                     size of the prompt context (default: 0, 0 = loaded from model)
-b,    --batch-size N                   logical maximum batch size (default: 2048)
-ub,   --ubatch-size N                  physical maximum batch size (default: 512)
--perf, --no-perf                       whether to enable internal libllama performance timings (default:
                                        false)
-p,    --prompt PROMPT                  prompt to start generation with
-dev,  --device <dev1,dev2,..>          comma-separated list of devices to use for offloading (none = don't
                                        offload)
--list-devices                          print list of available devices and exit
-ngl,  --gpu-layers, --n-gpu-layers N   max. number of layers to store in VRAM, either an exact number or 'all'
-sm,   --split-mode {none,layer,row}    how to split the model across multiple GPUs
-ot,   --override-tensor <tensor name pattern>=<buffer type>,...
                                        override tensor buffer type
                                        (env: LLAMA_ARG_OVERRIDE_TENSOR)
-cmoe, --cpu-moe                        keep all Mixture of Experts (MoE) weights in the CPU
-ncmoe, --n-cpu-moe N                   keep the Mixture of Experts (MoE) weights of the first N layers in the
                                        CPU
--moe-cache-mib N                       GPU cache size in MiB for the MoE experts kept in the CPU. with
-fit,  --fit [on|off]                   whether to adjust unset arguments to fit in device memory ('on' or
--control-vector-layer-range START END
                                        layer range to apply the control vector(s) to, start and end inclusive
-m,    --model FNAME                    model path to load
-mu,   --model-url MODEL_URL            model download url (default: unused)
-dr,   --docker-repo [<repo>/]<model>[:quant]
                                        Docker Hub model repository. repo is optional, default to ai/.
-hf,   -hfr, --hf-repo <user>/<model>[:quant]
                                        Hugging Face model repository; quant is optional, case-insensitive,
                                        --hf-repo (default: unused)
-hff,  --hf-file FILE                   Hugging Face model file. If specified, it will override the quant in
--spec-type none,draft-simple,draft-mtp,ngram-simple
                                        comma-separated list of types of speculative decoding to use
--spec-draft-override-tensor, -otd, --override-tensor-draft <tensor name pattern>=<buffer type>,...
                                        override tensor buffer type for draft model
--spec-draft-cpu-moe, -cmoed, --cpu-moe-draft
                                        keep all Mixture of Experts (MoE) weights in the CPU for the draft
--spec-draft-model, -md, --model-draft FNAME
                                        draft model for speculative decoding (default: unused)
--spec-draft-hf, -hfd, -hfrd, --hf-repo-draft <user>/<model>[:quant]
                                        Same as --hf-repo, but for the draft model (default: unused)
--fim-qwen-1.5b-default                 use default Qwen 2.5 Coder 1.5B (note: can download weights from the
                                        internet)
--gpt-oss-20b-default                   use gpt-oss-20b (note: can
                                        download weights from the internet)
--spec-default                          enable default speculative decoding config
"""

BENCH_HELP = """\
usage: llama-bench [options]

options:
  -h, --help
  --list-devices                              list available devices and exit
  --progress                                  print test progress indicators
  -fitt, --fit-target <MiB>                   fit model to device memory with this margin per device
  -fitc, --fit-ctx <n>                        minimum ctx size for --fit-target (default: 0)

test parameters:
  -m, --model <filename>                            (default: models/7B/ggml-model-q4_0.gguf)
  -hf, -hfr, --hf-repo <user>/<model>[:quant]       Hugging Face model repository; quant is optional, case-insensitive
                                                    default to Q4_K_M, or falls back to the first file in the repo
  -b, --batch-size <n>                              (default: 2048)
  -ub, --ubatch-size <n>                            (default: 512)
  -t, --threads <n>                                 (default: <num_cpus>)
  -ncmoe, --n-cpu-moe <n>                           (default: 0)
  -dev, --device <dev0/dev1/...>                    (default: auto)
  -ot --override-tensor <tensor name pattern>=<buffer type>;...
                                                    (default: disabled)

Multiple values can be given for each parameter by separating them with ','
"""

_STAND_IN = """\
#!{python}
import json, os, sys
if "--help" in sys.argv:
    print({help!r})
elif "--list-devices" in sys.argv:
    print("Available devices:\\n" + "".join(f"  {{d}}: a card (1 MiB, 1 MiB free)\\n" for d in {devices!r}))
else:
    names = ("GGML_BACKEND_PATH", "HYBRIMOE_CONFIG", "X")
    keep = {{n: v for n, v in os.environ.items() if n in names or n.startswith("LLAMA_ARG_")}}
    print(json.dumps({{"argv": sys.argv[1:], "env": keep}}))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Callable[..., str]:
    """`stand_in("llama-server")` is the path of a program that prints its arguments and environment as JSON."""

    def make(name: str, help: str = SERVER_HELP, devices: tuple[str, ...] = ()) -> str:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(_STAND_IN.format(python=sys.executable, help=help, devices=devices))
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def clean(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without any variable that exec reads."""
    for name in ("GGML_BACKEND_PATH", "HYBRIMOE_CONFIG", "HYBRIMOE_CALIBRATION", "HYBRIMOE_BACKENDS",
                 "LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home))
    return home


def environment(**changes: str) -> Mapping[str, str]:
    return {"PATH": os.environ["PATH"], **changes}


def error_of(call: Callable[[], object]) -> HybrimoeError:
    """The error that `call` raises, which must have both lines."""
    with pytest.raises(HybrimoeError) as caught:
        call()
    assert caught.value.message and caught.value.hint
    return caught.value


__all__ = ["BENCH_HELP", "SERVER_HELP", "Outcome", "environment", "error_of"]
