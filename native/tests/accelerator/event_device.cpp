#include "event_device.h"

#include "ggml-backend-impl.h"

#include <chrono>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

namespace event_device {

namespace {

std::mutex mutex;
counts counted;
std::set<ggml_backend_event_t> alive;
int wait_us = 0;

ggml_backend_dev_t cpu() {
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
}

void use(ggml_backend_event_t event) {
    counted.n_late += alive.count(event) == 0 ? 1 : 0;
}

void record(ggml_backend_t, ggml_backend_event_t event) {
    std::lock_guard<std::mutex> lock(mutex);
    counted.n_recorded++;
    use(event);
}

ggml_backend_t init(ggml_backend_dev_t, const char * params) {
    ggml_backend_t made = ggml_backend_dev_init(cpu(), params);
    if (made != nullptr) {
        made->iface.event_record = record;
    }
    return made;
}

void get_props(ggml_backend_dev_t, ggml_backend_dev_props * props) {
    ggml_backend_dev_get_props(cpu(), props);
    props->caps.events = true;
}

ggml_backend_event_t event_new(ggml_backend_dev_t device) {
    std::lock_guard<std::mutex> lock(mutex);
    counted.n_made++;
    // Freed at the end alone: an address that comes again would hide a late use.
    static std::vector<std::unique_ptr<ggml_backend_event>> all;
    all.emplace_back(new ggml_backend_event{device, nullptr});
    ggml_backend_event_t event = all.back().get();
    alive.insert(event);
    return event;
}

void event_free(ggml_backend_dev_t, ggml_backend_event_t event) {
    std::lock_guard<std::mutex> lock(mutex);
    counted.n_freed++;
    use(event);
    alive.erase(event);
}

void event_synchronize(ggml_backend_dev_t, ggml_backend_event_t event) {
    int us = 0;
    {
        std::lock_guard<std::mutex> lock(mutex);
        counted.n_waits++;
        use(event);
        us = wait_us;
    }
    std::this_thread::sleep_for(std::chrono::microseconds(us));
    std::lock_guard<std::mutex> lock(mutex);
    use(event); // it must outlive the wait, too
}

ggml_backend_device make() {
    ggml_backend_device device     = *cpu(); // what needs no events is the CPU's
    device.iface.init_backend      = init;
    device.iface.get_props         = get_props;
    device.iface.event_new         = event_new;
    device.iface.event_free        = event_free;
    device.iface.event_synchronize = event_synchronize;
    return device;
}

} // namespace

ggml_backend_dev_t get() {
    static ggml_backend_device device = make();
    return &device;
}

counts read_counts() {
    std::lock_guard<std::mutex> lock(mutex);
    return counted;
}

void set_wait_us(int us) {
    std::lock_guard<std::mutex> lock(mutex);
    wait_us = us;
}

} // namespace event_device
