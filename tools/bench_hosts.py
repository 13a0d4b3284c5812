#!/usr/bin/env python3
"""Decode speed in other programs: the same model, prompt and threads, in turns, as the machine is not always as fast.

    python tools/bench_hosts.py [--model FILE] [--rounds 5] [--tokens 128] [--threads 2] [--llama-cpp-bin FOLDER]
                                [--distribution FOLDER] [--vulkan-distribution FOLDER]

Compares llama-server of the pinned release (tools/build_llama_cpp.py --more llama-server) and of a distribution
(tools/get_distribution.py), each alone and through `hybrimoe exec`, with `hybrimoe serve`. Greedy, one client; the
first answer of each server is not counted. Prints one line for each: median and range of tokens per second.
--vulkan-distribution (tools/get_distribution.py --vulkan) adds llama.cpp's own expert cache (`--moe-cache-mib`) and
ours on a software device, to see that both run: how fast a card would be it does not say.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from hybrimoe.errors import HybrimoeError, as_script

START_S = 300.0
PROMPT = "The history of the steam engine begins"
HYBRIMOE = [sys.executable, "-m", "hybrimoe.cli.main"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(port: int, path: str, body: dict[str, object] | None = None) -> tuple[int, dict[str, object]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
    try:
        text = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, text, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"{}")
    finally:
        connection.close()


@contextlib.contextmanager
def server(command: Sequence[str], folder: Path) -> Iterator[int]:
    """Runs it until it was used. Raises HybrimoeError when it does not answer."""
    port = free_port()
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError, ValueError):
                if ask(port, "/health")[0] == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise HybrimoeError(f"{command[0]} does not serve", "start the command by hand")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def tokens_per_second(port: int, n_tokens: int) -> float:
    """Of the second of two answers, as the server itself says."""
    body = {"prompt": PROMPT, "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True, "min_tokens": n_tokens}
    ask(port, "/v1/completions", {**body, "max_tokens": 16, "min_tokens": 16})
    status, answer = ask(port, "/v1/completions", body)
    timings = answer.get("timings")
    if status != 200 or not isinstance(timings, dict):
        raise HybrimoeError(f"no timings in the answer ({status})", "is this a llama-server or hybrimoe serve?")
    return float(timings["predicted_per_second"])


def commands(options: argparse.Namespace) -> dict[str, tuple[list[str], Path]]:
    """By name: what starts a server, and the folder that it is started in."""
    model = str(Path(options.model).resolve())
    common = ["-m", model, "-c", "1024", "-t", str(options.threads), "-np", "1", "--no-repack"]
    here = Path.cwd()
    found = {"hybrimoe serve": ([*HYBRIMOE, "serve", model, "-c", "1024", "-t", str(options.threads)], here)}
    hosts = []
    if options.llama_cpp_bin:
        hosts.append(
            ("the pinned release's llama-server", [str(options.llama_cpp_bin.resolve() / "llama-server")], here)
        )
    if options.distribution:
        folder = options.distribution.resolve()
        hosts.append(("the distribution's llama-server", [str(folder / "run"), "llama-server"], folder / "modules"))
    if options.vulkan_distribution:
        folder = options.vulkan_distribution.resolve()
        start = [str(folder / "run"), "llama-server"]
        on_card = [*common, "-ngl", "99", "-fit", "off"]
        found["experts on the CPU, the rest on Vulkan"] = ([*start, *on_card, "-cmoe"], folder / "modules")
        own = [*start, *on_card, "-cmoe", "--moe-cache-mib", str(options.moe_cache_mib)]
        found[f"llama.cpp's own cache of {options.moe_cache_mib} MiB on Vulkan"] = (own, folder / "modules")
        ours = [*HYBRIMOE, "exec", "--expert-cache", f"{options.moe_cache_mib}MiB", "--", *start, *common, "-ngl", "99"]
        found[f"our cache of {options.moe_cache_mib} MiB on Vulkan"] = (ours, folder / "modules")
    for name, start, folder in hosts:
        found[f"{name} alone"] = ([*start, *common], folder)
        found[f"{name} with the plug-in"] = ([*HYBRIMOE, "exec", "--", *start, *common], folder)
    return found


@as_script
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a GGUF file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp-bin", type=Path)
    parser.add_argument("--distribution", type=Path)
    parser.add_argument("--vulkan-distribution", type=Path)
    parser.add_argument("--moe-cache-mib", type=int, default=64)
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in commands(options)}
    for n in range(options.rounds):
        for name, (command, folder) in commands(options).items():
            with server(command, folder) as port:
                found[name].append(tokens_per_second(port, options.tokens))
            print(f"round {n + 1}: {name}: {found[name][-1]:.1f}", file=sys.stderr)
    for name, values in found.items():
        print(f"{name}: {statistics.median(values):.1f} t/s ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    main()
