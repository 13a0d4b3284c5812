#include "running_ggml/other_builds.h"

#include "hybrimoe.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <dirent.h>
#include <dlfcn.h>
#include <memory>
#include <sys/stat.h>
#include <unistd.h>
#include <utility>

namespace hybrimoe {

namespace {

constexpr const char * library_name = "libggml-hybrimoe.so";

std::string environment(const char * name) {
    const char * value = std::getenv(name);
    return value == nullptr ? std::string() : value;
}

template <typename function> function find(void * library, const char * name) {
    return reinterpret_cast<function>(dlsym(library, name));
}

// Of this version, and fitting.
bool fits(void * library, void * ggml) {
    const auto abi     = find<int (*)()>(library, "hybrimoe_abi_version");
    const auto version = find<const char * (*)()>(library, "hybrimoe_version");
    if (abi == nullptr || version == nullptr || abi() != hybrimoe_abi_version() ||
        std::strcmp(version(), hybrimoe_version()) != 0) {
        return false;
    }
    const auto check = find<const char * (*)(void *)>(library, "hybrimoe_check_ggml");
    return check != nullptr && check(ggml) == nullptr;
}

} // namespace

std::string other_builds_folder() {
    const std::string given = environment("HYBRIMOE_PLUGINS");
    if (!given.empty()) {
        return given;
    }
    const std::string data = environment("XDG_DATA_HOME");
    if (!data.empty()) {
        return data + "/hybrimoe/plugins";
    }
    const std::string home = environment("HOME");
    return home.empty() ? home : home + "/.local/share/hybrimoe/plugins";
}

std::vector<std::string> builds_in(const std::string & folder) {
    const std::unique_ptr<DIR, int (*)(DIR *)> open(opendir(folder.c_str()), closedir);
    std::vector<std::pair<std::time_t, std::string>> found;
    for (dirent * entry = open == nullptr ? nullptr : readdir(open.get()); entry != nullptr;
         entry          = readdir(open.get())) {
        if (entry->d_name[0] == '.') {
            continue;
        }
        const std::string path = folder + "/" + entry->d_name + "/" + library_name;
        struct stat status{};
        if (stat(path.c_str(), &status) == 0 && S_ISREG(status.st_mode) && (status.st_mode & S_IWOTH) == 0 &&
            (status.st_uid == geteuid() || status.st_uid == 0)) {
            found.emplace_back(status.st_mtime, path);
        }
    }
    std::sort(found.rbegin(), found.rend());
    std::vector<std::string> paths;
    for (auto & one : found) {
        paths.push_back(std::move(one.second));
    }
    return paths;
}

other_build find_build_that_fits(void * ggml) {
    for (const std::string & path : builds_in(other_builds_folder())) {
        void * library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            continue;
        }
        if (fits(library, ggml)) {
            return {path, find<ggml_backend_reg_t (*)()>(library, "ggml_backend_init")};
        }
        dlclose(library);
    }
    return {};
}

} // namespace hybrimoe
