"""A sampler that was stopped goes on as if it had not been."""

import functools

import pytest
import torch

from pyro_ssm.infer import bootstrap, ibis, iterated_filtering, kalman_filter, pmmh, smc_sampler, smc_squared
from tests.infer.smc.known_posterior import judged


class Stopped(Exception):
    """The power failed."""


def stopping(filter, calls):
    """The filter, which fails at call number ``calls``."""
    made = 0

    @functools.wraps(filter)
    def until(model, data):
        nonlocal made
        made += 1
        if made > calls:
            raise Stopped
        return filter(model, data)

    return until


def numbers(result):
    found = {}
    for name, value in result._asdict().items():
        if isinstance(value, dict):
            found |= value
        elif isinstance(value, torch.Tensor):
            found[name] = value
    return found


def assert_same(a, b):
    a, b = numbers(a), numbers(b)
    assert list(a) == list(b)
    for name, value in a.items():
        assert torch.equal(value.nan_to_num(), b[name].nan_to_num()), name


SAMPLERS = {
    "pmmh": (pmmh, bootstrap, 45, {"num_samples": 30, "num_particles": 10, "num_chains": 2, "num_warmup": 20}),
    "correlated pmmh": (
        pmmh,
        bootstrap,
        45,
        {"num_samples": 30, "num_particles": 10, "num_chains": 2, "num_warmup": 20, "correlation": 0.9},
    ),
    "smc squared": (smc_squared, bootstrap, 9, {"num_samples": 30, "num_particles": 4, "ess_threshold": 0.95}),
    "ibis": (ibis, kalman_filter, 4, {"num_samples": 30, "ess_threshold": 0.95, "num_moves": 2}),
    "tempering": (smc_sampler, kalman_filter, 4, {"num_samples": 30, "ess_threshold": 0.95, "num_moves": 2}),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_resumed_is_uninterrupted(kind, tmp_path):
    sampler, filter, calls, options = SAMPLERS[kind]
    model, data, _ = judged()
    options = {**options, "progress": False}
    if sampler is not smc_sampler:
        options["checkpoint_every"] = 7 if sampler is pmmh else 2
    torch.manual_seed(3)
    whole = sampler(model, data, filter=filter, checkpoint=tmp_path / "whole.pt", **options)
    torch.manual_seed(3)
    with pytest.raises(Stopped):
        sampler(model, data, filter=stopping(filter, calls), checkpoint=tmp_path / "part.pt", **options)
    assert (tmp_path / "part.pt").exists()
    torch.manual_seed(4)  # no matter
    assert_same(sampler(model, data, filter=filter, checkpoint=tmp_path / "part.pt", **options), whole)


def test_more_draws_and_more_iterations(tmp_path):
    model, data, _ = judged()
    options = {"num_particles": 10, "num_chains": 2, "num_warmup": 10, "progress": False}
    torch.manual_seed(3)
    whole = pmmh(model, data, 20, checkpoint=tmp_path / "a.pt", **options)
    torch.manual_seed(3)
    pmmh(model, data, 8, checkpoint=tmp_path / "b.pt", **options)
    assert_same(pmmh(model, data, 20, checkpoint=tmp_path / "b.pt", **options), whole)

    torch.manual_seed(3)
    whole = iterated_filtering(model, data, 20, 5, checkpoint=tmp_path / "c.pt", progress=False)
    torch.manual_seed(3)
    iterated_filtering(model, data, 20, 2, checkpoint=tmp_path / "d.pt", progress=False)
    more = iterated_filtering(model, data, 20, 5, checkpoint=tmp_path / "d.pt", progress=False)
    assert torch.equal(more.trace["transition.rate"][:3], whole.trace["transition.rate"][:3])
    assert more.trace["transition.rate"].shape == (6,)


def test_another_run_is_refused(tmp_path):
    model, data, _ = judged()
    options = {"num_chains": 2, "num_warmup": 2, "progress": False, "checkpoint": tmp_path / "run.pt"}
    pmmh(model, data, 3, 10, **options)
    with pytest.raises(ValueError, match="num_particles was 10 and is 11"):
        pmmh(model, data, 3, 11, **options)
    pmmh(model, data, 3, 11, resume=False, **options)
    with pytest.raises(ValueError, match="`checkpoint_every` must be at least 1"):
        pmmh(model, data, 3, 11, checkpoint_every=0, **options)
