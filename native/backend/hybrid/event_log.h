// What the dispatch decided and why, as lines of text: for the user, never for control.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>

namespace hybrimoe {

class event_log {
public:
    explicit event_log(bool to_stderr) : to_stderr_(to_stderr) {}

#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    void add(const char * format, ...);
    // The first line after number `after`; false when there is none yet. Lines are numbered from 1; old ones go.
    bool next(uint64_t after, uint64_t & number, std::string & line) const;

private:
    static constexpr size_t max_lines = 256;

    mutable std::mutex mutex_;
    std::deque<std::string> lines_;
    uint64_t n_added_ = 0;
    bool to_stderr_;
};

} // namespace hybrimoe
