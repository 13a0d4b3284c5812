// Error values of the core. A status never allocates, so it may be returned on the decode path.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace hybrimoe {

enum class error_code : int {
    none             = 0,
    invalid_argument = 1, // a value outside its range; nothing was changed
    unknown_name     = 2, // no policy or parameter of that name; the message lists the known ones
    out_of_order     = 3, // complete without begin, twice, or for another transfer
    missing_cost     = 4, // a cost that was never measured; the core has no defaults for costs
    no_slot          = 5, // every slot is protected, loading or pinned
    missing_scores   = 6, // the policy needs router scores and the event has none
    out_of_memory    = 7,
    internal         = 8,
};

class status {
public:
    status() : code_(error_code::none) { message_[0] = '\0'; }
    status(const status & other) : code_(other.code_) { std::memcpy(message_, other.message_, length(other)); }
    status & operator=(const status & other) {
        if (this != &other) {
            code_ = other.code_;
            std::memcpy(message_, other.message_, length(other));
        }
        return *this;
    }

    bool ok() const { return code_ == error_code::none; }
    error_code code() const { return code_; }
    const char * message() const { return message_; }

#if defined(__GNUC__)
    __attribute__((format(printf, 2, 3)))
#endif
    static status fail(error_code code, const char * format, ...) {
        status out;
        out.code_ = code;
        va_list args;
        va_start(args, format);
        std::vsnprintf(out.message_, sizeof(out.message_), format, args);
        va_end(args);
        return out;
    }

private:
    static size_t length(const status & s) { return std::strlen(s.message_) + 1; }

    error_code code_;
    char message_[400];
};

} // namespace hybrimoe

// Early return in functions that yield a status.
#define HYBRIMOE_TRY(expression)                                                                                       \
    do {                                                                                                               \
        const ::hybrimoe::status try_status_ = (expression);                                                           \
        if (!try_status_.ok()) {                                                                                       \
            return try_status_;                                                                                        \
        }                                                                                                              \
    } while (false)
