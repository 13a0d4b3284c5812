// Where this user's sockets are: the one home of the rule that docs/observability.md states.
#pragma once

#include <string>

namespace hybrimoe {

// The folder, which need not exist.
std::string runtime_folder();
// Makes it, of mode 0700, where it is missing, and closes it to others where it is ours. False, with the reason, when
// others could get at it or nothing can be written there.
bool make_private(const std::string & folder, std::string & why_not);

// sizeof(sockaddr_un::sun_path) is 108 on Linux and 104 elsewhere, with the final zero.
constexpr size_t max_socket_path_bytes = 103;

} // namespace hybrimoe
