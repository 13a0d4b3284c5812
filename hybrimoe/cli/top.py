"""`hybrimoe top`: watch any process of this user that the plug-in runs in."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hybrimoe.cli.console import is_terminal, note
from hybrimoe.cli.options import HELP_NAMES, finish
from hybrimoe.errors import HybrimoeError, UsageError

if TYPE_CHECKING:
    from hybrimoe.live.sockets import WatchedProcess

_ONCE_SNAPSHOTS = 2  # rates need two


def add_to(app: typer.Typer) -> None:
    @app.command(context_settings=HELP_NAMES)
    def top(
        target: Annotated[
            str | None,
            typer.Argument(
                metavar="[URL or PID]", help="A server's address, or a process; without it the one there is."
            ),
        ] = None,
        once: Annotated[
            bool, typer.Option("--once/--no-once", help="Print one view and end.", show_default=False)
        ] = False,
        as_json: Annotated[
            bool, typer.Option("--json/--no-json", help="Print snapshots as JSON, one a line.", show_default=False)
        ] = False,
        interval: Annotated[
            float, typer.Option("--interval", metavar="S", help="Seconds between two views.", min=0.2)
        ] = 1.0,
        api_key: Annotated[
            str | None,
            typer.Option(
                "--api-key", metavar="KEY", envvar="LLAMA_API_KEY", show_envvar=False, help="The server's key."
            ),
        ] = None,
        serve: Annotated[
            int | None,
            typer.Option(
                "--serve",
                metavar="PORT",
                min=0,
                max=65535,
                help="Serve the live page, /live and /metrics of the process on this port of 127.0.0.1 (0: any).",
                show_default=False,
            ),
        ] = None,
        list_: Annotated[
            bool, typer.Option("--list/--no-list", help="List what can be watched.", show_default=False)
        ] = False,
    ) -> None:
        """Watch what a running server, chat or run does: speed, hit rate, who computes, what is where.

        Processes of the same user are found by themselves, other programs that load the plug-in too; servers of others
        by their address. Ctrl-C ends.
        """
        if serve is not None:
            finish(lambda: _serve(target, serve))
        finish(lambda: _list(as_json) if list_ else _top(target, once, as_json, interval, api_key))


def _top(target: str | None, once: bool, as_json: bool, interval: float, api_key: str | None) -> None:
    snapshots = _source(target, interval, api_key)
    if once:
        snapshots = _last_of(snapshots, _ONCE_SNAPSHOTS)
    if as_json:
        for snapshot in snapshots:
            print(json.dumps(snapshot, ensure_ascii=False), flush=True)
    elif once or not is_terminal(sys.stdout):
        _print_all(snapshots)
    else:
        _show_live(snapshots)


def _source(target: str | None, interval: float, api_key: str | None) -> Iterator[dict[str, Any]]:
    """Snapshots of what the user named. Raises UsageError, HybrimoeError."""
    from hybrimoe.live.remote import live_url, poll_snapshots

    if target is not None and not target.isdecimal():
        return poll_snapshots(live_url(target), interval, api_key)
    return _snapshots(choose_process(target), interval)


def _snapshots(process: WatchedProcess, period_s: float) -> Iterator[dict[str, Any]]:
    """Snapshots of a process, one each `period_s`, until it ends. Raises HybrimoeError when it cannot be reached."""
    from hybrimoe.live.snapshot import LiveSampler
    from hybrimoe.live.sockets import Observer, ObserverGoneError

    with Observer(process.path) as observer:
        sampler = LiveSampler(observer.read)
        while True:
            start = time.monotonic()
            try:
                snapshot = sampler.snapshot()
            except ObserverGoneError:
                return
            yield snapshot
            time.sleep(max(0.0, period_s - (time.monotonic() - start)))


def choose_process(target: str | None) -> WatchedProcess:
    """The process of that number, or the only one there is. Raises UsageError, HybrimoeError."""
    from hybrimoe.live.sockets import processes

    found = processes()
    if target is not None:
        chosen = next((p for p in found if p.pid == int(target)), None)
        if chosen is None:
            raise UsageError(f"process {target} cannot be watched", "hybrimoe top --list")
        return chosen
    if not found:
        raise HybrimoeError(
            "nothing of yours is running that could be watched", "start 'hybrimoe chat' or 'hybrimoe serve'"
        )
    if len(found) > 1:
        names = ", ".join(f"{p.pid} ({_title(p)})" for p in found)
        raise UsageError(f"there are several: {names}", f"hybrimoe top {found[-1].pid}")
    return found[0]


def _serve(target: str | None, port: int) -> int:
    """Serves the page and the figures of a process until a signal."""
    if target is not None and not target.isdecimal():
        raise UsageError("--serve is for a process of this machine", "a server has its own page and /metrics")
    from hybrimoe.cli.serve import check_packages

    check_packages()
    from hybrimoe.live.companion import serve_companion
    from hybrimoe.server.run import bind, shown_url

    process = choose_process(target)
    with bind("127.0.0.1", port) as bound:
        where = f"at {shown_url(bound)} (page at /, /live, /metrics; Ctrl-C stops)"
        note(f"watching {process.pid} ({_title(process)}) {where}")
        return serve_companion(process.path, bound)


def _title(process: WatchedProcess) -> str:
    snapshot = _first(process)
    return f"{snapshot.get('command', '?')} {snapshot.get('model', {}).get('name', '')}".strip()


def _first(process: WatchedProcess) -> dict[str, Any]:
    from hybrimoe.live.snapshot import live_snapshot
    from hybrimoe.live.sockets import Observer

    try:
        with Observer(process.path, 5.0) as observer:
            return live_snapshot(observer.ask("snapshot counters state"), None)
    except HybrimoeError:
        return {}


def _list(as_json: bool) -> None:
    from hybrimoe.cli.report import table
    from hybrimoe.live.sockets import processes

    rows = []
    for process in processes():
        snapshot = _first(process)
        row = {"pid": process.pid, "command": snapshot.get("command", ""), "url": snapshot.get("url", "")}
        rows.append({**row, "phase": snapshot.get("phase", ""), "model": snapshot.get("model", {}).get("name", "")})
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
        return
    head = ["pid", "command", "phase", "url", "model"]
    print(table(head, [[str(row[name]) for name in head] for row in rows]))


def _last_of(snapshots: Iterator[dict[str, Any]], n: int) -> Iterator[dict[str, Any]]:
    last = None
    for _, snapshot in zip(range(n), snapshots, strict=False):
        last = snapshot
        if snapshot["phase"] == "loading":
            break
    if last is not None:
        yield last


def _print_all(snapshots: Iterator[dict[str, Any]]) -> None:
    from rich.console import Console

    from hybrimoe.live.view import dashboard

    width = None if is_terminal(sys.stdout) or "COLUMNS" in os.environ else 80
    console = Console(highlight=False, emoji=False, markup=False, width=width)
    for snapshot in snapshots:
        console.print(dashboard(snapshot, console.width, None, colour=console.color_system is not None))


def _show_live(snapshots: Iterator[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.live import Live

    from hybrimoe.live.view import dashboard

    console = Console(highlight=False, emoji=False, markup=False)
    last: dict[str, Any] | None = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        for snapshot in snapshots:
            last = snapshot
            size = console.size  # asked again each time: terminals change
            view = dashboard(snapshot, size.width, size.height, colour=console.color_system is not None)
            live.update(view, refresh=True)
    if last is not None:
        print(f"process {last['pid']} has ended")
