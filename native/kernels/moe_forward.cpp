// One layer's experts in one parallel region.
//
//   group pairs by expert | quantise x              -- barrier
//   panels of x for experts with many tokens        -- barrier, only if there are any
//   gate, up, activation: dynamic items; where both sides are tiled, quantised into panels at once   -- barrier
//   quantise the other hidden rows                  -- barrier, only if there are any
//   down with the weighted sum: dynamic items       -- barrier
//
// A pair is one (token, k) whose expert is computed here. Pairs are ordered by expert; `position` is the place in that
// order. Every number depends on its own row, its own token and the size of its expert's group only, and a token's
// experts are added in ascending k: results are the same for any team.
#include <atomic>
#include <cstring>
#include <new>
#include <type_traits>

#include "kernel_set.h"

namespace hybrimoe::kernels {

namespace {

constexpr int64_t min_chunk_tokens = 32;
constexpr size_t cache_line        = 64;
constexpr size_t dot_stream_bytes  = 48 * 1024; // weights of one matrix in one work item of a decode step
constexpr int64_t most_item_rows   = 256;
constexpr int32_t block_tokens     = 128; // tokens that share one packing of a tile

size_t align_up(size_t n) {
    return (n + cache_line - 1) / cache_line * cache_line;
}

int64_t min_of(int64_t a, int64_t b) {
    return a < b ? a : b;
}
int64_t max_of(int64_t a, int64_t b) {
    return a > b ? a : b;
}

act_format format_of(const expert_matrix & m) {
    const type_info * info = find_type(m.type);
    return info != nullptr ? info->act : act_format::external;
}

// How the activations of one matrix are stored.
struct act_layout {
    act_format format              = act_format::f32;
    const external_type * external = nullptr;
    int64_t n                      = 0;
    size_t row_bytes               = 0; // 0 for f32: the values are used where they are
    size_t panel_bytes             = 0;

    act_layout() = default;

    act_layout(const kernel_set * ks, const expert_matrix & m, int64_t n_values)
        : format(format_of(m)), external(m.external), n(n_values) {
        const auto groups = static_cast<size_t>(n / 32);
        switch (format) {
        case act_format::q8_32:
            row_bytes   = ks->rows_in_units ? (groups + 3) / 4 * sizeof(row_unit128) : groups * sizeof(row_block32);
            panel_bytes = groups * sizeof(panel_group32);
            break;
        case act_format::q8_256:
            row_bytes   = groups / 8 * sizeof(row_block256);
            panel_bytes = groups / 8 * sizeof(panel_block256);
            break;
        case act_format::f32:
            panel_bytes = static_cast<size_t>(n) * panel_tokens * sizeof(float);
            break;
        case act_format::external:
            row_bytes =
                static_cast<size_t>(n) / static_cast<size_t>(external->act_block_values) * external->act_block_bytes;
            break;
        }
        row_bytes   = align_up(row_bytes);
        panel_bytes = align_up(panel_bytes);
    }

    bool same_as(const act_layout & other) const {
        return format == other.format &&
               (format != act_format::external || external->from_float == other.external->from_float);
    }

    void quantize(const kernel_set * ks, const float * x, void * row) const {
        switch (format) {
        case act_format::q8_32:
            return ks->quantize_32(x, n, row);
        case act_format::q8_256:
            return ks->quantize_256(x, n, row);
        case act_format::external:
            return external->from_float(x, row, n);
        case act_format::f32:
            return;
        }
    }

    void panel(const kernel_set * ks, const void * const * rows, int n_rows, void * out) const {
        switch (format) {
        case act_format::q8_32:
            return ks->panel_32(rows, n_rows, n, out);
        case act_format::q8_256:
            return ks->panel_256(rows, n_rows, n, out);
        case act_format::f32:
            return ks->panel_f32(rows, n_rows, n, out);
        case act_format::external:
            return;
        }
    }

    // Bytes of a panel before value k
    size_t panel_offset(int64_t k) const {
        switch (format) {
        case act_format::q8_32:
            return static_cast<size_t>(k / 32) * sizeof(panel_group32);
        case act_format::q8_256:
            return static_cast<size_t>(k / 256) * sizeof(panel_block256);
        default:
            return static_cast<size_t>(k) * panel_tokens * sizeof(float);
        }
    }
};

// A matrix with everything that runs it.
struct runner {
    const expert_matrix * m      = nullptr;
    const type_kernels * kernels = nullptr; // nullptr for external types
    act_layout act;
    int64_t n_in  = 0;
    int64_t n_out = 0;

    runner() = default;
    runner(const kernel_set * ks, const expert_matrix & matrix, int64_t in, int64_t out)
        : m(&matrix), kernels(find_kernels(ks, matrix.type)), act(ks, matrix, in), n_in(in), n_out(out) {}

    bool has_tile() const { return kernels != nullptr && kernels->gemm != nullptr; }

