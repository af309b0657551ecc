"""Without resampling a particle filter is importance sampling of whole paths: the same numbers, to rounding.

The densities of whole paths are computed by the model's own laws, in one call: masks, ragged lengths, own time grids,
refined grids, inputs, memory and batches of series must all be read alike, step by step.
"""

import math

import pytest
import torch

from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Structured
from pyro_ssm.infer import bootstrap, guided, particle_filter
from pyro_ssm.infer.smc import Genealogy
from pyro_ssm.models import history, observation_law, path_law, vrnn
from tests.contracts.toys import remembering, series, toy
from tests.infer.gaussian.linear import random_data, random_model
from tests.infer.smc.programs import D

N = 40


def uneven(num_times=6, batch=(3,), own=False):
    data = series(num_times, batch, own=own, missing=True)
    return data.replace(values=data.values, mask=data.mask, lengths=torch.tensor([num_times, 4, 1]))


CASES = {
    "Markov, ragged": lambda: (toy(), uneven()),
    "memory, ragged": lambda: (remembering(), uneven()),
    "memory, ragged, own times": lambda: (remembering(), uneven(own=True)),
    "memory, refined": lambda: (remembering(), series(4, (2,), missing=True).refine(3)),
    "memory, refined, ragged": lambda: (remembering(), uneven(4).refine(2)),
    "two batch dims": lambda: (remembering(), series(5, (2, 3), missing=True)),
    "inputs": lambda: (random_model(), random_data((2,), own_times=True)),
    "one time": lambda: (remembering(), series(1, (2,))),
    "recurrent": lambda: (vrnn(2, 2, hidden_dim=4).double(), uneven()),
}


def paths_of(fk):
    run = particle_filter(fk, N, ess_threshold=0, collectors=[Genealogy()])
    assert not run.resampled.any()
    return run, run.collected["genealogy"].paths()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bootstrap_is_importance_sampling_from_the_prior(case):
    model, data = CASES[case]()
    run, paths = paths_of(bootstrap(model, data))
    bound = model.bind()
    weights = observation_law(bound, data, paths, history(bound, data)).log_prob(data.values)
    assert torch.allclose(run.total, weights.logsumexp(0) - math.log(N), rtol=0, atol=1e-10)
    assert torch.allclose(run.cloud.log_weights, weights.log_softmax(0), rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("inputs", "two batch dims")])
@torch.no_grad()
def test_guided_is_importance_sampling_from_the_guide(case):
    model, data = CASES[case]()
    guide = Structured(model, 5, direction="both").double()
    run, paths = paths_of(guided(model, guide, data))
    bound = model.bind()
    past = history(bound, data)
    weights = observation_law(bound, data, paths, past).log_prob(data.values)
    weights = weights + path_law(bound, data, past).log_prob(paths) - guide.path(data, bound).log_prob(paths)
    assert torch.allclose(run.total, weights.logsumexp(0) - math.log(N), rtol=0, atol=1e-9)


@torch.no_grad()
def test_extend_and_log_backward_are_the_laws_of_the_model():
    """What smoothers and particle MCMC stand on."""
    model, data = remembering(), series(4, (2,))
    fk = bootstrap(model, data)
    run, paths = paths_of(fk)
    previous = None
    for k in range(4):
        previous = fk.extend(k, previous, paths[..., k, :])
    assert torch.allclose(previous.summary, run.cloud.particles.summary, rtol=0, atol=1e-12)
    assert torch.equal(fk.state(previous), paths[..., -1, :])

    model = toy()
    fk = bootstrap(model, data)
    clouds = particle_filter(fk, N, collectors=[Genealogy()]).collected["genealogy"].clouds
    paths = torch.stack([fk.state(clouds[1].particles), fk.state(clouds[2].particles)], -2)
    two = TimeSeries(data.times[1:3], data.values[:, 1:3])
    wanted = path_law(model.bind(), two).log_prob_steps(paths)[..., 1]
    assert torch.allclose(fk.log_backward(2, clouds[1].particles, clouds[2].particles), wanted, rtol=0, atol=1e-12)
    assert wanted.dtype == D
