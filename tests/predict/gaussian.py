"""A linear-Gaussian model with gaps, inputs and correlated noise, and its exact answers from one dense joint law."""

import torch
from pyro.distributions import Independent, MultivariateNormal, Normal
from torch import nn

import pyro_ssm as ssm
from pyro_ssm.components import Affine, AffineGaussian, Emission, Gaussian, Initial, Transition, gap


class Start(Initial, Gaussian):
    def __init__(self):
        super().__init__()
        self.state_dim = 2
        self.loc = nn.Parameter(torch.tensor([0.5, -1.0]))

    def forward(self, time, inputs, memory=None):
        return Independent(Normal(self.loc + torch.zeros(time.shape + (2,), dtype=self.loc.dtype), 0.8), 1)


class Decay(Transition, AffineGaussian):
    """z' = exp(-rate gap) z + swirl + gap drive u + sqrt(gap) 0.5 e."""

    event_dims = {"rate": 1}

    def __init__(self, with_inputs=False):
        super().__init__()
        self.state_dim = 2
        self.rate = nn.Parameter(torch.tensor([0.3]))
        self.drive = nn.Parameter(torch.tensor([[1.0], [-2.0]])) if with_inputs else None

    def parts(self, time, next_time, inputs):
        delta = gap(time, next_time, self.rate)
        decay = torch.exp(-self.rate * delta)  # (..., time, 1)
        turn = torch.tensor([[0.8, 0.6], [-0.6, 0.8]], dtype=delta.dtype)
        matrix = decay.unsqueeze(-1) * turn
        offset = torch.zeros(delta.shape[:-1] + (2,), dtype=delta.dtype)
        if self.drive is not None:
            offset = delta * (inputs @ self.drive.mT)
        return matrix, offset, 0.5 * delta.sqrt()

    def forward(self, state, time, next_time, inputs, memory=None):
        matrix, offset, scale = self.parts(time, next_time, inputs)
        mean = (matrix @ state.unsqueeze(-1)).squeeze(-1) + offset
        return Independent(Normal(mean, scale.expand(mean.shape)), 1)

    def affine(self, time, next_time, inputs, memory=None):
        matrix, offset, scale = self.parts(time, next_time, inputs)
        return Affine(matrix, offset, scale.unsqueeze(-1) * torch.eye(2, dtype=scale.dtype))


class Sight(Emission, AffineGaussian):
    """y = C z + R e, with R diagonal or full."""

    def __init__(self, correlated=False):
        super().__init__()
        self.state_dim = self.obs_dim = 2
        self.correlated = correlated
        self.matrix = nn.Parameter(torch.tensor([[1.0, 0.3], [0.0, 1.5]]))

    @property
    def root(self):
        return torch.tensor([[0.4, 0.0], [0.9 if self.correlated else 0.0, 0.6]], dtype=self.matrix.dtype)

    def forward(self, state, time, inputs, memory=None):
        mean = state @ self.matrix.mT
        if self.correlated:
            return MultivariateNormal(mean, scale_tril=self.root)
        return Independent(Normal(mean, self.root.diagonal()), 1)

    def affine(self, time, inputs, memory=None):
        return Affine(self.matrix, torch.zeros(2, dtype=self.matrix.dtype), self.root)


def gaussian_model(with_inputs=False, correlated=False, dtype=torch.float64):
    return ssm.StateSpaceModel(Start(), Decay(with_inputs), Sight(correlated)).to(dtype)


@torch.no_grad()
def exact(model, data, rate=None):
    """Means and covariances of the vectors (z_1 .. z_T) and (y_1 .. y_T) of *one* series given its observed entries.

    ``data`` may end in unobserved times: those are forecasts.
    """
    bound = model.bind({} if rate is None else {"transition.rate": torch.as_tensor(rate, dtype=torch.float64)})
    num_times, identity = data.num_times, torch.eye(2, dtype=torch.float64)
    inputs = data.inputs
    mean, cov = bound.initial.loc.clone(), 0.64 * identity
    means, rows = [mean], [[cov]]
    for k in range(num_times - 1):
        held = None if inputs is None else inputs[k : k + 1]
        matrix, offset, root = bound.transition.affine(data.times[k : k + 1], data.times[k + 1 : k + 2], held)
        matrix, offset, root = matrix.reshape(2, 2), offset.reshape(2), root.reshape(2, 2)
        means.append(matrix @ means[-1] + offset)
        rows.append([matrix @ block for block in rows[-1]] + [matrix @ rows[-1][-1] @ matrix.mT + root @ root.mT])
    full = torch.zeros(2 * num_times, 2 * num_times, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, block in enumerate(row):
            full[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = block
            full[2 * j : 2 * j + 2, 2 * i : 2 * i + 2] = block.mT
    z_mean = torch.cat(means)
    emission = torch.block_diag(*[bound.emission.matrix] * num_times)
    noise = torch.block_diag(*[bound.emission.root @ bound.emission.root.mT] * num_times)
    joint_mean = torch.cat([z_mean, emission @ z_mean])
    cross = full @ emission.mT
    joint = torch.cat([torch.cat([full, cross], 1), torch.cat([cross.mT, emission @ cross + noise], 1)], 0)
    seen = torch.cat([torch.zeros(2 * num_times, dtype=torch.bool), data.mask.reshape(-1)])
    gain = torch.linalg.solve(joint[seen][:, seen], joint[seen]).mT
    posterior_mean = joint_mean + gain @ (data.values.reshape(-1)[data.mask.reshape(-1)] - joint_mean[seen])
    posterior_cov = joint - gain @ joint[seen]
    n = 2 * num_times
    return (posterior_mean[:n], posterior_cov[:n, :n]), (posterior_mean[n:], posterior_cov[n:, n:])


def assert_moments(draws, mean, cov, sigmas=5.0):
    """Draws ``(S, n)`` have this mean and covariance, each entry within ``sigmas`` of its Monte Carlo error."""
    number = draws.shape[0]
    variance = cov.diagonal()
    error = (draws.mean(0) - mean).abs()
    assert (error <= sigmas * (variance / number).sqrt() + 1e-9).all(), (error / (variance / number).sqrt()).max()
    centred = draws - mean
    found = centred.mT @ centred / number
    error = (found - cov).abs()
    spread = ((variance[:, None] * variance + cov**2) / number).sqrt()
    assert (error <= sigmas * spread + 1e-9).all(), (error / spread).max()
