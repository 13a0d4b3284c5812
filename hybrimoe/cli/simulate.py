"""`hybrimoe simulate`: policies, sizes and machines tried on routing traces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hybrimoe.cli.console import note, output_console, progress, warn
from hybrimoe.cli.options import HELP_NAMES, finish
from hybrimoe.errors import UsageError

if TYPE_CHECKING:
    from hybrimoe.simulate.grid import Point
    from hybrimoe.simulate.replay import Row
    from hybrimoe.trace.format import TraceFile
    from hybrimoe.trace.parity import Parity

_SHAPE, _CLOCK, _CHANGES, _OUTPUT = "What to try", "With a clock", "A machine that changes", "Output"
# Parameters that `--machine-changes` has a use for; others are refused beside it.
_WITH_CHANGES = (
    "traces", "machine_changes", "tokens", "cache_policy", "expert_cache", "admission", "schedule", "prefetch",
    "prompts", "model", "as_json", "form", "output", "plot", "list_profiles",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What the command line asked for; lists as typed."""

    traces: list[Path]
    policies: str | None
    sizes: str | None
    kept: bool
    cold: bool
    admission: str
    prompts: int | None
    model: str | None
    machines: list[str]
    schedules: str
    prefetches: str
    lookahead: str
    gap_us: float | None
    n_ubatch: int
    max_window_layers: int
    pay_back: bool
    jobs: int | None
    form: str
    output: Path | None
    plot: Path | None
    html: Path | None
    recorded: bool
    machine_changes: Path | None
    tokens: int | None
    given: frozenset[str]  # parameters that the command line names


