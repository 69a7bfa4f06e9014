# For wheels: modules that load on every system with glibc 2.28 and the libstdc++ of GCC 8 (manylinux_2_28: RHEL 8 and 9,
# Debian 10, Ubuntu 20.04 and newer), built on a newer one. Included by the top-level CMakeLists.txt; docs/packaging.md
# says why it is done like this. Where the compiler is newer than GCC 12 or glibc than 2.36, `auditwheel` may name more
# symbols, which csrc/portable would have to list.

option(FUSED_RIN_PORTABLE "Ask glibc and libstdc++ for nothing newer than manylinux_2_28, and strip (wheels)" OFF)
if(FUSED_RIN_PORTABLE AND NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(FATAL_ERROR "FUSED_RIN_PORTABLE is for Linux, this is ${CMAKE_SYSTEM_NAME}")
endif()

# make_portable(TARGET SOURCE...): the target with these files of csrc/portable, and its calls sent to them.
function(make_portable target)
  if(NOT FUSED_RIN_PORTABLE)
    return()
  endif()
  foreach(source IN LISTS ARGN)
    set(source "${CMAKE_SOURCE_DIR}/csrc/portable/${source}")
    target_sources(${target} PRIVATE "${source}")
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${source}")
    file(STRINGS "${source}" names REGEX "^(OLD|NEW)\\(_?[A-Za-z]")
    foreach(name IN LISTS names)
      string(REGEX REPLACE "^(OLD|NEW)\\(([A-Za-z0-9_]+).*$" "\\2" name "${name}")
      target_link_options(${target} PRIVATE "LINKER:--wrap=${name}")
    endforeach()
  endforeach()
  target_link_options(${target} PRIVATE "LINKER:--strip-all")
endfunction()
