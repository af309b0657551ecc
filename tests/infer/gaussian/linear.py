"""A linear-Gaussian model with everything that may vary, and its joint law written out as one dense Gaussian."""

import pyro.distributions as dist
import torch
from pyro.distributions import MultivariateNormal
from pyro.nn import PyroSample

from pyro_ssm.components import Affine, AffineGaussian, Emission, Gaussian, Initial, Memory, Transition
from pyro_ssm.data import TimeSeries
from pyro_ssm.models import StateSpaceModel

D = torch.float64


class Start(Gaussian, Initial):
    event_dims = {"mean": 1, "root": 2}

    def __init__(self, mean, root):
        super().__init__()
        self.state_dim, self.mean, self.root = mean.shape[-1], mean, root

    def forward(self, time, inputs, memory=None):
        lead = torch.broadcast_shapes(self.mean.shape[:-1], self.root.shape[:-2], time.shape)
        n = self.state_dim
        # not validated: a zero root (a start that is known) is a law too
        return MultivariateNormal(
            self.mean.expand(lead + (n,)), scale_tril=self.root.expand(lead + (n, n)), validate_args=False
        )


class Drift(AffineGaussian, Transition):
    """z' = (F + gap E) z + b + U u + gap^1/2 Q e."""

    event_dims = {"F": 2, "Q": 2}

    def __init__(self, F, E, b, U, Q):
        super().__init__()
        self.state_dim, self.F, self.E, self.b, self.U, self.Q = F.shape[-1], F, E, b, U, Q

    def affine(self, time, next_time, inputs, memory=None):
        gap = (next_time - time).to(self.F.dtype)
        offset = self.b if inputs is None else self.b + inputs.to(self.b.dtype) @ self.U.mT
        return Affine(self.F + gap[..., None, None] * self.E, offset, gap.sqrt()[..., None, None] * self.Q)

    def forward(self, state, time, next_time, inputs, memory=None):
        return _law(self.affine(time, next_time, inputs), state)


class Decay(AffineGaussian, Transition):
    """The stationary Ornstein-Uhlenbeck law with unit variance, exact over any gap."""

    event_dims = {"rate": 1}

    def __init__(self, state_dim):
        super().__init__()
        self.state_dim = state_dim
        self.rate = PyroSample(dist.LogNormal(torch.tensor(0.0, dtype=D), 0.7))

    def affine(self, time, next_time, inputs, memory=None):
        kept = torch.exp(-self.rate * (next_time - time).unsqueeze(-1)) * torch.ones(self.state_dim, dtype=D)
        return Affine(kept.diag_embed(), torch.zeros_like(kept), (1 - kept.square()).sqrt().diag_embed())

    def forward(self, state, time, next_time, inputs, memory=None):
        return _law(self.affine(time, next_time, inputs), state)


class Look(AffineGaussian, Emission):
    """y = H z + d + W u + R e, the noise correlated."""

    event_dims = {"H": 2, "R": 2}

    def __init__(self, H, d, W, R):
        super().__init__()
        self.obs_dim, self.state_dim = H.shape[-2:]
        self.H, self.d, self.W, self.R = H, d, W, R

    def affine(self, time, inputs, memory=None):
        offset = self.d if inputs is None else self.d + inputs.to(self.d.dtype) @ self.W.mT
        return Affine(self.H, offset, self.R)

    def forward(self, state, time, inputs, memory=None):
        return _law(self.affine(time, inputs), state)


class Recall(Memory):
    features = 1


def _law(affine, state):
    loc = (affine.matrix @ state.unsqueeze(-1)).squeeze(-1) + affine.offset
    return MultivariateNormal(loc, scale_tril=affine.scale_tril.expand(loc.shape + loc.shape[-1:]))


def root(n, scale=1.0):
    """A random lower-triangular matrix with a positive diagonal: a correlated law."""
    A = torch.randn(n, n, dtype=D)
    return scale * (A.tril(-1) + A.diagonal().abs().add(0.3).diag())


