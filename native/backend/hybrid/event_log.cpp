#include "hybrid/event_log.h"

#include <cstdarg>
#include <cstdio>

namespace hybrimoe {

void event_log::add(const char * format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    std::vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    std::lock_guard<std::mutex> lock(mutex_);
    if (to_stderr_) {
        std::fprintf(stderr, "HybriMoE: %s\n", line);
    }
    lines_.emplace_back(line);
    n_added_++;
    if (lines_.size() > max_lines) {
        lines_.pop_front();
    }
}

bool event_log::next(uint64_t after, uint64_t & number, std::string & line) const {
    std::lock_guard<std::mutex> lock(mutex_);
    if (after >= n_added_) {
        return false;
    }
    const uint64_t first = n_added_ - lines_.size() + 1;
    number               = after + 1 < first ? first : after + 1;
    line                 = lines_[static_cast<size_t>(number - first)];
    return true;
}

} // namespace hybrimoe
