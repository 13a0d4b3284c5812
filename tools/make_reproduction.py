"""Writes docs/reproduction.md: published figures beside ours, on real traces and on a recording of the demo model.

    python tools/make_reproduction.py [--recording demo.trace]

Needs HYBRIMOE_TRACES, the folder of the traces of real models. Without --recording the demo model is built, where it is
missing, and recorded first (a minute or two).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

from reproduction_rows import TOPICS, Row, Traces, every_policy

from hybrimoe.errors import as_script
from hybrimoe.trace.convert import write_imported
from hybrimoe.trace.format import TraceFile, read
from hybrimoe.trace.importers import ImportOptions, import_files

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reproduction.md"
NAMES = ("deepseek-v2-lite", "qwen3-30b-a3b", "gemma4-26b-a4b", "gpt-oss-120b")
N_PREDICT = 32


def imported(path: Path, folder: Path) -> TraceFile:
    """A trace of the shared folder as a trace file."""
    output = folder / f"{path.stem}.trace"
    write_imported(import_files([path], ImportOptions()), output)
    return read(output)


def recorded(folder: Path) -> TraceFile:
    """A recording of the demo model's answers to the built-in questions."""
    from hybrimoe.engine import EngineOptions
    from hybrimoe.generation import Sampling
    from hybrimoe.gguf_model import inspect
    from hybrimoe.models import store
    from hybrimoe.trace.record import built_in_prompts, record

    output = folder / "demo.trace"
    options = EngineOptions(n_ctx=2048, n_threads=1, warmup=False, plugin=False)
    model = inspect(store.build_demo())
    record(model, output, built_in_prompts(), options, sampling=Sampling(temp=0.0), n_predict=N_PREDICT)
    return read(output)


def paragraph(text: str) -> str:
    return "\n".join(textwrap.wrap(" ".join(text.split()), 118))


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""


def page(traces: Traces) -> str:
    """The whole page."""
    demo = traces.demo
    lines = [
        "# Reproduction of published figures",
        "",
        paragraph(
            f"""Written by `make reproduce` (`tools/make_reproduction.py`); do not edit. Every row is computed by the
            policy core that the engine runs. Simulated times are called simulated; nothing here was measured on the
            papers' machines. Rows marked "demo recording" come from the routing of this project's demo model
            ({demo.model.n_expert} experts, top-{demo.model.top_k}, {demo.model.n_layers} layers; {demo.n_tokens} tokens
            of {demo.n_prompts} everyday questions and {N_PREDICT}-token answers, with all router scores and look-ahead
            recorded): the traces of real models hold no full scores. The DeepSeek trace is teacher-forced prompt text;
            its replay as decode is an approximation. The last but one column names what differs between the set-ups;
            that this is the reason was not tested, except where a row says so. Python {platform.python_version()}."""
        ),
        "",
    ]
    for title, functions in TOPICS:
        lines += [f"## {title}", ""]
        rows: list[list[str]] = []
        for function in functions:
            start = time.monotonic()
            found: list[Row] = list(function(traces))
            print(f"{function.__name__}: {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
            rows += [[r.source, r.figure, r.published, r.ours, r.why, r.trace] for r in found]
        lines += table(["source", "figure", "published", "ours", "difference, and why", "from"], rows)
    head, cells = every_policy(traces)
    lines += [
        "## Every eviction policy on the demo recording",
        "",
        paragraph(
            """Hit rates, event-atomic, default parameters. kept: one state over all prompts; cold: every prompt from a
            cold cache and fresh statistics. The same table on the traces of real models, without `mrs`, is in
            [policies.md](policies.md)."""
        ),
        "",
        *table(head, cells),
        "## Not reproduced",
        "",
        *table(
            ["source", "figure", "why not"],
            [
                ["HybriMoE", "1.33x prefill, 1.70x decode over kTransformers", "needs both engines on one machine"],
                ["MoE-Beyond (2508.17137)", "86.6 % macro-F1, 17 to 72 % hits", "no learned predictor here"],
                ["Super Experts (2507.23279)", "3 of 6,144 experts in Qwen3-30B", "needs activations, not routing"],
                ["Fate (2502.12224)", "99 % hits", "its cache sizes and model are not in the traces"],
                ["ExpertFlow, He (2410.17954)", "91.96 % hits", "needs its predictor's training data"],
            ],
        ),
    ]
    return "\n".join(lines).rstrip("\n") + "\n"


@as_script
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", type=Path, help="a trace of the demo model, instead of recording one")
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    given = os.environ.get("HYBRIMOE_TRACES")
    if not given:
        sys.exit("error: HYBRIMOE_TRACES is not set\nhint: point it at the folder with the traces of real models")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = read(options.recording) if options.recording else recorded(folder)
        real = [imported(Path(given) / f"{n}.npz", folder) for n in NAMES]
        text = page(Traces(real[0], real[1], real[2], real[3], demo))
    temporary = options.output.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(options.output)


if __name__ == "__main__":
    sys.exit(main())
