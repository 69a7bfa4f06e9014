# torch.ops.fused_rin in C++, libfused_rin_operators: for processes without Python. On PyTorch's stable ABI, so that one
# binary serves every release from 2.10 on. Built where the Python that builds has such a torch; older ones have the
# operators from Python alone.

execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
  OUTPUT_VARIABLE torch_folder OUTPUT_STRIP_TRAILING_WHITESPACE)
set(torch_version "")
if(EXISTS "${torch_folder}/include/torch/headeronly/version.h")
  file(STRINGS "${torch_folder}/include/torch/headeronly/version.h" numbers REGEX "define TORCH_VERSION_M(AJOR|INOR) ")
  string(REGEX MATCHALL "[0-9]+" numbers "${numbers}")
  list(JOIN numbers "." torch_version)
endif()
if(torch_version STREQUAL "" OR torch_version VERSION_LESS 2.10)
  message(STATUS "fused-rin: no torch >= 2.10 in ${Python_EXECUTABLE}, the operators' C++ library is not built")
  return()
endif()

add_library(fused_rin_operators SHARED csrc/operators/cpu.cpp csrc/operators/sweep.cpp)
target_include_directories(fused_rin_operators SYSTEM PRIVATE "${torch_folder}/include")
target_compile_definitions(fused_rin_operators PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)  # 2.10
# torch keeps the names of source files with the operators.
target_compile_options(fused_rin_operators PRIVATE -O2 ${warnings} "-ffile-prefix-map=${CMAKE_SOURCE_DIR}/=")
# By its name alone: whoever loads this library has torch's already.
find_library(torch_cpu torch_cpu PATHS "${torch_folder}/lib" NO_DEFAULT_PATH NO_CACHE REQUIRED)
target_link_libraries(fused_rin_operators PRIVATE ${cpu_objects} "${torch_cpu}")
set_target_properties(fused_rin_operators PROPERTIES SKIP_BUILD_RPATH TRUE SUFFIX .so)
install(TARGETS fused_rin_operators LIBRARY DESTINATION fused_rin)
