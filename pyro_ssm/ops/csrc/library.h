// What every file of entry points shares: how a function is exported, and which instruction set is in use.
#pragma once

#include <stdint.h>

typedef int64_t i64;

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

// What a GPU computes too.
#if defined(__CUDACC__)
#define DEVICE_TOO __host__ __device__
#else
#define DEVICE_TOO
#endif

enum IsaLevel { ISA_BASE = 0, ISA_AVX2 = 1, ISA_AVX512 = 2 };

// Chosen once, by this processor and the environment variable PYRO_SSM_ISA.
IsaLevel isa_level();
