// For every processor. (x86-64 and 64-bit ARM always have registers of 16 bytes.)
#include "selective_code.h"
#define PYRO_SSM_ISA selective_base
#define PYRO_SSM_BYTES 16
#include "selective_code.h"
