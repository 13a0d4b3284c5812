// A file that only this process sees: readers take a path, and a disk would be what is measured.
#pragma once

#include "fuzz.h"

#include <string>
#include <sys/mman.h>
#include <unistd.h>

class memory_file {
public:
    memory_file(const uint8_t * data, size_t size) : descriptor_(::memfd_create("input", 0)) {
        REQUIRE(descriptor_ >= 0);
        REQUIRE(size == 0 || ::write(descriptor_, data, size) == static_cast<ssize_t>(size));
    }
    ~memory_file() { ::close(descriptor_); }
    memory_file(const memory_file &)             = delete;
    memory_file & operator=(const memory_file &) = delete;

    std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

private:
    int descriptor_;
};
