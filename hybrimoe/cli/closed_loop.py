"""`hybrimoe simulate --machine-changes`: what becomes of the engine's decisions while the machine changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from hybrimoe.cli.console import note, output_console, warn
from hybrimoe.errors import UsageError

if TYPE_CHECKING:
    from hybrimoe.cli.simulate import Request
    from hybrimoe.native.core import Kind
    from hybrimoe.simulate.closed_loop import MachineChanges
    from hybrimoe.trace.format import TraceFile

_DEFAULT_SIZE = "50%"
_POLICY_WITHOUT_SCORES = "ema:alpha=0.1"


def closed_loop(request: Request) -> int:
    """The whole command; `request` has `machine_changes`, and flags that belong to it only."""
    from hybrimoe.simulate import loop_report
    from hybrimoe.simulate.closed_loop import read_changes, run_closed_loop
    from hybrimoe.simulate.run import load
    from hybrimoe.trace.files import save

    assert request.machine_changes is not None
    if len(request.traces) != 1:
        raise UsageError(
            f"--machine-changes replays one trace, not {len(request.traces)}",
            "hybrimoe simulate demo.trace --machine-changes FILE",
        )
    if request.form not in loop_report.FORMATS:
        known = ", ".join(loop_report.FORMATS)
        raise UsageError(f"--format: there is no '{request.form}' with --machine-changes", f"known are {known}")
    changes = _with_model(read_changes(request.machine_changes), request)
    loaded = load(request.traces[0], request.prompts, False)
    trace = loaded.trace
    if request.model is not None:
        from hybrimoe.cli.trace import check_model

        check_model(trace, request.model)
    policies, n_slots = _policies(request, trace), _n_slots(request, trace, changes)
    loop = run_closed_loop(loaded.core, trace.model, changes, n_slots, n_tokens=request.tokens, **policies)
    _say_what_it_is(trace, policies["policy"], request)
    text = loop_report.render(loop, request.form)
    if request.output is not None:
        save(request.output, (text + "\n").encode())
        note(f"wrote {request.output}")
    else:
        print(text) if request.form == "json" else output_console().print(text)
    if request.plot is not None:
        from hybrimoe.simulate import plots

        save(request.plot, plots.png(plots.closed_loop_figure(loop, changes)))
        note(f"wrote {request.plot}")
    return 0


def _with_model(changes: MachineChanges, request: Request) -> MachineChanges:
    """With the model that a probe's calibration needs."""
    from hybrimoe.machine.files import with_model
    from hybrimoe.models import store

    if request.model is None or not isinstance(changes.profile, str):
        return changes
    return replace(changes, profile=with_model(changes.profile, store.resolve(request.model).absolute()))


def _say_what_it_is(trace: TraceFile, policy: str, request: Request) -> None:
    if request.policies is None and policy == _POLICY_WITHOUT_SCORES:
        note(f"cache policy {policy}: the engine's needs router scores, and the trace has none")
    if trace.note:
        warn(trace.note)
    if trace.is_decode is None or not trace.is_decode.all():
        warn(f"every token of '{trace.path.name}' is replayed as decode, prompts too: an approximation")
    if not trace.model.dense_bytes:
        warn("no time passes between two layers' experts: the trace does not know the model's dense weights")


def _n_slots(request: Request, trace: TraceFile, changes: MachineChanges) -> int:
    from hybrimoe.machine.files import open_machine
    from hybrimoe.simulate import grid

    sizes = grid.split(request.sizes or _DEFAULT_SIZE)
    if len(sizes) != 1:
        raise UsageError(f"--machine-changes replays one cache size, not {len(sizes)}", "--expert-cache 50%")
    budget = open_machine(changes.profile).budget_bytes(trace.model) if isinstance(changes.profile, str) else None
    if sizes == ["auto"] and budget is None:
        raise UsageError(
            "--expert-cache auto: the file's machine or the trace does not say what memory there is for experts",
            "give slots per layer, or a share of the experts",
        )
    return grid.parse_size_of_cache(sizes[0], trace.model, budget)


def _policies(request: Request, trace: TraceFile) -> dict[str, str]:
    """Arguments of `run_closed_loop`: what was given, else the engine's defaults."""
    from hybrimoe.expert_options import ExpertOptions
    from hybrimoe.native.core import Kind
    from hybrimoe.simulate import grid

    has_scores = trace.scores is not None or trace.weights is not None
    usual = ExpertOptions()
    policy = request.policies
    if policy is None:
        policy = usual.cache_policy
        if not has_scores and grid.describe(Kind.EVICTION, policy).needs_scores:
            policy = _POLICY_WITHOUT_SCORES
    if not has_scores and grid.describe(Kind.EVICTION, policy.partition(":")[0]).needs_scores:
        raise UsageError(
            f"--cache-policy {policy} needs router scores, and '{trace.path.name}' has none",
            "record them: hybrimoe trace record",
        )
    schedule = request.schedules if "schedule" in request.given else usual.schedule
    admission = request.admission if "admission" in request.given else usual.admission
    prefetch = _one(Kind.PREFETCH, "--prefetch", request.prefetches)
    if grid.describe(Kind.PREFETCH, prefetch.partition(":")[0]).needs_scores:
        raise UsageError(
            f"--prefetch {prefetch} needs look-ahead, which --machine-changes does not replay",
            "--prefetch none, path or eam",
        )
    return {
        "policy": _one(Kind.EVICTION, "--cache-policy", policy),
        "admission": _one(Kind.ADMISSION, "--admission", admission),
        "schedule": _one(Kind.SCHEDULER, "--schedule", schedule),
        "prefetch": prefetch,
    }


def _one(kind: Kind, flag: str, text: str) -> str:
    """The policy of this name, which the engine could run too."""
    from hybrimoe.simulate import grid

    found = grid.parse_policies(kind, text)
    if len(found) != 1:
        raise UsageError(f"--machine-changes replays one {flag}, not {len(found)}", f"{flag} {found[0]}")
    if grid.describe(kind, found[0].partition(":")[0]).oracle:
        raise UsageError(f"{flag} {found[0]} is no policy that the engine could follow", "docs/policies.md lists them")
    return found[0]
