// The observer: a thread that serves what is known about this process to others of the same user, through a unix
// socket. Requests are lines, answers are snapshots (observer/snapshot.h) or the recorded passes as they come; the
// protocol is in docs/observability.md. It takes no lock that the computing thread takes while that computes, and ends
// with the process.
#pragma once

#include <string>

namespace hybrimoe {

// Starts the observer if the settings ask for it and it does not run yet. What is in its way is told once on stderr,
// where the settings allow that; it is no error.
void start_observer();

// The socket it serves; empty when it does not.
std::string observer_path();

} // namespace hybrimoe
