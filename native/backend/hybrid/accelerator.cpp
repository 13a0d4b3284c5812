#include "hybrid/accelerator.h"

#include "hybrid/device_step.h"

namespace hybrimoe {

accelerator::accelerator(ggml_backend_dev_t device, int index, const settings & config, const step_clock & clock)
    : port(device, index, config), share(std::make_unique<device_step>(*this)), compute(port),
      worker(port, config, clock) {
    for (int i = 0; port.has_events() && i < n_scratch_slots; i++) {
        scratch_events.emplace_back(ggml_backend_event_new(device));
    }
    if (port.has_events()) {
        end_event.reset(ggml_backend_event_new(device));
    }
}

accelerator::~accelerator() = default; // here, where a device_step is known

} // namespace hybrimoe
