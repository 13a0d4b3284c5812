// Which of the process's libraries something is from.
#pragma once

namespace hybrimoe {

// A handle of the loaded library (or program) that holds `address`; null if there is none.
void * library_of(const void * address);

} // namespace hybrimoe
