"""One side of a comparison: `python worker.py plain|plugin FOLDER` answers requests until its input ends.

Each request is a line of JSON, `{"scenario": NAME, "model": PATH, ...}`; each reply is a line of JSON whose `arrays`
names an npz file in FOLDER. A process of its own for each side, because a loaded plug-in changes plain llama.cpp.
Random token ids are used, so any vocabulary will do.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import numpy as np
from device_calls import DeviceCalls
from llama_forward import Context, ForwardError, Model, Tensors

from hybrimoe.native.backend_modules import load_backend_modules

Arrays = dict[str, "np.ndarray[Any, Any]"]
Facts = dict[str, Any]


def random_tokens(model: Model, n: int, seed: int = 0) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, model.n_vocab, n)]


def counted(context: Context) -> Facts:
    facts: Facts = {
        "instance": context.instance,
        "layers": [asdict(layer) for layer in context.counters()],
        "n_nodes_delegated": context.n_nodes_delegated(),
    }
    plugin = context.model.plugin
    if plugin is not None:
        facts["state"] = plugin.state(context.instance)
        facts["events"] = [line for _, line in plugin.events(context.instance)]
        facts["residency"] = plugin.residency(context.instance)
    return facts


def run_prompt(context: Context, tokens: list[int], n_prefill: int, name: str, arrays: Arrays, **options: Any) -> None:
    """A prefill of `n_prefill` tokens, then the rest one by one."""
    arrays[f"{name}/prefill"] = context.forward(tokens[:n_prefill], 0, **options)
    for i, token in enumerate(tokens[n_prefill:]):
        arrays[f"{name}/decode{i}"] = context.forward([token], n_prefill + i, **options)


def logits(
    model: Model, prefill: list[int], decode: int = 4, threads: int = 2, last_only: bool = False
) -> tuple[Arrays, Facts]:
    """Prompts of the given lengths, each from an empty cache, each followed by `decode` single tokens."""
    arrays: Arrays = {}
    with Context(model, n_threads=threads) as context:
        for length in prefill:
            context.clear()
            run_prompt(context, random_tokens(model, length + decode), length, str(length), arrays, last_only=last_only)
        return arrays, {"steps": [n for length in prefill for n in (length, *[1] * decode)], **counted(context)}


def shapes(model: Model, seeds: list[int], n_steps: int = 8, threads: int = 2) -> tuple[Arrays, Facts]:
    """Sequences of steps of 1 to 40 tokens in micro-batches of 8, so that the last layer often has no rows: with logits
    of all tokens or of the last one, from this thread or another, the state saved and restored between some of them."""
    arrays: Arrays = {}
    with Context(model, n_batch=64, n_ubatch=8, n_threads=threads) as context, ThreadPoolExecutor(1) as other:
        for seed in seeds:
            context.clear()
            rng = np.random.default_rng(seed)
            position = 0
            for step in range(n_steps):
                length = int(rng.choice([1, 1, 2, 5, 16, 17, 40]))
                tokens = [int(t) for t in rng.integers(1, model.n_vocab, length)]
                if rng.random() < 0.2:
                    context.restore(context.saved())
                forward = functools.partial(context.forward, tokens, position, last_only=bool(rng.random() < 0.7))
                arrays[f"{seed}/{step}"] = other.submit(forward).result() if rng.random() < 0.3 else forward()
                position += length
        return arrays, counted(context)


def greedy(model: Model, prompts: list[str], n_predict: int, threads: int = 2) -> tuple[Arrays, Facts]:
    """Greedy continuations. The logits that chose each token are kept too."""
    arrays: Arrays = {}
    with Context(model, n_threads=threads) as context:
        for index, prompt in enumerate(prompts):
            context.clear()
            tokens = model.tokenize(prompt)
            row = context.forward(tokens, 0, last_only=True)[0]
            chosen, rows = [], []
            for _ in range(n_predict):
                rows.append(row)
                chosen.append(int(row.argmax()))
                row = context.forward([chosen[-1]], len(tokens) + len(chosen) - 1)[0]
            arrays[f"{index}/tokens"] = np.array(chosen)
            arrays[f"{index}/logits"] = np.stack(rows)
        return arrays, counted(context)


def forced(model: Model, prompts: list[str], continuations: list[list[int]], threads: int = 2) -> tuple[Arrays, Facts]:
    """Logits along given continuations, so that two sides see the same tokens even when they would choose others."""
    arrays: Arrays = {}
    with Context(model, n_threads=threads) as context:
        for index, (prompt, continuation) in enumerate(zip(prompts, continuations, strict=True)):
            context.clear()
            tokens = model.tokenize(prompt)
            rows = [context.forward(tokens, 0, last_only=True)[0]]
            rows += [context.forward([t], len(tokens) + i)[0] for i, t in enumerate(continuation[:-1])]
            arrays[f"{index}/logits"] = np.stack(rows)
        return arrays, counted(context)


def log_probs(model: Model, texts: list[str], n_window: int = 256, threads: int = 2) -> tuple[Arrays, Facts]:
    """Each text's log-probabilities of its tokens, in windows that start from an empty cache."""
    arrays: Arrays = {}
    with Context(model, n_threads=threads) as context:
        for index, text in enumerate(texts):
            tokens = model.tokenize(text)
            found = [np.zeros(0)]
            for first in range(0, len(tokens), n_window):
                window = tokens[first : first + n_window]
                context.clear()
                rows = context.forward(window, 0).astype(np.float64)
                rows -= rows.max(axis=1, keepdims=True)
                given = rows[np.arange(len(window) - 1), window[1:]]
                found.append(given - np.log(np.exp(rows[:-1]).sum(axis=1)))
            arrays[f"{index}/log_probs"] = np.concatenate(found)
        return arrays, counted(context)


