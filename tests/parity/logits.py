"""Run a model in a process of its own and save its logits: `python logits.py MODEL OUT.npz [--plugin] [options]`.

The process is fresh because a loaded plug-in also changes where plain llama.cpp puts experts. Random token ids are used,
so any vocabulary will do. OUT.npz holds one array per step, `[n_rows, n_vocab]` float32, and the plug-in's counters.
"""

from __future__ import annotations

import argparse
import ctypes
import json

import numpy as np


def tensor_overrides(buffer_type: int):
    import llama_cpp

    class Override(ctypes.Structure):
        _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))

    overrides = (Override * 2)()
    overrides[0].pattern = rb"ffn_(gate_inp\.|.*_exps)|exp_probs_b"
    overrides[0].buft = buffer_type
    params = llama_cpp.llama_model_default_params()
    params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return params, overrides


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--plugin", action="store_true")
    parser.add_argument("--prefill", type=int, nargs="*", default=[1, 7, 33], help="prompt lengths, each from a cleared cache")
    parser.add_argument("--decode", type=int, default=4, help="single-token steps after each prompt")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    plugin = None
    if options.plugin:
        from hybrimoe.native.plugin import load_plugin

        plugin = load_plugin()
        params, _keep = tensor_overrides(plugin.buffer_type)
    else:
        params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = False  # the same ggml kernels on both sides: no repacked copies
    model = llama_cpp.llama_model_load_from_file(options.model.encode(), params)
    if not model:
        raise SystemExit(f"cannot load {options.model}")
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    context_params = llama_cpp.llama_context_default_params()
    context_params.n_ctx = 1024
    context_params.n_batch = context_params.n_ubatch = 512
    context_params.n_threads = context_params.n_threads_batch = options.threads
    context = llama_cpp.llama_init_from_model(model, context_params)
    if not context:
        raise SystemExit(f"cannot make a context for {options.model}")
    instance = plugin.last_instance() if plugin else 0
    rng = np.random.default_rng(0)
    steps = []
    for length in options.prefill:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = rng.integers(1, n_vocab, length + options.decode)
        position = 0
        for chunk in [tokens[:length], *([token] for token in tokens[length:])]:
            batch = llama_cpp.llama_batch_init(len(chunk), 0, 1)
            batch.n_tokens = len(chunk)
            for i, token in enumerate(chunk):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), position + i, 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = True
            if llama_cpp.llama_decode(context, batch) != 0:
                raise SystemExit("llama_decode failed")
            rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (len(chunk), n_vocab))
            steps.append(rows.copy())
            llama_cpp.llama_batch_free(batch)
            position += len(chunk)
    counters = [vars(layer) for layer in plugin.counters(instance)] if plugin else []
    delegated = plugin.n_nodes_delegated(instance) if plugin else 0
    np.savez(options.out, *steps, counters=json.dumps(counters), n_nodes_delegated=delegated)


if __name__ == "__main__":
    main()