    const uint8_t * row(int32_t expert, int64_t r) const {
        return static_cast<const uint8_t *>(m->data) + static_cast<size_t>(expert) * m->expert_bytes +
               static_cast<size_t>(r) * m->row_bytes;
    }

    // (w . x) scale + bias for rows [r0, r0 + n) of one expert
    void finish(int32_t expert, int64_t r0, int64_t n, float * values) const {
        if (m->scale != nullptr) {
            const float s = m->scale[expert];
            for (int64_t i = 0; i < n; ++i) {
                values[i] *= s;
            }
        }
        if (m->bias != nullptr) {
            const auto * bias = reinterpret_cast<const float *>(reinterpret_cast<const uint8_t *>(m->bias) +
                                                                static_cast<size_t>(expert) * m->bias_bytes) +
                                r0;
            for (int64_t i = 0; i < n; ++i) {
                values[i] += bias[i];
            }
        }
    }
};

struct expert_group {
    int32_t expert;
    int32_t first;       // position of its first pair
    int32_t n;           // pairs
    int32_t first_panel; // -1: row-stream dot
    int32_t first_row;   // of its hidden rows; -1: they go straight into panels
};

struct shared_state {
    alignas(64) std::atomic<int64_t> next_panel;
    alignas(64) std::atomic<int64_t> next_up_item;
    alignas(64) std::atomic<int64_t> next_hidden;
    alignas(64) std::atomic<int64_t> next_down_item;
    alignas(64) int32_t n_pairs;
    int32_t n_groups;
    int32_t n_panels;
    int32_t n_hidden; // units of work of the hidden phase
};

// Everything one pass over up to n_tokens tokens needs; offsets into the scratch.
struct pass_layout {
    runner gate;
    runner up;
    runner down;
    bool gated;
    bool two_x;      // gate and up want different activation formats
    bool x_per_pair; // x is multiplied with the router weight before it is quantised
    bool up_tiles;   // gate and up have packed tiles
    bool fused;      // down too: hidden values are quantised where they are made
    int64_t n_tokens;
    int64_t n_pairs; // at most
    int64_t n_panels;
    int64_t n_ff_stride; // floats from one hidden row to the next

    size_t at_groups, at_pair_of, at_position_of, at_counts, at_x_rows[2], at_x_panels[2], at_hidden, at_hidden_rows,
        at_hidden_panels, at_threads, thread_bytes, bytes;
    // within a thread's part
    size_t at_packed, at_gate_c, at_up_c, at_gate_rows, at_up_rows, at_block, at_block_rows, at_down_c, at_scaled_x;

    pass_layout(const kernel_set * ks, const moe_layer & layer, int64_t tokens, int32_t top_k, int32_t n_threads) {
        gated      = is_gated(layer.op);
        up         = runner(ks, layer.up, layer.n_embd, layer.n_ff);
        gate       = gated ? runner(ks, layer.gate, layer.n_embd, layer.n_ff) : up;
        down       = runner(ks, layer.down, layer.n_ff, layer.n_embd);
        two_x      = gated && !gate.act.same_as(up.act);
        x_per_pair = layer.weights_on_input;
        up_tiles   = up.has_tile() && gate.has_tile();
        fused      = up_tiles && down.has_tile();
        n_tokens   = tokens;
        n_pairs    = tokens * top_k;
        // Every group of 3 and more has at most 7 empty places in its last panel.
        n_panels    = n_pairs / panel_tokens + min_of(layer.n_expert, n_pairs / ks->gemm_tokens) + 1;
        n_ff_stride = (layer.n_ff + 15) / 16 * 16;

        size_t at       = 0;
        const auto take = [&at](size_t n) {
            const size_t here = at;
            at += align_up(n);
            return here;
        };
        take(sizeof(shared_state));
        const auto pairs  = static_cast<size_t>(n_pairs);
        const auto panels = static_cast<size_t>(n_panels);
        const auto x_rows = static_cast<size_t>(x_per_pair ? n_pairs : n_tokens);
        at_groups         = take(static_cast<size_t>(min_of(layer.n_expert, n_pairs)) * sizeof(expert_group));
        at_pair_of        = take(pairs * sizeof(int32_t));
        at_position_of    = take(pairs * sizeof(int32_t));
        at_counts         = take(static_cast<size_t>(layer.n_expert) * sizeof(int32_t));
        for (int i = 0; i < (two_x ? 2 : 1); ++i) {
            const act_layout & act = i == 0 ? up.act : gate.act;
            // f32 rows are the caller's own, unless they are multiplied with a weight first
            const size_t row = act.format == act_format::f32 && x_per_pair
                                   ? align_up(static_cast<size_t>(layer.n_embd) * 4)
                                   : act.row_bytes;
            at_x_rows[i]     = take(x_rows * row);
            at_x_panels[i]   = take(up_tiles ? panels * act.panel_bytes : 0);
        }
        const auto hidden =
            static_cast<size_t>(fused ? min_of(n_pairs, int64_t{layer.n_expert} * (ks->gemm_tokens - 1)) : n_pairs);
        at_hidden        = take(hidden * static_cast<size_t>(n_ff_stride) * sizeof(float));
        at_hidden_rows   = take(hidden * down.act.row_bytes);
        at_hidden_panels = take(down.has_tile() ? panels * down.act.panel_bytes : 0);
        at_threads       = at;

        at                = 0;
        const size_t tile = most_item_rows * sizeof(float);
        at_packed         = take(pack_bytes);
        at_gate_c         = take(block_tokens * tile_rows * sizeof(float));
        at_up_c           = take(block_tokens * tile_rows * sizeof(float));
        at_gate_rows      = take(8 * tile);
        at_up_rows        = take(8 * tile);
        at_block          = take(up_tiles ? block_tokens * tile : 0);
        at_block_rows     = take(panel_tokens * sizeof(row_block256));
        at_down_c         = take(pairs * max_down_rows(n_pairs) * sizeof(float));
        at_scaled_x       = take(x_per_pair ? static_cast<size_t>(layer.n_embd) * sizeof(float) : 0);
        thread_bytes      = at;
        bytes             = at_threads + thread_bytes * static_cast<size_t>(n_threads);
    }

