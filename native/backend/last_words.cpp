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
char words[1024];
size_t n_words           = 0;
int code                 = 1;
std::atomic_flag is_said = ATOMIC_FLAG_INIT;

void say_and_end(int) {
    while (is_said.test_and_set()) { // another thread speaks and ends this one too
        ::pause();
    }
    size_t at = 0;
    while (at < n_words) {
        const ssize_t n = ::write(STDERR_FILENO, words + at, n_words - at);
        if (n <= 0) {
            break;
        }
        at += static_cast<size_t>(n);
    }
    ::_exit(code);
}

} // namespace

bool set_last_words(const char * text, int exit_code) {
    struct sigaction action{};
    sigemptyset(&action.sa_mask);
    action.sa_handler = SIG_DFL;
    ::sigaction(SIGBUS, &action, nullptr);
    if (text != nullptr) {
        n_words = ::strnlen(text, sizeof(words));
        std::memcpy(words, text, n_words);
        code              = exit_code;
        action.sa_handler = say_and_end;
        ::sigaction(SIGBUS, &action, nullptr);
    }
    return true;
}

#else

bool set_last_words(const char *, int) {
    return false;
}

#endif

} // namespace hybrimoe
