#include "hybrid/fleet.h"

#include "hybrid/device_step.h"

#include <algorithm>
#include <cmath>
#include <exception>

namespace hybrimoe {

namespace {

constexpr double drain_timeout_us = 5e6;
constexpr double no_wait_us       = 0.0;

// Ids of copies that no plan has asked for.
int64_t fill_id(int key) {
    return -2 - static_cast<int64_t>(key);
}

int key_of_fill(int64_t id) {
    return static_cast<int>(-2 - id);
}

} // namespace

// ---------------------------------------------------------------------------------------------------------------
// facts

slot_table fleet::wanted() const {
    slot_table slots;
    for (const auto & device : devices_) {
        slots.push_back(device->wanted);
    }
    return slots;
}

int fleet::holder(int layer, int expert) const {
    const residency at = runtime_->cache().lookup(layer, expert);
    const bool there   = at.state == slot_state::resident || at.state == slot_state::pinned;
    return there ? at.device : cpu_device;
}

std::vector<std::vector<int32_t>> fleet::residents() const {
    expert_cache & cache = runtime_->cache();
    std::vector<std::vector<int32_t>> resident(static_cast<size_t>(shared_.book.n_layers()));
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        std::vector<int32_t> & experts = resident[static_cast<size_t>(layer)];
        for (int32_t e = 0; e < shared_.book.layer(layer).layout.n_expert; e++) {
            if (cache.lookup(layer, e).state == slot_state::resident) {
                experts.push_back(e);
            }
        }
        const auto value = [&](int32_t e) { return cache.policy().keep_value(cache.shape().key(layer, e)); };
        std::stable_sort(experts.begin(), experts.end(), [&](int32_t a, int32_t b) { return value(a) > value(b); });
    }
    return resident;
}

// ---------------------------------------------------------------------------------------------------------------
// set-up

bool fleet::open(std::string & why_not) {
    const layer_book & book = shared_.book;
    try {
        const std::vector<ggml_backend_dev_t> chosen =
            shared_.in_graph() ? std::vector{shared_.inner_device} : choose_devices(shared_.config);
        for (ggml_backend_dev_t device : chosen) {
            if (devices_.size() == max_devices) {
                shared_.log.add("more than %d accelerators: the others are not used", max_devices);
                break;
            }
            auto made = std::make_unique<accelerator>(device, size(), shared_.config, shared_.clock);
            made->slots.resize(static_cast<size_t>(book.n_layers()));
            made->scratch.resize(static_cast<size_t>(book.n_classes()));
            std::vector<const expert_layout *> layouts;
            for (int layer = 0; layer < book.n_layers(); layer++) {
                layouts.push_back(&book.layer(layer).layout);
            }
            if (!made->compute.reserve(layouts, book.max_top_k())) {
                why_not = made->port.name() + " has no memory left";
                shared_.log.add("%s: all experts on the CPU", why_not.c_str());
                promise_.broken("an accelerator cannot be used");
                continue;
            }
            devices_.push_back(std::move(made));
        }
    } catch (const std::exception & error) {
        why_not = std::string("no accelerator: ") + error.what();
        shared_.log.add("%s", why_not.c_str());
        promise_.broken("an accelerator cannot be used");
        devices_.clear();
    }
    if (!devices_.empty()) {
        why_not.clear(); // the others do without it
    }
    return !devices_.empty();
}

bool fleet::make_slots() {
    std::vector<const device_port *> ports;
    for (const auto & device : devices_) {
        ports.push_back(&device->port);
    }
    slot_table slots = count_slots(shared_, ports);
    bool has_any     = false;
    for (int d = 0; d < size(); d++) {
        std::vector<int> & of_device = slots[static_cast<size_t>(d)];
        allocate((*this)[d], of_device);
        const bool has_slots = std::any_of(of_device.begin(), of_device.end(), [](int n) { return n > 0; });
        if (has_slots && !shared_.config.reproducible) { // nothing is streamed where nothing is copied
            allocate_scratch((*this)[d]);
        }
        has_any           = has_any || has_slots;
        (*this)[d].wanted = std::move(of_device);
    }
    return has_any;
}