    // Rows of one item of the down phase: few pairs leave room for longer streams.
    static size_t max_down_rows(int64_t pairs) { return pairs <= 64 ? 128 : 2 * tile_rows; }
};

// One thread's view of one pass.
class pass {
public:
    pass(const moe_plan & moe_plan_, const moe_layer & moe, const moe_batch & moe_batch_,
         const pass_layout & pass_layout_, void * scratch, const team & t)
        : plan(moe_plan_), ks(moe_plan_.kernels), layer(moe), batch(moe_batch_), lay(pass_layout_), crew(t),
          base(static_cast<uint8_t *>(scratch)),
          mine(base + lay.at_threads + lay.thread_bytes * static_cast<size_t>(t.index)),
          shared(reinterpret_cast<shared_state *>(base)), groups(at<expert_group>(lay.at_groups)),
          pair_of(at<int32_t>(lay.at_pair_of)), position_of(at<int32_t>(lay.at_position_of)) {}

    void run() {
        if (crew.index == 0) {
            group_pairs();
        }
        quantize_x();
        barrier();
        if (shared->n_panels > 0 && lay.up_tiles) {
            make_x_panels();
            barrier();
        }
        up_phase();
        barrier();
        if (shared->n_hidden > 0) {
            hidden_phase();
            barrier();
        }
        down_phase();
        barrier();
    }

private:
    const moe_plan & plan;
    const kernel_set * ks;
    const moe_layer & layer;
    const moe_batch & batch;
    const pass_layout & lay;
    const team & crew;
    uint8_t * base;
    uint8_t * mine;
    shared_state * shared;
    expert_group * groups;
    int32_t * pair_of;     // position -> token * top_k + k
    int32_t * position_of; // token * top_k + k -> position, -1 if not computed here

    template <class T> T * at(size_t offset) const { return reinterpret_cast<T *>(base + offset); }
    template <class T> T * own(size_t offset) const { return reinterpret_cast<T *>(mine + offset); }

    void barrier() const {
        if (crew.count > 1) {
            crew.barrier(crew.ctx);
        }
    }

    const float * x_of(int64_t token) const {
        return reinterpret_cast<const float *>(reinterpret_cast<const uint8_t *>(batch.x) +
                                               static_cast<size_t>(token) * batch.x_token_bytes);
    }
    int32_t id_of(int64_t token, int32_t k) const {
        return reinterpret_cast<const int32_t *>(reinterpret_cast<const uint8_t *>(batch.ids) +
                                                 static_cast<size_t>(token) * batch.ids_token_bytes)[k];
    }
    float weight_of(int64_t token, int32_t k) const {
        return reinterpret_cast<const float *>(reinterpret_cast<const uint8_t *>(batch.weights) +
                                               static_cast<size_t>(token) * batch.weights_token_bytes)[k];
    }
    float * y_of(int64_t token) const {
        return reinterpret_cast<float *>(reinterpret_cast<uint8_t *>(batch.y) +
                                         static_cast<size_t>(token) * batch.y_token_bytes);
    }

    bool taken(int64_t token, int32_t k) const {
        const int32_t id = id_of(token, k);
        return id >= 0 && id < layer.n_expert && (batch.take == nullptr || batch.take[token * batch.top_k + k] != 0);
    }

