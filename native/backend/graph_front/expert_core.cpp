#include "graph_front/expert_core.h"

#include "settings.h"

namespace hybrimoe {

namespace {

struct core_table {
    std::mutex mutex;
    std::vector<std::weak_ptr<expert_core>> all;
};

core_table & table() {
    static core_table cores;
    return cores;
}

} // namespace

const float * host_copies::of(const ggml_tensor * weight) {
    if (weight->buffer == nullptr || ggml_backend_buffer_is_host(weight->buffer)) {
        return static_cast<const float *>(weight->data);
    }
    std::vector<float> & copy = copies_[weight];
    if (copy.empty()) {
        copy.resize((ggml_nbytes(weight) + sizeof(float) - 1) / sizeof(float));
        ggml_backend_tensor_get(weight, copy.data(), 0, ggml_nbytes(weight));
    }
    return copy.data();
}

expert_core::expert_core(instance_ticket ticket, ggml_backend_dev_t device)
    : inner(device), id(ticket.id), dispatch(current_settings(), std::move(ticket.data), device) {
    show_instance(id, &dispatch);
}

expert_core::~expert_core() {
    forget_instance(id);
}

std::shared_ptr<expert_core> expert_core::find(ggml_backend_dev_t inner, const void * experts) {
    core_table & cores = table();
    std::lock_guard<std::mutex> lock(cores.mutex);
    std::shared_ptr<expert_core> found;
    for (size_t i = 0; i < cores.all.size();) {
        const std::shared_ptr<expert_core> one = cores.all[i].lock();
        if (one == nullptr) {
            cores.all.erase(cores.all.begin() + static_cast<std::ptrdiff_t>(i));
            continue;
        }
        i++;
        std::lock_guard<std::mutex> of_core(one->mutex);
        if (one->inner == inner && one->experts.count(experts) != 0) {
            found = one;
        }
    }
    if (found == nullptr) {
        found = std::make_shared<expert_core>(register_instance(), inner);
        found->experts.insert(experts);
        cores.all.push_back(found);
    }
    set_last_instance_of_thread(found->id);
    return found;
}

} // namespace hybrimoe
