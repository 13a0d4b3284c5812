"""The flags of `chat` and `run`: llama.cpp's names, environment variables and defaults, and our own.

Names and variables are those of llama.cpp's common/arg.cpp, defaults those of its common/common.h. A flag stands here
only once it does something.
"""

from __future__ import annotations

from collections.abc import Callable

from hybrimoe.config import (
    Option,
    Settings,
    choice,
    cpu_range,
    flash_attention,
    gpu_layers,
    integer,
    number,
    parse_bool,
    parse_size,
    seed,
)
from hybrimoe.expert_options import UNUSED_WHEN_REPRODUCIBLE, CacheSize, check_policy, not_with_reproducible

_KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")

MODEL, EXPERTS, SAMPLING = "Model and speed", "Experts on CPU and GPU", "Sampling"
PROMPT, OUTPUT, SERVER = "Prompt", "Output", "Server"


def _cache_size(text: str) -> str:
    CacheSize.parse(text)
    return text.strip()


def _size(text: str) -> str:
    parse_size(text)
    return text.strip()


def _policy(flag: str) -> Callable[[str], str]:
    return lambda text: check_policy(flag, text)


def _on_off(text: str) -> str:
    return "on" if parse_bool(text) else "off"


MODEL_OPTIONS: tuple[Option, ...] = (
    Option(
        ("-m", "--model"),
        "Model: a GGUF file (of a split model its first part) or a name from 'hybrimoe models list'.",
        metavar="MODEL",
        environment="LLAMA_ARG_MODEL",
        section=MODEL,
    ),
    Option(
        ("-c", "--ctx-size"),
        "Context in tokens; 0: all it was trained with. Without it: the largest that costs at most 5 % of decode.",
        0,
        integer(0),
        "N",
        "LLAMA_ARG_CTX_SIZE",
        section=MODEL,
    ),
    Option(("-b", "--batch-size"), "Logical batch size.", 2048, integer(1), "N", "LLAMA_ARG_BATCH", section=MODEL),
    Option(("-ub", "--ubatch-size"), "Physical batch size.", 512, integer(1), "N", "LLAMA_ARG_UBATCH", section=MODEL),
    Option(
        ("-t", "--threads"),
        "CPU threads; 0: one per hardware thread.",
        None,
        integer(),
        "N",
        "LLAMA_ARG_THREADS",
        unset="what the probe found best, else one per physical core",
        section=MODEL,
    ),
    Option(
        ("-tb", "--threads-batch"),
        "CPU threads for prompts.",
        None,
        integer(),
        "N",
        unset="as --threads",
        section=MODEL,
    ),
    Option(
        ("-Cr", "--cpu-range"),
        "Processors that the program may use, first-last.",
        None,
        cpu_range,
        "LO-HI",
        unset="all",
        section=MODEL,
    ),
    Option(
        ("--cpu-strict",),
        "Keep every expert thread on a processor of its own: 0 or 1.",
        0,
        integer(0, 1),
        "N",
        section=MODEL,
    ),
    Option(
        ("-ngl", "--n-gpu-layers", "--gpu-layers"),
        "Layers whose dense part goes to the GPU: a number, auto or all (needs a GPU build of llama-cpp-python).",
        -1,
        gpu_layers,
        "N",
        "LLAMA_ARG_N_GPU_LAYERS",
        section=MODEL,
    ),
    Option(
        ("-fa", "--flash-attn"),
        "Flash attention: on, off or auto.",
        "auto",
        flash_attention,
        "WHEN",
        "LLAMA_ARG_FLASH_ATTN",
        section=MODEL,
    ),
    Option(
        ("-ctk", "--cache-type-k"),
        "Type of the KV cache's keys: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1.",
        "f16",
        choice(*_KV_TYPES),
        "TYPE",
        "LLAMA_ARG_CACHE_TYPE_K",
        section=MODEL,
    ),
    Option(
        ("-ctv", "--cache-type-v"),
        "Type of the KV cache's values.",
        "f16",
        choice(*_KV_TYPES),
        "TYPE",
        "LLAMA_ARG_CACHE_TYPE_V",
        section=MODEL,
    ),
    Option(
        ("-lm", "--load-mode"),
        "How weights are read: auto, none, mmap, mlock, mmap+mlock or dio.",
        "auto",
        choice("auto", "none", "mmap", "mlock", "mmap+mlock", "dio"),
        "MODE",
        "LLAMA_ARG_LOAD_MODE",
        section=MODEL,
    ),
    Option(
        ("--repack",),
        "Let llama.cpp keep a repacked copy of dense weights.",
        True,
        None,
        environment="LLAMA_ARG_REPACK",
        no_flags=("--no-repack",),
        section=MODEL,
    ),
    Option(
        ("--warmup",),
        "One empty step after loading.",
        True,
        None,
        no_flags=("--no-warmup",),
        section=MODEL,
    ),
    Option(
        ("-ot", "--override-tensor"),
        "Buffer type of tensors, PATTERN=TYPE,...; goes before all other placement.",
        (),
        str,
        "RULE",
        "LLAMA_ARG_OVERRIDE_TENSOR",
        repeats=True,
        section=MODEL,
    ),
    Option(
        ("-cmoe", "--cpu-moe"),
        "Keep all experts on the CPU.",
        False,
        None,
        environment="LLAMA_ARG_CPU_MOE",
        no_flags=("-no-cmoe", "--no-cpu-moe"),
        section=MODEL,
    ),
    Option(
        ("-ncmoe", "--n-cpu-moe"),
        "Keep the experts of the first N layers on the CPU.",
        0,
        integer(0, 512),
        "N",
        "LLAMA_ARG_N_CPU_MOE",
        section=MODEL,
    ),
    Option(
        ("--plugin",),
        "Run experts in the HybriMoE plug-in; without it everything is plain llama.cpp.",
        True,
        None,
        no_flags=("--no-plugin",),
        section=MODEL,
    ),
)

