// Which instruction sets can be chosen at run time, and how a file is compiled for one of them.
#pragma once

#if defined(__GNUC__) && (defined(__x86_64__) || defined(__amd64__))
#define PYRO_SSM_X86 1
#else
#define PYRO_SSM_X86 0
#endif

#define PYRO_SSM_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define BEGIN_ISA(set) PYRO_SSM_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define END_ISA _Pragma("clang attribute pop")
#else
#define BEGIN_ISA(set) PYRO_SSM_PRAGMA(GCC push_options) PYRO_SSM_PRAGMA(GCC target(set))
#define END_ISA _Pragma("GCC pop_options")
#endif