    // Counting sort of the pairs by expert. Serial: 4096 pairs take a few microseconds.
    void group_pairs() {
        auto * counts = at<int32_t>(lay.at_counts);
        memset(counts, 0, static_cast<size_t>(layer.n_expert) * sizeof(int32_t));
        for (int64_t t = 0; t < batch.n_tokens; ++t) {
            for (int32_t k = 0; k < batch.top_k; ++k) {
                if (taken(t, k)) {
                    counts[id_of(t, k)]++;
                }
            }
        }
        int32_t n_groups = 0;
        int32_t n_panels = 0;
        int32_t n_rows   = 0;
        int32_t n_hidden = 0;
        int32_t position = 0;
        for (int32_t e = 0; e < layer.n_expert; ++e) {
            const int32_t n = counts[e];
            counts[e]       = position;
            if (n == 0) {
                continue;
            }
            const bool tiled   = n >= ks->gemm_tokens && (lay.up_tiles || lay.down.has_tile());
            const bool direct  = tiled && lay.fused;
            const int n_units  = (n + panel_tokens - 1) / panel_tokens;
            groups[n_groups++] = {e, position, n, tiled ? n_panels : -1, direct ? -1 : n_rows};
            n_panels += tiled ? n_units : 0;
            n_rows += direct ? 0 : n;
            n_hidden += direct ? 0 : n_units;
            position += n;
        }
        for (int64_t t = 0; t < batch.n_tokens; ++t) {
            for (int32_t k = 0; k < batch.top_k; ++k) {
                const int64_t pair = t * batch.top_k + k;
                position_of[pair]  = -1;
                if (taken(t, k)) {
                    const int32_t p   = counts[id_of(t, k)]++;
                    position_of[pair] = p;
                    pair_of[p]        = static_cast<int32_t>(pair);
                }
            }
        }
        // The scratch comes as it is: the counters start their life here.
        new (shared) shared_state{};
        shared->n_pairs  = position;
        shared->n_groups = n_groups;
        shared->n_panels = n_panels;
        shared->n_hidden = n_hidden;
    }

    // -- x ---------------------------------------------------------------------------------------------------------

    const act_layout & x_act(int set) const { return set == 0 ? lay.up.act : lay.gate.act; }

    void quantize_x() {
        const int64_t n_rows = lay.x_per_pair ? batch.n_tokens * batch.top_k : batch.n_tokens;
        for (int64_t i = crew.index; i < n_rows; i += crew.count) {
            const float * x = x_of(lay.x_per_pair ? i / batch.top_k : i);
            if (lay.x_per_pair) {
                const int64_t token = i / batch.top_k;
                const auto k        = static_cast<int32_t>(i % batch.top_k);
                if (!taken(token, k)) {
                    continue;
                }
                if (batch.x_is_weighted) {
                    x += k * layer.n_embd;
                } else {
                    float * scaled = own<float>(lay.at_scaled_x);
                    ks->add_scaled(scaled, x, weight_of(token, k), layer.n_embd, true);
                    x = scaled;
                }
            }
            for (int set = 0; set < (lay.two_x ? 2 : 1); ++set) {
                const act_layout & act = x_act(set);
                if (act.format != act_format::f32) {
                    act.quantize(ks, x, at<uint8_t>(lay.at_x_rows[set]) + static_cast<size_t>(i) * act.row_bytes);
                } else if (lay.x_per_pair) {
                    memcpy(scaled_row(set, i), x, static_cast<size_t>(layer.n_embd) * sizeof(float));
                }
            }
        }
    }

    float * scaled_row(int set, int64_t i) const {
        return at<float>(lay.at_x_rows[set] + static_cast<size_t>(i) * align_up(static_cast<size_t>(layer.n_embd) * 4));
    }

    const void * x_row(int set, int32_t position) const {
        const int64_t pair = pair_of[position];
        const int64_t i    = lay.x_per_pair ? pair : pair / batch.top_k;
        if (x_act(set).format != act_format::f32) {
            return at<uint8_t>(lay.at_x_rows[set]) + static_cast<size_t>(i) * x_act(set).row_bytes;
        }
        return lay.x_per_pair ? scaled_row(set, i) : x_of(i);
    }

    // First group whose panels reach beyond `panel`
    const expert_group & group_of_panel(int64_t panel) const {
        for (int32_t g = 0;; ++g) {
            const expert_group & group = groups[g];
            if (group.first_panel >= 0 && panel < group.first_panel + (group.n + panel_tokens - 1) / panel_tokens) {
                return group;
            }
        }
    }

    void make_x_panels() {
        for (int64_t p = claim(shared->next_panel); p < shared->n_panels; p = claim(shared->next_panel)) {
            const expert_group & group = group_of_panel(p);
            const int32_t first        = group.first + static_cast<int32_t>(p - group.first_panel) * panel_tokens;
            const auto n               = static_cast<int>(min_of(panel_tokens, group.first + group.n - first));
            for (int set = 0; set < (lay.two_x ? 2 : 1); ++set) {
                const void * rows[panel_tokens];
                for (int t = 0; t < n; ++t) {
                    rows[t] = x_row(set, first + t);
                }
                x_act(set).panel(ks, rows, n, x_panel(set, static_cast<int32_t>(p)));
            }
        }
    }

