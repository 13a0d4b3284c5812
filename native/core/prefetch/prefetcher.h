// Which experts to load before their layer asks. A policy predicts scores per expert of a coming layer; proposals are
// ranked by gain, and the runtime copies them only into idle link time.
#pragma once

#include "../expert_cache.h"
#include "../scheduling/scheduler.h"

namespace hybrimoe {

// What a prefetcher may look at, at the end of planning one layer.
struct prefetch_view {
    const model_shape * shape  = nullptr;
    const cost_model * costs   = nullptr;
    const expert_cache * cache = nullptr;
    const scheduler * policy   = nullptr; // for impact: the planner that will plan the coming layers
    const router_step * step   = nullptr; // the layer just routed
    // lookahead[d - 1]: router scores of layer + d from this layer's gate input, summed over the step's tokens,
    // [n_expert]; null where the caller has none.
    const float * lookahead[max_lookahead]{};
    int horizon                 = 1;       // layers ahead
    double layer_us             = 0.0;     // measured time from one MoE layer to the next; 0: not known yet
    const int * device_of_layer = nullptr; // [n_layers] where a prefetch would go; cpu_device: no slots
};

struct proposal {
    int layer         = 0;
    int expert        = 0;
    double gain_us    = 0.0;
    double confidence = 0.0; // breaks ties of gain
};

// Lists of fixed capacity, so that proposing never allocates.
struct proposal_list {
    static constexpr int capacity = 512;

    proposal items[capacity];
    int n_items = 0;
    int keep[capacity]; // keys that are predicted and present: not to be evicted for others
    int n_keep = 0;

    void clear() { n_items = n_keep = 0; }
    void add(const proposal & p);
    void add_keep(int key);
    void sort(); // greatest gain first, then confidence, then layer and id
};

class prefetcher {
public:
    prefetcher(int horizon, bool adaptive) : horizon_(horizon), adaptive_(adaptive) {}
    virtual ~prefetcher() = default;

    // Scores of the experts of layer `step->layer + distance`, larger is likelier; false: no prediction. The default
    // takes the caller's look-ahead.
    virtual bool predict(const prefetch_view & view, int distance, float * scores) const;
    // The default proposes, for every layer up to the horizon, the absent ones among its n_candidates best experts;
    // gain = score x time saved by having the expert cached.
    virtual void propose(const prefetch_view & view, proposal_list & out) const;

    virtual void reset() {}
    virtual void on_prompt() {}
    virtual void observe(const router_step &) {}

    virtual int max_horizon() const { return max_lookahead; }
    virtual int n_candidates(const prefetch_view & view) const { return view.shape->top_k; }

    int horizon() const { return horizon_; } // where an adaptive horizon starts
    bool adaptive() const { return adaptive_; }

private:
    int horizon_;
    bool adaptive_;
};

const policy_table<prefetcher> & prefetchers();

// Time that one token saves when the expert is cached.
double saving_us(const cost_model & costs, int layer, int device);

} // namespace hybrimoe
