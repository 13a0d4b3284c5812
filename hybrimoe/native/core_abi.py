"""The C interface of the policy core as ctypes sees it: structures, prototypes, loading. Mirrors
`native/include/hybrimoe_core.h`; use `hybrimoe.native.core` instead."""

from __future__ import annotations

import ctypes as ct
import os
import sys
from pathlib import Path

from hybrimoe.errors import HybrimoeError, PluginError, UsageError
from hybrimoe.native.locate import installed_library

API_VERSION = 1
MAX_DEVICES = 8
MAX_LOOKAHEAD = 3
LIBRARY_VARIABLE = "HYBRIMOE_CORE_LIB"

# hm_error
INVALID_ARGUMENT, UNKNOWN_NAME, OUT_OF_ORDER, MISSING_COST, NO_SLOT, MISSING_SCORES = 1, 2, 3, 4, 5, 6

_MESSAGE_BYTES = 512
_handle = ct.c_void_p
_i32p = ct.POINTER(ct.c_int32)
_i64p = ct.POINTER(ct.c_int64)
_f64p = ct.POINTER(ct.c_double)
_devices = ct.c_double * MAX_DEVICES


class CoreError(HybrimoeError):
    """The policy core refused a call; nothing has changed. `code` is an hm_error."""

    code: int = 0


class CoreUsageError(CoreError, UsageError):
    """A value outside its range, or a name that no policy has (the message lists the known ones)."""


class PolicyInfoC(ct.Structure):
    """hm_policy_info"""

    _fields_ = (
        ("name", ct.c_char_p),
        ("doc", ct.c_char_p),
        ("source", ct.c_char_p),
        ("needs_scores", ct.c_int32),
        ("oracle", ct.c_int32),
        ("needs_costs", ct.c_int32),
        ("n_params", ct.c_int32),
    )


class ParamInfoC(ct.Structure):
    """hm_param_info"""

    _fields_ = (
        ("name", ct.c_char_p),
        ("doc", ct.c_char_p),
        ("default_value", ct.c_double),
        ("min_value", ct.c_double),
        ("max_value", ct.c_double),
        ("integer", ct.c_int32),
    )


class ParamC(ct.Structure):
    """hm_param"""

    _fields_ = (("name", ct.c_char_p), ("value", ct.c_double))


class PolicyC(ct.Structure):
    """hm_policy"""

    _fields_ = (("name", ct.c_char_p), ("params", ct.POINTER(ParamC)), ("n_params", ct.c_int32))


class CurveC(ct.Structure):
    """hm_curve"""

    _fields_ = (
        ("fixed_us", ct.c_double),
        ("per_token_us", ct.c_double),
        ("n_points", ct.c_int32),
        ("n_tokens", _f64p),
        ("us", _f64p),
    )


class WorkItemC(ct.Structure):
    """hm_work_item"""

    _fields_ = (
        ("expert", ct.c_int32),
        ("n_tokens", ct.c_int32),
        ("device", ct.c_int32),
        ("loading", ct.c_int32),
        ("may_copy", ct.c_int32),
        ("ready_us", ct.c_double),
    )


class ProblemC(ct.Structure):
    """hm_problem"""

    _fields_ = (
        ("layer", ct.c_int32),
        ("n_items", ct.c_int32),
        ("items", ct.POINTER(WorkItemC)),
        ("cpu_ready_us", ct.c_double),
        ("gpu_ready_us", _devices),
        ("link_ready_us", _devices),
        ("max_copies", ct.c_int32 * MAX_DEVICES),
    )


class PlacementC(ct.Structure):
    """hm_placement"""

    _fields_ = (
        ("expert", ct.c_int32),
        ("device", ct.c_int32),
        ("copied", ct.c_int32),
        ("start_us", ct.c_double),
        ("end_us", ct.c_double),
        ("copy_start_us", ct.c_double),
        ("copy_end_us", ct.c_double),
    )


class PlanC(ct.Structure):
    """hm_plan"""

    _fields_ = (
        ("n_placements", ct.c_int32),
        ("placements", ct.POINTER(PlacementC)),
        ("makespan_us", ct.c_double),
        ("cpu_end_us", ct.c_double),
        ("dram_us", ct.c_double),
        ("cpu_bytes", ct.c_double),
        ("copy_bytes", ct.c_double),
        ("gpu_end_us", _devices),
        ("link_end_us", _devices),
        ("n_cpu", ct.c_int32),
        ("n_gpu", ct.c_int32),
        ("n_copies", ct.c_int32),
    )


