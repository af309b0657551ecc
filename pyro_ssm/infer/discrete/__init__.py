"""Exact and approximate inference with finite states: hidden Markov, semi-Markov and switching models."""

from pyro_ssm.infer.discrete.baum_welch import BaumWelchResult, baum_welch
from pyro_ssm.infer.discrete.enumerate_regimes import RegimeEnumeration, enumerate_regimes
from pyro_ssm.infer.discrete.hmm import (
    BestPath,
    HMMFiltered,
    HMMSmoothed,
    hmm_filter,
    hmm_smoother,
    sample_posterior_states,
    viterbi,
)
from pyro_ssm.infer.discrete.regime_step import RegimeCarry, regime_log_probs, regime_start, regime_step
from pyro_ssm.infer.discrete.semi_markov import (
    HSMMFiltered,
    HSMMSmoothed,
    SegmentPath,
    hsmm_filter,
    hsmm_smoother,
    hsmm_viterbi,
    sample_posterior_segments,
)
from pyro_ssm.infer.discrete.switching import (
    SwitchingFiltered,
    SwitchingSmoothed,
    imm_filter,
    kim_filter,
    kim_smoother,
)
from pyro_ssm.infer.discrete.switching_system import SwitchingStep, SwitchingSystem, switching_system
from pyro_ssm.infer.discrete.variational import SwitchingEM, SwitchingPosterior, switching_em, switching_variational

__all__ = [
    "BaumWelchResult",
    "BestPath",
    "HMMFiltered",
    "HMMSmoothed",
    "HSMMFiltered",
    "HSMMSmoothed",
    "RegimeCarry",
    "RegimeEnumeration",
    "SegmentPath",
    "SwitchingEM",
    "SwitchingFiltered",
    "SwitchingPosterior",
    "SwitchingSmoothed",
    "SwitchingStep",
    "SwitchingSystem",
    "baum_welch",
    "enumerate_regimes",
    "hmm_filter",
    "hmm_smoother",
    "hsmm_filter",
    "hsmm_smoother",
    "hsmm_viterbi",
    "imm_filter",
    "kim_filter",
    "kim_smoother",
    "regime_log_probs",
    "regime_start",
    "regime_step",
    "sample_posterior_segments",
    "sample_posterior_states",
    "switching_em",
    "switching_system",
    "switching_variational",
    "viterbi",
]