def add_to(app: typer.Typer) -> None:
    @app.command(context_settings=HELP_NAMES)
    def simulate(
        context: typer.Context,
        traces: Annotated[list[Path] | None, typer.Argument(metavar="TRACE...", help="Trace files.")] = None,
        cache_policy: Annotated[
            str | None,
            typer.Option(
                "--cache-policy",
                metavar="LIST",
                rich_help_panel=_SHAPE,
                help="Eviction policies, such as lru,ema:alpha=0.1,belady; all. [default: the usual ones and belady]",
            ),
        ] = None,
        expert_cache: Annotated[
            str | None,
            typer.Option(
                "--expert-cache",
                metavar="LIST",
                rich_help_panel=_SHAPE,
                help="Cache sizes: 16 (slots per layer), 2k (times top-k), 25%, 6GiB, auto. [default: 2k,25%,50%,75%]",
            ),
        ] = None,
        kept: Annotated[
            bool, typer.Option("--kept/--no-kept", rich_help_panel=_SHAPE, help="Keep state across prompts (default).")
        ] = False,
        cold: Annotated[
            bool, typer.Option("--cold/--no-cold", rich_help_panel=_SHAPE, help="Every prompt from a cold cache.")
        ] = False,
        admission: Annotated[
            str, typer.Option("--admission", metavar="NAME", rich_help_panel=_SHAPE, help="Which misses are cached.")
        ] = "always",
        prompts: Annotated[
            int | None,
            typer.Option("--prompts", metavar="N", min=1, rich_help_panel=_SHAPE, help="Only the first N prompts."),
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(
                "-m",
                "--model",
                metavar="MODEL",
                rich_help_panel=_SHAPE,
                help="Check whose the traces are; calibrations need it.",
            ),
        ] = None,
        machine: Annotated[
            list[str] | None,
            typer.Option(
                "--machine",
                "--profile",
                "--calibration",
                metavar="MACHINE",
                rich_help_panel=_CLOCK,
                help="Machines as 'hybrimoe plan' takes them, calibrations, or this; presets separated by commas, "
                "descriptions each with a flag. With one a clock runs.",
            ),
        ] = None,
        schedule: Annotated[
            str, typer.Option("--schedule", metavar="LIST", rich_help_panel=_CLOCK, help="Schedulers of a layer.")
        ] = "two-threshold",
        prefetch: Annotated[
            str, typer.Option("--prefetch", metavar="LIST", rich_help_panel=_CLOCK, help="Prefetch policies.")
        ] = "none",
        lookahead: Annotated[
            str,
            typer.Option(
                "--lookahead",
                metavar="WHAT",
                rich_help_panel=_CLOCK,
                help="What prefetch foresees: recorded, perfect, or recall=0.8.",
            ),
        ] = "recorded",
        gap_us: Annotated[
            float | None,
            typer.Option(
                "--gap-us",
                metavar="US",
                min=0.0,
                rich_help_panel=_CLOCK,
                help="Attention and all else between two layers' experts. [default: from the model's dense weights]",
            ),
        ] = None,
        ubatch_size: Annotated[
            int, typer.Option("-ub", "--ubatch-size", metavar="N", min=1, rich_help_panel=_CLOCK, help="Prefill step.")
        ] = 512,
        max_window_layers: Annotated[
            int,
            typer.Option(
                "--max-window-layers",
                metavar="N",
                min=1,
                rich_help_panel=_CLOCK,
                help="Layers that an idle-time copy may take.",
            ),
        ] = 1,
        pay_back: Annotated[
            bool,
            typer.Option(
                "--pay-back/--no-pay-back", rich_help_panel=_CLOCK, help="Switch prefetch off while it does not pay."
            ),
        ] = True,
        recorded: Annotated[
            bool,
            typer.Option(
                "--recorded/--no-recorded",
                rich_help_panel=_CLOCK,
                help="Replay a live recording's own events and compare decisions and time with the engine's.",
            ),
        ] = False,
        list_profiles: Annotated[
            bool,
            typer.Option(
                "--machines", "--list-profiles", rich_help_panel=_CLOCK, help="List what --machine knows, then end."
            ),
        ] = False,
        machine_changes: Annotated[
            Path | None,
            typer.Option(
                "--machine-changes",
                metavar="FILE",
                rich_help_panel=_CHANGES,
                help="A machine whose costs change while it runs: decisions on beliefs, times at the truth "
                "(docs/simulate.md). One trace, size and policy; what is not given is as in the engine, half of the "
                "experts cached.",
            ),
        ] = None,
        tokens: Annotated[
            int | None,
            typer.Option(
                "--tokens",
                metavar="N",
                min=1,
                max=1 << 20,
                rich_help_panel=_CHANGES,
                help="Repeat the trace until there are so many. [default: 512 after the last change]",
            ),
        ] = None,
        jobs: Annotated[
            int | None, typer.Option("-j", "--jobs", metavar="N", min=1, help="Processes. [default: one per core]")
        ] = None,
        as_json: Annotated[
            bool, typer.Option("--json/--no-json", rich_help_panel=_OUTPUT, help="The same as --format json.")
        ] = False,
        form: Annotated[
            str, typer.Option("--format", metavar="NAME", rich_help_panel=_OUTPUT, help="table, md, csv or json.")
        ] = "table",
        output: Annotated[
            Path | None,
            typer.Option("-o", "--output", metavar="FILE", rich_help_panel=_OUTPUT, help="Instead of stdout."),
        ] = None,
        plot: Annotated[
            Path | None,
            typer.Option(
                "--plot", metavar="FILE.png", rich_help_panel=_OUTPUT, help="Hit rate over size as a picture."
            ),
        ] = None,
        html: Annotated[
            Path | None,
            typer.Option("--html", metavar="FILE", rich_help_panel=_OUTPUT, help="One page with table and pictures."),
        ] = None,
    ) -> None:
        """Try cache policies, sizes, prefetch, schedules and machines on traces, with the core that the engine runs.

        Without --machine the replay has no clock: of a step's experts all are looked up, then every miss is admitted.
        With one, times are simulated on that machine; they are estimates. With --machine-changes the machine changes
        while it runs, and the engine's own following of costs, trials and guard have to find that out.
        """
        if list_profiles:
            from hybrimoe.cli.plan import list_machines

            finish(lambda: list_machines(as_json=as_json))
        request = Request(
            traces or [], cache_policy, expert_cache, kept, cold, admission, prompts, model, machine or [], schedule,
            prefetch, lookahead, gap_us, ubatch_size, max_window_layers, pay_back, jobs,
            "json" if as_json else form, output, plot, html, recorded, machine_changes, tokens, _given(context),
        )  # fmt: skip
        flags = {p.name or "": p.opts[0] for p in context.command.params}
        finish(lambda: _simulate(request) if machine_changes is None else _with_changes(request, flags))


