// Tokens and time of the model's passes, told from the blocks of them that reach the plug-in. For the computing thread.
#pragma once

#include "core/governor.h"
#include "counters.h"

#include <chrono>

namespace hybrimoe {

class pass_meter {
public:
    void begin_block(int layer, int64_t n_tokens, pass_counters & counts) {
        const auto now = clock::now();
        if (layer <= last_layer_ || last_layer_ < 0) {
            // What lies between two passes (the output, sampling, the first attention) belongs to the one before it,
            // unless it is longer than that pass: then nobody wanted a token.
            if (last_layer_ >= 0 && now - last_ <= last_ - begin_) {
                add_time(now, counts);
            }
            is_decode_ = n_tokens <= governor::most_decode_tokens;
            add(counts.n_passes, 1);
            add(is_decode_ ? counts.n_generated_tokens : counts.n_prompt_tokens, static_cast<uint64_t>(n_tokens));
            begin_ = last_ = now;
        } else {
            add_time(now, counts);
        }
        last_layer_ = layer;
    }

    void end_block(pass_counters & counts) { add_time(clock::now(), counts); }

private:
    using clock = std::chrono::steady_clock;

    void add_time(clock::time_point now, pass_counters & counts) {
        const auto past = std::chrono::duration_cast<std::chrono::nanoseconds>(now - last_).count();
        add(is_decode_ ? counts.generation_ns : counts.prompt_ns, static_cast<uint64_t>(past));
        last_ = now;
    }

    int last_layer_ = -1;
    bool is_decode_ = false;
    clock::time_point begin_, last_; // of the pass; until when its time is counted
};

} // namespace hybrimoe
