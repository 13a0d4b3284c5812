// The plug-in's C interface: everything Python (or any other host) may ask of libggml-hybrimoe.so beyond ggml's backend
// API. All functions are thread-safe. Strings are UTF-8 and owned by the library unless stated otherwise.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HYBRIMOE_API __attribute__((visibility("default")))
#else
#define HYBRIMOE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised by one with every change of this header that an older caller would misread.
#define HYBRIMOE_ABI_VERSION 6

HYBRIMOE_API int hybrimoe_abi_version(void);
HYBRIMOE_API const char * hybrimoe_version(void);
// The ggml release whose headers the plug-in was compiled with. A remark: what decides whether it fits another one is
// the interface (hybrimoe_check_ggml).
HYBRIMOE_API const char * hybrimoe_ggml_version(void);

// What the plug-in was compiled to expect of ggml, as one JSON object: the backend APIs it speaks, numbers of
// operations and types, places in a tensor. Two plug-ins with equal texts fit the same releases.
HYBRIMOE_API const char * hybrimoe_ggml_interface(void);

// Binds the plug-in to the ggml that is found through `library`, a handle of dlopen() whose library is, or depends on,
// libggml (NULL: wherever the process has it), and compares what ggml says of its operations, types, structures and
// tables with what the plug-in was compiled with. Returns why that ggml cannot be used, or NULL when it can. The first
// call decides for the life of the process. Call it before ggml_backend_load() and before any probe; a host that only
// loads the plug-in through ggml need not.
HYBRIMOE_API const char * hybrimoe_check_ggml(void * library);

// Sets what backend instances created from now on use; instances that exist keep their settings. `json` is one object,
// its keys and values are those of docs/settings.md. The environment variable HYBRIMOE_CONFIG holds the same for hosts
// that do not call this. Returns 0, or -1 with a message in `error` and nothing changed.
HYBRIMOE_API int hybrimoe_configure(const char * json, char * error, size_t error_size);

// llama.cpp creates one backend instance per llama_context. Ids start at 1 and are never used twice.
// The id of the instance that the calling thread created last, 0 if none.
HYBRIMOE_API uint64_t hybrimoe_last_instance(void);

// What is known about this process and its instances, as one JSON object on one line: the same that the observer's
// socket serves (docs/observability.md has all of its members). `request` is a line of words: `instance=N` (default:
// all), `after=N` (events after number N), and the parts that are wanted: counters, state, residency, events, heat,
// trace; without one (or NULL) all but trace. Writes at most `size` bytes with the terminating 0 and returns the length
// that the whole text has, or -1 when memory ran out. Never makes a step of the model wait.
HYBRIMOE_API int64_t hybrimoe_snapshot(const char * request, char * out, size_t size);
// What the host wants to be known of itself: one JSON object of at most 64 KiB, which snapshots hold as `host`; the
// last one holds. Starts the observer where the settings ask for it, even if no model uses the plug-in. Returns 0, or
// -1 with a message in `error` and nothing changed.
HYBRIMOE_API int hybrimoe_set_host_facts(const char * json, char * error, size_t error_size);
// The folder of this user's observer sockets, which need not exist. Writes and returns as hybrimoe_snapshot.
HYBRIMOE_API int64_t hybrimoe_runtime_folder(char * out, size_t size);

// Recording of a live run. The computing thread hands every pass of the model over whole; when the ring has no room for
// it, it is dropped and counted. Kinds of events and the meaning of their fields: docs/trace-format.md.
struct hybrimoe_trace_event {
    int32_t type, layer, n_rows, a, b, c;
    int64_t id;
    int64_t offset, scores_offset, lookahead_offset; // within the pass; -1: none
    double now_us, cpu_ready_us, gap_us, x, y, z;
    double gpu_ready_us[8];
};
// Head of a pass. Then follow n_events events, n_ids ids (int32_t), n_ids router weights, n_scores scores and
// n_lookahead look-ahead scores (float), n_ids devices (int8_t), n_text bytes of text (cost sections; event COSTS has
// the first byte in `id` and the length in `c`), and zeros up to n_bytes.
struct hybrimoe_trace_pass {
    uint64_t n_bytes;   // with this head
    uint64_t n_dropped; // passes lost before this one
    int64_t n_events, n_ids, n_scores, n_lookahead, n_text;
};
// Moves as many whole passes to `out` as fit; for one reading thread. Returns their bytes; 0: there is none; -n: the
// next one has n bytes; -1: the instance is unknown or does not record.
HYBRIMOE_API int64_t hybrimoe_read_trace(uint64_t instance, void * out, int64_t size);
// Ends the recording; what was recorded may still be read. Returns 0, or -1 as above.
HYBRIMOE_API int hybrimoe_stop_trace(uint64_t instance);

// What the user reads when the kernel ends the process: `text` goes to stderr, the exit status is `exit_code`. NULL: as
// if this was never called. Returns 0, or -1 for another `ending` or where the system has no such signal.
enum hybrimoe_ending {
    HYBRIMOE_FILE_IS_GONE        = 0, // a page of a mapped file (SIGBUS): the file was cut, its disk failed
    HYBRIMOE_ILLEGAL_INSTRUCTION = 1, // this CPU lacks it (SIGILL): code that was compiled for another one
};
HYBRIMOE_API int hybrimoe_set_last_words(int ending, const char * text, int exit_code);

#ifdef __cplusplus
}
#endif
