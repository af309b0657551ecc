"""Exact and approximate inference with finite states: hidden Markov, semi-Markov and switching models."""

from pyro_ssm.infer.discrete.hmm import (
    BestPath,
    HMMFiltered,
    HMMSmoothed,
    hmm_filter,
    hmm_smoother,
    sample_posterior_states,
    viterbi,
)

__all__ = ["BestPath", "HMMFiltered", "HMMSmoothed", "hmm_filter", "hmm_smoother", "sample_posterior_states", "viterbi"]
