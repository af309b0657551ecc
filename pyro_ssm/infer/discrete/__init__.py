"""Exact and approximate inference with finite states: hidden Markov, semi-Markov and switching models."""

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
from pyro_ssm.infer.discrete.switching import (
    SwitchingFiltered,
    SwitchingSmoothed,
    imm_filter,
    kim_filter,
    kim_smoother,
)
from pyro_ssm.infer.discrete.switching_system import SwitchingStep, SwitchingSystem, switching_system

__all__ = [
    "BestPath",
    "HMMFiltered",
    "HMMSmoothed",
    "RegimeCarry",
    "RegimeEnumeration",
    "SwitchingFiltered",
    "SwitchingSmoothed",
    "SwitchingStep",
    "SwitchingSystem",
    "enumerate_regimes",
    "hmm_filter",
    "hmm_smoother",
    "imm_filter",
    "kim_filter",
    "kim_smoother",
    "regime_log_probs",
    "regime_start",
    "regime_step",
    "sample_posterior_states",
    "switching_system",
    "viterbi",
]
