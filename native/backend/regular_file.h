// What a path names, before it is opened: opening a pipe without a writer would wait for ever.
#pragma once

#include <string>
#include <sys/stat.h>

namespace hybrimoe {

enum class file_kind { none, regular, other };

// `none` also for what the system does not let us look at; opening it says why.
inline file_kind kind_of_file(const std::string & path) {
    struct stat status{};
    if (::stat(path.c_str(), &status) != 0) {
        return file_kind::none;
    }
    return S_ISREG(status.st_mode) ? file_kind::regular : file_kind::other;
}

} // namespace hybrimoe