// Fewer where memory does not hold them.
void fleet::allocate(accelerator & device, std::vector<int> & slots) {
    int most  = shared_.book.max_experts();
    bool told = false;
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        int & n = slots[static_cast<size_t>(layer)];
        n       = std::min(n, most);
        while (n > 0 &&
               !device.of_layer(layer).allocate(device.port, shared_.book.layer(layer).layout, n, shared_.in_graph())) {
            n    = shared_.config.reproducible ? 0 : n / 2; // half a layer is no fixed placement
            most = n;
            if (!told) {
                shared_.log.add("%s ran out of memory while slots were made: fewer experts are cached",
                                device.port.name().c_str());
                told = true;
                if (shared_.config.expert_cache.is != expert_cache_size::kind::automatic) {
                    promise_.broken("memory does not hold the expert cache that was asked for");
                }
            }
        }
    }
}

void fleet::allocate_scratch(accelerator & device) {
    for (int cls = 0; cls < shared_.book.n_classes(); cls++) {
        const expert_layout & layout = shared_.book.of_class(cls).layout;
        if (device_compute::supports(device.port, layout) &&
            !device.scratch[static_cast<size_t>(cls)].allocate(device.port, layout, n_scratch_slots)) {
            shared_.log.add("%s has no memory left to stream experts through: prompts use the cached ones only",
                            device.port.name().c_str());
        }
    }
}

void fleet::pin_experts() {
    size_t n_pinned = 0;
    size_t n_ranges = 0;
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        const expert_layout & layout = shared_.book.layer(layer).layout;
        for (const expert_part & part : layout.parts) {
            if (!part.is_matrix()) {
                continue;
            }
            const size_t bytes = part.stride_bytes * static_cast<size_t>(layout.n_expert);
            n_ranges++;
            for (auto & device : devices_) {
                if (device->port.register_host(const_cast<char *>(part.host), bytes)) {
                    n_pinned++;
                }
            }
        }
    }
    shared_.log.add("pinned %zu of %zu expert tensors for copies without staging", n_pinned,
                    n_ranges * devices_.size());
}

void fleet::start(runtime & rt, governor & gov) {
    runtime_  = &rt;
    governor_ = &gov;
}

void fleet::clear() {
    devices_.clear();
    runtime_  = nullptr;
    governor_ = nullptr;
}

void fleet::fill(std::vector<std::vector<int32_t>> preferred) {
    preferred.resize(static_cast<size_t>(shared_.book.n_layers()));
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        std::vector<int32_t> & order = preferred[static_cast<size_t>(layer)];
        const auto n_preferred       = static_cast<std::ptrdiff_t>(order.size());
        for (int32_t e = 0; e < shared_.book.layer(layer).layout.n_expert; e++) {
            if (std::find(order.begin(), order.begin() + n_preferred, e) == order.begin() + n_preferred) {
                order.push_back(e);
            }
        }
        size_t at = 0;
        for (int d = 0; d < size(); d++) {
            for (int i = 0; i < (*this)[d].of_layer(layer).n_slots() && at < order.size(); i++, at++) {
                load_now(d, layer, order[at]);
            }
        }
    }
    settle_fills();
}

void fleet::load_now(int device, int layer, int expert) {
    load_result loaded;
    if (runtime_->cache().begin_load(layer, expert, device, false, loaded).ok()) {
        record_.on_load(layer, expert, device);
        copy_now(device, layer, expert, loaded.slot, true);
    }
}

void fleet::copy_now(int device, int layer, int expert, int slot, bool is_load) {
    accelerator & to = (*this)[device];
    copy_order order;
    order.id     = is_load ? fill_id(runtime_->cache().shape().key(layer, expert)) : -1;
    order.layout = &shared_.book.layer(layer).layout;
    order.slots  = &to.of_layer(layer);
    order.expert = expert;
    order.slot   = slot;
    to.worker.copy(order, false);
}

