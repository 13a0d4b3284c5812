#include "hybrid/device_step.h"

#include <algorithm>
#include <chrono>
#include <numeric>

namespace hybrimoe {

namespace {

// Pairs of one chunk of resident experts: bounds the work memory of a long prompt.
constexpr size_t max_chunk_pairs = 4096;
// The worker's call to watch for the end of a decode step; lanes have others.
constexpr int watch_stage = -1;
// ... and to say that the copies ordered before it have come.
constexpr int arrival_stage = -2;

} // namespace

template <class body> bool device_step::timed(body run) {
    if (!is_timed_) {
        return run();
    }
    const auto begin = std::chrono::steady_clock::now();
    const bool ok    = run();
    computed_until_  = std::chrono::steady_clock::now();
    computed_us_ += std::chrono::duration<double, std::micro>(computed_until_ - begin).count();
    return ok;
}

void device_step::begin(const expert_layout & layout, const routed_pairs & pairs, bool timed, bool in_graph) {
    in_graph_       = in_graph;
    is_timed_       = timed;
    computed_us_    = 0.0;
    computed_until_ = {};
    layout_         = &layout;
    pairs_          = pairs;
    items_.clear();
    batch_open_ = batch_sum_ = false;
    abandoned_ = broken_ = pending_ = has_seen_end_ = false;
}

const device_item * device_step::find(int32_t expert) const {
    if (expert < 0 || static_cast<size_t>(expert) >= item_of_.size()) {
        return nullptr;
    }
    const int32_t i = item_of_[static_cast<size_t>(expert)];
    return i < 0 ? nullptr : &items_[static_cast<size_t>(i)];
}

void device_step::sort_items() {
    item_of_.assign(static_cast<size_t>(layout_->n_expert), -1);
    waiting_.clear();
    resident_.clear();
    for (size_t i = 0; i < items_.size(); i++) {
        item_of_[static_cast<size_t>(items_[i].expert)] = static_cast<int32_t>(i);
        (items_[i].transfer == 0 ? resident_ : waiting_).push_back(i);
    }
    lane_row_.assign(items_.size(), {-1, 0});
}

void device_step::launch(const std::vector<copy_order> & orders, bool looks) {
    sort_items();
    if (in_graph_) {
        for (const copy_order & order : orders) {
            if (order.layout != nullptr) {
                device_.worker.copy(order, true);
            }
        }
        if (!waiting_.empty()) {
            pending_ = true;
            device_.worker.call(this, arrival_stage);
        }
        return;
    }
    if (is_decode()) {
        for (const copy_order & order : orders) {
            if (order.layout != nullptr) {
                device_.worker.copy(order, true);
            }
        }
        launch_lane(0, false);
        if (!waiting_.empty()) {
            pending_ = true;
            device_.worker.call(this, 0);
        } else if (looks && device_.end_event != nullptr) {
            ggml_backend_event_record(device_.end_event.get(), device_.port.compute());
            pending_ = true;
            device_.worker.call(this, watch_stage);
        }
        return;
    }
    pairs_of_.resize(std::max(pairs_of_.size(), items_.size()));
    for (size_t i = 0; i < items_.size(); i++) {
        pairs_of_[i].clear();
    }
    const size_t n_pairs = static_cast<size_t>(pairs_.n_tokens * pairs_.top_k);
    row_of_pair_.assign(n_pairs, -1);
    for (size_t p = 0; p < n_pairs; p++) {
        const device_item * item = find(pairs_.ids[p]);
        if (item != nullptr) {
            pairs_of_[static_cast<size_t>(item - items_.data())].push_back(static_cast<int32_t>(p));
        }
    }
    pending_ = true;
    device_.worker.call(this, 0);
    for (size_t i = 0; i < waiting_.size(); i++) {
        if (orders[i].layout != nullptr) {
            device_.worker.copy(orders[i], true);
        }
        device_.worker.call(this, static_cast<int>(i) + 1);
    }
    device_.worker.call(this, static_cast<int>(waiting_.size()) + 1);
}

void device_step::run(int stage) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (abandoned_ || broken_) {
        return;
    }
    if (stage == arrival_stage) {
        pending_ = false;
    } else if (stage == watch_stage) {
        watch_end();
        pending_ = false;
    } else if (is_decode()) {
        launch_lane(1, true);
        pending_ = false;
    } else {
        run_batch_stage(static_cast<size_t>(stage));
        pending_ = static_cast<size_t>(stage) <= waiting_.size();
    }
    lock.unlock();
    done_.notify_all();
}

void device_step::on_failure() noexcept {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        broken_  = true;
        pending_ = false;
    }
    done_.notify_all();
}