def _given(context: typer.Context) -> frozenset[str]:
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return frozenset(name for name, source in sources if source is not None and source.name != "DEFAULT")


def _with_changes(request: Request, flags: Mapping[str, str]) -> int:
    from hybrimoe.cli.closed_loop import closed_loop

    for name in flags:
        if name in request.given and name not in _WITH_CHANGES:
            known = ", ".join(flags[n] for n in _WITH_CHANGES[2:-1])
            raise UsageError(f"--machine-changes has no use for {flags[name]}", f"it takes {known}")
    return closed_loop(request)


def _simulate(request: Request) -> int:
    from hybrimoe.machine import host
    from hybrimoe.simulate import report
    from hybrimoe.simulate.run import run
    from hybrimoe.trace.files import save

    if not request.traces:
        raise UsageError("simulate needs a trace", "hybrimoe trace record -o demo.trace")
    if request.tokens is not None:
        raise UsageError("--tokens is of no use without --machine-changes", "--prompts N replays the first N prompts")
    if request.form not in report.FORMATS:
        raise UsageError(f"--format: there is no '{request.form}'", f"known are {', '.join(report.FORMATS)}")
    if request.recorded:
        return _recorded(request)
    points = _points(request)
    with progress(f"simulating {len(points)} combinations") as update:
        rows = run(points, request.jobs or host.n_logical_cpus(), update)
    text = report.render(rows, request.form)
    if request.output is not None:
        save(request.output, (text + "\n").encode())
        note(f"wrote {request.output}")
    else:
        print(text) if request.form != "table" else output_console().print(text)
    if request.form == "table" and (sentence := report.advice(rows)):
        output_console().print(f"\n{sentence}")
    if request.plot is not None or request.html is not None:
        _draw(request, points, rows)
    return 0


def _points(request: Request) -> list[Point]:
    from hybrimoe.machine.files import open_machine, with_model
    from hybrimoe.models import store
    from hybrimoe.native.core import Kind
    from hybrimoe.simulate import grid
    from hybrimoe.simulate.run import load

    model = None if request.model is None else store.resolve(request.model).absolute()
    machines: list[str | None] = [
        with_model(name, model) for text in request.machines for name in grid.split_machines(text)
    ] or [None]
    schedules = grid.parse_policies(Kind.SCHEDULER, request.schedules)
    prefetches = grid.parse_policies(Kind.PREFETCH, request.prefetches)
    grid.parse_policies(Kind.ADMISSION, request.admission)
    if machines == [None] and (schedules != ["two-threshold"] or prefetches != ["none"]):
        raise UsageError("schedules and prefetch need a machine", "--machine NAME; --machines lists them")
    points = []
    for path in request.traces:
        trace = load(path, request.prompts, False).trace
        if request.model is not None:
            from hybrimoe.cli.trace import check_model

            check_model(trace, request.model)
        if trace.note:
            warn(trace.note)
        _warn_about(trace, request)
        has_scores = trace.scores is not None or trace.weights is not None
        names = (
            grid.parse_policies(Kind.EVICTION, request.policies)
            if request.policies
            else grid.default_policies(has_scores)
        )
        if request.policies and "all" in grid.split(request.policies) and not has_scores:
            names = [n for n in names if not grid.describe(Kind.EVICTION, n.partition(":")[0]).needs_scores]
            warn("policies that need router scores are left out: the trace has none")
        for name in machines:
            machine = None if name is None else open_machine(name)
            budget = None if machine is None else machine.budget_bytes(trace.model)
            sizes = grid.sizes_of(request.sizes or grid.DEFAULT_SIZES, trace.model, budget)
            if machine is not None and not machine.costs(trace.model).devices:
                warn(f"'{machine.name}' has no card, so nothing is cached there")
                sizes = [("0", 0)]
            for cold in [
                c for c, wanted in ((False, request.kept or not request.cold), (True, request.cold)) if wanted
            ]:
                for policy in names:
                    oracle = grid.describe(Kind.EVICTION, policy.partition(":")[0]).oracle
                    for size, n_slots in sizes:
                        for schedule in schedules[:1] if oracle else schedules:
                            for prefetch in prefetches[:1] if oracle else prefetches:
                                points.append(
                                    grid.Point(
                                        path, policy, n_slots, size, cold, request.admission, name, schedule, prefetch,
                                        request.lookahead, request.prompts, request.n_ubatch, request.gap_us,
                                        request.max_window_layers, request.pay_back,
                                    )
                                )  # fmt: skip
    return points