// Waits for the copies of copy_now.
void fleet::settle_fills() {
    const model_shape & shape = runtime_->cache().shape();
    for (auto & device : devices_) {
        const double begin = shared_.clock.now_us();
        while (!device->worker.wait_idle(drain_timeout_us)) {
            if (shared_.clock.now_us() - begin > 60 * drain_timeout_us) {
                device->is_suspended = true;
                shared_.log.add("%s does not finish its copies: set aside", device->port.name().c_str());
                return;
            }
        }
        device->worker.collect(results_);
        for (const copy_result & result : results_) {
            if (result.id > -2) {
                continue;
            }
            const int key    = key_of_fill(result.id);
            const int layer  = shape.layer_of(key);
            const int expert = shape.expert_of(key);
            const status end =
                result.ok ? runtime_->cache().complete_load(layer, expert) : runtime_->cache().fail_load(layer, expert);
            if (end.ok()) {
                record_.on_loaded(layer, expert, result.ok);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------
// between two passes

bool fleet::drain(double timeout_us) {
    bool idle = true;
    for (auto & device : devices_) {
        idle = device->worker.wait_idle(timeout_us) && idle;
    }
    take_results();
    return idle;
}

void fleet::relayout(int device, const std::vector<int> & slots) {
    if (!drain(drain_timeout_us)) {
        return;
    }
    std::vector<int> changed;
    changed.reserve(slots.size());
    try {
        lay_out(device, slots, changed);
    } catch (...) {
        empty(device, changed); // nobody knows what their slots hold
        throw;
    }
}

// `changed`: the layers whose slots are others, whether or not it ends well.
void fleet::lay_out(int device, const std::vector<int> & slots, std::vector<int> & changed) {
    accelerator & on = (*this)[device];
    on.compute.synchronize();
    on.compute.forget_graphs();
    std::vector<slot_move> moves;
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        const int n = slots[static_cast<size_t>(layer)];
        if (n == on.of_layer(layer).n_slots()) {
            continue;
        }
        changed.push_back(layer);
        if (runtime_->resize(layer, device, n, moves).ok()) {
            record_.on_resize(layer, device, n);
            on.of_layer(layer).release(); // all first: there may be no room for both
        } else {
            changed.pop_back();
        }
    }
    for (const int layer : changed) {
        slot_set & set = on.of_layer(layer);
        int n          = slots[static_cast<size_t>(layer)];
        while (n > 0 && !set.allocate(on.port, shared_.book.layer(layer).layout, n, shared_.in_graph())) {
            n /= 2;
        }
        if (n != slots[static_cast<size_t>(layer)] && runtime_->resize(layer, device, n, moves).ok()) {
            record_.on_resize(layer, device, n);
        }
        for (int32_t e = 0; e < shared_.book.layer(layer).layout.n_expert; e++) {
            const residency at = runtime_->cache().lookup(layer, e);
            if (at.device == device && at.slot >= 0 && at.state != slot_state::loading) {
                copy_now(device, layer, e, at.slot, false);
            }
        }
    }
    settle_fills();
}

void fleet::empty(int device, const std::vector<int> & layers) noexcept try {
    accelerator & on = (*this)[device];
    std::vector<slot_move> moves;
    for (const int layer : layers) {
        if (runtime_->resize(layer, device, 0, moves).ok()) {
            record_.on_resize(layer, device, 0);
        }
    }
    if (on.worker.wait_idle(drain_timeout_us)) {
        for (const int layer : layers) {
            on.of_layer(layer).release();
        }
    }
} catch (const std::exception & error) {
    (*this)[device].is_lost = true;
    shared_.log.add("%s: %s: it is not used any more", (*this)[device].port.name().c_str(), error.what());
}

void fleet::shrink(int device, double share) {
    (*this)[device].shrink = share;
    relayout(device, current_slots(device));
}

void fleet::fill_layers(int device) {
    const expert_cache & cache = runtime_->cache();
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        const int32_t n_expert = shared_.book.layer(layer).layout.n_expert;
        for (int32_t e = 0; e < n_expert; e++) {
            if (cache.n_slots(layer, device) > 0 && cache.lookup(layer, e).state == slot_state::absent &&
                cache.n_available(layer, device, 1) > 0 && cache.n_slots(layer, device) >= n_expert) {
                load_now(device, layer, e);
            }
        }
    }
    settle_fills();
}

std::vector<int> fleet::current_slots(int device) const {
    std::vector<int> slots = (*this)[device].wanted;
    for (int & n : slots) {
        n = static_cast<int>(std::floor(n * (*this)[device].shrink + 1e-9));
    }
    return slots;
}

double fleet::wanted_bytes(int device) const {
    double bytes = 0.0;
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        bytes += static_cast<double>(shared_.book.layer(layer).layout.expert_bytes()) *
                 (*this)[device].wanted[static_cast<size_t>(layer)];
    }
    return bytes;
}

std::vector<int> fleet::static_slots(int device) const {
    const double budget = wanted_bytes(device) * (*this)[device].shrink;
    std::vector<bool> may_take(static_cast<size_t>(shared_.book.n_layers()), false);
    for (int layer = 0; layer < shared_.book.n_layers(); layer++) {
        bool is_free = (*this)[device].wanted[static_cast<size_t>(layer)] > 0;
        for (int other = 0; other < device; other++) {
            is_free = is_free && (*this)[other].of_layer(layer).n_slots() != shared_.book.layer(layer).layout.n_expert;
        }
        may_take[static_cast<size_t>(layer)] = is_free;
    }
    return whole_layers(shared_.book, budget, may_take);
}

// ---------------------------------------------------------------------------------------------------------------
// in a step

void fleet::take_results() {
    for (int d = 0; d < size(); d++) {
        accelerator & device = (*this)[d];
        device.worker.collect(results_);
        for (const copy_result & result : results_) {
            if (result.id < 0) {
                continue;
            }
            const double now = shared_.clock.now_us();
            if (result.ok) {
                if (runtime_->on_complete(result.id, now).ok()) {
                    record_.on_complete(result.id, now);
                }
                record_.on_copied(result, now);
                governor_->on_copy(d, result.bytes, result.us, result.end_us);
            } else {
                if (runtime_->on_fail(result.id, now).ok()) {
                    record_.on_fail(result.id, now);
                }
                if (!device.told_copy) {
                    device.told_copy = true;
                    shared_.log.add("%s: a copy failed: such experts run on the CPU", device.port.name().c_str());
                }
            }
        }
    }
}

bool fleet::all_copy() {
    for (auto & device : devices_) {
        if (device->is_suspended && device->worker.wait_idle(no_wait_us)) {
            device->is_suspended = false;
            shared_.log.add("%s copies again", device->port.name().c_str());
        }
        if (device->is_suspended || device->is_lost) {
            return false;
        }
    }
    return true;
}

void fleet::set_aside(int device, double after_us) {
    (*this)[device].is_suspended = true;
    shared_.log.add("%s: a copy did not end within %.1f s: its experts run on the CPU",
                    (*this)[device].port.name().c_str(), after_us * 1e-6);
}

void fleet::tell_no_memory(int device, int64_t n_tokens) {
    accelerator & on = (*this)[device];
    if (!on.told_memory) {
        on.told_memory = true;
        shared_.log.add("%s has no work memory for %lld tokens: such experts run on the CPU", on.port.name().c_str(),
                        static_cast<long long>(n_tokens));
    }
}

bool fleet::take_failure(std::string & why) {
    bool has_any = false;
    for (auto & device : devices_) {
        has_any = device->worker.take_failure(why) || has_any;
    }
    return has_any;
}

bool fleet::has_scratch(int layer) const {
    const known_layer & known = shared_.book.layer(layer);
    return known.llama_layer >= shared_.config.n_cpu_layers &&
           std::all_of(devices_.begin(), devices_.end(), [&](const auto & device) {
               return device->scratch[static_cast<size_t>(known.cls)].n_slots() > 0;
           });
}

} // namespace hybrimoe
