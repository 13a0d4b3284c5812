#include "trials.h"

#include <algorithm>
#include <limits>

namespace hybrimoe {

namespace {

constexpr double suspect_slowdown = 1.3;  // slower than calibrated by so much: it may have recovered meanwhile
constexpr double surprise_ratio   = 0.67; // measured over believed: it has
constexpr int n_follow_ups        = 2 * disturbance::window;
constexpr int first_wait          = 4;  // passes until something that was never used is tried
constexpr int pause_growth        = 16; // a trial again after 1/16 of the time since the cost jumped
constexpr double credit_passes    = 64; // credit is kept for so many passes

} // namespace

trials::trials(int n_devices, const trial_options & options) : options_(options) {
    candidates_.push_back({});
    for (int d = 0; d < n_devices; ++d) {
        for (const resource_kind kind : {resource_kind::gpu, resource_kind::link}) {
            candidate c;
            c.what = {kind, d};
            candidates_.push_back(c);
        }
    }
    for (candidate & c : candidates_) {
        c.wait = first_wait;
    }
}

int trials::pause_of(const candidate & c, int64_t pass) const {
    if (!c.is_suspect) {
        return c.wait;
    }
    const int64_t age = c.changed_pass < 0 ? pass : pass - c.changed_pass;
    return static_cast<int>(std::clamp<int64_t>(age / pause_growth, 1, options_.most_pause));
}

void trials::next_pass(const cost_estimator & costs, double pass_us) {
    const int64_t pass  = costs.pass();
    double saved_for_us = 0.0;
    for (candidate & c : candidates_) {
        const cost_state s = costs.state(c.what);
        if (s.last_pass > c.last_pass) {
            c.saved_for_us = 0.0; // it is used
        }
        saved_for_us = std::max(saved_for_us, c.saved_for_us);
        c.last_pass  = std::max(c.last_pass, s.last_pass);
        c.is_suspect = s.slowdown > suspect_slowdown;
        if (s.changed_pass > c.changed_pass) {
            c.changed_pass = s.changed_pass;
            c.wait         = first_wait;
            changed_pass_  = std::max(changed_pass_, s.changed_pass);
        }
        c.is_due = pass - c.last_pass >= pause_of(c, pass);
    }
    const double age     = changed_pass_ < 0 ? options_.share_passes : static_cast<double>(pass - changed_pass_);
    const double falling = std::max(0.0, 1.0 - age / options_.share_passes);
    const double share   = options_.share + (options_.first_share - options_.share) * falling;
    const double usual   = credit_passes * share * pass_us;
    // What is believed so slow that the usual credit never pays for a trial would stay unused for good: credit is saved
    // until it does. What is left of that is not kept.
    if (saves_ && saved_for_us == 0.0) {
        credit_us_ = std::min(credit_us_, usual);
    }
    saves_            = saved_for_us > 0.0;
    const double most = std::max(usual, saved_for_us);
    credit_us_        = std::min(credit_us_ + share * pass_us, std::max(most, credit_us_));
}

trials::candidate * trials::find(const resource & what) {
    const auto at = std::find_if(candidates_.begin(), candidates_.end(), [&what](const candidate & c) {
        return c.what.kind == what.kind && c.what.device == what.device;
    });
    return at == candidates_.end() ? nullptr : &*at;
}

void trials::on_refused(const resource & what, double price_us) {
    if (candidate * c = find(what)) {
        c->saved_for_us = price_us;
    }
}

trial_request trials::next(const cost_estimator & costs) {
    trial_request out;
    for (size_t i = 0; options_.on && i < candidates_.size(); ++i) {
        candidate & c      = candidates_[(turn_ + i) % candidates_.size()];
        const bool is_next = c.n_follow_ups > 0;
        if (!is_next && (!c.is_due || costs.state(c.what).last_pass >= costs.pass())) {
            continue;
        }
        out.wanted = true;
        out.what   = c.what;
        // The first look after a jump is free: a burst of waits is over by then.
        const bool is_first = c.is_suspect && c.changed_pass >= 0 && c.last_pass <= c.changed_pass;
        out.budget_us       = is_next || is_first ? std::numeric_limits<double>::infinity() : credit_us_;
        out.must_be_useful  = c.is_suspect;
        turn_               = (turn_ + i + 1) % candidates_.size();
        return out;
    }
    return out;
}

void trials::on_tried(const resource & what, double price_us, const cost_estimator & costs) {
    credit_us_ -= price_us;
    spent_us_ += price_us;
    ++n_trials_;
    if (candidate * c = find(what)) {
        const cost_state s  = costs.state(what);
        const bool surprise = s.last_pass >= costs.pass() && s.last_ratio < surprise_ratio;
        c->n_follow_ups     = surprise ? (c->n_follow_ups > 0 ? c->n_follow_ups - 1 : n_follow_ups) : 0;
        c->wait             = surprise ? first_wait : std::min(2 * c->wait, options_.calibrated_wait);
        c->last_pass        = costs.pass();
        c->is_due           = false;
        c->saved_for_us     = 0.0;
    }
}

} // namespace hybrimoe