def callback(model: Model, watch: str, n_prefill: int = 7, decode: int = 2) -> tuple[Arrays, Facts]:
    """An evaluation callback that asks for values in the middle of graphs, which llama.cpp then cuts into pieces.

    `watch`: "all" nodes, every "third", or "experts" (nodes named ffn_moe_*). Keeps a checksum of each value seen.
    """
    tensors = Tensors()
    seen: list[tuple[str, int]] = []
    n_asked = 0

    def on_node(tensor: int, ask: bool) -> bool:
        nonlocal n_asked
        if ask:
            n_asked += 1
            if watch == "experts":
                return tensors.name(tensor).startswith("ffn_moe_")
            return watch == "all" or n_asked % 3 == 0
        value = tensors.value(tensor)
        if value is not None:
            seen.append((tensors.name(tensor), zlib.crc32(value)))
        return True

    arrays: Arrays = {}
    with Context(model, on_node=on_node) as context:
        run_prompt(context, random_tokens(model, n_prefill + decode), n_prefill, watch, arrays)
        return arrays, {"seen": seen, "n_asked": n_asked, **counted(context)}


def callbacks(model: Model, watches: list[str], n_prefill: int = 17, decode: int = 4) -> tuple[Arrays, Facts]:
    """One context, whose evaluation callback wants other nodes in each prompt; the facts after each.

    Each of `watches` is "all" nodes, every "third", "experts" (nodes named ffn_moe_*), "outside" (others) or "none".
    """
    tensors = Tensors()
    now = {"watch": "none", "n_asked": 0}

    def on_node(tensor: int, ask: bool) -> bool:
        if not ask:
            return True
        now["n_asked"] += 1
        if now["watch"] in ("experts", "outside"):
            return tensors.name(tensor).startswith("ffn_moe_") == (now["watch"] == "experts")
        return now["watch"] == "all" or (now["watch"] == "third" and now["n_asked"] % 3 == 0)

    arrays: Arrays = {}
    after = []
    with Context(model, n_batch=64, n_ubatch=8, on_node=on_node) as context:
        for i, watch in enumerate(watches):
            now["watch"] = watch
            context.clear()
            run_prompt(context, random_tokens(model, n_prefill + decode, seed=i), n_prefill, f"{i}-{watch}", arrays)
            after.append(counted(context))
        return arrays, {"after": after, **counted(context)}


