#include "eam_library.h"

#include <algorithm>
#include <cmath>

namespace hybrimoe {

eam_library::eam_library(const model_shape & shape, int capacity, int n_nearest)
    : shape_(shape), capacity_(static_cast<size_t>(capacity)), n_nearest_(static_cast<size_t>(n_nearest)) {
    past_.reserve(capacity_);
    nearest_.reserve(n_nearest_);
    clear_current();
}

void eam_library::clear_current() {
    current_.uses.assign(static_cast<size_t>(shape_.n_keys()), 0.0F);
    current_.row_sum.assign(static_cast<size_t>(shape_.n_layers), 0.0F);
    current_.norm2 = 0.0;
    for (matrix & m : past_) {
        m.dot = 0.0;
    }
    nearest_.clear();
    last_layer_ = -1;
}

void eam_library::reset() {
    past_.clear();
    clear_current();
}

void eam_library::on_prompt() {
    if (current_.norm2 > 0.0) {
        if (past_.size() < capacity_) {
            past_.push_back(current_);
        } else {
            size_t most_alike = 0;
            double best       = -1.0;
            for (size_t i = 0; i < past_.size(); ++i) {
                const double cosine2 = past_[i].dot * past_[i].dot / past_[i].norm2;
                if (cosine2 > best) {
                    best       = cosine2;
                    most_alike = i;
                }
            }
            past_[most_alike] = current_;
        }
    }
    clear_current();
}

void eam_library::observe(const router_step & step) {
    if (step.layer <= last_layer_ || nearest_.empty()) {
        find_nearest(); // once per token
    }
    last_layer_ = step.layer;
    for (int i = 0; i < step.n_experts; ++i) {
        const auto key  = static_cast<size_t>(shape_.key(step.layer, step.experts[i]));
        const auto n    = static_cast<float>(step.n_tokens[i]);
        const float old = current_.uses[key];
        current_.uses[key] += n;
        current_.row_sum[static_cast<size_t>(step.layer)] += n;
        current_.norm2 += static_cast<double>(n) * (2.0 * static_cast<double>(old) + static_cast<double>(n));
        for (matrix & m : past_) {
            m.dot += static_cast<double>(n) * static_cast<double>(m.uses[key]);
        }
    }
}

void eam_library::find_nearest() {
    nearest_.clear();
    for (size_t i = 0; i < past_.size(); ++i) {
        const auto cosine = [this](size_t m) { return past_[m].dot / std::sqrt(past_[m].norm2); };
        // Insertion into a list of a few.
        size_t at = nearest_.size();
        while (at > 0 && cosine(nearest_[at - 1]) < cosine(i)) {
            --at;
        }
        if (at < n_nearest_) {
            if (nearest_.size() == n_nearest_) {
                nearest_.pop_back();
            }
            nearest_.insert(nearest_.begin() + static_cast<std::ptrdiff_t>(at), i);
        }
    }
}

double eam_library::predicted(int key) const {
    const auto layer = static_cast<size_t>(shape_.layer_of(key));
    double uses      = 0.0;
    double total     = 0.0;
    for (const size_t i : nearest_) {
        uses += static_cast<double>(past_[i].uses[static_cast<size_t>(key)]);
        total += static_cast<double>(past_[i].row_sum[layer]);
    }
    if (nearest_.empty()) {
        uses  = static_cast<double>(current_.uses[static_cast<size_t>(key)]);
        total = static_cast<double>(current_.row_sum[layer]);
    }
    return total > 0.0 ? uses / total : 0.0;
}

} // namespace hybrimoe
