#include "robust_fit.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace hybrimoe {

namespace {

constexpr int n_reweightings   = 60;
constexpr double least_scale   = 1e-3; // of the relative residuals: a clock does not resolve less
constexpr double least_damping = 1e-9;

// Solves the n x n system in place by elimination with pivoting; false when it is singular.
bool solve_system(double m[max_fit_params][max_fit_params + 1], int n) {
    for (int c = 0; c < n; ++c) {
        int best = c;
        for (int i = c + 1; i < n; ++i) {
            best = std::fabs(m[i][c]) > std::fabs(m[best][c]) ? i : best;
        }
        if (std::fabs(m[best][c]) < 1e-300) {
            return false;
        }
        std::swap(m[c], m[best]);
        for (int i = 0; i < n; ++i) {
            if (i == c) {
                continue;
            }
            const double f = m[i][c] / m[c][c];
            for (int j = c; j <= n; ++j) {
                m[i][j] -= f * m[c][j];
            }
        }
    }
    for (int i = 0; i < n; ++i) {
        m[i][n] /= m[i][i];
    }
    return true;
}

} // namespace

void normal_equations::add(const double * x, double y, double weight, int n) {
    for (int i = 0; i < n; ++i) {
        for (int j = 0; j < n; ++j) {
            a[i][j] += weight * x[i] * x[j];
        }
        r[i] += weight * x[i] * y;
    }
}

void normal_equations::scale(double factor) {
    for (int i = 0; i < max_fit_params; ++i) {
        for (int j = 0; j < max_fit_params; ++j) {
            a[i][j] *= factor;
        }
        r[i] *= factor;
    }
}

void normal_equations::solve(int n, const double * lower, const double * target, double damping, double * s) const {
    double best_cost = std::numeric_limits<double>::infinity();
    double best[max_fit_params];
    std::copy(target, target + n, best);
    for (int at_bound = 0; at_bound < (1 << n); ++at_bound) {
        int free[max_fit_params], n_free = 0;
        double candidate[max_fit_params];
        for (int i = 0; i < n; ++i) {
            candidate[i] = lower[i];
            if (!(at_bound >> i & 1)) {
                free[n_free++] = i;
            }
        }
        double m[max_fit_params][max_fit_params + 1];
        for (int i = 0; i < n_free; ++i) {
            const int fi = free[i];
            double right = r[fi] + damping * target[fi];
            for (int k = 0; k < n; ++k) {
                right -= at_bound >> k & 1 ? a[fi][k] * lower[k] : 0.0;
            }
            for (int j = 0; j < n_free; ++j) {
                m[i][j] = a[fi][free[j]] + (i == j ? damping : 0.0);
            }
            m[i][n_free] = right;
        }
        if (!solve_system(m, n_free)) {
            continue;
        }
        bool feasible = true;
        for (int i = 0; i < n_free; ++i) {
            candidate[free[i]] = m[i][n_free];
            feasible           = feasible && candidate[free[i]] >= lower[free[i]];
        }
        if (!feasible) {
            continue;
        }
        double cost = 0.0; // up to a constant
        for (int i = 0; i < n; ++i) {
            const double d = candidate[i] - target[i];
            cost += damping * d * d - 2.0 * r[i] * candidate[i];
            for (int j = 0; j < n; ++j) {
                cost += candidate[i] * a[i][j] * candidate[j];
            }
        }
        if (cost < best_cost) {
            best_cost = cost;
            std::copy(candidate, candidate + n, best);
        }
    }
    std::copy(best, best + n, s);
}

double huber_weight(double residual, double scale) {
    const double size = std::fabs(residual), bound = huber_k * scale;
    return size <= bound ? 1.0 : bound / size;
}