def warmup(model: Model, late: bool = False, n: int = 1) -> tuple[Arrays, Facts]:
    """`n` of llama.cpp's warm-up steps, which run every expert, each before a plain prompt. `late`: two prompts come
    before the first. The facts are of before and after the last warm-up, and of the end."""
    arrays: Arrays = {}
    with Context(model) as context:
        tokens = random_tokens(model, 11)
        before: Facts = {}
        if late:
            for name in ("first", "second"):
                context.clear()
                run_prompt(context, tokens, 7, name, arrays)
            before = counted(context)
            context.clear()
        for i in range(n):
            if i:
                before = counted(context)
                context.clear()
            context.set_warmup(True)
            arrays[f"warmup {i}"] = context.forward(tokens[:2], 0)
            facts = counted(context)
            context.set_warmup(False)
            context.clear()
            run_prompt(context, tokens, 7, f"after {i}", arrays)
        return arrays, {"before_warmup": before, "after_warmup": facts, **counted(context)}


def thread_counts(model: Model, counts: list[int]) -> tuple[Arrays, Facts]:
    """The same prompt on one context whose number of threads changes."""
    arrays: Arrays = {}
    with Context(model, n_threads=counts[0]) as context:
        for i, count in enumerate(counts):
            context.set_threads(count)
            context.clear()
            run_prompt(context, random_tokens(model, 35), 33, f"{i}-{count}", arrays)
        return arrays, counted(context)


def two_contexts(model: Model) -> tuple[Arrays, Facts]:
    """Two contexts of one model in turns, on different tokens; then one alone, freed and made again."""
    arrays: Arrays = {}
    with Context(model) as first:
        with Context(model, n_threads=1) as second:
            a, b = random_tokens(model, 9, seed=1), random_tokens(model, 36, seed=2)
            arrays["a/prefill"] = first.forward(a[:5], 0)
            arrays["b/prefill"] = second.forward(b[:33], 0)
            for i in range(3):
                arrays[f"a/decode{i}"] = first.forward([a[5 + i]], 5 + i)
                arrays[f"b/decode{i}"] = second.forward([b[33 + i]], 33 + i)
            facts = {"first": counted(first), "second": counted(second)}
        arrays["a/decode3"] = first.forward([a[8]], 8)
        facts["first_after"] = counted(first)
        if model.plugin is not None:
            freed = facts["second"]["instance"]
            facts["freed"] = {"layers": [asdict(layer) for layer in model.plugin.counters(freed)]}
            model.plugin.reset_counters(first.instance)
            facts["first_reset"] = counted(first)
    for again in range(3):
        with Context(model) as context:
            arrays[f"again{again}"] = context.forward(a, 0)
            facts[f"again{again}"] = counted(context)
    return arrays, facts


def sequences(model: Model) -> tuple[Arrays, Facts]:
    """Two sequences in one context, as a server runs them, and a cache cut back and continued."""
    arrays: Arrays = {}
    with Context(model, n_sequences=2) as context:
        a, b = random_tokens(model, 12, seed=3), random_tokens(model, 12, seed=4)
        arrays["a"] = context.forward(a[:8], 0, sequence=0)
        arrays["b"] = context.forward(b[:5], 0, sequence=1)
        for i in range(3):
            arrays[f"a{i}"] = context.forward([a[8 + i]], 8 + i, sequence=0)
            arrays[f"b{i}"] = context.forward([b[5 + i]], 5 + i, sequence=1)
        context.forget_from(6)
        arrays["cut"] = context.forward(b[:6], 6, sequence=0)
        return arrays, counted(context)


def long_greedy(model: Model, n_tokens: int, n_answer: int = 200, threads: int = 2) -> tuple[Arrays, Facts]:
    """Greedy answers to random prompts until `n_tokens` were chosen: the tokens, and a checksum of each logits row."""
    chosen: list[int] = []
    sums: list[int] = []
    with Context(model, n_threads=threads) as context:
        while len(chosen) < n_tokens:
            prompt = random_tokens(model, 3 + len(chosen) % 29, seed=len(chosen))
            context.clear()
            row = context.forward(prompt, 0, last_only=True)[0]
            for i in range(min(n_answer, n_tokens - len(chosen))):
                sums.append(zlib.crc32(row.tobytes()))
                chosen.append(int(row.argmax()))
                row = context.forward([chosen[-1]], len(prompt) + i)[0]
        return {"tokens": np.array(chosen), "sums": np.array(sums)}, counted(context)