class CacheConfigC(ct.Structure):
    """hm_cache_config"""

    _fields_ = (
        ("n_layers", ct.c_int32),
        ("n_expert", ct.c_int32),
        ("top_k", ct.c_int32),
        ("n_devices", ct.c_int32),
        ("pooled", ct.c_int32),
        ("n_slots", _i32p),
        ("class_of_layer", _i32p),
    )


CACHE_STATS = (
    "n_queries",
    "n_hits",
    "n_misses",
    "n_late",
    "n_loads",
    "n_failed_loads",
    "n_evictions",
    "n_refused",
    "n_prefetched",
    "n_prefetch_used",
    "n_prefetch_wasted",
)


class CacheStatsC(ct.Structure):
    """hm_cache_stats"""

    _fields_ = tuple((name, ct.c_int64) for name in CACHE_STATS)


class StepC(ct.Structure):
    """hm_step"""

    _fields_ = (
        ("layer", ct.c_int32),
        ("n_rows", ct.c_int32),
        ("top_k", ct.c_int32),
        ("ids", ct.c_void_p),
        ("weights", ct.c_void_p),
        ("scores", ct.c_void_p),
    )


class SlotMoveC(ct.Structure):
    """hm_slot_move"""

    _fields_ = (
        ("layer", ct.c_int32),
        ("expert", ct.c_int32),
        ("from_slot", ct.c_int32),
        ("to_slot", ct.c_int32),
    )


class TraceC(ct.Structure):
    """hm_trace"""

    _fields_ = (
        ("n_layers", ct.c_int32),
        ("n_expert", ct.c_int32),
        ("top_k", ct.c_int32),
        ("n_tokens", ct.c_int64),
        ("n_prompts", ct.c_int64),
        ("experts", ct.c_void_p),
        ("weights", ct.c_void_p),
        ("scores", ct.c_void_p),
        ("prompt_offsets", ct.c_void_p),
    )


class ReplayOptionsC(ct.Structure):
    """hm_replay_options"""

    _fields_ = (("cold", ct.c_int32), ("preload", ct.c_int32), ("resident", ct.c_void_p))


class ReplayResultC(ct.Structure):
    """hm_replay_result"""

    _fields_ = (
        ("n_queries", ct.c_int64),
        ("n_hits", ct.c_int64),
        ("n_loads", ct.c_int64),
        ("n_evictions", ct.c_int64),
    )


class RuntimeConfigC(ct.Structure):
    """hm_runtime_config"""

    _fields_ = (
        ("cache", CacheConfigC),
        ("eviction", PolicyC),
        ("admission", PolicyC),
        ("schedule", PolicyC),
        ("prefetch", PolicyC),
        ("max_window_layers", ct.c_int32),
        ("pay_back", ct.c_int32),
        ("preload", ct.c_int32),
    )


class LayerEventC(ct.Structure):
    """hm_layer_event"""

    _fields_ = (
        ("layer", ct.c_int32),
        ("n_rows", ct.c_int32),
        ("top_k", ct.c_int32),
        ("scratch", ct.c_int32),
        ("ids", ct.c_void_p),
        ("weights", ct.c_void_p),
        ("scores", ct.c_void_p),
        ("lookahead", ct.c_void_p * MAX_LOOKAHEAD),
        ("cpu_ready_us", ct.c_double),
        ("gpu_ready_us", _devices),
        ("gap_us", ct.c_double),
    )


class TransferC(ct.Structure):
    """hm_transfer"""

    _fields_ = (
        ("id", ct.c_int64),
        ("kind", ct.c_int32),
        ("layer", ct.c_int32),
        ("expert", ct.c_int32),
        ("device", ct.c_int32),
        ("slot", ct.c_int32),
        ("evicted_layer", ct.c_int32),
        ("evicted_expert", ct.c_int32),
        ("bytes", ct.c_double),
        ("start_us", ct.c_double),
        ("end_us", ct.c_double),
        ("saved_us", ct.c_double),
    )


class DecisionC(ct.Structure):
    """hm_decision"""

    _fields_ = (
        ("n_items", ct.c_int32),
        ("n_transfers", ct.c_int32),
        ("placements", ct.POINTER(PlacementC)),
        ("slots", _i32p),
        ("transfers", ct.POINTER(TransferC)),
        ("makespan_us", ct.c_double),
        ("cpu_end_us", ct.c_double),
        ("dram_us", ct.c_double),
        ("n_hits", ct.c_int32),
        ("n_misses", ct.c_int32),
        ("n_late", ct.c_int32),
        ("n_cpu", ct.c_int32),
        ("n_gpu", ct.c_int32),
        ("n_copies", ct.c_int32),
        ("horizon", ct.c_int32),
    )


