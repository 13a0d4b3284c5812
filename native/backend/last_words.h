// What the user reads when the kernel ends the program: a page of the mapped model file that is gone raises SIGBUS.
#pragma once

namespace hybrimoe {

// On SIGBUS `text` goes to stderr and the process ends with `exit_code`; null: the signal's default is restored. `text`
// is cut to a kilobyte. Returns false where the system has no such signal.
bool set_last_words(const char * text, int exit_code);

} // namespace hybrimoe
