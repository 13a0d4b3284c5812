#include "virtual_machine.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace hybrimoe {

namespace {

constexpr double forever    = std::numeric_limits<double>::infinity();
constexpr double a_moment   = 1e-9; // us: less is left of rounding only
constexpr double pi         = 3.14159265358979323846;
constexpr int noise_of_cpu  = 1;
constexpr int noise_of_link = 2; // + device
constexpr int noise_of_gpu  = noise_of_link + max_devices;

// SplitMix64 (Steele, Lea, Flood 2014): a hash that is good enough to draw from.
uint64_t mix(uint64_t x) {
    x += 0x9e3779b97f4a7c15ULL;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
    return x ^ (x >> 31);
}

double uniform(uint64_t key) { // in (0, 1)
    return (static_cast<double>(mix(key) >> 11) + 0.5) / 9007199254740992.0;
}

} // namespace

double virtual_machine::factor(int layer, int what, int64_t item) const {
    uint64_t key = mix(options_.seed);
    for (const int64_t part : {token_, static_cast<int64_t>(layer), static_cast<int64_t>(what), item}) {
        key = mix(key ^ static_cast<uint64_t>(part));
    }
    // Box-Muller.
    const double normal = std::sqrt(-2.0 * std::log(uniform(key))) * std::cos(2.0 * pi * uniform(key + 1));
    const double rare   = uniform(key + 2) < phase_->outlier_share ? phase_->outlier_factor : 1.0;
    return std::exp(phase_->noise * normal) * rare;
}

double virtual_machine::gpu_wait_us(int layer) const {
    const int every = phase_->waits_every_layers;
    return every > 0 && layer % every == 0 ? phase_->waits_us : 0.0;
}

double virtual_machine::plain_us(const decision & made, int layer, int device) const {
    double us = truth().step_us(device), bytes = 0.0;
    for (size_t i = 0; i < made.items.size(); ++i) {
        const int n = made.items[i].n_tokens;
        us += device == cpu_device ? truth().t_cpu(layer, n, i == 0) : truth().t_gpu(layer, device, n);
        bytes += truth().of_layer(layer).bytes;
    }
    if (device != cpu_device) {
        return us * factor(layer, noise_of_gpu + device, 0) + gpu_wait_us(layer);
    }
    return std::max(us * factor(layer, noise_of_cpu, 0), bytes / truth().dram_bytes_per_us());
}

// Copies that a layer waits for go before idle-time ones; the one that runs is not interrupted.
void virtual_machine::enqueue(const transfer & t) {
    std::vector<copy> & queue = links_[static_cast<size_t>(t.device)];
    copy one;
    one.id          = t.id;
    one.layer       = t.layer;
    one.expert      = t.expert;
    one.is_demanded = t.kind == transfer_kind::demand || t.kind == transfer_kind::scratch;
    one.bytes       = t.bytes;
    one.whole_us    = truth().t_copy(t.device, t.bytes) * factor(t.layer, noise_of_link + t.device, t.expert);
    one.left_us     = one.whole_us;
    auto at         = queue.end();
    if (one.is_demanded) {
        at =
            std::find_if(queue.begin(), queue.end(), [](const copy & c) { return c.start_us < 0.0 && !c.is_demanded; });
    }
    queue.insert(at, one);
}

// To the next end of anything, or to the limit; false when the limit was reached.
bool virtual_machine::step(double limit_us) {
    double asked = cpu_left_us_ > 0.0 ? cpu_bytes_per_us_ : 0.0;
    double next  = cpu_left_us_ > 0.0 ? cpu_left_us_ : forever;
    for (std::vector<copy> & queue : links_) {
        if (!queue.empty()) {
            copy & c = queue.front();
            if (c.start_us < 0.0) {
                c.start_us = now_us_;
            }
            asked += c.bytes / c.whole_us;
            next = std::min(next, c.left_us);
        }
    }
    const double ceiling = truth().dram_bytes_per_us();
    const double speed   = asked > ceiling ? ceiling / asked : 1.0;
    const bool reached   = limit_us - now_us_ <= next / speed;
    if (reached && limit_us == forever) {
        return false; // nothing is left to run
    }
    const double us      = reached ? std::max(0.0, limit_us - now_us_) : next / speed;
    now_us_              = reached ? std::max(now_us_, limit_us) : now_us_ + us;
    const bool cpu_works = cpu_left_us_ > 0.0;
    for (size_t d = 0; d < links_.size(); ++d) {
        if (links_[d].empty()) {
            continue;
        }
        copy & c = links_[d].front();
        c.left_us -= us * speed;
        if (c.left_us <= a_moment) {
            finished_.push_back({c.id, static_cast<int>(d), c.bytes, now_us_ - c.start_us, now_us_});
            ends_.push_back({c.layer, c.expert, static_cast<int>(d), now_us_});
            links_[d].erase(links_[d].begin());
        }
    }
    if (cpu_works) {
        cpu_left_us_ -= us * speed;
        if (cpu_left_us_ <= a_moment) {
            cpu_left_us_ = 0.0;
            cpu_end_us_  = now_us_;
        }
    }
    return !reached;
}