class RuntimeStatsC(ct.Structure):
    """hm_runtime_stats"""

    _fields_ = (
        ("n_events", ct.c_int64),
        ("n_cpu", ct.c_int64),
        ("n_gpu", ct.c_int64),
        ("n_hits", ct.c_int64),
        ("n_misses", ct.c_int64),
        ("n_late", ct.c_int64),
        ("n_transfers", ct.c_int64 * 4),
        ("bytes", ct.c_double * 4),
        ("n_failed", ct.c_int64),
        ("prefetch_useful_bytes", ct.c_double),
        ("prefetch_late_bytes", ct.c_double),
        ("prefetch_wasted_bytes", ct.c_double),
        ("n_delayed_demands", ct.c_int64),
        ("stall_us", ct.c_double),
        ("makespan_us", ct.c_double),
        ("n_prefetch_switches", ct.c_int64),
        ("prefetch_on", ct.c_int32),
        ("horizon", ct.c_int32),
        ("decision_hash", ct.c_uint64),
    )


class EventC(ct.Structure):
    """hm_event"""

    _fields_ = (
        ("type", ct.c_int32),
        ("layer", ct.c_int32),
        ("n_rows", ct.c_int32),
        ("a", ct.c_int32),
        ("b", ct.c_int32),
        ("c", ct.c_int32),
        ("id", ct.c_int64),
        ("offset", ct.c_int64),
        ("scores_offset", ct.c_int64),
        ("lookahead_offset", ct.c_int64),
        ("now_us", ct.c_double),
        ("cpu_ready_us", ct.c_double),
        ("gap_us", ct.c_double),
        ("gpu_ready_us", _devices),
    )


class EventArraysC(ct.Structure):
    """hm_event_arrays"""

    _fields_ = (
        ("ids", ct.c_void_p),
        ("n_ids", ct.c_int64),
        ("weights", ct.c_void_p),
        ("scores", ct.c_void_p),
        ("n_scores", ct.c_int64),
        ("lookahead", ct.c_void_p),
        ("n_lookahead", ct.c_int64),
    )


class ClockOptionsC(ct.Structure):
    """hm_clock_options"""

    _fields_ = (
        ("step_offsets", ct.c_void_p),
        ("n_steps", ct.c_int64),
        ("gap_us", ct.c_double),
        ("shared_us", ct.c_double),
        ("scratch", ct.c_int32),
        ("lookahead", ct.c_void_p),
    )


class ClockLayerC(ct.Structure):
    """hm_clock_layer"""

    _fields_ = (
        ("step", ct.c_int64),
        ("layer", ct.c_int32),
        ("n_rows", ct.c_int32),
        ("n_hits", ct.c_int32),
        ("n_misses", ct.c_int32),
        ("n_cpu", ct.c_int32),
        ("n_gpu", ct.c_int32),
        ("n_copies", ct.c_int32),
        ("n_prefetched", ct.c_int32),
        ("start_us", ct.c_double),
        ("makespan_us", ct.c_double),
        ("cpu_us", ct.c_double),
        ("gpu_us", ct.c_double),
        ("link_us", ct.c_double),
    )


class ClockResultC(ct.Structure):
    """hm_clock_result"""

    _fields_ = (
        ("total_us", ct.c_double),
        ("experts_us", ct.c_double),
        ("cpu_busy_us", ct.c_double),
        ("gpu_busy_us", ct.c_double),
        ("link_busy_us", ct.c_double),
        ("n_layers_run", ct.c_int64),
    )


class MachinePhaseC(ct.Structure):
    """hm_machine_phase"""

    _fields_ = (
        ("from_token", ct.c_int64),
        ("costs", _handle),
        ("noise", ct.c_double),
        ("outlier_share", ct.c_double),
        ("outlier_factor", ct.c_double),
        ("waits_every_layers", ct.c_int32),
        ("waits_us", ct.c_double),
    )


class LoopOptionsC(ct.Structure):
    """hm_loop_options"""

    _fields_ = (
        ("phases", ct.POINTER(MachinePhaseC)),
        ("n_phases", ct.c_int32),
        ("n_tokens", ct.c_int64),
        ("gap_us", ct.c_double),
        ("overhead_us", ct.c_double),
        ("seed", ct.c_uint64),
        ("live", ct.c_int32),
        ("guard", ct.c_int32),
        ("trials", ct.c_int32),
        ("is_told", ct.c_int32),
    )