EXPERT_OPTIONS: tuple[Option, ...] = (
    Option(
        ("-ec", "--expert-cache"),
        "GPU memory for experts: auto (what is free), slots per layer (32), a share (25%), a size (6GiB); 0: none.",
        "auto",
        _cache_size,
        "SIZE",
        section=EXPERTS,
    ),
    Option(
        ("-dev", "--device"),
        "Accelerators for experts, ggml's names separated by commas, or none.",
        None,
        str,
        "NAMES",
        "LLAMA_ARG_DEVICE",
        unset="every GPU",
        section=EXPERTS,
    ),
    Option(
        ("-fitt", "--fit-target"),
        "GPU memory that --expert-cache auto leaves free.",
        "1GiB",
        _size,
        "SIZE",
        section=EXPERTS,
    ),
    Option(
        ("--cache-policy",),
        "Which expert leaves the cache (docs/policies.md).",
        "mrs",
        _policy("--cache-policy"),
        "NAME",
        section=EXPERTS,
    ),
    Option(
        ("--schedule",),
        "Who computes which expert of a layer.",
        "two-threshold",
        _policy("--schedule"),
        "NAME",
        section=EXPERTS,
    ),
    Option(("--prefetch",), "What is copied ahead of time.", "impact", _policy("--prefetch"), "NAME", section=EXPERTS),
    Option(
        ("--admission",), "Which missed expert gets a slot.", "pays", _policy("--admission"), "NAME", section=EXPERTS
    ),
    Option(
        ("--guard",),
        "Never slower than plain llama.cpp: give up copies, prefetch, the cache while they lose; on or off.",
        "on",
        _on_off,
        "WHEN",
        section=EXPERTS,
    ),
    Option(
        ("--calibration",),
        "Costs from this file of 'hybrimoe probe'.",
        None,
        str,
        "FILE",
        unset="this machine's, measured once",
        section=EXPERTS,
    ),
    Option(
        ("--pin-experts",),
        "Pin the experts' memory for faster copies (all of it stays in RAM).",
        False,
        None,
        no_flags=("--no-pin-experts",),
        section=EXPERTS,
    ),
    Option(
        ("--keep-residency",),
        "Keep which experts were on the GPU for the next start.",
        True,
        None,
        no_flags=("--no-keep-residency",),
        section=EXPERTS,
    ),
    Option(
        ("--reproducible",),
        "Same bits every time: whole layers placed once, no copies, no policies (docs/reproducibility.md).",
        False,
        None,
        environment="HYBRIMOE_REPRODUCIBLE",
        no_flags=("--no-reproducible",),
        section=EXPERTS,
    ),
)