    uint8_t * x_panel(int set, int32_t panel) const {
        return at<uint8_t>(lay.at_x_panels[set]) + static_cast<size_t>(panel) * x_act(set).panel_bytes;
    }

    static int64_t claim(std::atomic<int64_t> & counter) { return counter.fetch_add(1, std::memory_order_relaxed); }

    // -- products --------------------------------------------------------------------------------------------------

    // Row-stream dot of rows [r0, r0 + n_rows) with n_x activation rows; out[t] + r
    void dot(const runner & m, int32_t expert, int64_t r0, int64_t n_rows, const void * const * x, int n_x,
             float * const * out, const uint8_t * next) const {
        if (m.kernels == nullptr) {
            for (int64_t r = 0; r < n_rows; ++r) {
                for (int t = 0; t < n_x; ++t) {
                    m.m->external->vec_dot(static_cast<int>(m.n_in), out[t] + r, 0, m.row(expert, r0 + r), 0, x[t], 0,
                                           1);
                }
            }
            return;
        }
        dot_args args = {m.row(expert, r0), m.m->row_bytes, n_rows, m.n_in, {}, n_x, {}, next, plan.n_streams};
        for (int t = 0; t < n_x; ++t) {
            args.x[t]   = x[t];
            args.out[t] = out[t];
        }
        m.kernels->dot(args);
    }

    // c[t * c_stride + r] for n_tokens tokens, up to 16 rows of packed weights
    void tile(const runner & m, int32_t expert, int64_t r0, int64_t n_rows, const uint8_t * panels, int32_t n_tokens,
              float * c, int64_t c_stride) const {
        const tile_source source = {m.row(expert, r0), m.m->row_bytes, static_cast<int>(n_rows)};
        const bool floats        = m.act.format == act_format::f32;
        const int64_t step       = floats ? pack_values_float : pack_values_int8;
        void * packed            = own<void>(lay.at_packed);
        for (int64_t k = 0; k < m.n_in; k += step) {
            const int64_t n = min_of(step, m.n_in - k);
            m.kernels->pack(source, k, n, packed);
            const uint8_t * panel = panels + m.act.panel_offset(k);
            for (int32_t t = 0; t < n_tokens; t += panel_tokens, panel += m.act.panel_bytes) {
                m.kernels->gemm(packed, panel, n, static_cast<int>(min_of(panel_tokens, n_tokens - t)),
                                c + t * c_stride, c_stride, k == 0);
            }
        }
    }

    // -- gate, up, activation --------------------------------------------------------------------------------------

    int64_t up_item_rows() const {
        if (shared->n_panels > 0 && lay.up_tiles) {
            // whole blocks of the hidden rows' format, so that an item can quantise what it made
            return lay.fused && lay.down.act.format == act_format::q8_256 ? 256 : 2 * tile_rows;
        }
        int64_t rows = static_cast<int64_t>(dot_stream_bytes / max_row_bytes());
        rows         = max_of(tile_rows, min_of(most_item_rows, rows / tile_rows * tile_rows));
        // enough items that the slowest core does not hold the layer
        while (rows > tile_rows && shared->n_groups * ((layer.n_ff + rows - 1) / rows) < 8 * crew.count) {
            rows -= tile_rows;
        }
        return rows;
    }

    size_t max_row_bytes() const {
        return layer.up.row_bytes > layer.gate.row_bytes ? layer.up.row_bytes : layer.gate.row_bytes;
    }

    struct up_item {
        const expert_group * group;
        int64_t r0;
        int64_t n_rows;
    };

    void up_phase() {
        const int64_t rows     = up_item_rows();
        const int64_t n_chunks = (layer.n_ff + rows - 1) / rows;
        const int64_t n_items  = shared->n_groups * n_chunks;
        const auto item_at     = [&](int64_t i) {
            const int64_t r0 = i % n_chunks * rows;
            return up_item{groups + i / n_chunks, r0, min_of(rows, layer.n_ff - r0)};
        };
        // The next item is claimed ahead, so that the stream of weights can be prefetched into it.
        int64_t next = claim(shared->next_up_item);
        while (next < n_items) {
            const up_item item           = item_at(next);
            next                         = claim(shared->next_up_item);
            const runner & first_matrix  = lay.gated ? lay.gate : lay.up;
            const uint8_t * next_weights = nullptr;
            if (next < n_items) {
                const up_item following = item_at(next);
                next_weights            = first_matrix.row(following.group->expert, following.r0);
            }
            if (item.group->first_panel >= 0 && lay.up_tiles) {
                up_tiled(item);
            } else {
                up_streamed(item, next_weights);
            }
        }
    }

    float * hidden(int32_t row) const { return at<float>(lay.at_hidden) + static_cast<int64_t>(row) * lay.n_ff_stride; }

