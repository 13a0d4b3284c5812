// Robust linear least squares for timings, of at most three parameters. Times have a relative error, and their outliers
// (preemption, page faults) are large and one-sided: residuals are relative and bounded by Huber's function.
// Source: P. J. Huber, Robust Estimation of a Location Parameter (1964); k = 1.345 keeps 95 % efficiency on Gaussian
// noise.
#pragma once

#include "../status.h"

namespace hybrimoe {

constexpr int max_fit_params = 3;
constexpr double huber_k     = 1.345;

// Weighted sums of least squares: minimises sum w (y - x . s)^2 by its normal equations.
struct normal_equations {
    double a[max_fit_params][max_fit_params] = {};
    double r[max_fit_params]                 = {};

    void add(const double * x, double y, double weight, int n);
    void scale(double factor);
    // Least squares with s[i] >= lower[i], by looking at every active set (at most 2^3). `damping` pulls every s[i]
    // towards target[i]: what the samples do not tell apart stays there.
    void solve(int n, const double * lower, const double * target, double damping, double * s) const;
};

// 1 within k scales, then falling: what a sample counts.
double huber_weight(double residual, double scale);

struct fit_result {
    double params[max_fit_params] = {};
    double median_error           = 0.0; // of |y / prediction - 1|
    double p90_error              = 0.0;
    int n_outliers                = 0; // samples beyond three scales
};

// Fits y = sum_i x[i] params[i], params >= 0, to all samples at once. x: [n_samples, n_params], finite, at least 0, no
// row all zero; y > 0. Needs at least n_params samples.
status fit_costs(const double * x, const double * y, int n_samples, int n_params, fit_result & out);

} // namespace hybrimoe
