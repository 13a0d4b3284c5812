#include "hybrid/route_trace.h"

#include "regular_file.h"

#include <algorithm>
#include <fstream>
#include <stdexcept>

namespace hybrimoe {

namespace {

constexpr int32_t magic       = 0x52544d48;
constexpr int64_t max_entries = int64_t{1} << 28;

} // namespace

void route_trace::load(const std::string & path) {
    if (kind_of_file(path) == file_kind::other) {
        throw std::runtime_error("the route trace " + path + " is no regular file");
    }
    std::ifstream file(path, std::ios::binary);
    int32_t header[5]{};
    if (!file.read(reinterpret_cast<char *>(header), sizeof(header)) || header[0] != magic || header[1] != 1) {
        throw std::runtime_error("the route trace " + path + " cannot be read or has another format");
    }
    n_steps_  = header[2];
    n_layers_ = header[3];
    top_k_    = header[4];
    if (n_steps_ < 1 || n_layers_ < 1 || top_k_ < 1 || n_steps_ > max_entries / n_layers_ / top_k_) {
        throw std::runtime_error("the route trace " + path + " has impossible dimensions");
    }
    // What the head promises is there before memory is taken for it.
    const int64_t n_bytes = n_steps_ * n_layers_ * top_k_ * static_cast<int64_t>(sizeof(int32_t));
    const auto begin      = file.tellg();
    if (!file.seekg(0, std::ios::end) || file.tellg() - begin < n_bytes || !file.seekg(begin)) {
        throw std::runtime_error("the route trace " + path + " is cut off");
    }
    std::vector<int32_t> ids(static_cast<size_t>(n_steps_ * n_layers_ * top_k_));
    if (!file.read(reinterpret_cast<char *>(ids.data()), static_cast<std::streamsize>(ids.size() * sizeof(int32_t)))) {
        throw std::runtime_error("the route trace " + path + " is cut off");
    }
    ids_ = std::move(ids);
}

void route_trace::replace(int layer, int32_t * ids, int64_t n_tokens, int32_t top_k, int32_t n_expert) {
    for (int64_t t = 0; t < n_tokens; t++) {
        const int64_t step   = (step_ + t) % n_steps_;
        const int32_t * from = ids_.data() + (step * n_layers_ + layer % n_layers_) * top_k_;
        int32_t * to         = ids + t * top_k;
        for (int32_t k = 0; k < top_k; k++) {
            // Wider than the trace: further experts, so that none comes twice.
            int32_t id = k < top_k_ ? static_cast<int32_t>(static_cast<uint32_t>(from[k]) & 0x7fffffffu) % n_expert
                                    : (to[k - 1] + 1) % n_expert;
            while (std::find(to, to + k, id) != to + k) {
                id = (id + 1) % n_expert;
            }
            to[k] = id;
        }
    }
}

} // namespace hybrimoe
