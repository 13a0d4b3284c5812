// Drives a fuzz target without libFuzzer: its seeds, then as many damaged copies as asked for, the same every time.
// PROGRAM [N [SEED]]; PROGRAM FILE... runs files (what libFuzzer has found).
#include "fuzz.h"

#include <fstream>
#include <iterator>
#include <random>

namespace {

using bytes = std::string;

bytes damaged(bytes text, std::mt19937_64 & rng) {
    const auto below                   = [&](size_t n) { return static_cast<size_t>(rng() % n); };
    static const char * const pieces[] = {
        "0", "-1", "1e999", "1e300", "-0.0", "9223372036854775808", "null", "true",  "[", "]", "{",
        "}", "\"", ",",     ":",     "[[[[", "4294967296",          "\xff", "\"a\":"};
    for (size_t n = 1 + below(6); n > 0; n--) {
        const size_t at = below(text.size() + 1);
        switch (below(6)) {
        case 0:
            if (at < text.size()) {
                text[at] = static_cast<char>(text[at] ^ (1 << below(8)));
            }
            break;
        case 1:
            text.erase(at, 1 + below(8));
            break;
        case 2:
            text.insert(at, pieces[below(sizeof(pieces) / sizeof(pieces[0]))]);
            break;
        case 3:
            text.insert(at, text.substr(at, 1 + below(32)));
            break;
        case 4:
            if (at < text.size()) {
                text[at] = static_cast<char>(below(256));
            }
            break;
        default:
            if (below(4) == 0) {
                text.resize(at);
            }
        }
    }
    return text;
}

void run(const bytes & input) {
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t *>(input.data()), input.size());
}

} // namespace

int main(int argc, char ** argv) {
    char * end   = nullptr;
    const long n = argc > 1 ? std::strtol(argv[1], &end, 10) : 1000;
    if (argc > 1 && *end != '\0') {
        for (int i = 1; i < argc; i++) {
            std::ifstream file(argv[i], std::ios::binary);
            run(bytes(std::istreambuf_iterator<char>(file), {}));
        }
        return 0;
    }
    std::mt19937_64 rng(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0);
    const std::vector<bytes> seeds = fuzz_seeds();
    for (const bytes & seed : seeds) {
        run(seed);
    }
    for (long i = 0; i < n; i++) {
        run(damaged(seeds[rng() % seeds.size()], rng));
    }
    // What nests deeper than any stack.
    for (const char * const piece : {"[", "{\"a\":", "{\"costs\":[", "{\"resident\":[["}) {
        bytes deep;
        for (int i = 0; i < 200000; i++) {
            deep += piece;
        }
        run(deep);
    }
    bytes closed = "{\"costs\":{\"layer_class\":";
    closed += bytes(200000, '[') + bytes(200000, ']') + "}}";
    run(closed);
    std::printf("ok: %ld inputs\n", n);
    return 0;
}
