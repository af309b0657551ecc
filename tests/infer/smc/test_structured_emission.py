"""Particles carry and resample the state of a structured block: their evidence is the sum, or the integral, by hand."""

import itertools

import pyro.distributions as dist
import pytest
import torch

from pyro_ssm import blocks, emissions
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.codes import index_law
from pyro_ssm.dynamics import CategoricalInitial, LinearNormal, MarkovChain, NormalInitial
from pyro_ssm.infer import auxiliary, bootstrap, guided, particle_filter
from pyro_ssm.infer.smc.tree import tree_map
from pyro_ssm.models import StateSpaceModel
from tests.infer.smc.programs import assert_unbiased, repeated, totals

D, RUNS, N, T = torch.float64, 1000, 80, 5
START = torch.tensor([0.5, 0.3, 0.2], dtype=D)
CHAIN = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4]], dtype=D)
BLOCKS = {
    "S4D": lambda: blocks.ResidualStack([blocks.S4D(3, 4, step_range=(0.3, 1.0))], in_features=1),
    "Mamba": lambda: blocks.ResidualStack([blocks.Mamba(3, 2, step_range=(0.3, 1.0))], in_features=1),
    "S5, Mamba2": lambda: blocks.ResidualStack([blocks.S5(4, 4), blocks.Mamba2(4, 2, head_size=4)], in_features=1),
    "LinOSS alone": lambda: blocks.LinOSS(1, 4),
}
FILTERS = {
    "auxiliary": auxiliary,
    "guided": lambda model, data: guided(model, even_odds, data),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    with torch.no_grad():
        yield
    torch.set_default_dtype(torch.float32)


def even_odds(state, k, memory):
    """Each of the three states with the same probability, whatever came before."""
    assert memory.shape[:-2] == (N, RUNS)
    return index_law(torch.zeros(N, RUNS, 1, 3))


def chain_model(block, sees_state=False, memory=blocks.BlockMemory):
    """Three states that a block reads, and a head that reads the block, or the state beside it."""
    block = BLOCKS[block]()
    if sees_state:
        head = emissions.Normal(1, 2, 4, memory_dim=block.out_features, scale=0.6)
    else:
        head = emissions.Normal(block.out_features, 2, 4, scale=0.6)
    emission = emissions.Structured(block, head)
    emission.memory = memory(block, state_dim=1)
    model = StateSpaceModel(CategoricalInitial(3, probs=START), MarkovChain(3, matrix=CHAIN), emission)
    for name, weight in emission.named_parameters():
        if weight.dim() > 1 and name.endswith("weight"):
            weight *= 2.5  # so that what is seen depends strongly on the block, and the block on its past
    return model


def drawn(model, missing=True):
    """A series of the model's own, at irregular times."""
    times = torch.tensor([0.0, 0.4, 1.7, 2.0, 3.6])
    values = model(TimeSeries(times))[1]
    if missing:
        values[1], values[3, 0] = float("nan"), float("nan")
    return TimeSeries(times, values)


def brute_force(model, data, forgets=False):
    """log p(y), by the sum over all paths of states; ``forgets`` runs the block over the last state alone."""
    paths = torch.tensor(list(itertools.product(range(3), repeat=data.num_times)))
    log_path = START[paths[:, 0]].log() + CHAIN[paths[:, :-1], paths[:, 1:]].log().sum(-1)
    z, gap = paths.unsqueeze(-1).double(), torch.cat([torch.ones(1), data.times.diff()])
    block, head = model.emission.memory.block, model.emission.head
    if forgets:
        y = torch.stack([block(z[:, k : k + 1], dt=gap[k : k + 1])[0][:, 0] for k in range(data.num_times)], 1)
    else:
        y = block(z, dt=gap)[0]
    law = head(z, data.times, None, memory=y) if model.emission.head_sees_state else head(y, data.times, None)
    entries = law.base_dist.log_prob(torch.where(data.mask, data.values, 0.0))
    return torch.logsumexp(log_path + torch.where(data.mask, entries, 0.0).sum((-2, -1)), 0)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("sees_state", [False, True])
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_evidence_is_the_sum_over_all_paths(block, sees_state, threshold):
    torch.manual_seed(0)
    model = chain_model(block, sees_state)
    data = drawn(model)
    found = particle_filter(bootstrap(model, repeated(data, RUNS)), N, ess_threshold=threshold)
    assert_unbiased(found.total, brute_force(model, data))
    assert (found.log_likelihood[:, 1] == 0).all()  # nothing is seen there, and yet the block has read the state
    if threshold == 1.0:
        assert found.resampled[:, 1:].all()


@pytest.mark.parametrize("filtering", FILTERS)
def test_other_filters_have_the_same_evidence(filtering):
    torch.manual_seed(1)
    model = chain_model("Mamba")
    data = drawn(model)
    assert_unbiased(totals(FILTERS[filtering](model, repeated(data, RUNS)), N), brute_force(model, data))


class Mixed(blocks.BlockMemory):
    """A wrong memory: at each step every particle gets the block state of its neighbour."""

    def see_state(self, carry, state, gap, inputs):
        held, *rest = carry
        neighbour = tree_map(lambda x: x.roll(1, 0), held)
        return super().see_state((neighbour, *rest), state, gap, inputs)


@pytest.mark.parametrize("block", ["S4D", "Mamba"])
def test_a_block_state_that_is_lost_or_mixed_up_would_be_seen(block):
    """The judge can tell: the evidence of a block without a past, and of particles that swap their pasts, differs."""
    torch.manual_seed(0)
    model = chain_model(block)
    data = drawn(model, missing=False)
    exact = brute_force(model, data)
    assert (exact - brute_force(model, data, forgets=True)).abs() > 0.5
    wrong = chain_model(block, memory=Mixed)
    wrong.load_state_dict(model.state_dict())
    assert brute_force(wrong, data) == exact
    with pytest.raises(AssertionError):
        assert_unbiased(totals(bootstrap(wrong, repeated(data, RUNS)), N), exact)


def test_evidence_of_a_continuous_state_is_the_integral():
    """S5 is linear: states and observations are one Gaussian, through the matrix of the block's impulse responses."""
    torch.manual_seed(3)
    block = blocks.S5(1, 4, step_range=(0.3, 1.0))
    head = emissions.LinearNormal(1, 1, matrix=torch.ones(1, 1), scale=1.0)
    model = StateSpaceModel(
        NormalInitial(1, scale=1.0),
        LinearNormal(1, matrix=torch.tensor([[0.8]]), scale=0.6),
        emissions.Structured(block, head),
    )
    data = drawn(model, missing=False)
    gap = torch.cat([torch.ones(1), data.times.diff()])
    decay = 0.8 ** (torch.arange(T).unsqueeze(-1) - torch.arange(T)).clamp(min=0)
    moves = torch.tril(decay) * torch.tensor([1.0] + [0.6] * (T - 1))  # z = moves @ independent normals
    reads = block(torch.eye(T).unsqueeze(-1), dt=gap)[0].squeeze(-1).mT
    root = reads @ moves
    law = dist.MultivariateNormal(torch.zeros(T), root @ root.mT + torch.eye(T))
    exact = law.log_prob(data.values[:, 0])
    for build in (bootstrap, auxiliary):
        assert_unbiased(totals(build(model, repeated(data, RUNS)), N, ess_threshold=1.0), exact)
