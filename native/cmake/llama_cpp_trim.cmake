# Included by llama.cpp's own project() call when llama-cpp-python is built with
# -DCMAKE_PROJECT_llama.cpp_INCLUDE=<this file>: leaves out the helper library of llama.cpp's command-line tools, a third
# of the compile time, which no Python package uses. llama-cpp-python forces it on through the cache; a plain variable
# wins over that.
set(LLAMA_BUILD_COMMON OFF)
