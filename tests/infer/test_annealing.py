"""The weight of the KL as an effect handler."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_ssm.infer import kl_annealing, linear_annealing, warmup_cosine

from .programs import Chain, LinearGuide, simulate


def parts(data, seed=0):
    """log p(y | z), log p(z), log q(z) for one draw."""
    torch.manual_seed(seed)
    model, guide = Chain(), LinearGuide()
    torch.manual_seed(seed)
    drawn = pyro.poutine.trace(guide).get_trace(data)
    run = pyro.poutine.trace(pyro.poutine.replay(model, trace=drawn)).get_trace(data)
    drawn.compute_log_prob()
    run.compute_log_prob()
    terms = run.nodes["y"]["log_prob_sum"], run.nodes["z"]["log_prob_sum"], drawn.nodes["z"]["log_prob_sum"]
    return model, guide, [term.item() for term in terms]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("part", [None, [1]], ids=["all", "mini-batch"])
def test_beta_multiplies_both_path_terms_and_nothing_else(beta, part):
    data = simulate(3, 4, ragged=True, missing=0.3)
    data = data if part is None else data.minibatch(part)
    model, guide, (log_y, log_p, log_q) = parts(data)
    torch.manual_seed(0)
    with kl_annealing(beta):
        loss = Trace_ELBO().loss(model, guide, data)
    assert loss == pytest.approx(-(log_y + beta * (log_p - log_q)))


def test_sites_can_be_named():
    data = simulate(2, 3)
    model, guide, (log_y, log_p, log_q) = parts(data)
    for sites, beta in ((["x"], 1.0), (["z"], 0.5), (lambda name: name in "xyz", 0.5)):
        torch.manual_seed(0)
        with kl_annealing(0.5, sites=sites):
            loss = Trace_ELBO().loss(model, guide, data)
        assert loss == pytest.approx(-(log_y + beta * (log_p - log_q)))  # an observed site keeps its weight


def test_a_model_inside_a_module_has_its_path_too():
    def program():
        pyro.sample("child.z", dist.Normal(0.0, 1.0))
        pyro.sample("size.xz", dist.Normal(0.0, 1.0))

    with kl_annealing(0.25):
        trace = pyro.poutine.trace(program).get_trace()
    assert trace.nodes["child.z"]["scale"] == 0.25 and trace.nodes["size.xz"]["scale"] == 1.0


def test_it_serves_a_loop_over_svi():
    pyro.clear_param_store()
    data = simulate(2, 3)
    model, guide, (log_y, log_p, log_q) = parts(data)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-12}), Trace_ELBO())
    torch.manual_seed(0)
    with kl_annealing(0.1):
        assert svi.step(data) == pytest.approx(-(log_y + 0.1 * (log_p - log_q)))
    pyro.clear_param_store()


def test_arguments_are_checked():
    for beta in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`beta` must be a finite number >= 0"):
            kl_annealing(beta)
    with pytest.raises(TypeError, match=r"use \['z'\]"):
        kl_annealing(0.5, sites="z")
    with pytest.raises(ValueError, match="`start` must be in"):
        linear_annealing(1.5, 3)
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        linear_annealing(0.5, 0)
    with pytest.raises(ValueError, match="`warmup` must be in"):
        warmup_cosine(10, 10)
    with pytest.raises(ValueError, match="`final` must be in"):
        warmup_cosine(10, 1, final=2.0)


def test_ramps_meet_their_ends():
    beta = linear_annealing(0.2, 10)
    assert beta(0) == 0.2 and beta(10) == beta(1000) == 1.0
    steps = [beta(k + 1) - beta(k) for k in range(10)]
    assert steps == pytest.approx([0.08] * 10)
    factor = warmup_cosine(100, 20, final=0.1)
    assert factor(19) == 1.0 and factor(20) == 1.0 and factor(100) == factor(150) == pytest.approx(0.1)
    assert factor(60) == pytest.approx(0.55)