    void activate(int32_t expert, int64_t r0, int64_t n_rows, float * g, float * u, float * out) const {
        if (lay.gated) {
            lay.gate.finish(expert, r0, n_rows, g);
        }
        lay.up.finish(expert, r0, n_rows, u);
        ks->glu(layer.op, layer.alpha, layer.limit, g, u, out, n_rows);
    }

    // Any number of tokens, dot_tokens at a time
    void up_streamed(const up_item & item, const uint8_t * next_weights) const {
        for (int32_t t0 = 0; t0 < item.group->n; t0 += ks->dot_tokens) {
            const auto n_x  = static_cast<int>(min_of(ks->dot_tokens, item.group->n - t0));
            const bool last = t0 + n_x == item.group->n;
            const void * x[2][8];
            float * g[8];
            float * u[8];
            for (int t = 0; t < n_x; ++t) {
                x[0][t] = x_row(0, item.group->first + t0 + t);
                x[1][t] = lay.two_x ? x_row(1, item.group->first + t0 + t) : x[0][t];
                g[t]    = own<float>(lay.at_gate_rows) + t * most_item_rows;
                u[t]    = own<float>(lay.at_up_rows) + t * most_item_rows;
            }
            if (lay.gated) {
                dot(lay.gate, item.group->expert, item.r0, item.n_rows, x[1], n_x, g,
                    lay.up.row(item.group->expert, item.r0));
            }
            dot(lay.up, item.group->expert, item.r0, item.n_rows, x[0], n_x, u, last ? next_weights : nullptr);
            for (int t = 0; t < n_x; ++t) {
                activate(item.group->expert, item.r0, item.n_rows, g[t], u[t],
                         hidden(item.group->first_row + t0 + t) + item.r0);
            }
        }
    }

    void up_tiled(const up_item & item) const {
        const expert_group & group = *item.group;
        for (int32_t t0 = 0; t0 < group.n; t0 += block_tokens) {
            const auto n_tokens = static_cast<int32_t>(min_of(block_tokens, group.n - t0));
            const int32_t panel = group.first_panel + t0 / panel_tokens;
            float * g           = own<float>(lay.at_gate_c);
            float * u           = own<float>(lay.at_up_c);
            float * block = group.first_row < 0 ? own<float>(lay.at_block) : hidden(group.first_row + t0) + item.r0;
            const int64_t stride = group.first_row < 0 ? most_item_rows : lay.n_ff_stride;
            for (int64_t r = 0; r < item.n_rows; r += tile_rows) {
                const int64_t n  = min_of(tile_rows, item.n_rows - r);
                const int64_t r0 = item.r0 + r;
                if (lay.gated) {
                    tile(lay.gate, group.expert, r0, n, x_panel(lay.two_x ? 1 : 0, panel), n_tokens, g, tile_rows);
                }
                tile(lay.up, group.expert, r0, n, x_panel(0, panel), n_tokens, u, tile_rows);
                for (int32_t t = 0; t < n_tokens; ++t) {
                    activate(group.expert, r0, n, g + t * tile_rows, u + t * tile_rows, block + t * stride + r);
                }
            }
            if (group.first_row < 0) {
                for (int32_t t = 0; t < n_tokens; t += panel_tokens) {
                    put_in_panel(item, block + t * stride, static_cast<int>(min_of(panel_tokens, n_tokens - t)),
                                 panel + t / panel_tokens);
                }
            }
        }
    }

    // Hidden values [r0, r0 + n_rows) of up to 8 tokens, at most_item_rows from each other
    void put_in_panel(const up_item & item, const float * values, int n_tokens, int32_t panel) const {
        act_layout act = lay.down.act;
        act.n          = item.n_rows;
        const void * rows[panel_tokens];
        for (int t = 0; t < n_tokens; ++t) {
            rows[t] = values + t * most_item_rows;
            if (act.format != act_format::f32) {
                auto * row = own<row_block256>(lay.at_block_rows) + t;
                act.quantize(ks, values + t * most_item_rows, row);
                rows[t] = row;
            }
        }
        act.panel(ks, rows, n_tokens, hidden_panel(panel) + act.panel_offset(item.r0));
    }

    // -- hidden rows -----------------------------------------------------------------------------------------------

    void * hidden_row(int32_t row) const {
        return at<uint8_t>(lay.at_hidden_rows) + static_cast<size_t>(row) * lay.down.act.row_bytes;
    }

    const void * hidden_values(int32_t row) const {
        return lay.down.act.format == act_format::f32 ? static_cast<const void *>(hidden(row)) : hidden_row(row);
    }

    uint8_t * hidden_panel(int32_t panel) const {
        return at<uint8_t>(lay.at_hidden_panels) + static_cast<size_t>(panel) * lay.down.act.panel_bytes;
    }

