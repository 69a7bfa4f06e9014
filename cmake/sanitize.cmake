# The C++ of the CPU under a sanitizer, for `make sanitize` (tools/sanitize.py). Included by the top-level CMakeLists.txt
# before any target.
#
#   FUSED_RIN_SANITIZE  address: AddressSanitizer and UndefinedBehaviorSanitizer
#                       thread:  ThreadSanitizer
#                       off:     neither (default)
#
# A module built so loads only in a process that has the sanitizer's runtime already (LD_PRELOAD).

set(FUSED_RIN_SANITIZE off CACHE STRING "Build under sanitizers: address (and undefined), thread or off")
set_property(CACHE FUSED_RIN_SANITIZE PROPERTY STRINGS off address thread)

if(NOT FUSED_RIN_SANITIZE MATCHES "^(address|thread|off)$")
  message(FATAL_ERROR "FUSED_RIN_SANITIZE must be address, thread or off, got '${FUSED_RIN_SANITIZE}'")
endif()
set(kernel_level -O3)  # of csrc/cpu/sweep.cpp
if(FUSED_RIN_SANITIZE STREQUAL "off")
  return()
endif()
if(NOT CMAKE_CXX_COMPILER_ID MATCHES "^(GNU|Clang|AppleClang)$")
  message(FATAL_ERROR "FUSED_RIN_SANITIZE is for GCC and Clang, this is ${CMAKE_CXX_COMPILER_ID}")
endif()

set(sanitizers -fsanitize=thread)
if(FUSED_RIN_SANITIZE STREQUAL "address")
  # Undefined behaviour ends the program, as the other findings do.
  set(sanitizers -fsanitize=address,undefined -fno-sanitize-recover=all)
  set(kernel_level -O1)  # -O3 takes GCC 12 two minutes for each instruction set, not 20 s
endif()
# One runtime for all libraries of a process, which LD_PRELOAD can name; GCC's is shared without being asked.
if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND sanitizers -shared-libsan)
endif()
add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:${sanitizers};-g1;-fno-omit-frame-pointer>")
add_link_options(${sanitizers})
