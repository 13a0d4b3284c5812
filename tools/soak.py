#!/usr/bin/env python3
"""Keeps a server busy for minutes with many clients at once, and says whether it stood it.

Clients ask for answers of mixed lengths, streamed and whole, and abort some. Answers are compared with the same
question asked alone before, so a lost or mixed one is noticed; some reuse the KV cache, which changes roundings and
with them now and then a word, and are not compared. The server's memory is read from /proc meanwhile: it must not grow.

    python tools/soak.py demo --minutes 10
    python tools/soak.py model.gguf --clients 32 --serve-options "--device CPU --expert-cache 8"
"""

from __future__ import annotations

import argparse
import http.client
import json
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

# Few, so that every client meets answers that it can compare; of different lengths, so that prompts differ in work.
QUESTIONS = [f"{text} {'Consider this carefully. ' * n}" for n, text in enumerate((
    "Name three colours.", "What is a river?", "Count to five.", "Who writes books?",
    "Why is the sky blue?", "What do birds eat?", "Name a city.", "What is bread made of?",
))]  # fmt: skip
LENGTHS = (1, 8, 24, 64)
ABORT_SHARE = 0.2
STREAM_SHARE = 0.5
REUSE_SHARE = 0.2
TIMEOUT_S = 600.0
# Growth of memory between the first and the last third of the run that is still called flat.
FLAT_SHARE = 0.02


@dataclass
class Tally:
    """What the clients saw."""

    ends: Counter[str] = field(default_factory=Counter)
    n_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, end: str, n_tokens: int = 0, seconds: float | None = None) -> None:
        with self.lock:
            self.ends[end] += 1
            self.n_tokens += n_tokens
            if seconds is not None:
                self.seconds.append(seconds)

    def fault(self, text: str) -> None:
        with self.lock:
            self.ends["wrong"] += 1
            self.faults.append(text)


