"""What is fuzzed: for each kind of input its seeds, how it is damaged, and the code that reads and uses it.

A use may succeed or raise a `HybrimoeError` with one of the target's exit codes. Everything else is a defect.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import corpus, gguf_file, mutators, trace_file
from hybrimoe.errors import HybrimoeError

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One input: the file's bytes and how many zeros follow (weights: only their number matters)."""

    data: bytes
    n_zeros: int = 0

    def write(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(self.data)
            file.truncate(len(self.data) + self.n_zeros)

    @property
    def n_bytes(self) -> int:
        return len(self.data) + self.n_zeros


@dataclass(frozen=True)
class Target:
    """`cli` are command lines that read the file; FILE stands for it, OUT for a file to write, MODEL for a model.

    `slack_bytes` is what a use may take besides twice the file: buffers, numbers that are kept, compressed input.
    """

    name: str
    suffix: str
    mutate: Callable[[random.Random], Case]
    use: Callable[[Path], object]
    seeds: Sequence[Case]
    exit_codes: tuple[int, ...]
    cli: tuple[tuple[str, ...], ...] = ()
    slack_bytes: int = 8 * MIB
    prepare: Callable[[], None] = field(default=lambda: None)

    def run(self, path: Path) -> int:
        """Uses the file; the exit code that a command would end with. Raises what a defect raises."""
        try:
            self.use(path)
        except HybrimoeError as error:
            assert error.exit_code in self.exit_codes, f"exit code {error.exit_code}: {error}"
            assert error.message.strip(), "no message"
            return error.exit_code
        return 0


@dataclass(frozen=True)
class Seeds:
    """Where the seeds that are files lie."""

    models: list[Path]
    traces: list[Path]
    scratch: Path


def make_seeds(folder: Path) -> Seeds:
    """Writes the seeds that need time into `folder`, once."""
    folder.mkdir(parents=True, exist_ok=True)
    models = corpus.tiny_models(folder)
    return Seeds(models, corpus.traces(folder, models[0]), folder)


def make_targets(seeds: Seeds) -> dict[str, Target]:
    """All targets whose code is Python, by name."""
    made = [
        _gguf(seeds), _gguf_split(seeds), _trace(seeds), *_imports(seeds), _calibration(seeds), _config(), _machine(),
        _machine_changes(), _costs(), _chat(seeds),
    ]  # fmt: skip
    return {target.name: target for target in made}


# --- models ----------------------------------------------------------------------------------------------------------


def use_model(path: Path) -> None:
    """What commands do with a header before llama.cpp sees it."""
    from hybrimoe.calibration import model_shapes
    from hybrimoe.gguf_model import inspect
    from hybrimoe.planning.work import moe_layers
    from hybrimoe.trace.identity import identity_of

    model = inspect(path)
    json.dumps(model.to_dict())
    model.kv.bytes_for(4096)
    model.require_moe()
    moe_layers(model)
    model_shapes(model)
    identity_of(model)


def _gguf(seeds: Seeds) -> Target:
    files = [gguf_file.parse(path.read_bytes()) for path in seeds.models]

    def mutate(rng: random.Random) -> Case:
        return Case(*gguf_file.mutate_to_bytes(rng, rng.choice(files)))

    return Target(
        "gguf",
        ".gguf",
        mutate,
        use_model,
        [Case(file.header(), file.n_data_bytes) for file in files],
        (3,),
        (
            ("models", "show", "FILE", "--json"),
            ("plan", "FILE", "--machine", "rtx3060-pcie3-ddr4"),
            ("run", "FILE", "hello", "-n", "2", "-c", "64", "-t", "1", "--device", "none", "--no-conversation"),
        ),
    )


def _gguf_split(seeds: Seeds) -> Target:
    """A split model: the mutated file is the first part; the second one lies beside it."""
    import struct

    first, second = (gguf_file.parse(seeds.models[0].read_bytes()) for _ in range(2))
    half = len(first.tensors) // 2

    def split(file: gguf_file.GgufFile, number: int, tensors: list[gguf_file.Tensor]) -> None:
        base, file.tensors = tensors[0].offset, tensors
        file.n_data_bytes = second.n_data_bytes if number else tensors[-1].offset + 65536
        for tensor in tensors:
            tensor.offset -= base
        keys = {b"split.no": (2, number, 2), b"split.count": (2, 2, 2), b"split.tensors.count": (5, half * 2, 4)}
        for key, (kind, value, size) in keys.items():
            file.entries.append(gguf_file.Entry(key, kind, value.to_bytes(size, "little")))

    total = len(first.tensors)
    tensors = first.tensors, second.tensors
    split(first, 0, tensors[0][:half])
    split(second, 1, tensors[1][half:])
    for file in (first, second):
        file.entries[-1].raw = struct.pack("<i", total)

    def use(path: Path) -> None:
        # Both names are part of what a split model is.
        folder = path.parent / "split"
        folder.mkdir(exist_ok=True)
        one, two = (folder / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
        two.unlink(missing_ok=True)
        one.unlink(missing_ok=True)
        Case(second.header(), second.n_data_bytes).write(two)
        path.replace(one)
        use_model(one)

    def mutate(rng: random.Random) -> Case:
        return Case(*gguf_file.mutate_to_bytes(rng, first))

    return Target("gguf-split", ".gguf", mutate, use, [Case(first.header(), first.n_data_bytes)], (3,))


# --- traces ----------------------------------------------------------------------------------------------------------


def use_trace(path: Path) -> None:
    """`trace info`, `trace convert` and a short `simulate`."""
    from hybrimoe.native.core_replay import replay_cache
    from hybrimoe.trace import convert, info
    from hybrimoe.trace.format import read

    trace = read(path)
    info.lines(trace)
    json.dumps(info.summary(trace), default=str)
    core = trace.trace()
    replay_cache(core, "mrs" if trace.scores is not None or trace.weights is not None else "lru", 2)
    for suffix in (".csv", ".trace"):
        convert.write(trace, path.with_name(f"converted{suffix}"))


def _trace(seeds: Seeds) -> Target:
    files = [trace_file.parse(path.read_bytes()) for path in seeds.traces]

    def mutate(rng: random.Random) -> Case:
        return Case(trace_file.mutate(rng, rng.choice(files)))

    return Target(
        "trace",
        ".trace",
        mutate,
        use_trace,
        [Case(path.read_bytes()) for path in seeds.traces],
        (2, 3, 4),
        (
            ("trace", "info", "FILE", "--json"),
            ("trace", "info", "FILE", "--metrics"),
            ("simulate", "FILE", "--cache-policy", "lru,mrs", "--expert-cache", "2", "--json"),
            ("trace", "convert", "FILE", "-o", "OUT.csv", "--force"),
        ),
        # Traces are compressed.
        slack_bytes=64 * MIB,
    )


def _imports(seeds: Seeds) -> list[Target]:
    from hybrimoe.trace.convert import write_imported
    from hybrimoe.trace.importers import ImportOptions, import_files

    def use(path: Path) -> None:
        write_imported(import_files([path], ImportOptions()), path.with_name("imported.trace"))

    targets = []
    texts = {
        "route-csv": corpus.ROUTE_CSV,
        "layer-csv": corpus.LAYER_CSV,
        "list-csv": corpus.LIST_CSV,
        "moe-beyond-csv": corpus.BEYOND_CSV,
    }
    cli = (("trace", "import", "FILE", "-o", "OUT.trace", "--force"),)
    for name, text in texts.items():

        def mutate(rng: random.Random, text: str = text) -> Case:
            return Case(mutators.mutate_lines(rng, text, ", ="))

        targets.append(Target(name, ".csv", mutate, use, [Case(text.encode())], (2, 3), cli, slack_bytes=16 * MIB))

    def mutate_npz(rng: random.Random) -> Case:
        if rng.random() < 0.3:
            return Case(mutators.mutate_bytes(rng, corpus.npz()))
        return Case(corpus.npz(**_hostile_arrays(rng)))

    targets.append(Target("npz", ".npz", mutate_npz, use, [Case(corpus.npz())], (2, 3, 4), cli, slack_bytes=64 * MIB))
    return targets


def _hostile_arrays(rng: random.Random) -> dict[str, Any]:
    import numpy as np

    def array() -> Any:
        kind = rng.choice(["u1", "i1", "<i4", "<i8", "<u8", "<f4", "<f8", "?", "<U3", "S2", "<M8[s]", "<c8"])
        shape = tuple(rng.choice([0, 1, 2, 3, 5, 8]) for _ in range(rng.randrange(5)))
        filled = np.zeros(shape, kind)
        if filled.size and filled.dtype.kind in "iu" and rng.random() < 0.7:
            info = np.iinfo(filled.dtype)
            filled.flat[rng.randrange(filled.size)] = rng.choice([info.min, info.max, 1, 2, 7, 8])
        return filled

    names = ("experts", "prompt_offsets", "n_expert", "first_layer", "expert_bytes", "model", "is_decode", "weights")
    changed: dict[str, Any] = {}
    for name in rng.sample(names, rng.choice([1, 1, 2])):
        if rng.random() < 0.5:
            changed[name] = array()
        elif name == "experts":
            ids = np.array(rng.choice([[[[0, 1]]], [[[0, 0]]], [[[255, 1]]], [[[-1, -1]]], [[[5, 2**31]]]]))
            changed |= {"experts": ids, "prompt_offsets": np.array([0, 1])}
        elif name == "prompt_offsets":
            changed[name] = np.array(rng.choice([[0, 5], [0, 5, 3, 5], [5, 0], [0], [0, -1, 5], [0, 2**40, 5]]))
        elif name == "model":
            changed[name] = rng.choice(["", "\x1b[2J", "a\nb", "n" * 10_000])
        else:
            changed[name] = np.array(rng.choice([v for v in mutators.INTEGERS if -(2**63) <= v < 2**63]))
    return changed


# --- settings --------------------------------------------------------------------------------------------------------


def _calibration(seeds: Seeds) -> Target:
    from hybrimoe import calibration
    from hybrimoe.gguf_model import inspect
    from hybrimoe.native.core import Costs

    model = inspect(seeds.models[0])
    sound = json.loads(json.dumps(corpus.calibration()))

    def use(path: Path) -> None:
        found = calibration.load(path)
        found.covers(calibration.model_shapes(model))
        found.describe()
        found.best_threads(model)
        for step in (found.dense_bytes_per_us, found.dense_macs_per_us, found.node_us, found.step_us):
            step()
        Costs.from_calibration(found.cost_section(model))

    def signed(data: Any) -> Any:
        """With the checksum that the file would have had: what is fuzzed is what comes after it."""
        try:
            return {**data, "checksum": calibration._checksum(data)}
        except (TypeError, ValueError, RecursionError, AttributeError):
            return data

    def mutate(rng: random.Random) -> Case:
        data = mutators.mutate_json(rng, sound)
        if rng.random() < 0.6:
            data = {**sound, "fit": mutators.mutate_json(rng, sound["fit"])}
        return Case(mutators.dump_json(rng, signed(data) if rng.random() < 0.9 else data))

    return Target(
        "calibration",
        ".json",
        mutate,
        use,
        [Case(json.dumps(signed(sound)).encode())],
        (1, 2),
        (
            ("simulate", str(seeds.traces[0]), "--profile", "FILE@MODEL", "--expert-cache", "2", "--json"),
            ("run", "MODEL", "hello", "-n", "2", "-c", "64", "-t", "1", "--calibration", "FILE", "--no-conversation"),
        ),
    )


def _config() -> Target:
    from hybrimoe.cli.flags import CHAT_COMMAND_OPTIONS, RUN_COMMAND_OPTIONS, SERVE_COMMAND_OPTIONS
    from hybrimoe.config import Sources, resolve

    def use(path: Path) -> None:
        known = [*CHAT_COMMAND_OPTIONS, *SERVE_COMMAND_OPTIONS]
        resolve(RUN_COMMAND_OPTIONS, {}, Sources(environment={}, file=path), known).describe()

    def mutate(rng: random.Random) -> Case:
        data = mutators.mutate_lines(rng, corpus.CONFIG, "=")
        if rng.random() < 0.05:
            depth = rng.choice([50, 5000])
            data += b"\nx = " + b"[" * depth + b"]" * depth
        return Case(data)

    return Target("config", ".toml", mutate, use, [Case(corpus.CONFIG.encode())], (2,), (("run", "--print-config"),))


def _machine() -> Target:
    from hybrimoe.machine.files import read_machine
    from hybrimoe.machine.rates import ExpertShape

    sound = corpus.machine()

    def use(path: Path) -> None:
        machine = read_machine(path)
        machine.price([ExpertShape.of_bytes(1000.0), ExpertShape.of_bytes(2000.0)]).costs()

    def mutate(rng: random.Random) -> Case:
        return Case(mutators.dump_json(rng, mutators.mutate_json(rng, sound)))

    return Target(
        "machine",
        ".json",
        mutate,
        use,
        [Case(json.dumps(sound).encode())],
        (1, 2),
        (("plan", "MODEL", "--machine", "FILE"),),
    )


def _machine_changes() -> Target:
    """A file of `simulate --machine-changes`, with a machine's name or a cost section in it."""
    import numpy as np

    from hybrimoe.native.core_replay import Trace
    from hybrimoe.simulate.closed_loop import read_changes, run_closed_loop
    from hybrimoe.trace.format import ModelIdentity

    sound = [corpus.machine_changes(profile) for profile in ("rtx3060-pcie4-ddr4", corpus.COSTS)]
    n_layers = len(corpus.COSTS["layer_class"])
    trace = Trace(np.tile(np.arange(2), (8, n_layers, 1)), 4)
    model = ModelIdentity("fuzzed", n_layers, 4, 2, expert_bytes=(1_000_000,) * n_layers)

    def use(path: Path) -> None:
        run_closed_loop(trace, model, read_changes(path), 2, n_tokens=8).to_json()

    def mutate(rng: random.Random) -> Case:
        return Case(mutators.dump_json(rng, mutators.mutate_json(rng, rng.choice(sound))))

    return Target("machine-changes", ".json", mutate, use, [Case(json.dumps(one).encode()) for one in sound], (1, 2))


def _costs() -> Target:
    """The cost section as the policy core takes it."""
    from hybrimoe.errors import UsageError
    from hybrimoe.native.core import Costs

    def use(path: Path) -> None:
        try:
            data = json.loads(path.read_bytes())
        except (ValueError, RecursionError):
            raise UsageError("no JSON") from None
        if isinstance(data, dict):
            Costs.from_calibration(data)

    def mutate(rng: random.Random) -> Case:
        return Case(mutators.dump_json(rng, mutators.mutate_json(rng, corpus.COSTS)))

    return Target("costs", ".json", mutate, use, [Case(json.dumps(corpus.COSTS).encode())], (1, 2))


def _chat(seeds: Seeds) -> Target:
    """A conversation that `/load` reads."""
    from hybrimoe.cli.session import Session

    def use(path: Path) -> None:
        session = Session.__new__(Session)
        session.load(path)

    def mutate(rng: random.Random) -> Case:
        return Case(mutators.dump_json(rng, mutators.mutate_json(rng, corpus.CHAT)))

    return Target("chat", ".json", mutate, use, [Case(json.dumps(corpus.CHAT).encode())], (1, 2))
