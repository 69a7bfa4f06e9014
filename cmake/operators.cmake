# torch.ops.fused_rin in C++, libfused_rin_operators: for processes without Python. On PyTorch's stable ABI, so that one
# binary serves every release from 2.10 on. Built where the Python that builds has such a torch; older ones have the
# operators from Python alone.

set(FUSED_RIN_TORCH "" CACHE PATH "Folder of the torch to build on, if not that of the Python that builds")
set(torch_folder "${FUSED_RIN_TORCH}")
if(NOT torch_folder)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
            "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE torch_folder OUTPUT_STRIP_TRAILING_WHITESPACE)
endif()
set(torch_version "")
if(EXISTS "${torch_folder}/include/torch/headeronly/version.h")
  file(STRINGS "${torch_folder}/include/torch/headeronly/version.h" numbers REGEX "define TORCH_VERSION_M(AJOR|INOR) ")
  string(REGEX MATCHALL "[0-9]+" numbers "${numbers}")
  list(JOIN numbers "." torch_version)
endif()
if(FUSED_RIN_TORCH AND (torch_version STREQUAL "" OR torch_version VERSION_LESS 2.10))
  refuse("FUSED_RIN_TORCH must be the folder of an installed torch >= 2.10 (torch.__path__[0]), got '${FUSED_RIN_TORCH}'")
endif()
if(torch_version STREQUAL "" OR torch_version VERSION_LESS 2.10)
  message(STATUS "fused-rin: no torch >= 2.10 in ${Python_EXECUTABLE}, the operators' C++ library is not built")
  return()
endif()

# By its name alone: whoever loads these libraries has torch's already.
find_library(torch_cpu torch_cpu PATHS "${torch_folder}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)

function(add_operators name)
  add_library(${name} SHARED ${ARGN})
  target_include_directories(${name} SYSTEM PRIVATE "${torch_folder}/include")
  target_compile_definitions(${name} PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)  # 2.10
  # torch keeps the names of source files with the operators.
  target_compile_options(${name} PRIVATE -O2 ${warnings} "-ffile-prefix-map=${CMAKE_SOURCE_DIR}/="
                         "-ffile-prefix-map=${torch_folder}/=")
  target_link_libraries(${name} PRIVATE "${torch_cpu}")
  set_target_properties(${name} PROPERTIES SKIP_BUILD_RPATH TRUE SUFFIX .so)
  install(TARGETS ${name} LIBRARY DESTINATION fused_rin)
endfunction()

add_operators(fused_rin_operators csrc/operators/cpu.cpp csrc/operators/sweep.cpp)
target_link_libraries(fused_rin_operators PRIVATE ${cpu_objects})
make_portable(fused_rin_operators cpu.cpp)

if(TARGET cuda_kernels)
  add_operators(fused_rin_operators_cuda csrc/operators/cuda.cpp csrc/operators/sweep.cpp csrc/cuda/plan.cpp)
  target_include_directories(fused_rin_operators_cuda PRIVATE csrc/cuda)
  target_link_libraries(fused_rin_operators_cuda PRIVATE cuda_kernels CUDA::cudart_static ${CMAKE_DL_LIBS})
  make_portable(fused_rin_operators_cuda cpu.cpp cudart.cpp)
endif()