SAMPLING_OPTIONS: tuple[Option, ...] = (
    Option(
        ("-n", "--n-predict", "--predict"),
        "Most tokens of an answer; -1: no limit.",
        -1,
        integer(-2),
        "N",
        "LLAMA_ARG_N_PREDICT",
        section=SAMPLING,
    ),
    Option(
        ("--temp", "--temperature"),
        "Temperature; 0: always the likeliest token.",
        0.8,
        number(),
        "T",
        "LLAMA_ARG_TEMPERATURE",
        section=SAMPLING,
    ),
    Option(("--top-k",), "Draw from the K likeliest; 0: off.", 40, integer(), "K", "LLAMA_ARG_TOP_K", section=SAMPLING),
    Option(("--top-p",), "Nucleus sampling; 1: off.", 0.95, number(0, 1), "P", "LLAMA_ARG_TOP_P", section=SAMPLING),
    Option(
        ("--min-p",),
        "Least share of the likeliest token's probability; 0: off.",
        0.05,
        number(0, 1),
        "P",
        "LLAMA_ARG_MIN_P",
        section=SAMPLING,
    ),
    Option(("--typical", "--typical-p"), "Locally typical sampling; 1: off.", 1.0, number(0, 1), "P", section=SAMPLING),
    Option(
        ("--repeat-penalty",),
        "Penalty on repeated tokens; 1: off.",
        1.0,
        number(1e-6),
        "X",
        "LLAMA_ARG_REPEAT_PENALTY",
        section=SAMPLING,
    ),
    Option(("--repeat-last-n",), "Last tokens that penalties consider; 0: off.", 64, integer(0), "N", section=SAMPLING),
    Option(
        ("--presence-penalty",),
        "Penalty on tokens that occurred; 0: off.",
        0.0,
        number(),
        "X",
        "LLAMA_ARG_PRESENCE_PENALTY",
        section=SAMPLING,
    ),
    Option(
        ("--frequency-penalty",),
        "Penalty on tokens by how often they occurred; 0: off.",
        0.0,
        number(),
        "X",
        "LLAMA_ARG_FREQUENCY_PENALTY",
        section=SAMPLING,
    ),
    Option(("-s", "--seed"), "Seed; -1: a random one.", -1, seed, "N", section=SAMPLING),
)

SYSTEM_OPTIONS: tuple[Option, ...] = (
    Option(("-sys", "--system-prompt"), "System prompt.", metavar="TEXT", section=PROMPT),
    Option(
        ("-sysf", "--system-prompt-file"), "File with the system prompt.", metavar="FILE", section=PROMPT, in_file=False
    ),
    Option(
        ("-e", "--escape"),
        r"Read \n, \t and the like in -p and -sys as llama.cpp does.",
        True,
        None,
        no_flags=("--no-escape",),
        section=PROMPT,
    ),
)

RUN_OPTIONS: tuple[Option, ...] = (
    Option(("-p", "--prompt"), "Prompt.", metavar="TEXT", section=PROMPT, in_file=False),
    Option(("-f", "--file"), "File with the prompt.", metavar="FILE", section=PROMPT, in_file=False),
    Option(
        ("-cnv", "--conversation"),
        "Put the prompt into the model's chat template; without it the text is continued as it stands.",
        True,
        None,
        no_flags=("-no-cnv", "--no-conversation"),
        section=PROMPT,
    ),
    Option(
        ("--json",),
        "Print one JSON object instead of the text.",
        False,
        None,
        no_flags=("--no-json",),
        section=OUTPUT,
    ),
)

