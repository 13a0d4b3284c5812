#include "trace_recorder.h"

#include <algorithm>
#include <chrono>
#include <new>

namespace hybrimoe {

class trace_recorder::timed {
public:
    explicit timed(trace_recorder & recorder) : recorder_(recorder) {}
    ~timed() {
        const auto past = std::chrono::steady_clock::now() - begin_;
        recorder_.pass_ns_ += std::chrono::duration_cast<std::chrono::nanoseconds>(past).count();
    }
    timed(const timed &)             = delete;
    timed & operator=(const timed &) = delete;

private:
    trace_recorder & recorder_;
    std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// A pass for which there is no memory is lost; the model goes on.
template <class body> void trace_recorder::gather(body run) {
    if (!is_on() || is_lost_) {
        return;
    }
    const timed watch(*this);
    try {
        run();
    } catch (const std::bad_alloc &) {
        is_lost_ = true;
    }
}

hybrimoe_trace_event & trace_recorder::new_event(trace_kind kind, double now_us) {
    hybrimoe_trace_event & e = events_.emplace_back();
    e                        = {};
    e.type                   = static_cast<int32_t>(kind);
    e.now_us                 = now_us;
    e.offset = e.scores_offset = e.lookahead_offset = -1;
    return e;
}

void trace_recorder::add(trace_kind kind, double now_us, int layer, int64_t id, int a, int b, int c) {
    gather([&] {
        hybrimoe_trace_event & e = new_event(kind, now_us);
        e.layer                  = layer;
        e.id                     = id;
        e.a                      = a;
        e.b                      = b;
        e.c                      = c;
    });
}

void trace_recorder::begin_pass(int64_t n_tokens, double now_us) {
    commit();
    gather([&] {
        is_decode_               = n_tokens == 1;
        hybrimoe_trace_event & e = new_event(trace_kind::step, now_us);
        e.n_rows                 = static_cast<int32_t>(n_tokens);
        e.a                      = is_decode_ ? 1 : 0;
    });
}

void trace_recorder::add_layer(const layer_event & from, int n_expert, double now_us, bool planned) {
    gather([&] {
        const auto n_rows        = static_cast<size_t>(from.n_rows);
        const size_t n           = n_rows * static_cast<size_t>(from.top_k);
        const auto width         = static_cast<size_t>(n_expert);
        hybrimoe_trace_event & e = new_event(planned ? trace_kind::layer : trace_kind::routed, now_us);
        e.layer                  = from.layer;
        e.n_rows                 = from.n_rows;
        e.a                      = from.top_k;
        e.b                      = from.scratch ? 1 : 0;
        e.gap_us                 = from.gap_us;
        e.cpu_ready_us           = from.cpu_ready_us;
        std::copy(from.gpu_ready_us, from.gpu_ready_us + max_devices, e.gpu_ready_us);
        last_layer_ = ids_.size();
        e.offset    = static_cast<int64_t>(last_layer_);
        ids_.insert(ids_.end(), from.ids, from.ids + n);
        weights_.insert(weights_.end(), from.weights, from.weights + n);
        devices_.resize(devices_.size() + n, static_cast<int8_t>(cpu_device));
        if (from.scores != nullptr) {
            e.scores_offset = static_cast<int64_t>(scores_.size());
            scores_.insert(scores_.end(), from.scores, from.scores + n_rows * width);
        }
        for (size_t d = 0; d < max_lookahead; d++) {
            if (from.lookahead[d] == nullptr) {
                continue;
            }
            if (e.c == 0) {
                e.lookahead_offset = static_cast<int64_t>(lookahead_.size());
                lookahead_.resize(lookahead_.size() + max_lookahead * width, 0.0f);
            }
            e.c |= 1 << d;
            std::copy(from.lookahead[d], from.lookahead[d] + width,
                      lookahead_.end() - static_cast<std::ptrdiff_t>((max_lookahead - d) * width));
        }
    });
}

void trace_recorder::add_transfers(const decision & made) {
    gather([&] {
        for (const transfer & t : made.transfers) {
            hybrimoe_trace_event & e = new_event(trace_kind::transfer, made.now_us);
            e.id                     = t.id;
            e.layer                  = t.layer;
            e.a                      = t.expert;
            e.b                      = t.device;
            e.c                      = static_cast<int32_t>(t.kind);
            e.n_rows                 = t.slot;
            e.x                      = t.bytes;
        }
    });
}

void trace_recorder::add_devices(const std::vector<int32_t> & where) {
    gather([&] {
        for (size_t i = last_layer_; i < ids_.size(); i++) {
            devices_[i] = static_cast<int8_t>(std::max<int32_t>(where[static_cast<size_t>(ids_[i])], cpu_device));
        }
    });
}

void trace_recorder::add_measured(int layer, double cpu_us, double gpu_us, double wait_us, double now_us,
                                  bool planned) {
    gather([&] {
        hybrimoe_trace_event & e = new_event(trace_kind::measured, now_us);
        e.layer                  = layer;
        e.a                      = planned ? 0 : 1;
        e.x                      = cpu_us;
        e.y                      = gpu_us;
        e.z                      = wait_us;
    });
}

void trace_recorder::add_phases(int layer, int64_t n_tokens, const block_times & times, bool planned) {
    gather([&] {
        hybrimoe_trace_event & e = new_event(trace_kind::phases, times.end);
        e.layer                  = layer;
        e.n_rows                 = static_cast<int32_t>(n_tokens);
        e.a                      = times.n_cpu;
        e.b                      = times.n_gpu;
        e.c                      = (planned ? 1 : 0) | (times.gpu_is_known ? 2 : 0);
        e.cpu_ready_us           = times.predicted_cpu;
        e.gap_us                 = times.predicted_gpu;
        e.x                      = times.predicted;
        e.y                      = times.gpu_busy;
        const double ends[]      = {times.begin,   times.router_end, times.launch_begin, times.launch_end,
                                    times.cpu_end, times.wait_end,   times.end,          times.gpu_end};
        static_assert(sizeof(ends) == sizeof(e.gpu_ready_us), "one column holds them all");
        // A phase that did not take place ends where it begins.
        double last = times.begin;
        for (size_t i = 0; i < max_devices; i++) {
            last              = i + 1 == max_devices ? std::max(e.gpu_ready_us[2], ends[i]) : std::max(last, ends[i]);
            e.gpu_ready_us[i] = last;
        }
    });
}

void trace_recorder::add_copied(int64_t id, double begin_us, double end_us, double bytes, double now_us) {
    gather([&] {
        hybrimoe_trace_event & e = new_event(trace_kind::copied, now_us);
        e.id                     = id;
        e.x                      = begin_us;
        e.y                      = end_us;
        e.z                      = bytes;
    });
}

void trace_recorder::add_costs(const std::string & json, double now_us) {
    gather([&] {
        const auto at            = static_cast<int64_t>(text_.size());
        hybrimoe_trace_event & e = new_event(trace_kind::costs, now_us);
        e.id                     = at;
        e.c                      = static_cast<int32_t>(json.size());
        text_ += json;
    });
}

void trace_recorder::hand_over() {
    const auto bytes_of      = [](const auto & v) { return v.size() * sizeof(v[0]); };
    const trace_part parts[] = {
        {nullptr, sizeof(hybrimoe_trace_pass)}, {events_.data(), bytes_of(events_)},
        {ids_.data(), bytes_of(ids_)},          {weights_.data(), bytes_of(weights_)},
        {scores_.data(), bytes_of(scores_)},    {lookahead_.data(), bytes_of(lookahead_)},
        {devices_.data(), bytes_of(devices_)},  {text_.data(), text_.size()},
    };
    constexpr size_t n_parts = sizeof(parts) / sizeof(parts[0]);
    size_t n_bytes           = 0;
    for (const trace_part & part : parts) {
        n_bytes += part.n_bytes;
    }
    static constexpr uint8_t zeros[8] = {};
    const size_t padding              = (8 - n_bytes % 8) % 8;
    hybrimoe_trace_pass head{};
    head.n_bytes     = n_bytes + padding;
    head.n_dropped   = static_cast<uint64_t>(n_lost_);
    head.n_events    = static_cast<int64_t>(events_.size());
    head.n_ids       = static_cast<int64_t>(ids_.size());
    head.n_scores    = static_cast<int64_t>(scores_.size());
    head.n_lookahead = static_cast<int64_t>(lookahead_.size());
    head.n_text      = static_cast<int64_t>(text_.size());
    trace_part all[n_parts + 1];
    std::copy(parts, parts + n_parts, all);
    all[0].data  = &head;
    all[n_parts] = {zeros, padding};
    if (!is_lost_ && ring_.push(all, n_parts + 1)) {
        n_lost_ = 0;
        n_passes_++;
    } else {
        n_lost_++;
        n_dropped_++;
    }
}

void trace_recorder::commit() {
    if (!is_on() || (events_.empty() && !is_lost_)) {
        return;
    }
    {
        const timed watch(*this);
        hand_over();
        events_.clear();
        ids_.clear();
        weights_.clear();
        scores_.clear();
        lookahead_.clear();
        devices_.clear();
        text_.clear();
        is_lost_ = false;
    }
    all_ns_ += static_cast<double>(pass_ns_);
    decode_ns_ += is_decode_ ? static_cast<double>(pass_ns_) : 0.0;
    n_decode_ += is_decode_ ? 1 : 0;
    pass_ns_ = 0;
}

void trace_recorder::stop() {
    commit();
    on_.store(false, std::memory_order_relaxed);
}

} // namespace hybrimoe
