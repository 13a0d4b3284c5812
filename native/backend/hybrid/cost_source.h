// Where the costs come from: given, or measured at the start with the very code that will do the work.
#pragma once

#include "core/cost_model.h"
#include "hybrid/layer_book.h"
#include "settings.h"

#include <string>
#include <vector>

namespace hybrimoe {

class fleet;
struct common;

// Times expert FFNs on the CPU: microseconds for `n_tokens` tokens on each of `experts`.
class cpu_timer {
public:
    virtual ~cpu_timer()                                                                                  = default;
    virtual double time_us(const known_layer & layer, const std::vector<int32_t> & experts, int n_tokens) = 0;
};

// A model of the book's layers and classes without costs.
status set_layers(const layer_book & book, int n_devices, cost_model & out);
// One figure for every expert, from the settings.
status simple_cost_model(const simple_costs & given, const layer_book & book, int n_devices, cost_model & out);
// The cost section of a calibration (JSON); refuses one of other layers or devices.
status calibrated_cost_model(const std::string & json, const layer_book & book, int n_devices, cost_model & out);
// Runs experts on the CPU and the accelerators and copies some. Slots must be allocated, and what is in them is lost.
status measured_cost_model(const common & shared, fleet & devices, cpu_timer & timer, cost_model & out);
// The one of these three that the settings ask for; one that cannot be used is measured instead, and the log says so.
status find_cost_model(const common & shared, fleet & devices, cpu_timer & timer, cost_model & out);

// The opposite: a cost section that gives the same model, bit for bit.
std::string describe_costs(const cost_model & costs);

} // namespace hybrimoe