OUTPUT_OPTIONS: tuple[Option, ...] = (
    Option(
        ("--show-timings",),
        "Speeds after each answer, on stderr.",
        True,
        None,
        environment="LLAMA_ARG_SHOW_TIMINGS",
        no_flags=("--no-show-timings",),
        section=OUTPUT,
    ),
    Option(
        ("--expert-stats",),
        "What each layer's experts did, on stderr at the end.",
        False,
        None,
        no_flags=("--no-expert-stats",),
        section=OUTPUT,
    ),
    Option(
        ("--trace",),
        "Record routing and every decision into this file ('hybrimoe simulate FILE').",
        metavar="FILE",
        section=OUTPUT,
        in_file=False,
    ),
    Option(
        ("-v", "--verbose"),
        "llama.cpp's log and tracebacks.",
        False,
        None,
        no_flags=("--no-verbose",),
        section=OUTPUT,
    ),
)

LIVE_OPTIONS: tuple[Option, ...] = (
    Option(
        ("--live",),
        "Let 'hybrimoe top' of the same user watch, and count which experts are asked for.",
        True,
        None,
        no_flags=("--no-live",),
        section=OUTPUT,
    ),
)

SERVER_OPTIONS: tuple[Option, ...] = (
    Option(("--host",), "Address to listen on.", "127.0.0.1", str, "HOST", "LLAMA_ARG_HOST", section=SERVER),
    Option(
        ("--port",),
        "Port to listen on; 0: any that is free.",
        8080,
        integer(0, 65535),
        "N",
        "LLAMA_ARG_PORT",
        section=SERVER,
    ),
    Option(
        ("-a", "--alias"),
        "Name under which clients ask for the model.",
        None,
        str,
        "NAME",
        "LLAMA_ARG_ALIAS",
        section=SERVER,
        unset="the file's name",
    ),
    Option(
        ("--api-key",),
        "Key that clients must send; better in the environment, where other users cannot see it.",
        None,
        str,
        "KEY",
        "LLAMA_API_KEY",
        section=SERVER,
        is_secret=True,
    ),
    Option(("--api-key-file",), "File whose first line is the key.", None, str, "FILE", section=SERVER),
    Option(
        ("--metrics",),
        "GET /metrics for Prometheus.",
        True,
        None,
        environment="LLAMA_ARG_ENDPOINT_METRICS",
        no_flags=("--no-metrics",),
        section=SERVER,
    ),
    Option(("--max-waiting",), "Requests that may wait for their turn.", 64, integer(0, 100_000), "N", section=SERVER),
    Option(("--max-request",), "Largest request.", "8MiB", _size, "SIZE", section=SERVER),
    Option(
        ("--request-timeout",),
        "Seconds in which a request must have arrived.",
        30.0,
        number(0.1, 3600),
        "S",
        section=SERVER,
    ),
    Option(
        ("--grace",),
        "Seconds that answers may go on after Ctrl-C or SIGTERM.",
        8.0,
        number(0, 3600),
        "S",
        section=SERVER,
    ),
)

DRY_RUN_OPTIONS: tuple[Option, ...] = (
    Option(
        ("--dry-run",),
        "Print what would be loaded where, how fast it would be, and end ('hybrimoe plan').",
        False,
        None,
        no_flags=("--no-dry-run",),
        section=OUTPUT,
        in_file=False,
    ),
)

