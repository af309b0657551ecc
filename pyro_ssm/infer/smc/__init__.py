"""Particle inference: one waist (`FeynmanKac`) between models and algorithms.

A *builder* turns a model and data into a process: ``bootstrap``, ``guided``, ``locally_optimal``, ``auxiliary``,
``mixture_kalman``, ``rao_blackwellised``. :func:`particle_filter` runs it, and knows nothing of models. What is
recorded along the way is a *collector*; what happens to an uneven cloud is a :class:`Resampling`; what is drawn from is
a :class:`Noise`. Other algorithms (smoothers, particle MCMC) stand on :class:`Stepper`, ``init`` and ``step`` without
the loop, and on ``log_backward`` and ``extend`` of the process.
"""

from pyro_ssm.infer.smc.auxiliary import auxiliary
from pyro_ssm.infer.smc.backward import backward_indices
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.check import ParticleCollapseWarning
from pyro_ssm.infer.smc.collectors.base import Collector
from pyro_ssm.infer.smc.collectors.choices import ChoiceLogProb
from pyro_ssm.infer.smc.collectors.fixed_lag import FixedLag
from pyro_ssm.infer.smc.collectors.genealogy import Ancestry, Genealogy
from pyro_ssm.infer.smc.collectors.moments import FilteredMoments, Moments
from pyro_ssm.infer.smc.collectors.online_smoothing import OnlineSmoothing
from pyro_ssm.infer.smc.collectors.quantiles import Quantiles
from pyro_ssm.infer.smc.collectors.variance import EvidenceVariance, MeanVariance
from pyro_ssm.infer.smc.conditional import ConditionalPath, conditional_smc
from pyro_ssm.infer.smc.data_tempering import ibis
from pyro_ssm.infer.smc.diffusion import DiffusionResampling
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac, GaussianSteps
from pyro_ssm.infer.smc.filter import ParticleFiltered, particle_filter
from pyro_ssm.infer.smc.guided import guided
from pyro_ssm.infer.smc.iterated import SampledPaths, iterated_csmc
from pyro_ssm.infer.smc.locally_optimal import locally_optimal
from pyro_ssm.infer.smc.mixture_kalman import mixture_kalman
from pyro_ssm.infer.smc.model_steps import StateParticles
from pyro_ssm.infer.smc.noise import FixedNoise, Noise, PseudoRandom, QuasiRandom
from pyro_ssm.infer.smc.online import OnlineParticleFilter, OnlineState
from pyro_ssm.infer.smc.parameter_moves import HamiltonianMove, ParameterMove, RandomWalkMove
from pyro_ssm.infer.smc.parameter_smc import ParameterSMCResult
from pyro_ssm.infer.smc.particle_gibbs import particle_gibbs
from pyro_ssm.infer.smc.particle_marginal import ParticleMarginal
from pyro_ssm.infer.smc.perturbed import IteratedFilteringResult, iterated_filtering
from pyro_ssm.infer.smc.pmmh import pmmh
from pyro_ssm.infer.smc.posterior_draws import ParticleMCMCResult, RandomParameters
from pyro_ssm.infer.smc.rao_blackwellised import Weighed, linear_step, rao_blackwellised
from pyro_ssm.infer.smc.resample import AncestorResampling, Resampled, Resampling, Weighted
from pyro_ssm.infer.smc.resample_gradient import SoftResampling, StopGradientResampling
from pyro_ssm.infer.smc.score import FisherScore, fisher_score
from pyro_ssm.infer.smc.smc_squared import smc_squared
from pyro_ssm.infer.smc.smoother import ParticleSmoothed, particle_smoother
from pyro_ssm.infer.smc.stepper import Cloud, Step, Stepper
from pyro_ssm.infer.smc.tempering import smc_sampler
from pyro_ssm.infer.smc.transport import TransportResampling

__all__ = [
    "AncestorResampling",
    "Ancestry",
    "ChoiceLogProb",
    "Cloud",
    "Collector",
    "ConditionalPath",
    "DiffusionResampling",
    "EvidenceVariance",
    "FeynmanKac",
    "FilteredMoments",
    "FisherScore",
    "FixedLag",
    "FixedNoise",
    "GaussianSteps",
    "Genealogy",
    "HamiltonianMove",
    "IteratedFilteringResult",
    "MeanVariance",
    "Moments",
    "Noise",
    "OnlineParticleFilter",
    "OnlineSmoothing",
    "OnlineState",
    "ParameterMove",
    "ParameterSMCResult",
    "ParticleCollapseWarning",
    "ParticleFiltered",
    "ParticleMCMCResult",
    "ParticleMarginal",
    "ParticleSmoothed",
    "PseudoRandom",
    "Quantiles",
    "QuasiRandom",
    "RandomParameters",
    "RandomWalkMove",
    "Resampled",
    "Resampling",
    "SampledPaths",
    "SoftResampling",
    "StateParticles",
    "Step",
    "Stepper",
    "StopGradientResampling",
    "TransportResampling",
    "Weighed",
    "Weighted",
    "auxiliary",
    "backward_indices",
    "bootstrap",
    "conditional_smc",
    "fisher_score",
    "guided",
    "ibis",
    "iterated_csmc",
    "iterated_filtering",
    "linear_step",
    "locally_optimal",
    "mixture_kalman",
    "particle_filter",
    "particle_gibbs",
    "particle_smoother",
    "pmmh",
    "rao_blackwellised",
    "smc_sampler",
    "smc_squared",
]