// Where the worker came too late to wait, it did not see the end.
void device_step::watch_end() {
    const auto begin = std::chrono::steady_clock::now();
    ggml_backend_event_synchronize(device_.end_event.get());
    seen_end_     = std::chrono::steady_clock::now();
    has_seen_end_ = std::chrono::duration<double, std::micro>(seen_end_ - begin).count() > least_wait_us;
}

bool device_step::wait_for_worker(double timeout_us) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (!done_.wait_for(lock, std::chrono::duration<double, std::micro>(timeout_us), [this] { return !pending_; })) {
        abandoned_ = true;
    }
    return abandoned_;
}

bool device_step::await_copies(double timeout_us) {
    const bool has_come = !wait_for_worker(timeout_us);
    for (device_item & item : items_) {
        item.done = item.transfer == 0 || (has_come && !broken_ && !device_.worker.has_failed(item.transfer));
    }
    return !has_come;
}

int device_step::slot_in_graph(int32_t expert) const {
    const device_item * item = find(expert);
    return item == nullptr || !item->done ? -1 : item->slot;
}

void device_step::watch(ggml_backend_t compute) {
    if (device_.end_event != nullptr) {
        ggml_backend_event_record(device_.end_event.get(), compute);
        pending_ = true;
        device_.worker.call(this, watch_stage);
    }
}

bool device_step::finish(double timeout_us) {
    wait_for_worker(timeout_us);
    if (in_graph_) {
        return abandoned_;
    }
    device_.compute.synchronize();
    if ((abandoned_ || broken_) && !is_decode()) {
        for (device_item & item : items_) {
            item.done = false; // the batch has no end, so nothing of it came back
        }
    }
    return abandoned_;
}

// ---------------------------------------------------------------------------------------------------------------
// decode

void device_step::launch_lane(int lane, bool waiting) {
    slots_.clear();
    experts_.clear();
    x_rows_.clear();
    const std::vector<size_t> & which = waiting ? waiting_ : resident_;
    for (const size_t i : which) {
        if (waiting && device_.worker.has_failed(items_[i].transfer)) {
            continue;
        }
        if (items_[i].on != items_[which.front()].on) {
            continue; // a lane reads from one slot set: the CPU computes what is in another
        }
        lane_row_[i] = {lane, static_cast<int>(slots_.size())};
        slots_.push_back(items_[i].slot);
        experts_.push_back(items_[i].expert);
        if (layout_->x_per_pair) {
            const int32_t * ids = pairs_.ids;
            x_rows_.push_back(static_cast<int32_t>(std::find(ids, ids + pairs_.top_k, items_[i].expert) - ids));
        }
    }
    if (slots_.empty()) {
        return;
    }
    rows_request request;
    request.layout = layout_;
    request.slots  = items_[which.front()].on;
    request.x      = pairs_.x;
    // Only before the worker may touch the device too.
    request.x_there  = waiting ? device_rows() : pairs_.x_there;
    request.x_rows   = layout_->x_per_pair ? x_rows_.data() : nullptr;
    request.slot_ids = slots_.data();
    request.experts  = experts_.data();
    request.n        = static_cast<int>(slots_.size());
    request.lane     = lane;
    const bool ok    = timed([&] { return device_.compute.launch_rows(request); });
    for (const size_t i : which) {
        items_[i].done = ok && lane_row_[i].first == lane;
    }
}

// ---------------------------------------------------------------------------------------------------------------
// batch

void device_step::begin_batch() {
    int64_t n_pairs = 0;
    for (size_t i = 0; i < items_.size(); i++) {
        n_pairs += static_cast<int64_t>(pairs_of_[i].size());
    }
    const size_t n_chunks = waiting_.size() + static_cast<size_t>(n_pairs) / max_chunk_pairs + resident_.size() + 1;
    batch_open_ =
        device_.compute.begin_batch(*layout_, pairs_.x, pairs_.x_token_bytes, pairs_.x_there, pairs_.n_tokens, n_pairs,
                                    static_cast<int>(n_chunks), layout_->x_per_pair ? pairs_.top_k : 1);
}

// All of one slot set.
void device_step::launch_items(const size_t * which, size_t n) {
    chunk_.clear();
    for (size_t i = 0; i < n; i++) {
        const device_item & item = items_[which[i]];
        for (const int32_t pair : pairs_of_[which[i]]) {
            chunk_.add(layout_->x_per_pair ? pair : pair / pairs_.top_k, item.slot, item.expert);
        }
    }
    int64_t row   = 0;
    const bool ok = timed([&] { return device_.compute.launch_chunk(*layout_, *items_[which[0]].on, chunk_, row); });
    for (size_t i = 0; i < n; i++) {
        items_[which[i]].done = ok;
        for (const int32_t pair : pairs_of_[which[i]]) {
            row_of_pair_[static_cast<size_t>(pair)] = ok ? static_cast<int32_t>(row) : -1;
            row++;
        }
    }
}