namespace {

double predict(const double * x, const double * s, int n) {
    double y = 0.0;
    for (int i = 0; i < n; ++i) {
        y += x[i] * s[i];
    }
    return y;
}

status check_samples(const double * x, const double * y, int n_samples, int n_params) {
    if (n_params < 1 || n_params > max_fit_params) {
        return status::fail(error_code::invalid_argument, "n_params = %d is outside 1..%d", n_params, max_fit_params);
    }
    if (n_samples < n_params || !x || !y) {
        return status::fail(error_code::invalid_argument, "%d samples cannot tell %d parameters", n_samples, n_params);
    }
    for (int k = 0; k < n_samples; ++k) {
        double sum = 0.0;
        for (int i = 0; i < n_params; ++i) {
            const double v = x[k * n_params + i];
            if (!std::isfinite(v) || v < 0.0) {
                return status::fail(error_code::invalid_argument, "sample %d: x = %g must be finite and at least 0", k,
                                    v);
            }
            sum += v;
        }
        if (sum <= 0.0) {
            return status::fail(error_code::invalid_argument, "sample %d: x is all zero", k);
        }
        if (!std::isfinite(y[k]) || y[k] <= 0.0) {
            return status::fail(error_code::invalid_argument, "sample %d: y = %g must be finite and above 0", k, y[k]);
        }
    }
    return {};
}

double quantile(std::vector<double> & values, double share) {
    const auto at = static_cast<long>(share * static_cast<double>(values.size() - 1) + 0.5);
    std::nth_element(values.begin(), values.begin() + at, values.end());
    return values[static_cast<size_t>(at)];
}

} // namespace

status fit_costs(const double * x, const double * y, int n_samples, int n_params, fit_result & out) {
    HYBRIMOE_TRY(check_samples(x, y, n_samples, n_params));
    // Every feature is measured in units of its largest value, so that latencies and bytes weigh alike.
    double unit[max_fit_params] = {};
    for (int k = 0; k < n_samples; ++k) {
        for (int i = 0; i < n_params; ++i) {
            unit[i] = std::max(unit[i], x[k * n_params + i]);
        }
    }
    const double zero[max_fit_params] = {};
    double s[max_fit_params]          = {};
    std::vector<double> errors(static_cast<size_t>(n_samples)), weights(static_cast<size_t>(n_samples), 1.0);
    std::vector<double> base(y, y + n_samples); // residuals are relative to these
    double scale = 0.0;
    for (int pass = 0; pass < n_reweightings; ++pass) {
        normal_equations sums;
        double trace = 0.0;
        for (int k = 0; k < n_samples; ++k) {
            const auto at = static_cast<size_t>(k);
            double row[max_fit_params];
            for (int i = 0; i < n_params; ++i) {
                row[i] = unit[i] > 0.0 ? x[k * n_params + i] / unit[i] / base[at] : 0.0;
            }
            sums.add(row, y[k] / base[at], weights[at], n_params);
        }
        for (int i = 0; i < n_params; ++i) {
            trace += sums.a[i][i];
        }
        double next[max_fit_params];
        sums.solve(n_params, zero, zero, trace * least_damping, next);
        double moved = 0.0;
        for (int i = 0; i < n_params; ++i) {
            moved = std::max(moved, std::fabs(next[i] - s[i]) / (std::fabs(next[i]) + 1e-300));
            s[i]  = next[i];
        }
        for (int k = 0; k < n_samples; ++k) {
            double at_unit = 0.0;
            for (int i = 0; i < n_params; ++i) {
                at_unit += unit[i] > 0.0 ? x[k * n_params + i] / unit[i] * s[i] : 0.0;
            }
            const auto at = static_cast<size_t>(k);
            // Between the first guess, which outliers inflate, and a prediction near zero, which would blow up others.
            base[at]   = std::min(std::max(at_unit, y[k] * 0.02), y[k] * 50.0);
            errors[at] = std::fabs(y[k] / base[at] - 1.0);
        }
        std::vector<double> sorted = errors;
        scale                      = std::max(least_scale, 1.4826 * quantile(sorted, 0.5));
        for (int k = 0; k < n_samples; ++k) {
            weights[static_cast<size_t>(k)] = huber_weight(errors[static_cast<size_t>(k)], scale);
        }
        if (pass > 3 && moved < 1e-9) {
            break;
        }
    }
    fit_result found;
    for (int i = 0; i < n_params; ++i) {
        found.params[i] = unit[i] > 0.0 ? s[i] / unit[i] : 0.0;
    }
    for (int k = 0; k < n_samples; ++k) {
        const double p                 = predict(x + k * n_params, found.params, n_params);
        errors[static_cast<size_t>(k)] = p > 0.0 ? std::fabs(y[k] / p - 1.0) : std::numeric_limits<double>::infinity();
        found.n_outliers += errors[static_cast<size_t>(k)] > 3.0 * scale ? 1 : 0;
    }
    found.median_error = quantile(errors, 0.5);
    found.p90_error    = quantile(errors, 0.9);
    out                = found;
    return {};
}

} // namespace hybrimoe
