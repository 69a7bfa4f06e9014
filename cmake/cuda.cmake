# The CUDA backend, fused_rin._cuda: a module of its own, so that a CPU-only import never maps it, with the CUDA runtime
# linked statically. Included by the top-level CMakeLists.txt.
#
#   FUSED_RIN_CUDA        auto (built if there is an nvcc that works), on (an error if there is none), off
#   FUSED_RIN_CUDA_ARCHS  auto: the GPUs of this machine, else sm_80 and sm_90a, and PTX for what comes after them
#                         all: 80 86 89 90a 100 120 and PTX; or a list such as "80;90a"

set(FUSED_RIN_CUDA auto CACHE STRING "Build the CUDA backend: auto, on or off")
set(FUSED_RIN_CUDA_ARCHS auto CACHE STRING "auto, all, or a list of compute capabilities such as 80;90a")

# tools/cuda_toolkit.py finds nvcc and tries it, unless FUSED_RIN_NVCC names one that setup.py has tried.
set(FUSED_RIN_NVCC "" CACHE FILEPATH "An nvcc that works")
execute_process(
  COMMAND ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/tools/cuda_toolkit.py
          "--cuda=${FUSED_RIN_CUDA}" "--archs=${FUSED_RIN_CUDA_ARCHS}" "--nvcc=${FUSED_RIN_NVCC}"
  OUTPUT_VARIABLE chosen ERROR_VARIABLE said RESULT_VARIABLE failed)
if(failed)
  refuse("${said}")
elseif(said)
  message(WARNING "${said}")
endif()
string(REGEX MATCH "^([^\n]*)\n([^\n]*)" chosen "${chosen}")
set(nvcc "${CMAKE_MATCH_1}")
set(archs "${CMAKE_MATCH_2}")
if(NOT nvcc)
  message(STATUS "fused-rin: the CUDA backend is not built")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES "")
foreach(arch IN LISTS archs)
  list(APPEND CMAKE_CUDA_ARCHITECTURES "${arch}-real")
endforeach()
list(GET archs 0 first_arch)
string(REGEX MATCH "^[0-9]+" first_arch "${first_arch}")
list(APPEND CMAKE_CUDA_ARCHITECTURES "${first_arch}-virtual")  # PTX of the oldest: runs on everything after it
message(STATUS "fused-rin: CUDA backend by ${nvcc} for ${CMAKE_CUDA_ARCHITECTURES}")

set(CMAKE_CUDA_COMPILER "${nvcc}")
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

# ---- the module
add_library(cuda_kernels OBJECT csrc/cuda/block.cu csrc/cuda/block_bfloat16.cu csrc/cuda/block_float16.cu
            csrc/cuda/block_float32_fma.cu csrc/cuda/block_float32_tf32.cu csrc/cuda/block_float32_tf32x3.cu
            csrc/cuda/block_bfloat16_units.cu csrc/cuda/block_float16_units.cu csrc/cuda/block_float32_units.cu
            csrc/cuda/cluster_bfloat16.cu csrc/cuda/cluster_float16.cu csrc/cuda/cluster_float32.cu
            csrc/cuda/grid_bfloat16.cu csrc/cuda/grid_float16.cu csrc/cuda/grid_float32.cu)
target_include_directories(cuda_kernels PRIVATE csrc/cuda)
set_target_properties(cuda_kernels PROPERTIES CUDA_VISIBILITY_PRESET hidden)
# Not compressed, so that tests/cuda_aot reads the registers and the stack of every kernel out of the module without a
# tool of CUDA's. All six architectures are compressed (to 30% on the one kernel tried): two take 25 MB without.
if(FUSED_RIN_CUDA_ARCHS STREQUAL "all")
  set(compression --compress-mode=size)
else()
  set(compression --no-compress)
endif()
target_compile_options(cuda_kernels PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:${compression}>)

pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/cuda/bindings.cpp)
string(REPLACE ";" " " built_for "${archs}")
target_compile_definitions(_cuda PRIVATE FUSED_RIN_CUDA_ARCHS="${built_for}" FUSED_RIN_CUDA_PTX=${first_arch})
target_link_libraries(_cuda PRIVATE cuda_kernels CUDA::cudart_static)
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O2>)
make_portable(_cuda cpu.cpp cudart.cpp)
install(TARGETS _cuda LIBRARY DESTINATION fused_rin)
