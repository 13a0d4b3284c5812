// Prints what a plug-in compiled with these headers would expect of ggml: `hybrimoe plugin build` compares it with what
// the plug-ins that exist expect, before it compiles one.
#include "running_ggml/facts.h"

#include <cstdio>

int main() {
    std::puts(hybrimoe::describe(hybrimoe::compiled_facts()).c_str());
    return 0;
}
