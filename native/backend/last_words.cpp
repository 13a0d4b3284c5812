#include "last_words.h"

#include <atomic>
#include <cstddef>
#include <cstring>

#ifdef __unix__
#include <csignal>
#include <unistd.h>
#endif

namespace hybrimoe {

#ifdef __unix__

namespace {

// A signal handler may read nothing that takes a lock: plain memory, written before the handler is set.
struct last_words {
    char text[1024];
    size_t n_bytes;
    int exit_code;
};
last_words of_file{};
last_words of_instruction{};
std::atomic_flag is_said = ATOMIC_FLAG_INIT;

void say_and_end(int signal) {
    while (is_said.test_and_set()) { // another thread speaks and ends this one too
        ::pause();
    }
    const last_words & words = signal == SIGBUS ? of_file : of_instruction;
    size_t at                = 0;
    while (at < words.n_bytes) {
        const ssize_t n = ::write(STDERR_FILENO, words.text + at, words.n_bytes - at);
        if (n <= 0) {
            break;
        }
        at += static_cast<size_t>(n);
    }
    ::_exit(words.exit_code);
}

} // namespace

bool set_last_words(ending why, const char * text, int exit_code) {
    const int signal   = why == ending::file_is_gone ? SIGBUS : SIGILL;
    last_words & words = why == ending::file_is_gone ? of_file : of_instruction;
    struct sigaction action{};
    sigemptyset(&action.sa_mask);
    action.sa_handler = SIG_DFL;
    ::sigaction(signal, &action, nullptr);
    if (text != nullptr) {
        words.n_bytes = ::strnlen(text, sizeof(words.text));
        std::memcpy(words.text, text, words.n_bytes);
        words.exit_code   = exit_code;
        action.sa_handler = say_and_end;
        ::sigaction(signal, &action, nullptr);
    }
    return true;
}

#else

bool set_last_words(ending, const char *, int) {
    return false;
}

#endif

} // namespace hybrimoe