void virtual_machine::run_until(double us) {
    while (step(us)) {
    }
}

// When the expert's copy has arrived: waits for it.
double virtual_machine::wait_for(int layer, int expert, int device) {
    const auto of = [&](const end_of_copy & e) { return e.layer == layer && e.expert == expert && e.device == device; };
    auto end      = std::find_if(ends_.begin(), ends_.end(), of);
    while (end == ends_.end() && step(forever)) {
        end = std::find_if(ends_.begin(), ends_.end(), of);
    }
    return end == ends_.end() ? now_us_ : end->us;
}

// The device's share of the layer that began at begin_us: resident experts first, then those whose copies come. Below
// 0: it has none.
double virtual_machine::gpu_us(const layer_event & event, const decision & made, int device,
                               const std::vector<transfer> & in_flight, double begin_us) {
    const double noise = factor(event.layer, noise_of_gpu + device, 0);
    double t           = truth().step_us(device) * noise + gpu_wait_us(event.layer);
    std::vector<std::pair<double, double>> late; // when it has come, what it takes
    bool has_any = false;
    for (size_t i = 0; i < made.items.size(); ++i) {
        const placement & at = made.plan.placements[i];
        if (at.device != device) {
            continue;
        }
        has_any          = true;
        const double us  = truth().t_gpu(event.layer, device, made.items[i].n_tokens) * noise;
        const bool comes = at.copied || std::any_of(in_flight.begin(), in_flight.end(), [&](const transfer & f) {
                               return f.layer == event.layer && f.expert == at.expert && f.device == device;
                           });
        if (comes) {
            late.emplace_back(static_cast<double>(at.expert), us);
        } else {
            t += us;
        }
    }
    t += begin_us;
    for (auto & one : late) {
        one.first = wait_for(event.layer, static_cast<int>(one.first), device);
    }
    std::sort(late.begin(), late.end());
    for (const auto & one : late) {
        t = std::max(t, one.first) + one.second;
    }
    return has_any ? t - begin_us : -1.0;
}

void virtual_machine::run_layer(const layer_event & event, const decision & made,
                                const std::vector<transfer> & in_flight, layer_timing & out) {
    out                   = layer_timing();
    const double begin_us = now_us_;
    ends_.clear();
    for (const transfer & t : made.transfers) {
        enqueue(t);
    }
    double cpu_us = truth().step_us(cpu_device), bytes = 0.0;
    for (size_t i = 0; i < made.items.size(); ++i) {
        if (made.plan.placements[i].device == cpu_device) {
            cpu_us += truth().t_cpu(event.layer, made.items[i].n_tokens, bytes == 0.0);
            bytes += truth().of_layer(event.layer).bytes;
        }
    }
    cpu_end_us_ = begin_us;
    if (bytes > 0.0) {
        cpu_left_us_      = cpu_us * factor(event.layer, noise_of_cpu, 0);
        cpu_bytes_per_us_ = bytes / cpu_left_us_;
    }
    double gpu_us_of[max_devices];
    const int n_devices = static_cast<int>(links_.size());
    for (int d = 0; d < n_devices; ++d) {
        gpu_us_of[d] = gpu_us(event, made, d, in_flight, begin_us);
    }
    while (cpu_left_us_ > 0.0 && step(forever)) {
    }
    const double cpu_done_us = cpu_end_us_ - begin_us;
    double end_us            = cpu_done_us;
    out.cpu_us               = bytes > 0.0 ? cpu_done_us : -1.0;
    out.cpu_begin_us         = begin_us;
    // The calling thread waits for one device after the other, when its own experts are done.
    for (int d = 0; d < n_devices; ++d) {
        if (gpu_us_of[d] < 0.0) {
            continue;
        }
        out.gpu_is_known[d] = true;
        // A device that is looked at is timed by itself.
        const bool is_timed =
            event.trial.wanted && event.trial.what.kind == resource_kind::gpu && event.trial.what.device == d;
        out.gpu_at_most[d] = gpu_us_of[d] <= end_us && !is_timed;
        end_us             = std::max(end_us, gpu_us_of[d]);
        out.gpu_us[d]      = is_timed ? gpu_us_of[d] : end_us;
    }
    run_until(begin_us + end_us + options_.overhead_us);
    out.span_us     = now_us_ - begin_us;
    out.overhead_us = options_.overhead_us;
    out.now_us      = now_us_;
}

void virtual_machine::drain() {
    while (step(forever)) {
    }
}

double virtual_machine::fill(const std::vector<std::vector<double>> & bytes) {
    double most = 0.0;
    for (size_t d = 0; d < bytes.size(); ++d) {
        double us = 0.0;
        for (const double one : bytes[d]) {
            us += std::max(truth().t_copy(static_cast<int>(d), one), one / truth().dram_bytes_per_us());
        }
        most = std::max(most, us);
    }
    now_us_ += most;
    return most;
}

} // namespace hybrimoe
