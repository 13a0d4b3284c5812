#include "hybrid/state_file.h"

#include "core/types.h"
#include "json_text.h"
#include "regular_file.h"

#include <cstdio>
#include <fcntl.h>
#include <fstream>
#include <unistd.h>

namespace hybrimoe {

namespace {

constexpr int version = 1;

// Tells models apart that have other layers; which file belongs to which model is the host's business.
nlohmann::json shape_of(const layer_book & book) {
    nlohmann::json layers = nlohmann::json::array();
    for (int layer = 0; layer < book.n_layers(); layer++) {
        layers.push_back({book.layer(layer).layout.n_expert, book.layer(layer).layout.expert_bytes()});
    }
    return layers;
}

} // namespace

bool read_state(const std::string & path, const layer_book & book, std::vector<std::vector<int32_t>> & experts,
                std::string & problem) {
    experts.clear();
    if (kind_of_file(path) == file_kind::other) {
        problem = path + " is no regular file";
        return false;
    }
    std::ifstream file(path);
    if (!file) {
        return true;
    }
    try {
        const nlohmann::json data = parse_json(file);
        if (data.at("version") != version || data.at("layers") != shape_of(book)) {
            problem = path + " is of another version or model";
            return false;
        }
        for (const nlohmann::json & layer : data.at("resident")) {
            std::vector<int32_t> ids;
            for (const nlohmann::json & id : layer) {
                ids.push_back(static_cast<int32_t>(read_index(id, max_experts)));
            }
            experts.push_back(std::move(ids));
        }
        bool fits = experts.size() == static_cast<size_t>(book.n_layers());
        for (size_t layer = 0; fits && layer < experts.size(); layer++) {
            std::vector<bool> seen(static_cast<size_t>(book.layer(static_cast<int>(layer)).layout.n_expert), false);
            for (const int32_t e : experts[layer]) {
                fits = fits && e >= 0 && static_cast<size_t>(e) < seen.size() && !seen[static_cast<size_t>(e)];
                if (fits) {
                    seen[static_cast<size_t>(e)] = true;
                }
            }
        }
        if (fits) {
            return true;
        }
        problem = path + " names experts that the model does not have";
    } catch (const std::exception &) { // the file system's errors come through the parser too
        problem = path + " is damaged or cannot be read";
    }
    experts.clear();
    return false;
}

bool write_state(const std::string & path, const layer_book & book, const std::vector<std::vector<int32_t>> & experts) {
    if (kind_of_file(path) == file_kind::other) { // renaming over a device or pipe would remove it
        return false;
    }
    const nlohmann::json data   = {{"version", version}, {"layers", shape_of(book)}, {"resident", experts}};
    const std::string temporary = path + "." + std::to_string(::getpid()) + ".tmp";
    const int descriptor = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    std::FILE * file     = descriptor < 0 ? nullptr : ::fdopen(descriptor, "w");
    if (file == nullptr) {
        return false;
    }
    const std::string text = data.dump();
    bool ok                = std::fwrite(text.data(), 1, text.size(), file) == text.size();
    ok                     = std::fclose(file) == 0 && ok;
    ok                     = ok && std::rename(temporary.c_str(), path.c_str()) == 0;
    if (!ok) {
        std::remove(temporary.c_str());
    }
    return ok;
}

} // namespace hybrimoe