def device_calls(
    model: Model, module: str, steps: list[int], repeat: int = 4, threads: int = 2
) -> tuple[Arrays, Facts]:
    """A step of each of the given numbers of tokens, `repeat` times. The facts have what the test device `module`
    counted in each, the first of them with what setting up the context needed."""
    arrays: Arrays = {}
    calls = []
    counts = DeviceCalls(module)
    counts.reset()
    with Context(model, n_threads=threads) as context:
        position = 0
        for i, n in enumerate(n for n in steps for _ in range(repeat)):
            arrays[str(i)] = context.forward(random_tokens(model, n, seed=i), position)
            position += n
            calls.append(counts.window())
            counts.reset()
        return arrays, {"calls": calls, "all_calls": counts.total(), **counted(context)}


def _usage() -> dict[str, int]:
    import psutil

    process = psutil.Process()
    return {"rss": process.memory_info().rss, "n_fds": process.num_fds(), "n_threads": process.num_threads()}


def usage(model: Model, n_steps: int, n_settle: int, threads: int = 2) -> tuple[Arrays, Facts]:
    """What the process holds after `n_settle` single-token steps and after `n_steps` of them."""
    found = []
    with Context(model, n_threads=threads) as context:
        token, at = 1, 0
        for step in range(n_steps + 1):
            if step in (n_settle, n_steps):
                found.append(_usage())
            if at == 200:
                context.clear()
                at = 0
            token = int(context.forward([token], at)[0].argmax())
            at += 1
        return {}, {"usage": found, **counted(context)}


def reload(model: Model, times: int, n_settle: int) -> tuple[Arrays, Facts]:
    """Loads and frees the model again and again; what the process holds after `n_settle` and after all of them."""
    found, arrays = [], {}
    for i in range(times + 1):
        if i in (n_settle, times):
            found.append(_usage())
        plugin = model.plugin is not None
        with Model(model.path, plugin=plugin, repack=False) as again, Context(again) as context:
            tokens = random_tokens(again, 9)
            rows = [context.forward(tokens[:5], 0), *(context.forward([t], 5 + k) for k, t in enumerate(tokens[5:]))]
            arrays[str(i)] = np.concatenate(rows)
    return arrays, {"usage": found}


def two_engines(model: Model, engines: list[dict[str, Any]]) -> tuple[Arrays, Facts]:
    """One process, several models with settings of their own, in turns."""
    arrays: Arrays = {}
    made = []
    for one in engines:
        if model.plugin is not None:
            model.plugin.configure(**one)
        made.append(Context(model))
    tokens = random_tokens(model, 21)
    for step, (first, n) in enumerate([(0, 17), *((17 + i, 1) for i in range(4))]):
        for i, context in enumerate(made):
            arrays[f"{i}/{step}"] = context.forward(tokens[first : first + n], first)
    facts: Facts = {"engines": [counted(context) for context in made]}
    for context in made:
        context.close()
    return arrays, facts


SCENARIOS: dict[str, Callable[..., tuple[Arrays, Facts]]] = {
    f.__name__: f
    for f in (
        logits,
        shapes,
        greedy,
        forced,
        log_probs,
        callback,
        callbacks,
        warmup,
        thread_counts,
        two_contexts,
        sequences,
        long_greedy,
        device_calls,
        usage,
        reload,
        two_engines,
    )
}


def answer(request: dict[str, Any], plugin: bool, folder: Path, number: int) -> dict[str, Any]:
    scenario = SCENARIOS[request.pop("scenario")]
    options = {"repack": request.pop("repack", False)}
    of_model = ("mmap", "settings", "backends", "n_gpu_layers", "front")
    options |= {name: request.pop(name) for name in of_model if name in request}
    if request.pop("device_first", False):
        load_backend_modules(options["backends"])
        DeviceCalls(options["backends"][0]).stand_first()
    try:
        with Model(request.pop("model"), plugin=plugin, **options) as model:
            arrays, facts = scenario(model, **request)
    except ForwardError as error:
        return {"error": str(error)}
    path = folder / f"{number}.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return {"arrays": str(path), "facts": facts}


def main() -> None:
    side, folder = sys.argv[1], Path(sys.argv[2])
    # Replies have a stream of their own: whatever a library prints goes to stderr.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for number, line in enumerate(sys.stdin):
        reply = answer(json.loads(line), side == "plugin", folder, number)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
