# The C++ compiler and Python's headers; what is missing is said in one sentence. Included by the top-level CMakeLists.txt.

set(refusal "${CMAKE_BINARY_DIR}/fused_rin_refusal.txt")
file(REMOVE "${refusal}")

# refuse(TEXT): ends the configuration. setup.py shows the text of the file, and none of CMake's own around it.
function(refuse text)
  string(STRIP "${text}" text)
  file(WRITE "${refusal}" "${text}\n")
  message(FATAL_ERROR "${text}")
endfunction()

# In a project of its own: enable_language itself ends with pages of CMake's where there is no compiler that works.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  unset(CMAKE_CXX_COMPILER CACHE)  # one that is installed later is looked for again
  if(NOT "$ENV{CXX}" STREQUAL "")
    refuse("the C++ compiler that CXX names does not work: '$ENV{CXX}'; name another, or unset CXX")
  endif()
  refuse("no C++ compiler that works was found; install g++ or clang++ (C++17), or name one: CXX=/path/to/g++")
endif()
enable_language(CXX)

find_package(Python COMPONENTS Interpreter Development.Module)
if(NOT Python_Development.Module_FOUND)
  refuse("${Python_EXECUTABLE} has no headers to build with (Python.h); install them, on Debian and Ubuntu as python3-dev")
endif()