    // One unit of work: 8 pairs of one group
    void hidden_phase() {
        int32_t unit = 0;
        int64_t want = claim(shared->next_hidden);
        for (int32_t g = 0; g < shared->n_groups; ++g) {
            const expert_group & group = groups[g];
            if (group.first_row < 0) {
                continue;
            }
            const int32_t n_units = (group.n + panel_tokens - 1) / panel_tokens;
            for (; want < unit + n_units; want = claim(shared->next_hidden)) {
                finish_hidden(group, static_cast<int32_t>(want) - unit);
            }
            unit += n_units;
        }
    }

    void finish_hidden(const expert_group & group, int32_t unit) const {
        const int32_t first = unit * panel_tokens;
        const auto n        = static_cast<int>(min_of(panel_tokens, group.n - first));
        const void * rows[panel_tokens];
        for (int t = 0; t < n; ++t) {
            const int32_t row = group.first_row + first + t;
            lay.down.act.quantize(ks, hidden(row), hidden_row(row));
            rows[t] = hidden_values(row);
        }
        if (group.first_panel >= 0 && lay.down.has_tile()) {
            lay.down.act.panel(ks, rows, n, hidden_panel(group.first_panel + unit));
        }
    }

    // -- down and sum ----------------------------------------------------------------------------------------------

    int64_t down_item_rows() const {
        int64_t rows = 2 * tile_rows;
        if (shared->n_panels == 0) {
            rows = static_cast<int64_t>(dot_stream_bytes / layer.down.row_bytes) / tile_rows * tile_rows;
            rows = max_of(tile_rows, min_of(rows, static_cast<int64_t>(pass_layout::max_down_rows(lay.n_pairs))));
        }
        while (rows > tile_rows && (layer.n_embd + rows - 1) / rows < 6 * crew.count) {
            rows -= tile_rows;
        }
        return rows;
    }

    void down_phase() {
        const int64_t rows    = down_item_rows();
        const int64_t n_items = (layer.n_embd + rows - 1) / rows;
        int64_t next          = claim(shared->next_down_item);
        while (next < n_items) {
            const int64_t r0     = next * rows;
            const int64_t n_rows = min_of(rows, layer.n_embd - r0);
            next                 = claim(shared->next_down_item);
            float * c            = own<float>(lay.at_down_c);
            for (int32_t g = 0; g < shared->n_groups; ++g) {
                const uint8_t * following = nullptr;
                if (g + 1 < shared->n_groups) {
                    following = lay.down.row(groups[g + 1].expert, r0);
                } else if (next < n_items) {
                    following = lay.down.row(groups[0].expert, next * rows);
                }
                down_group(groups[g], r0, n_rows, c + groups[g].first * rows, rows, following);
            }
            for (int64_t t = 0; t < batch.n_tokens; ++t) {
                sum_token(t, r0, n_rows, c, rows);
            }
        }
    }

    // c[t * c_stride + r]: finished outputs of one expert
    void down_group(const expert_group & group, int64_t r0, int64_t n_rows, float * c, int64_t c_stride,
                    const uint8_t * following) const {
        if (group.first_panel >= 0 && lay.down.has_tile()) {
            for (int64_t r = 0; r < n_rows; r += tile_rows) {
                tile(lay.down, group.expert, r0 + r, min_of(tile_rows, n_rows - r), hidden_panel(group.first_panel),
                     group.n, c + r, c_stride);
            }
        } else {
            for (int32_t t0 = 0; t0 < group.n; t0 += ks->dot_tokens) {
                const auto n_x = static_cast<int>(min_of(ks->dot_tokens, group.n - t0));
                const void * x[8];
                float * out[8];
                for (int t = 0; t < n_x; ++t) {
                    x[t]   = hidden_values(group.first_row + t0 + t);
                    out[t] = c + (t0 + t) * c_stride;
                }
                dot(lay.down, group.expert, r0, n_rows, x, n_x, out, t0 + n_x == group.n ? following : nullptr);
            }
        }
        if (layer.down.scale != nullptr || layer.down.bias != nullptr) {
            for (int32_t t = 0; t < group.n; ++t) {
                lay.down.finish(group.expert, r0, n_rows, c + t * c_stride);
            }
        }
    }