class LoopTokenC(ct.Structure):
    """hm_loop_token"""

    _fields_ = (
        ("us", ct.c_double),
        ("cpu_only_us", ct.c_double),
        ("whole_layers_us", ct.c_double),
        ("trying_us", ct.c_double),
        ("n_trials", ct.c_int32),
        ("n_gpu", ct.c_int32),
        ("n_copies", ct.c_int32),
        ("level", ct.c_int32),
        ("believed_cpu", ct.c_double),
        ("believed_gpu", ct.c_double),
        ("believed_link", ct.c_double),
        ("believed_dram", ct.c_double),
    )


# Functions that return an error code; (char * message, size_t message_size) follows the named arguments.
_FALLIBLE: dict[str, tuple[object, ...]] = {
    "hm_costs_create": (ct.c_int32, ct.c_int32, ct.c_int32, ct.POINTER(_handle)),
    "hm_costs_set_layer_class": (_handle, ct.c_int32, ct.c_int32),
    "hm_costs_set_bytes": (_handle, ct.c_int32, ct.c_double),
    "hm_costs_set_cpu": (_handle, ct.c_int32, ct.POINTER(CurveC), ct.c_double),
    "hm_costs_set_gpu": (_handle, ct.c_int32, ct.c_int32, ct.POINTER(CurveC)),
    "hm_costs_set_link": (_handle, ct.c_int32, ct.c_double, ct.c_double),
    "hm_costs_set_step": (_handle, ct.c_int32, ct.c_double),
    "hm_costs_set_dram": (_handle, ct.c_double),
    "hm_costs_check": (_handle,),
    "hm_scheduler_create": (ct.POINTER(PolicyC), ct.POINTER(_handle)),
    "hm_scheduler_plan": (_handle, _handle, ct.POINTER(ProblemC), ct.POINTER(PlanC)),
    "hm_cache_create": (ct.POINTER(CacheConfigC), ct.POINTER(PolicyC), ct.POINTER(_handle)),
    "hm_cache_lookup": (_handle, ct.c_int32, ct.c_int32, _i32p, _i32p, _i32p),
    "hm_cache_begin_step": (_handle, ct.POINTER(StepC)),
    "hm_cache_begin_load": (_handle, ct.c_int32, ct.c_int32, ct.c_int32, ct.c_int32, _i32p, _i32p, _i32p),
    "hm_cache_complete_load": (_handle, ct.c_int32, ct.c_int32),
    "hm_cache_fail_load": (_handle, ct.c_int32, ct.c_int32),
    "hm_cache_pin": (_handle, ct.c_int32, ct.c_int32, ct.c_int32),
    "hm_cache_resize": (_handle, ct.c_int32, ct.c_int32, ct.c_int32, ct.POINTER(SlotMoveC), ct.c_int32, _i32p),
    "hm_cache_verify": (_handle,),
    "hm_allocate_slots": (ct.POINTER(PolicyC), ct.c_int32, ct.c_int32, ct.c_int32, ct.c_void_p, _i32p),
    "hm_replay_cache": (
        ct.POINTER(TraceC),
        ct.POINTER(ReplayOptionsC),
        ct.POINTER(CacheConfigC),
        ct.POINTER(PolicyC),
        ct.POINTER(PolicyC),
        _handle,
        ct.POINTER(ReplayResultC),
        ct.c_void_p,
        ct.c_void_p,
    ),
    "hm_replay_recall": (
        ct.POINTER(TraceC),
        ct.POINTER(PolicyC),
        ct.c_int32,
        ct.c_int64,
        _i32p,
        ct.c_int32,
        _f64p,
    ),
    "hm_runtime_create": (ct.POINTER(RuntimeConfigC), _handle, ct.POINTER(_handle)),
    "hm_runtime_on_layer": (_handle, ct.POINTER(LayerEventC), ct.c_double, ct.POINTER(DecisionC)),
    "hm_runtime_on_complete": (_handle, ct.c_int64, ct.c_double),
    "hm_runtime_on_fail": (_handle, ct.c_int64, ct.c_double),
    "hm_runtime_set_costs": (_handle, _handle),
    "hm_runtime_resize": (_handle, ct.c_int32, ct.c_int32, ct.c_int32, ct.POINTER(SlotMoveC), ct.c_int32, _i32p),
    "hm_runtime_lookup": (_handle, ct.c_int32, ct.c_int32, _i32p, _i32p, _i32p),
    "hm_runtime_warm": (_handle, ct.c_int32, ct.c_int32, ct.c_int32, _i32p),
    "hm_runtime_replay_events": (
        _handle,
        ct.c_void_p,
        ct.c_int64,
        ct.POINTER(EventArraysC),
        ct.c_void_p,
        ct.c_int32,
        _i64p,
    ),
    "hm_runtime_replay_clock": (
        _handle,
        ct.POINTER(TraceC),
        ct.POINTER(ClockOptionsC),
        ct.c_void_p,
        ct.c_int64,
        ct.POINTER(ClockResultC),
    ),
    "hm_runtime_closed_loop": (_handle, ct.POINTER(TraceC), ct.POINTER(LoopOptionsC), ct.c_void_p),
}

