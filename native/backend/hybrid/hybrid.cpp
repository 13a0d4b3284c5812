#include "hybrid/hybrid.h"

#include "hybrid/governor_changes.h"
#include "hybrid/policies.h"
#include "hybrid/report.h"
#include "hybrid/state_file.h"

#include <algorithm>
#include <cstdio>
#include <exception>
#include <stdexcept>

namespace hybrimoe {

namespace {

constexpr int64_t passes_between_looks = 64; // at free memory
constexpr int64_t look_ahead_tokens    = 4;  // a bigger batch uses most experts anyway
constexpr int most_learning_passes     = 3;  // a model may really ask for all experts of a layer

} // namespace

hybrid::hybrid(const settings & config, std::shared_ptr<counters> data, cpu_timer & timer,
               const kernels::kernel_set * kernels, ggml_backend_dev_t inner)
    : shared_(config, inner), counters_(std::move(data)), timer_(timer), kernels_(kernels),
      step_(shared_, fleet_, governor_, routers_, recording_, reproducibility_, *counters_) {
    if (config.faults.pause_us > 0) {
        pause_ = sharing_pause(static_cast<double>(config.faults.pause_us));
    }
}

hybrid::~hybrid() {
    try {
        if (runtime_ != nullptr && !shared_.config.state_path.empty()) {
            save_state();
        }
    } catch (const std::exception & error) {
        std::fprintf(stderr, "HybriMoE: %s, while the expert cache's state was kept\n", error.what());
    }
}

void hybrid::save_state() {
    fleet_.drain(copy_patience_us);
    if (!write_state(shared_.config.state_path, shared_.book, fleet_.residents())) {
        shared_.log.add("the expert cache's state could not be written to %s", shared_.config.state_path.c_str());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// set-up

void hybrid::set_up() {
    const settings & config = shared_.config;
    phase_                  = phase::off;
    shared_.book.close();
    if (!config.route_trace.empty()) {
        try {
            trace_.load(config.route_trace);
        } catch (const std::exception & error) {
            shared_.log.add("%s", error.what());
        }
    }
    if (shared_.book.n_layers() == 0 || config.expert_cache.is_off() || !fleet_.open(given_up_)) {
        if (config.reproducible) {
            shared_.log.add("reproducible: all experts on the CPU");
        }
        return;
    }
    std::string why_not;
    if (!make_parts(why_not)) {
        give_up(why_not.c_str());
        return;
    }
    if (config.pin_experts) {
        fleet_.pin_experts();
    }
    fleet_.fill(read_residents());
    if (config.reproducible) {
        runtime_->set_limits({false, false, false});
        recording_.on_limits(runtime_->limits());
        reproducibility_.check(fleet_);
    }
    if (horizon_ > 0) {
        routers_.load(shared_.book);
    }
    if (config.faults.fail_set_up > 0) {
        throw std::runtime_error("a set-up that fails on purpose");
    }
    phase_ = phase::ready;
    announce(shared_, fleet_, reproducibility_, governor_.costs());
}

void hybrid::give_up(const char * reason) {
    phase_    = phase::off;
    given_up_ = reason;
    shared_.log.add("%s: all experts on the CPU", reason);
    fleet_.clear();
    runtime_.reset();
}

// Slots, costs, and what decides with them.
bool hybrid::make_parts(std::string & why_not) {
    const settings & config = shared_.config;
    if (!fleet_.make_slots()) {
        why_not = config.reproducible ? "reproducible: the expert cache holds no whole layer"
                                      : "no memory on the accelerator is free for experts";
        return false;
    }
    cost_model costs;
    status made = find_cost_model(shared_, fleet_, timer_, costs);
    if (!made.ok()) {
        why_not = std::string("no costs (") + made.message() + ")";
        return false;
    }
    composed parts;
    made = compose(shared_, costs, fleet_.wanted(), parts);
    if (made.ok()) {
        governor_options options;
        options.live  = config.live_costs && !config.simple;
        options.guard = config.guard;
        made          = governor::create(costs, options, *parts.made, governor_);
    }
    if (!made.ok()) {
        why_not = made.message();
        return false;
    }
    runtime_      = std::move(parts.made);
    needs_scores_ = parts.needs_scores;
    horizon_      = parts.horizon;
    governor_.begin_pass();
    recording_.keep_costs(costs);
    fleet_.start(*runtime_, governor_);
    step_.start(*runtime_, horizon_ > 0);
    return true;
}

// What was resident when the model was last used.
std::vector<std::vector<int32_t>> hybrid::read_residents() const {
    std::vector<std::vector<int32_t>> residents;
    std::string problem;
    if (!shared_.config.state_path.empty() &&
        !read_state(shared_.config.state_path, shared_.book, residents, problem)) {
        shared_.log.add("%s: starting with a cold expert cache", problem.c_str());
    }
    return residents;
}

// ---------------------------------------------------------------------------------------------------------------
// before a block

// One pass is over, and all other memory has been taken. A warm-up says nothing about how many experts are asked for:
// the layers are learnt from the next pass then.
void hybrid::on_learnt_pass() {
    if (++n_learnt_ < most_learning_passes && shared_.book.may_be_warm_up()) {
        return;
    }
    try {
        set_up();
    } catch (const std::exception & error) {
        give_up((std::string("set-up failed: ") + error.what()).c_str());
        reproducibility_.broken("set-up failed");
    }
    introduce();
}

bool hybrid::prepare(const moe_block & block, const described_block & described, bool exact, bool in_graph) {
    std::lock_guard<std::mutex> lock(mutex_);
    layer_book & book   = shared_.book;
    const bool is_known = book.is_known(described);
    const int layer     = book.find(block, described);
    if (phase_ == phase::learning && is_known && layer == 0) {
        on_learnt_pass(); // the first layer again
    }
    if (layer < 0 || (phase_ != phase::ready && !trace_.is_active() && !recording_.is_on())) {
        return false;
    }
    if (layer <= last_layer_ || (layer == 0 && last_layer_ < 0)) {
        recording_.on_pass(block.n_tokens());
        if (phase_ != phase::learning) {
            try {
                on_pass_end();
            } catch (const std::exception & error) {
                fail_step(error.what());
            }
        }
    }
    last_layer_ = layer;
    // The last layer of a micro-batch without outputs has no rows. A warm-up step asks for every expert: it must not
    // teach the cache.
    if (block.n_tokens() == 0 || (phase_ == phase::ready && block.top_k() > book.layer(layer).top_k)) {
        return false;
    }
    recording_.on_block();
    if (phase_ != phase::learning) {
        pass_is_decode_ = pass_is_decode_ && block.n_tokens() <= governor::most_decode_tokens;
        pass_tokens_    = block.n_tokens();
    }
    step_.begin(layer, block, exact, in_graph && phase_ == phase::ready && fleet_[0].of_layer(layer).n_slots() > 0);
    return true;
}

const slot_set * hybrid::slots_in_graph() const {
    return step_.in_graph() && step_.is_planned() && step_.n_gpu() > 0 ? &fleet_[0].of_layer(step_.layer()) : nullptr;
}

const uint8_t * hybrid::settle_in_graph() {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
        return step_.settle_in_graph();
    } catch (const std::exception & error) {
        fail_step(error.what());
        step_.leave_to_cpu();
        return nullptr;
    }
}

void hybrid::set_input(const float * x, size_t x_token_bytes, bool is_gate_input, const device_rows & there) {
    step_.set_input(x, x_token_bytes, there);
    const int64_t n_tokens = step_.pairs().n_tokens;
    const bool wanted      = phase_ == phase::ready && horizon_ > 0 && kernels_ != nullptr && is_gate_input &&
                             runtime_->prefetch_on() && n_tokens <= look_ahead_tokens;
    if (wanted) {
        routers_.begin(step_.layer(), std::min(horizon_, std::max(1, runtime_->horizon())), x, x_token_bytes, n_tokens);
    } else {
        routers_.none();
    }
}

bool hybrid::wants_scores() const {
    return (phase_ == phase::ready && needs_scores_) || recording_.wants_scores();
}

void hybrid::look_ahead(int thread, int n_threads) {
    routers_.compute(kernels_, thread, n_threads);
}

// ---------------------------------------------------------------------------------------------------------------
// between two passes

void hybrid::on_pass_end() {
    if (trace_.is_active() && n_passes_ > 0) {
        trace_.next_pass(pass_tokens_);
    }
    n_passes_++;
    if (shared_.config.faults.fail_pass_end > 0 && n_passes_ == shared_.config.faults.fail_pass_end) {
        throw std::runtime_error("the end of a pass that fails on purpose");
    }
    if (phase_ != phase::ready) {
        return;
    }
    guard_change change;
    // A pass that the accelerators had no part in says nothing about sharing.
    if (governor_.end_pass(pass_is_decode_ && pass_is_shared_, change)) {
        apply_guard(shared_, fleet_, recording_, governor_, runtime_->limits(), change);
    }
    if (!pass_is_decode_ && !was_prompt_) {
        runtime_->begin_prompt();
        recording_.on_prompt();
    }
    was_prompt_     = !pass_is_decode_;
    pass_is_decode_ = pass_is_shared_ = true;
    governor_.begin_pass();
    tell_drift(shared_, fleet_, governor_);
    if (n_passes_ % passes_between_looks == 0) {
        memory_watch_.look(governor_.level().level() == guard_level::static_layers);
    }
}

// ---------------------------------------------------------------------------------------------------------------
// in a block

bool hybrid::is_paused() {
    const bool was_on = pause_.is_on();
    const bool is_on  = pause_.is_on(shared_.clock.now_us());
    if (was_on && !is_on) {
        shared_.log.add("experts are shared again");
    }
    return is_on;
}

void hybrid::pause(const char * reason) noexcept try {
    pause_.begin(reason, shared_.clock.now_us());
    reproducibility_.broken("a step failed");
    shared_.log.add("%s: all experts on the CPU; sharing is tried again in %.0f s", reason,
                    (pause_.until_us() - pause_.since_us()) * 1e-6);
} catch (const std::exception &) { // no memory for its words: it pauses all the same
}

// Sharing pauses; what was begun is waited for and taken back. The CPU computes what is missing.
void hybrid::fail_step(const char * reason) noexcept {
    pass_is_shared_ = false;
    pause(reason);
    if (runtime_ != nullptr) {
        step_.give_up();
    }
}

bool hybrid::plan(const float * scores) {
    std::string why;
    if (fleet_.take_failure(why)) { // between two blocks
        fail_step(why.c_str());
    }
    if (is_paused() || !fleet_.all_copy()) {
        return false;
    }
    const status done = step_.plan(scores);
    if (!done.ok()) {
        pause(done.message());
        return false;
    }
    pause_.on_success(shared_.clock.now_us());
    return true;
}

const uint8_t * hybrid::route(int32_t * ids, const float * weights, const float * scores) {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
        step_.set_routing(ids, weights);
        if (trace_.is_active()) {
            const routed_pairs & pairs = step_.pairs();
            trace_.replace(step_.layer(), ids, pairs.n_tokens, pairs.top_k, layout().n_expert);
        }
        if (phase_ == phase::ready && plan(scores)) {
            return step_.share_out();
        }
        pass_is_shared_ = false;
        if (recording_.is_on()) {
            recording_.on_routed(step_.event_of(scores));
        }
    } catch (const std::exception & error) {
        fail_step(error.what()); // nothing may leave the team's region
    }
    return nullptr;
}

void hybrid::finish() {
    if (step_.is_planned()) {
        std::lock_guard<std::mutex> lock(mutex_);
        try {
            step_.finish();
            std::string why;
            if (fleet_.take_failure(why)) { // the block itself is whole: what is missing is among the rest
                fail_step(why.c_str());
            }
        } catch (const std::exception & error) {
            fail_step(error.what());
            step_.leave_to_cpu();
        }
    }
}

void hybrid::end_block() {
    std::lock_guard<std::mutex> lock(mutex_);
    try {
        if (phase_ != phase::learning) {
            step_.end();
        }
        // Which layer is the last one is known once all have been seen.
        const bool is_last = phase_ != phase::learning && step_.layer() == shared_.book.n_layers() - 1;
        recording_.on_block_end(step_.layer(), step_.pairs().n_tokens, step_.is_planned(), is_last);
    } catch (const std::exception & error) {
        fail_step(error.what());
    }
}

// ---------------------------------------------------------------------------------------------------------------
// what others may ask (the rest is in report.cpp)

bool hybrid::stop_trace() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return recording_.stop();
}

std::string hybrid::describe_trace() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return recording_.describe(phase_ != phase::learning, runtime_.get(), fleet_);
}

} // namespace hybrimoe
