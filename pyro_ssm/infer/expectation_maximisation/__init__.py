"""Expectation maximisation: closed-form maximum likelihood for linear-Gaussian models and their radial kin."""

from pyro_ssm.infer.expectation_maximisation.loop import EMResult, em

__all__ = ["EMResult", "em"]
