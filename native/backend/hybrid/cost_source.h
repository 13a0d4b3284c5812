// Where the costs come from: given, or measured at the start with the very code that will do the work.
#pragma once

#include "core/cost_model.h"
#include "hybrid/device_step.h"
#include "hybrid/layer_book.h"
#include "settings.h"

#include <memory>
#include <string>
#include <vector>

namespace hybrimoe {

class cpu_timer;

// A model of the book's layers and classes without costs.
status set_layers(const layer_book & book, int n_devices, cost_model & out);
// One figure for every expert, from the settings.
status simple_cost_model(const simple_costs & given, const layer_book & book, int n_devices, cost_model & out);
// The cost section of a calibration (JSON); refuses one of other layers or devices.
status calibrated_cost_model(const std::string & json, const layer_book & book, int n_devices, cost_model & out);
// Runs experts on the CPU and the accelerators and copies some. Slots must be allocated, and what is in them is lost.
status measured_cost_model(const layer_book & book, std::vector<std::unique_ptr<accelerator>> & devices,
                           cpu_timer & timer, const step_clock & clock, cost_model & out);

// The opposite: a cost section that gives the same model, bit for bit.
std::string describe_costs(const cost_model & costs);

} // namespace hybrimoe
