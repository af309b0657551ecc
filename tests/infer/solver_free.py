"""A linear equation whose likelihood is exact, and guides of it that call no solver."""

import torch

from pyro_ssm import StateSpaceModel, TimeSeries, infer
from pyro_ssm.dynamics import ConstantDiffusion, LinearDrift, NeuralSDE, NormalInitial, discretize
from pyro_ssm.emissions import LinearNormal
from pyro_ssm.guides import ARCTA, SVISE, SDEMatching
from pyro_ssm.infer.elbo import SolverFree
from pyro_ssm.testing.checks import perturb

D = torch.float64
EXACT = SolverFree(8, times="quadrature", order=20)
GUIDES = {
    "svise": lambda model, data: SVISE(model, data, scale=0.5),
    "arcta": lambda model, data: ARCTA(model, 2, 8, encoder_hidden=8, scale=0.5),
    "sde matching": lambda model, data: SDEMatching(model, 8, hidden=8, scale=0.5),
    "sinh arcsinh": lambda model, data: SDEMatching(model, 8, "sinh_arcsinh", hidden=8, scale=0.5),
}


def linear(state_dim=1, exact=False, input_dim=0, noise="diagonal"):
    F = torch.tensor([[-0.7, 0.6], [-0.4, -1.1]])[:state_dim, :state_dim]
    value = 0.8 if noise == "diagonal" else torch.tensor([[0.8, 0.0, 0.1], [0.3, 0.6, 0.0]])
    drift = LinearDrift(F, 0.3, input_dim)
    sde = NeuralSDE(drift, ConstantDiffusion(value, state_dim), noise=noise)
    model = StateSpaceModel(
        NormalInitial(state_dim), discretize(sde, "exact") if exact else sde, LinearNormal(state_dim, 1, scale=0.4)
    ).double()
    with torch.no_grad():
        model.emission.matrix.fill_(0.8)
        if input_dim:
            drift.input_matrix.fill_(1.5)
    return model


def series(batch=(3,), num=4, lengths=None, inputs=False):
    torch.manual_seed(2)
    times = torch.tensor([0.0, 0.4, 1.1, 1.6, 2.0], dtype=D)[:num]
    if batch:
        times = times * torch.linspace(0.5, 1, batch[0], dtype=D).unsqueeze(-1)
    values = torch.randn(*batch, num, 1, dtype=D)
    u = torch.randn(*batch, num, 1, dtype=D) if inputs else None
    return TimeSeries(times, values, lengths=lengths, inputs=u)


def log_likelihood(data, *args, **how):
    with torch.no_grad():
        return infer.kalman_filter(linear(*args, exact=True, **how).bind(), data).log_likelihood.sum(-1)


def bound(model, guide, data, loss=EXACT):
    with torch.no_grad():
        terms = loss.terms(model, guide, data)
    return terms.likelihood - terms.start - terms.path


def made(name, data, model=None):
    torch.manual_seed(0)
    model = linear() if model is None else model
    guide = GUIDES[name](model, data).double()
    perturb(guide, 0.2)
    return model, guide


def trained(model, guide, data, steps, loss):
    """The guide at the optimum of a deterministic loss."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    optimiser = torch.optim.LBFGS(guide.parameters(), max_iter=steps, history_size=30, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        value = loss.differentiable_loss(model, guide, data)
        value.backward()
        return value

    optimiser.step(closure)
    return bound(model, guide, data)