_PLANNED = (
    "model", "ctx-size", "batch-size", "ubatch-size", "n-gpu-layers", "flash-attn", "cache-type-k", "cache-type-v",
    "override-tensor", "cpu-moe", "n-cpu-moe",
)  # fmt: skip
PLAN_COMMAND_OPTIONS: tuple[Option, ...] = (
    *(option for option in MODEL_OPTIONS if option.key in _PLANNED),
    Option(
        ("--machine",),
        'Plan for another machine: "gpu=rtx4070ti,cpu=7900x,ram=ddr5-6000x2:96GiB,link=pcie4x8", a preset with parts '
        "replaced (rtx3060-pcie4-ddr4:vram=8GiB), or a file; docs/cost-model.md has the grammar.",
        metavar="MACHINE",
        unset="this one",
        section=MODEL,
        in_file=False,
    ),
    Option(
        ("--machines",),
        "List the presets, cards and processors that --machine knows, then end.",
        False,
        None,
        no_flags=("--no-machines",),
        section=MODEL,
        in_file=False,
    ),
    Option(
        ("-d", "--depth"), "Tokens in the context already.", 0, integer(0, 1 << 24), "N", section=MODEL, in_file=False
    ),
    Option(
        ("-p", "--n-prompt"),
        "Tokens of the prompt.",
        None,
        integer(1, 1 << 24),
        "N",
        unset="one batch",
        section=MODEL,
        in_file=False,
    ),
    Option(
        ("-np", "--parallel"),
        "Slots that share the context, where none is given.",
        1,
        integer(1, 256),
        "N",
        section=MODEL,
        in_file=False,
    ),
    Option(
        ("--vary",),
        "Plan for several values: ram=ddr5-6000x2,ddr5-8000x2 or ncmoe=0:48:8; keys of --machine, and c, ub, ctk, ctv, "
        "depth, prompt, ngl, ncmoe, cmoe, quant.",
        (),
        str,
        "KEY=VALUES",
        repeats=True,
        section=OUTPUT,
        in_file=False,
    ),
    Option(("--plot",), "Picture of what --vary found (PNG).", metavar="FILE", section=OUTPUT, in_file=False),
    Option(
        ("--probe",),
        "Probe this machine where there is no calibration for it.",
        True,
        None,
        no_flags=("--no-probe",),
        section=MODEL,
        in_file=False,
    ),
    Option(("--json",), "Print one JSON object.", False, None, no_flags=("--no-json",), section=OUTPUT, in_file=False),
    *(option for option in OUTPUT_OPTIONS if option.key == "verbose"),
)

_LOAD_OPTIONS = MODEL_OPTIONS + EXPERT_OPTIONS + SAMPLING_OPTIONS + SYSTEM_OPTIONS
CHAT_COMMAND_OPTIONS = _LOAD_OPTIONS + OUTPUT_OPTIONS + LIVE_OPTIONS + DRY_RUN_OPTIONS
RUN_COMMAND_OPTIONS = _LOAD_OPTIONS + RUN_OPTIONS + OUTPUT_OPTIONS + LIVE_OPTIONS + DRY_RUN_OPTIONS
SERVE_COMMAND_OPTIONS = (
    *MODEL_OPTIONS,
    *EXPERT_OPTIONS,
    *SAMPLING_OPTIONS,
    *SERVER_OPTIONS,
    *(option for option in OUTPUT_OPTIONS if option.key in ("trace", "verbose")),
    *LIVE_OPTIONS,
    *DRY_RUN_OPTIONS,
)
ALL_OPTIONS: tuple[Option, ...] = RUN_COMMAND_OPTIONS + SERVER_OPTIONS


def check_reproducible(settings: Settings) -> None:
    """Raises UsageError where `--reproducible` stands beside a setting that it leaves nothing to decide.

    A default that a file or a variable repeats contradicts nothing: what --print-config prints is a config file.
    """
    if not settings.values.get("reproducible", False):
        return
    unused = UNUSED_WHEN_REPRODUCIBLE.values()
    for option in settings.options:
        flag = f"--{option.key}"
        if flag not in unused:
            continue
        value, by_flag = settings.values[option.name], settings.sources[option.name] == "flag"
        if (by_flag and value is not False) or (not option.is_switch and value != option.default):
            raise not_with_reproducible(_as_given(settings, "reproducible"), _as_given(settings, option.name))


def _as_given(settings: Settings, name: str) -> str:
    """The flag, with where it comes from unless it was typed."""
    source = settings.sources[name]
    flag = f"--{name.replace('_', '-')}"
    return flag if source == "flag" else f"{flag} ({source})"
