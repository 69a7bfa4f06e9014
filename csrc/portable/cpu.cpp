// What the CPU modules take from glibc and libstdc++ that is newer than a manylinux_2_28 system has.
// cmake/portable.cmake reads the names from the lines that start with OLD or NEW.

#include <ios>
#include <new>
#include <sstream>

#include "old.h"

// glibc 2.34 moved these from libpthread and libdl into libc, under a new version. What they do did not change.
OLD(dlopen, FUSED_RIN_GLIBC)
OLD(dlsym, FUSED_RIN_GLIBC)
OLD(pthread_mutex_trylock, FUSED_RIN_GLIBC)
OLD(pthread_once, FUSED_RIN_GLIBC)

// condition_variable::wait: the version of before GCC 12 is noexcept, else the same.
OLD(_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE, "GLIBCXX_3.4.11")

#define NEW(name) extern "C" __attribute__((visibility("hidden"))) void __wrap_##name

// std::__throw_bad_array_new_length(), GCC 11
NEW(_ZSt28__throw_bad_array_new_lengthv)() { throw std::bad_array_new_length(); }

// The default constructors of string streams, GCC 9
NEW(_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev)(void* memory) {
  ::new (memory) std::stringstream(std::ios_base::in | std::ios_base::out);
}
NEW(_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev)(void* memory) {
  ::new (memory) std::ostringstream(std::ios_base::out);
}

// Shared pointers ask it whether they may count without atomic instructions (glibc 2.32). "No" is always right.
asm(".pushsection .rodata\n.globl __libc_single_threaded\n.hidden __libc_single_threaded\n"
    ".type __libc_single_threaded, %object\n.size __libc_single_threaded, 1\n"
    "__libc_single_threaded: .byte 0\n.popsection\n");

// exception_ptr's counting, GCC 11: before, its copy constructor and destructor, which did the same, were functions of
// the library, and they still are.
extern "C" void exception_ptr_copy(void* memory,
                                   const void* other) asm("_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
extern "C" void exception_ptr_destroy(void*) asm("_ZNSt15__exception_ptr13exception_ptrD1Ev");

NEW(_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv)(void* counted) {
  void* copy = nullptr;  // never destroyed: its count is the one that was asked for
  exception_ptr_copy(&copy, counted);
}
NEW(_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv)(void* counted) { exception_ptr_destroy(counted); }