def random_model(n=3, p=2, u=2, seed=0):
    torch.manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, dtype=D)

    return StateSpaceModel(
        Start(r(n), root(n)),
        Drift(0.7 * torch.eye(n, dtype=D) + 0.1 * r(n, n), 0.1 * r(n, n), r(n), r(n, u), root(n, 0.5)),
        Look(r(p, n), r(p), r(p, u), root(p, 0.7)),
    )


def random_data(batch=(), num_times=6, p=2, u=2, own_times=False, missing=0.4, lengths=None, inputs=True, seed=1):
    """Random values, masks (partial rows, and one whole step), irregular times and inputs."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(*shape, dtype=D, generator=generator)

    times = (0.2 + rand(*(batch if own_times else ()), num_times)).cumsum(-1)
    values = 4 * rand(*batch, num_times, p) - 2
    mask = rand(*values.shape) >= missing
    if num_times > 3 and missing:
        mask[..., 2, :] = False
    mask[..., 0, 0] = True
    held = 2 * rand(*batch, num_times, u) - 1 if inputs else None
    return TimeSeries(times, values, mask=mask, inputs=held, lengths=lengths)


def step(affine):
    """The one step of an affine law, without its time axis."""
    return [part.reshape(part.shape[-event:]) for part, event in zip(affine, (2, 1, 2), strict=True)]


def dense(model, data):
    """One series: mean and covariance of the stacked path and of the stacked record, and their cross-covariance."""
    T, times, inputs = data.num_times, data.times, data.inputs

    def held(k):
        return None if inputs is None else inputs[k : k + 1]

    first = model.initial(times[:1], held(0))
    means, blocks = [first.mean[0]], {(0, 0): first.covariance_matrix[0]}
    for k in range(T - 1):
        F, b, Q = step(model.transition.affine(times[k : k + 1], times[k + 1 : k + 2], held(k)))
        means.append(F @ means[-1] + b)
        for j in range(k + 1):
            blocks[k + 1, j] = F @ blocks[k, j]
            blocks[j, k + 1] = blocks[k + 1, j].T
        blocks[k + 1, k + 1] = F @ blocks[k, k] @ F.T + Q @ Q.T
    P = torch.cat([torch.cat([blocks[i, j] for j in range(T)], 1) for i in range(T)], 0)
    at = range(T) if data.observed_index is None else data.observed_index.tolist()
    looks = [step(model.emission.affine(times[k : k + 1], held(k))) for k in at]
    n, p = model.initial.state_dim, model.emission.obs_dim
    H = torch.zeros(len(at) * p, T * n, dtype=D)
    for row, (k, look) in enumerate(zip(at, looks, strict=True)):
        H[row * p : (row + 1) * p, k * n : (k + 1) * n] = look[0]
    noise = torch.block_diag(*(R @ R.T for _, _, R in looks))
    z = torch.cat(means)
    return z, P, H @ z + torch.cat([d for _, d, _ in looks]), H @ P @ H.T + noise, P @ H.T


def dense_log_likelihood(model, data):
    _, _, mean, covariance, _ = dense(model, data)
    seen = data.mask.flatten()
    return MultivariateNormal(mean[seen], covariance[seen][:, seen]).log_prob(data.values.flatten()[seen])


def dense_posterior(model, data):
    """Mean (time, n) and covariance (time, n, time, n) of the path given the record."""
    z, P, mean, covariance, cross = dense(model, data)
    seen = data.mask.flatten()
    gain = torch.linalg.solve(covariance[seen][:, seen], cross[:, seen].T).T
    T = data.num_times
    posterior = P - gain @ cross[:, seen].T
    z = z + gain @ (data.values.flatten()[seen] - mean[seen])
    return z.reshape(T, -1), posterior.reshape(T, len(z) // T, T, -1)
