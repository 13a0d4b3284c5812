// A ggml device for tests, GPU by type, that shows what a real one would punish: memory that the host cannot touch,
// work that has not happened until somebody waits for it, transfers that read and write host memory late. Its kernels
// are those of ggml's CPU backend. It counts every call, so that tests can hold a front end to a budget.
//
// libggml-test-device.so is loaded like any backend module (HYBRIMOE_BACKENDS, GGML_BACKEND_PATH, ggml_backend_load)
// and brings the devices TEST0, TEST1, ... They follow ggml's CUDA backend where backends may differ: set_tensor and
// get_tensor of a buffer do not wait for what is queued, tensors of another buffer type are refused in transfers, a
// graph whose uid is the last one's is run again as it was, quantised rows are padded, host memory is pinned or
// pageable. What a card answers with garbage or a crash is a message ("test device: ...") and an abort here. So is
// freeing memory that queued work uses, for which CUDA waits and others do not.
//
// Environment, read when the module is loaded:
//   HYBRIMOE_TEST_DEVICES          how many devices (1)
//   HYBRIMOE_TEST_DEVICE_MODE      when queued work runs: lazy, as late as its order allows (default); eager, at once;
//                                  random, at any moment between
//   HYBRIMOE_TEST_DEVICE_WORK_US   how long each queued operation takes at least, besides its own time (0)
//   HYBRIMOE_TEST_DEVICE_MIB       memory of a device (4096); a list by commas for each, the last for all others
//   HYBRIMOE_TEST_DEVICE_ID        device ids as they stand in the properties ("test:0", "test:1"); a list; "none"
//   HYBRIMOE_TEST_DEVICE_ADDRESSES reuse: a freed address is given out again soon, as cards do (default); fresh: never
//   HYBRIMOE_TEST_DEVICE_REGISTER  0: registering host memory (pinning it) fails
//   HYBRIMOE_TEST_DEVICE_FAIL      allocations that fail, counted from 1: "5", "5-8", or "5-" for all from there on
//   HYBRIMOE_TEST_DEVICE_TRACE     a file to which each call is appended as a line of JSON: kind, device, stream (0 is
//                                  the one of buffers' own set_tensor and get_tensor), bytes, nodes, names
#pragma once

#include "ggml-backend.h"

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The registry that ggml_backend_init returns, for programs that link the device; nullptr if the environment is wrong.
ggml_backend_reg_t test_device_registry(void);

// Counts as JSON, {"total": {...}, "window": {...}}: since loading, and since the last reset. See counts.def for names.
// Returns the text's length without its zero; writes at most `size` bytes, the zero included. `json` may be null.
int64_t test_device_counts(char * json, size_t size);

// Begins a new window.
void test_device_reset_counts(void);

// Puts the CPU behind the test device in ggml's list, where GPUs that a llama.cpp is compiled for stand before it.
// Where the CPU is linked in, and before its device is in use.
void test_device_stand_first(void);

#ifdef __cplusplus
}
#endif
