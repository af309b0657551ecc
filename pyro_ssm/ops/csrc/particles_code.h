// The particle operators for one instruction set. Each particles_*.cpp defines PYRO_SSM_ISA (a namespace), includes the
// system headers below for any processor, switches its instructions on, and includes this file again.
#if !defined(PYRO_SSM_PARTICLE_HEADERS)
#define PYRO_SSM_PARTICLE_HEADERS
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

#include "particles.h"
#else
namespace PYRO_SSM_ISA {
namespace {
#include "loop_math.h"
#include "parallel.h"
#include "gaussian.h"
#include "normalise.h"
#include "random.h"
#include "resampling.h"
#include "particle_move.h"
#include "particle_step.h"
}  // namespace
extern const ParticleCode code = {
    normalise<float>,        normalise<double>,        normals,             affine_draw<float>,
    affine_draw<double>,     normal_density<float>,    normal_density<double>,
    ancestors<float>,        ancestors<double>,        ancestors_of_counts, take,
    particle_step<float>,    particle_step<double>};
}  // namespace PYRO_SSM_ISA
#endif