    void sum_token(int64_t token, int64_t r0, int64_t n_rows, const float * c, int64_t c_stride) const {
        float sum[most_item_rows];
        bool first = true;
        float * y  = y_of(token) + r0;
        for (int32_t k = 0; k < batch.top_k; ++k) {
            const int32_t position = position_of[token * batch.top_k + k];
            if (position < 0) {
                continue;
            }
            const float w = layer.weights_on_input ? 1.0f : weight_of(token, k);
            ks->add_scaled(sum, c + position * c_stride, w, n_rows, first);
            first = false;
        }
        if (first) {
            if (!batch.accumulate) {
                memset(y, 0, static_cast<size_t>(n_rows) * sizeof(float));
            }
        } else if (batch.accumulate) {
            ks->add_scaled(y, sum, 1.0f, n_rows, false);
        } else {
            memcpy(y, sum, static_cast<size_t>(n_rows) * sizeof(float));
        }
    }
};

const char * check_matrix(const expert_matrix & m, int64_t n_in) {
    if (m.data == nullptr) {
        return "an expert tensor is missing";
    }
    const type_info * info = find_type(m.type);
    if (info == nullptr) {
        if (m.external == nullptr || m.external->vec_dot == nullptr || m.external->from_float == nullptr) {
            return "an expert tensor's type has no kernel and no external one was given";
        }
        return n_in % m.external->act_block_values == 0 ? nullptr : "a row is no multiple of its type's block";
    }
    if (n_in % info->block_values != 0) {
        return "a row is no multiple of its type's block";
    }
    const auto row_bytes = static_cast<size_t>(n_in / info->block_values) * static_cast<size_t>(info->block_bytes);
    if (m.row_bytes < row_bytes) {
        return "the row stride is shorter than a row";
    }
    return m.row_bytes * tile_rows < (size_t{1} << 31) ? nullptr : "rows are too long";
}

moe_batch part_of(const moe_batch & batch, int64_t first, int64_t n) {
    const auto shift = [first](auto * p, size_t bytes) {
        using bytes_of =
            std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(p)>>, const uint8_t, uint8_t>;
        return reinterpret_cast<decltype(p)>(reinterpret_cast<bytes_of *>(p) + static_cast<size_t>(first) * bytes);
    };
    moe_batch part = batch;
    part.n_tokens  = n;
    part.x         = shift(batch.x, batch.x_token_bytes);
    part.ids       = shift(batch.ids, batch.ids_token_bytes);
    part.weights   = shift(batch.weights, batch.weights_token_bytes);
    part.take      = batch.take != nullptr ? batch.take + first * batch.top_k : nullptr;
    part.y         = shift(batch.y, batch.y_token_bytes);
    return part;
}

} // namespace

void split_gate_up(const expert_matrix & gate_up, int64_t n_ff, expert_matrix * gate, expert_matrix * up) {
    *gate    = gate_up;
    *up      = gate_up;
    up->data = static_cast<const uint8_t *>(gate_up.data) + static_cast<size_t>(n_ff) * gate_up.row_bytes;
    up->bias = gate_up.bias != nullptr ? gate_up.bias + n_ff : nullptr;
}

const char * check_layer(const moe_layer & layer) {
    if (layer.n_embd <= 0 || layer.n_ff <= 0 || layer.n_expert <= 0) {
        return "a dimension is not positive";
    }
    if (is_gated(layer.op)) {
        if (const char * why = check_matrix(layer.gate, layer.n_embd)) {
            return why;
        }
    }
    if (const char * why = check_matrix(layer.up, layer.n_embd)) {
        return why;
    }
    return check_matrix(layer.down, layer.n_ff);
}

moe_plan make_plan(const kernel_set * ks, const moe_layer & layer, int64_t max_tokens, int32_t top_k, int32_t n_threads,
                   size_t limit_bytes) {
    const auto bytes = [&](int64_t tokens) { return pass_layout(ks, layer, tokens, top_k, n_threads).bytes; };
    int64_t chunk    = max_of(1, max_tokens);
    while (chunk > min_chunk_tokens && bytes(chunk) > limit_bytes) {
        // equal passes, so that the last one is not a remainder
        const int64_t n_passes = (max_tokens + chunk - 1) / chunk + 1;
        chunk                  = max_of(min_chunk_tokens, (max_tokens + n_passes - 1) / n_passes);
    }
    return {ks, max_tokens, top_k, n_threads, chunk, bytes(chunk), default_streams()};
}

void moe_forward(const moe_plan & plan, const moe_layer & layer, const moe_batch & batch, void * scratch,
                 const team & team) {
    for (int64_t first = 0; first < batch.n_tokens; first += plan.chunk_tokens) {
        const int64_t n = min_of(plan.chunk_tokens, batch.n_tokens - first);
        const pass_layout lay(plan.kernels, layer, n, batch.top_k, plan.n_threads);
        const moe_batch part = part_of(batch, first, n);
        pass(plan, layer, part, lay, scratch, team).run();
    }
}

void router_rows(const kernel_set * ks, int32_t type, const void * w, size_t row_bytes, int64_t n_in, const float * x,
                 float * logits, int64_t row_begin, int64_t row_end) {
    const type_kernels * kernels = find_kernels(ks, type);
    if (kernels == nullptr || find_type(type)->act != act_format::f32) {
        return;
    }
    dot_args args = {static_cast<const uint8_t *>(w) + static_cast<size_t>(row_begin) * row_bytes,
                     row_bytes,
                     row_end - row_begin,
                     n_in,
                     {x},
                     1,
                     {logits + row_begin},
                     nullptr,
                     default_streams()};
    kernels->dot(args);
}

} // namespace hybrimoe::kernels
