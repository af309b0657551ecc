// For any processor the compiler targets by default.
#include "particles_code.h"
#define PYRO_SSM_ISA particles_base
#include "particles_code.h"
