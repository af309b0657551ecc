// For any processor the compiler targets by default.
#include "kalman_code.h"
#define PYRO_SSM_ISA kalman_base
#if defined(__GNUC__)
#define PYRO_SSM_WIDTH 2
#else
#define PYRO_SSM_WIDTH 1
#endif
#include "kalman_code.h"
