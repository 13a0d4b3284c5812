// The accelerators and their slots: opens devices, makes and fills slots, lays them out anew, and collects what the
// workers have copied. Owns the accelerators (accelerator.h). The computing thread calls it, under the instance's mutex
// wherever others may ask for facts.
#pragma once

#include "hybrid/accelerator.h"
#include "hybrid/common.h"
#include "hybrid/recording.h"
#include "hybrid/reproducibility.h"
#include "hybrid/slot_counts.h"

#include "core/governor.h"

#include <memory>
#include <string>
#include <vector>

namespace hybrimoe {

class fleet {
public:
    fleet(const common & shared, recording & record, reproducibility & promise)
        : shared_(shared), record_(record), promise_(promise) {}

    int size() const { return static_cast<int>(devices_.size()); }
    accelerator & operator[](int device) { return *devices_[static_cast<size_t>(device)]; }
    const accelerator & operator[](int device) const { return *devices_[static_cast<size_t>(device)]; }
    // Slots after set-up, [device][layer].
    slot_table wanted() const;
    // The accelerator that holds the expert, or -1.
    int holder(int layer, int expert) const;
    // Per layer the experts that accelerators hold, the best first.
    std::vector<std::vector<int32_t>> residents() const;

    // Set-up, in this order. False: no device can be used (`why_not` says why; empty on a machine without one), or no
    // device has memory for a single slot.
    bool open(std::string & why_not);
    bool make_slots();
    void pin_experts(); // registers each layer's tensors; the kernel pins whole pages
    // What is copied from now on is told to these two.
    void start(runtime & rt, governor & gov);
    // Experts in the order of preference, per layer; what is left of the slots takes the first others.
    void fill(std::vector<std::vector<int32_t>> preferred);
    void clear();

    // Between two passes: caches of another size.
    void relayout(int device, const std::vector<int> & slots);
    // The share of the wanted slots that the device has from now on.
    void shrink(int device, double share);
    std::vector<int> current_slots(int device) const;
    // The first layers whole, as many as the memory of the cache holds.
    std::vector<int> static_slots(int device) const;
    // Loads missing experts of layers that have room for all: whole layers of the static placement.
    void fill_layers(int device);
    double wanted_bytes(int device) const;

    // Waits for all copies. False when that takes longer, for any device, than timeout_us.
    bool drain(double timeout_us);
    // Tells runtime and governor what copies have ended.
    void take_results();
    // False while a copy is stuck somewhere: then nothing is shared.
    bool all_copy();
    // A copy got stuck.
    void set_aside(int device, double after_us);
    // Said once: the device could not compute its share of n_tokens.
    void tell_no_memory(int device, int64_t n_tokens);
    bool has_scratch(int layer) const;
    // Whether something failed on a worker's thread since the last call, and why.
    bool take_failure(std::string & why);

private:
    void allocate(accelerator & device, std::vector<int> & slots);
    void allocate_scratch(accelerator & device);
    void copy_now(int device, int layer, int expert, int slot, bool is_load);
    void load_now(int device, int layer, int expert);
    void settle_fills();
    void lay_out(int device, const std::vector<int> & slots, std::vector<int> & changed);
    void empty(int device, const std::vector<int> & layers) noexcept;

    const common & shared_;
    recording & record_;
    reproducibility & promise_;
    std::vector<std::unique_ptr<accelerator>> devices_;
    runtime * runtime_   = nullptr; // from start() to clear()
    governor * governor_ = nullptr;
    std::vector<copy_result> results_;
};

} // namespace hybrimoe
