# Included by llama.cpp's own project() call when llama-cpp-python is built with
# -DCMAKE_PROJECT_llama.cpp_INCLUDE=<this file>.

# The helper library of llama.cpp's command-line tools is half of the files to compile, and no Python package uses it.
# llama-cpp-python forces it on through the cache; a plain variable wins over that.
set(LLAMA_BUILD_COMMON OFF)

# ggml's AMX path crashes at its first tile instruction when built with some compilers (llama.cpp issue 20824, pull request
# 26954). Without the macro it is left out, and such a CPU takes the AVX-512 path instead.
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$" AND NOT MSVC)
    add_compile_options($<$<COMPILE_LANGUAGE:C,CXX>:-U__AMX_INT8__>)
endif()
