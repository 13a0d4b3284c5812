// The process that the plug-in lives in: what the system knows of it, what it says of itself, and what its user is told
// because only we can know it.
#pragma once

#include "nlohmann/json.hpp"

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace hybrimoe {

// What a process is called: `name` as the kernel has it, or, where that is the dynamic linker, the program that it was
// told to start by the command line `arguments`.
std::string program_name(const std::string & name, const std::vector<std::string> & arguments);

// pid, program, version, uptime_s (since the plug-in was first used), model_file (null: unknown).
nlohmann::json describe_process();

// What the host told of itself; one JSON value, "null" when it told nothing.
std::string host_facts();
// Throws std::invalid_argument for what is not one JSON object or too large.
void set_host_facts(const std::string & json);

// The model put tensors into our buffer type: memory at `data`, which may be a mapped file.
void note_buffer(const void * data, size_t size);

// Tells the user once, on stderr, that contexts compute without us: the plug-in is loaded and has nothing to do.
class idleness {
public:
    // llama.cpp announces each of a context's graphs, whether or not a part of it is ours.
    void on_graph_announced(bool may_speak);
    void on_graph_of_ours() { is_ours_ = true; }

private:
    bool is_ours_    = false;
    int n_announced_ = 0;
};

} // namespace hybrimoe