def _warn_about(trace: TraceFile, request: Request) -> None:
    if request.machines and trace.is_decode is None:
        warn(f"'{trace.path.name}' does not say what was decoded: every token is replayed as decode, an approximation")
    if request.machines and request.gap_us is None and not trace.model.dense_bytes:
        warn("times are those of the experts alone: the trace does not know the model's dense weights; --gap-us says")


def _draw(request: Request, points: list[Point], rows: list[Row]) -> None:
    import shlex
    import sys

    from hybrimoe.simulate import plots
    from hybrimoe.simulate.run import load
    from hybrimoe.trace.files import save

    # Pictures are of one trace; the table of the page has all.
    own = [(r, p) for r, p in zip(rows, points, strict=True) if p.trace == request.traces[0]]
    trace = load(request.traces[0], request.prompts, False).trace
    pictures = plots.figures([r for r, _ in own], [p for _, p in own], trace)
    if request.plot is not None:
        save(request.plot, plots.png(pictures[0][1]))
        note(f"wrote {request.plot}")
        for number, (_, figure) in enumerate(pictures[1:], start=2):
            path = request.plot.with_stem(f"{request.plot.stem}-{number}")
            save(path, plots.png(figure))
            note(f"wrote {path}")
    if request.html is not None:
        notes = ["Times and speeds are simulated, never measured."] if request.machines else []
        command = shlex.join(["hybrimoe", *sys.argv[1:]])
        save(request.html, plots.html_page(rows, pictures, command, notes).encode())
        note(f"wrote {request.html}")


def _recorded(request: Request) -> int:
    import json
    from dataclasses import asdict

    from hybrimoe.cli.trace import without_nan
    from hybrimoe.trace.format import read
    from hybrimoe.trace.parity import replay_recorded

    found = [(path, replay_recorded(read(path))) for path in request.traces]
    if request.form == "json":
        data = [{"trace": path.name, "equal": p.equal, **asdict(p)} for path, p in found]
        print(json.dumps(without_nan(data), ensure_ascii=False, indent=1))
    else:
        for path, parity in found:
            output_console().print("\n".join(_parity_lines(path, parity)))
    return 0 if all(parity.equal or parity.engine is None for _, parity in found) else 1


def _parity_lines(path: Path, p: Parity) -> list[str]:
    agree = "the engine wrote no counters to compare with"
    if p.engine is not None:
        agree = "every counter equals the engine's" if p.equal else f"different: {', '.join(p.different)}"
    lines = [f"{path.name}: {p.n_events} events replayed, {p.replay['n_hits']} hits; {agree}"]
    measured = "not recorded" if p.measured_ms_per_token is None else f"{p.measured_ms_per_token:.3f} measured"
    error = "" if p.error is None else f", error {100 * p.error:+.1f} %"
    return [*lines, f"ms per token: {p.simulated_ms_per_token:.3f} simulated, {measured}{error}"]
