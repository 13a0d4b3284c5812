# The ggml that tests link: of an installed llama_cpp (HYBRIMOE_GGML_LIB_DIR) or, for sanitizers, one compiled here with
# them (HYBRIMOE_GGML_SOURCE). Sets `ggml_libraries` for programs, and `ggml_of_host` for modules, which bind to what
# their host has loaded; neither where there is no ggml.
set(HYBRIMOE_GGML_SOURCE "" CACHE PATH "the folder vendor/llama.cpp/ggml of the pinned release; compiled for the tests against it")

if(HYBRIMOE_GGML_SOURCE)
    function(add_ggml)
        set(BUILD_SHARED_LIBS ON) # the dispatch looks symbols up in the library that the CPU device is from
        set(CMAKE_CXX_VISIBILITY_PRESET default)
        set(CMAKE_VISIBILITY_INLINES_HIDDEN OFF)
        set(CMAKE_CXX_EXTENSIONS ON)
        # Sanitizers do not see into OpenMP's library. The instruction set is any; what is slow to compile is left out.
        foreach(option OPENMP NATIVE LLAMAFILE CPU_REPACK CCACHE)
            set(GGML_${option} OFF CACHE BOOL "" FORCE)
        endforeach()
        if(HYBRIMOE_SANITIZE)
            add_compile_options(-fsanitize=${HYBRIMOE_SANITIZE} -fno-omit-frame-pointer -g1 -O1)
            add_link_options(-fsanitize=${HYBRIMOE_SANITIZE})
        endif()
        add_subdirectory(${HYBRIMOE_GGML_SOURCE} ggml EXCLUDE_FROM_ALL)
    endfunction()
    add_ggml()
    # By file: the targets would bring a second copy of the headers.
    foreach(name ggml ggml-base ggml-cpu)
        list(APPEND ggml_libraries $<TARGET_LINKER_FILE:${name}> -Wl,-rpath,$<TARGET_FILE_DIR:${name}>)
    endforeach()
    set(ggml_of_host $<TARGET_LINKER_FILE:ggml> $<TARGET_LINKER_FILE:ggml-base>)
elseif(HYBRIMOE_GGML_LIB_DIR)
    set(ggml_libraries -L${HYBRIMOE_GGML_LIB_DIR} -lggml -lggml-base -Wl,--no-as-needed -lggml-cpu
                       -Wl,--as-needed -Wl,-rpath,${HYBRIMOE_GGML_LIB_DIR})
    set(ggml_of_host -L${HYBRIMOE_GGML_LIB_DIR} -lggml -lggml-base)
endif()
