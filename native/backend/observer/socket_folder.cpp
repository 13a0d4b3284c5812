#include "observer/socket_folder.h"

#ifdef __unix__
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace hybrimoe {

#ifdef __unix__

namespace {

std::string environment(const char * name) {
    const char * value = std::getenv(name);
    return value == nullptr ? std::string() : std::string(value);
}

std::string home_folder() {
    const std::string given = environment("HOME");
    if (!given.empty()) {
        return given;
    }
    const passwd * user = ::getpwuid(::getuid());
    return user == nullptr || user->pw_dir == nullptr ? std::string("/") : std::string(user->pw_dir);
}

} // namespace

std::string runtime_folder() {
    const std::string runtime = environment("XDG_RUNTIME_DIR");
    const std::string state   = environment("XDG_STATE_HOME");
    std::string folder        = !runtime.empty() ? runtime + "/hybrimoe"
                                : !state.empty() ? state + "/hybrimoe/live"
                                                 : home_folder() + "/.local/state/hybrimoe/live";
    if ((folder + "/4194304-9.sock").size() > max_socket_path_bytes) {
        const std::string temporary = environment("TMPDIR");
        folder = (temporary.empty() ? std::string("/tmp") : temporary) + "/hybrimoe-" + std::to_string(::getuid());
    }
    return folder;
}

bool make_private(const std::string & folder, std::string & why_not) {
    for (size_t at = folder.find('/', 1); at != std::string::npos; at = folder.find('/', at + 1)) {
        ::mkdir(folder.substr(0, at).c_str(), 0700); // most are there already
    }
    if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST) {
        why_not = "'" + folder + "' cannot be made: " + std::strerror(errno);
        return false;
    }
    struct stat status{};
    const auto is_private = [&] {
        return ::lstat(folder.c_str(), &status) == 0 && S_ISDIR(status.st_mode) && status.st_uid == ::getuid() &&
               (status.st_mode & 077) == 0;
    };
    if (!is_private() && S_ISDIR(status.st_mode) && status.st_uid == ::getuid()) {
        ::chmod(folder.c_str(), 0700);
    }
    if (!is_private()) {
        why_not = "'" + folder + "' is not a private folder of this user";
        return false;
    }
    if (::access(folder.c_str(), W_OK | X_OK) != 0) {
        why_not = "'" + folder + "' cannot be written to: " + std::strerror(errno);
        return false;
    }
    return true;
}

#else

std::string runtime_folder() {
    return {};
}

bool make_private(const std::string &, std::string & why_not) {
    why_not = "this system has no unix sockets";
    return false;
}

#endif

} // namespace hybrimoe