def ask(
    port: int, question: str, n_tokens: int, *, stream: bool, abort_after: int | None = None, reuse: bool = False
) -> tuple[str, int]:
    """(answer, its tokens) of one question; an aborted one gives what had come. Raises on any other end."""
    body = {
        "messages": [{"role": "user", "content": question}],
        "max_tokens": n_tokens,
        "temperature": 0,
        "stream": stream,
        "stream_options": {"include_usage": True},
        "cache_prompt": reuse,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {response.read()[:200]!r}")
        if not stream:
            data = json.loads(response.read())
            return str(data["choices"][0]["message"]["content"]), int(data["usage"]["completion_tokens"])
        return _read_stream(response, abort_after)
    finally:
        connection.close()


def _read_stream(response: http.client.HTTPResponse, abort_after: int | None) -> tuple[str, int]:
    text, n_tokens, n_events = "", 0, 0
    for line in response:
        if not line.startswith(b"data: "):
            continue
        if line.strip() == b"data: [DONE]":
            return text, n_tokens
        event = json.loads(line[6:])
        if "error" in event:
            raise RuntimeError(event["error"]["message"])
        if event["choices"]:
            text += event["choices"][0]["delta"].get("content") or ""
        n_tokens = event.get("usage", {}).get("completion_tokens", n_tokens)
        n_events += 1
        if abort_after is not None and n_events > abort_after:
            return text, n_events
    raise RuntimeError("the stream ended early")


def client(port: int, seed: int, until_s: float, expected: dict[tuple[str, int], str], tally: Tally) -> None:
    """Asks one question after the other."""
    rng = random.Random(seed)
    while time.monotonic() < until_s:
        question, n_tokens = rng.choice(list(expected))
        stream = rng.random() < STREAM_SHARE
        aborts = stream and rng.random() < ABORT_SHARE
        reuse = rng.random() < REUSE_SHARE
        start = time.monotonic()
        try:
            abort_after = rng.randrange(4) if aborts else None
            text, n = ask(port, question, n_tokens, stream=stream, abort_after=abort_after, reuse=reuse)
        except Exception as error:
            tally.fault(f"{type(error).__name__}: {error}")
            continue
        right = expected[question, n_tokens]
        if aborts:
            tally.count("aborted")
            if not reuse and not right.startswith(text):
                tally.fault(f"an aborted answer differs: {text!r} is no beginning of {right!r}")
        elif reuse and 0 <= n <= n_tokens:
            tally.count("not compared", n, time.monotonic() - start)
        elif text != right:
            tally.fault(f"an answer differs: {text!r} instead of {right!r}")
        else:
            tally.count("right", n, time.monotonic() - start)


def memory_bytes(pid: int) -> tuple[int, int]:
    """(anonymous, all) resident bytes of a process. Pages of the model's file come and go; ours must not grow."""
    with open(f"/proc/{pid}/status") as status:  # noqa: PTH123
        text = status.read()
    found = {name: int(kb) << 10 for name, kb in re.findall(r"^(Rss\w+|VmRSS):\s+(\d+) kB", text, re.MULTILINE)}
    return found.get("RssAnon", 0), found.get("VmRSS", 0)


def start_server(model: str, options: list[str]) -> tuple[subprocess.Popen[str], int]:
    """A server on a free port, loaded. Raises SystemExit with its last words when it does not come up."""
    command = [
        sys.executable,
        "-m",
        "hybrimoe.cli.main",
        "serve",
        model,
        "--port",
        "0",
        "--max-waiting",
        "1000",
        *options,
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    port, lines = 0, []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"listening on http://\S+:(\d+),", line):
            port = int(found[1])
        if "answers at" in line:
            break
    else:
        raise SystemExit("".join(lines[-5:]))
    stderr = process.stderr
    threading.Thread(target=lambda: [None for _ in stderr], daemon=True).start()
    return process, port


def soak(port: int, pid: int, n_clients: int, minutes: float, tally: Tally) -> list[tuple[int, int]]:
    """Runs the clients. Returns the server's memory over time."""
    questions = [(q, n) for q in QUESTIONS for n in LENGTHS]
    expected = {(q, n): ask(port, q, n, stream=False)[0] for q, n in questions}
    until_s = time.monotonic() + 60 * minutes
    threads = [
        threading.Thread(target=client, args=(port, seed, until_s, expected, tally), daemon=True)
        for seed in range(n_clients)
    ]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < until_s:
        memory.append(memory_bytes(pid))
        time.sleep(min(1.0, 3 * minutes))
    for thread in threads:
        thread.join()
    return memory


def report(tally: Tally, memory: list[tuple[int, int]], state: dict[str, Any], passed_s: float, args: Any) -> bool:
    """Prints the figures. Returns whether all is well."""
    third = max(1, len(memory) // 3)
    first = sum(a for a, _ in memory[third : 2 * third]) / max(1, len(memory[third : 2 * third]))
    last = sum(a for a, _ in memory[-third:]) / third
    growth = last / first - 1 if first else 0.0
    # What answers under way hold comes and goes; a leak raises the least.
    tenth = -(-len(memory) // 10)
    floors = [min(a for a, _ in memory[i : i + tenth]) for i in range(0, len(memory), tenth)]
    times = sorted(tally.seconds) or [0.0]
    requests = state["requests"]
    left = requests["running"] + requests["waiting"]
    rows = [
        ("machine", f"{platform.machine()}, {platform.release()}"),
        ("command", f"tools/soak.py {shlex.join(sys.argv[1:])}"),
        ("clients, minutes", f"{args.clients}, {passed_s / 60:.2f}"),
        ("answers right / not compared", f"{tally.ends['right']} / {tally.ends['not compared']}"),
        ("answers aborted / wrong", f"{tally.ends['aborted']} / {tally.ends['wrong']}"),
        ("tokens of answers", f"{tally.n_tokens} ({tally.n_tokens / passed_s:.1f} t/s)"),
        ("seconds per answer, median and most", f"{times[len(times) // 2]:.2f}, {times[-1]:.2f}"),
        ("server: done / cancelled / failed", f"{requests['done']} / {requests['cancelled']} / {requests['failed']}"),
        ("server: requests left over", str(left)),
        ("own memory, middle and last third", f"{first / 2**20:.1f}, {last / 2**20:.1f} MiB ({growth:+.1%})"),
        ("own memory, least of each tenth, MiB", " ".join(f"{n / 2**20:.0f}" for n in floors)),
        ("all resident memory at the end", f"{memory[-1][1] / 2**20:.0f} MiB"),
    ]
    for name, value in rows:
        print(f"{name:<38} {value}")
    for text in tally.faults[:10]:
        print(f"wrong: {text}", file=sys.stderr)
    flat = growth <= FLAT_SHARE
    if not flat:
        print(f"memory grew by {growth:.1%}", file=sys.stderr)
    return flat and not tally.faults and left == 0 and requests["failed"] == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="a GGUF file or a known model's name [default: demo]")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N")
    parser.add_argument("--clients", type=int, default=16, metavar="N")
    parser.add_argument("--serve-options", default="-c 2048", metavar="OPTIONS", help="for hybrimoe serve, in one word")
    args = parser.parse_args()
    process, port = start_server(args.model, shlex.split(args.serve_options))
    tally = Tally()
    try:
        start = time.monotonic()
        memory = soak(port, process.pid, args.clients, args.minutes, tally)
        passed_s = time.monotonic() - start
        time.sleep(1.0)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/live")
        state = json.loads(connection.getresponse().read())
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    if code != 0:
        tally.faults.append(f"the server ended with {code}")
    return 0 if report(tally, memory, state, passed_s, args) else 1


if __name__ == "__main__":
    sys.exit(main())
