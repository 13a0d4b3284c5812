// What the user reads when the kernel ends the program.
#pragma once

namespace hybrimoe {

// Why the kernel would end it: a page of the mapped model file is gone (SIGBUS), or code was compiled for a CPU with
// instructions that this one lacks (SIGILL).
enum class ending { file_is_gone, illegal_instruction };

// At that end `text` goes to stderr and the process ends with `exit_code`; null: the signal's default is restored.
// `text` is cut to a kilobyte. Returns false where the system has no such signal.
bool set_last_words(ending why, const char * text, int exit_code);

} // namespace hybrimoe
