"""The constants of the speed model: which were fitted to measurements of others, and which have a source.

`tools/fit_field.py` fits `FITTED` to the public list in tools/field and prints the error with each machine left out.
docs/cost-model.md explains every term.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CONSTANTS", "FITTED", "Constants"]


@dataclass(frozen=True)
class Constants:
    """See docs/cost-model.md, "The terms"."""

    # --- fitted ---
    # A core's speed at dot products with weights that come from main memory, as a share of its speed in the cache.
    streaming_share: float = 0.37
    # Tokens of one expert at which a card's matrix product reaches half of `matrix_share`.
    half_tokens: float = 71.0
    # Activations that one node of a prompt's graph moves, in numbers of n_tokens x n_embd floats.
    activation_moves: float = 1.5

    # --- with a source, or judged where it says so; fitting them did not lower the error on machines left out ---
    # One node of the graph on a card: its kernel's fixed time, averaged over views (which cost nothing) and kernels. A
    # short kernel takes 2 to 3 us from start to start (NVIDIA, "Getting Started with CUDA Graphs": 3.4 us), and four of
    # ten nodes are kernels.
    node_us: float = 1.0
    # Handing one layer's experts to the CPU and back: waiting for the card, two small copies of 6-7 us each with their
    # calls, waking the threads. Judged.
    handover_us: float = 50.0
    # Quantised matrix products of large batches, as a share of a card's dense INT8 rate. Judged.
    matrix_share: float = 0.25
    # Launching one kernel where no CUDA graph does, on a core of _REFERENCE_THREAD's speed: 2-4 us a kernel, about a
    # third of the nodes are kernels (NVIDIA, "Getting Started with CUDA Graphs": 3.8 us with launches in a stream).
    launch_us: float = 1.0
    # Matrix-vector products reach 80-90 % of a card's bandwidth when they are large; small ones pay `node_us`.
    card_bandwidth_share: float = 0.85
    # Reading memory with all cores: STREAM reaches about 80 % of the peak with two channels, 65-75 % on servers.
    dram_share: float = 0.8
    server_dram_share: float = 0.7
    # Threads of two sockets read pages that lie on one of them: little more than one socket's memory, unless pages are
    # spread (llama.cpp, docs of --numa). Assumed.
    second_socket: float = 0.2
    # A copy from pageable memory is read, written to the driver's pinned buffer, and read again by the card.
    pageable_passes: float = 3.0
    # Expert use in prompts: gamma-distributed popularity of this shape fits traces of single texts (Qwen3-30B, Gemma 4,
    # gpt-oss-120b: 0.28-0.36).
    popularity_shape: float = 0.33
    # Attention in prompts as a share of the FP16 rate (flash attention, small heads).
    attention_share: float = 0.35
    # Sharpness of the knee between bound by memory and bound by arithmetic; 1 would add both, infinity take the larger.
    knee: float = 1.5
    # One node on a CPU, and each thread's part of the barrier behind it (a cache line that goes from core to core).
    cpu_node_us: float = 0.6
    barrier_us: float = 0.05
    # Sampling, logits to the host, the call itself.
    token_us: float = 200.0
    # Graph nodes of one layer's experts, which run on the CPU with it.
    expert_nodes: float = 8.0
    # Latency of a small copy.
    copy_latency_us: float = 6.5
    # Random reads of expert-sized pieces from an NVMe drive that nothing else is known of.
    disk_bytes_per_s: float = 2.5e9


FITTED = ("streaming_share", "half_tokens", "activation_moves")
CONSTANTS = Constants()