# Functions that cannot fail, or return a plain value.
_PLAIN: dict[str, tuple[object | None, tuple[object, ...]]] = {
    "hm_core_api_version": (ct.c_int, ()),
    "hm_kind_name": (ct.c_char_p, (ct.c_int32,)),
    "hm_policy_count": (ct.c_int32, (ct.c_int32,)),
    "hm_policy_describe": (ct.c_int, (ct.c_int32, ct.c_int32, ct.POINTER(PolicyInfoC))),
    "hm_policy_param": (ct.c_int, (ct.c_int32, ct.c_int32, ct.c_int32, ct.POINTER(ParamInfoC))),
    "hm_costs_destroy": (None, (_handle,)),
    "hm_scheduler_destroy": (None, (_handle,)),
    "hm_cache_destroy": (None, (_handle,)),
    "hm_cache_end_step": (None, (_handle,)),
    "hm_cache_begin_prompt": (None, (_handle,)),
    "hm_cache_get_stats": (None, (_handle, ct.POINTER(CacheStatsC))),
    "hm_runtime_destroy": (None, (_handle,)),
    "hm_runtime_on_layer_done": (None, (_handle,)),
    "hm_runtime_begin_prompt": (None, (_handle,)),
    "hm_runtime_set_limits": (None, (_handle, ct.c_int32, ct.c_int32, ct.c_int32)),
    "hm_runtime_get_stats": (None, (_handle, ct.POINTER(RuntimeStatsC))),
    "hm_runtime_get_cache_stats": (None, (_handle, ct.POINTER(CacheStatsC))),
}

_loaded: dict[Path, ct.CDLL] = {}


def library_path() -> Path:
    """The core's shared library: `HYBRIMOE_CORE_LIB`, else the one that is installed with this package."""
    given = os.environ.get(LIBRARY_VARIABLE)
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    return Path(given) if given else installed_library("libhybrimoe-core" + suffix)


def library() -> ct.CDLL:
    """Loads the core once per path.

    Raises PluginError if it is missing, cannot be loaded, or speaks another version of the interface.
    """
    path = library_path()
    if path in _loaded:
        return _loaded[path]
    hint = f"reinstall hybrimoe, or point {LIBRARY_VARIABLE} at a built libhybrimoe-core.so"
    if not path.is_file():
        raise PluginError(f"the policy core '{path}' does not exist", hint)
    try:
        lib = ct.CDLL(str(path))
        for name, (result, arguments) in _PLAIN.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        version = int(lib.hm_core_api_version())
        if version != API_VERSION:
            raise PluginError(
                f"the policy core '{path}' has interface {version}, this package needs {API_VERSION}", hint
            )
        for name, arguments in _FALLIBLE.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = ct.c_int, (*arguments, ct.c_char_p, ct.c_size_t)
    except (OSError, AttributeError) as error:
        raise PluginError(f"the policy core '{path}' cannot be loaded: {error}", hint) from error
    _loaded[path] = lib
    return lib


def call(name: str, *arguments: object, hint: str = "") -> None:
    """Calls a fallible function of the core; raises CoreError (CoreUsageError for bad values and unknown names)."""
    buffer = ct.create_string_buffer(_MESSAGE_BYTES)
    code = int(getattr(library(), name)(*arguments, buffer, ct.c_size_t(_MESSAGE_BYTES)))
    if code:
        kind = CoreUsageError if code in (INVALID_ARGUMENT, UNKNOWN_NAME) else CoreError
        error = kind(buffer.value.decode() or f"{name} failed with code {code}", hint)
        error.code = code
        raise error
