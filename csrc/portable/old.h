// For wheels alone (FUSED_RIN_PORTABLE, see cmake/portable.cmake): ways to older versions of the C library's functions.
#pragma once

#if defined(__x86_64__)
#define FUSED_RIN_JUMP "jmp"
#define FUSED_RIN_PLT "@PLT"
#define FUSED_RIN_GLIBC "GLIBC_2.2.5"  // the oldest version of this processor
#define FUSED_RIN_GLIBC_DLMOPEN "GLIBC_2.3.4"
#elif defined(__aarch64__)
#define FUSED_RIN_JUMP "b"
#define FUSED_RIN_PLT ""
#define FUSED_RIN_GLIBC "GLIBC_2.17"
#define FUSED_RIN_GLIBC_DLMOPEN FUSED_RIN_GLIBC
#else
#error "FUSED_RIN_PORTABLE: x86-64 and aarch64 only"
#endif

// __wrap_NAME, which the linker (--wrap) calls in NAME's place, is a jump to `target`.
#define FUSED_RIN_WRAP(name, target)                                                               \
  asm(".pushsection .text\n.globl __wrap_" #name "\n.hidden __wrap_" #name "\n.type __wrap_" #name \
      ", %function\n__wrap_" #name ":\n" FUSED_RIN_JUMP " " target FUSED_RIN_PLT "\n.popsection\n");

// Calls of `name` go to its older `version`.
#define OLD(name, version)                          \
  asm(".symver old_" #name ", " #name "@" version); \
  FUSED_RIN_WRAP(name, "old_" #name)
