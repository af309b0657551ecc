"""Estimates and predictions are of the guide as it is used: without dropout, and modes are given back."""

from __future__ import annotations

import torch

import pyro_ssm as ssm


def pair():
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1)
    )
    return model, ssm.guides.Structured(model, 8, num_layers=2, dropout=0.5)


def twice(function):
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(function())
    return found


def test_dropout_is_off_in_estimates_and_draws_and_on_again_afterwards():
    model, guide = pair()
    data = ssm.TimeSeries(torch.arange(6.0), torch.randn(3, 6, 1))
    reference = guide.eval().path(data, model.bind())
    guide.train()
    for draw in (
        lambda: ssm.infer.evidence_lower_bound(model, guide, data, num_samples=5).series,
        lambda: ssm.infer.importance_log_likelihood(model, guide, data, num_samples=5).log_likelihood,
        lambda: ssm.predict.posterior_draws(model, guide, data, num_samples=5).states,
    ):
        in_training = twice(draw)
        guide.eval()
        in_evaluation = twice(draw)
        guide.train()
        torch.testing.assert_close(in_training, in_evaluation, rtol=0, atol=0)
    assert all(module.training for module in guide.modules())
    assert reference.event_shape == (6, 2)


def test_each_submodule_gets_its_own_mode_back():
    _, guide = pair()
    guide.encoder.eval()
    with ssm.infer.evaluating(guide, print):
        assert not any(module.training for module in guide.modules())
    assert guide.training and not guide.encoder.training
