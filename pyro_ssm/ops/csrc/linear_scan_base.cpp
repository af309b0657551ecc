// For any processor the compiler targets by default.
#include "linear_scan_code.h"
#define PYRO_SSM_ISA linear_scan_base
#if defined(__GNUC__)
#define PYRO_SSM_WIDTH 2
#else
#define PYRO_SSM_WIDTH 1
#endif
#include "linear_scan_code.h"