void device_step::run_batch_stage(size_t stage) {
    if (stage == 0) {
        begin_batch();
    }
    if (!batch_open_) {
        return;
    }
    if (stage == 0) {
        size_t begin = 0;
        while (begin < resident_.size()) {
            size_t end     = begin;
            size_t n_pairs = 0;
            while (end < resident_.size() &&
                   (end == begin || n_pairs + pairs_of_[resident_[end]].size() <= max_chunk_pairs)) {
                n_pairs += pairs_of_[resident_[end]].size();
                end++;
            }
            launch_items(resident_.data() + begin, end - begin);
            begin = end;
        }
    } else if (stage <= waiting_.size()) {
        const size_t i = waiting_[stage - 1];
        if (device_.worker.has_failed(items_[i].transfer)) {
            return;
        }
        launch_items(&i, 1);
        if (items_[i].is_scratch && device_.scratch_event(items_[i].slot) != nullptr) {
            ggml_backend_event_record(device_.scratch_event(items_[i].slot), device_.port.compute());
        }
    } else {
        end_batch();
    }
}

void device_step::end_batch() {
    bool ok = false;
    if (pairs_.exact) {
        ok = timed([&] { return device_.compute.end_batch_with_rows(); });
    } else {
        // Each token's rows of this device, moved to the left.
        int64_t n_k = 0;
        for (int64_t t = 0; t < pairs_.n_tokens; t++) {
            const int32_t * rows = row_of_pair_.data() + t * pairs_.top_k;
            n_k = std::max<int64_t>(n_k, std::count_if(rows, rows + pairs_.top_k, [](int32_t r) { return r >= 0; }));
        }
        if (n_k == 0) {
            return;
        }
        sum_rows_.assign(static_cast<size_t>(pairs_.n_tokens * n_k), -1);
        sum_weights_.assign(static_cast<size_t>(pairs_.n_tokens * n_k), 0.0f);
        for (int64_t t = 0; t < pairs_.n_tokens; t++) {
            int64_t at = t * n_k;
            for (int64_t p = t * pairs_.top_k; p < (t + 1) * pairs_.top_k; p++) {
                if (row_of_pair_[static_cast<size_t>(p)] >= 0) {
                    sum_rows_[static_cast<size_t>(at)]    = row_of_pair_[static_cast<size_t>(p)];
                    sum_weights_[static_cast<size_t>(at)] = pairs_.weights[p];
                    at++;
                }
            }
        }
        ok = timed([&] { return device_.compute.end_batch_with_sum(sum_rows_.data(), sum_weights_.data(), n_k); });
        batch_sum_ = ok;
    }
    for (device_item & item : items_) {
        item.done = item.done && ok;
    }
}

// ---------------------------------------------------------------------------------------------------------------
// results

const float * device_step::row(int64_t token, int32_t k) const {
    const int64_t pair       = token * pairs_.top_k + k;
    const device_item * item = find(pairs_.ids[pair]);
    if (item == nullptr || !item->done || in_graph_) {
        return nullptr;
    }
    if (is_decode()) {
        const auto & [lane, index] = lane_row_[static_cast<size_t>(item - items_.data())];
        return device_.compute.rows(lane) + index * layout_->n_embd;
    }
    return device_.compute.batch_result() + row_of_pair_[static_cast<size_t>(pair)] * layout_->n_embd;
}

void device_step::add_to(float * y, size_t y_token_bytes) const {
    const int64_t n_embd = layout_->n_embd;
    for (int64_t t = 0; t < pairs_.n_tokens && !in_graph_; t++) {
        auto * out = reinterpret_cast<float *>(reinterpret_cast<char *>(y) + static_cast<size_t>(t) * y_token_bytes);
        if (batch_sum_) {
            const float * in = device_.compute.batch_result() + t * n_embd;
            for (int64_t i = 0; i < n_embd; i++) {
                out[i] += in[i];
            }
            continue;
        }
        for (int32_t k = 0; k < pairs_.top_k; k++) {
            const float * in = row(t, k);
            if (in == nullptr) {
                continue;
            }
            const float w = pairs_.weights[t * pairs_.top_k + k];
            for (int64_t i = 0; i < n_embd; i++) {
                out[i] += w * in[i];
            }
        }
    }
}

} // namespace hybrimoe
