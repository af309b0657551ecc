"""A structured block as a memory: the contract, for blocks of every kind, over states and over observations."""

import pytest
import torch

from pyro_ssm.blocks import S4, S4D, S5, BlockMemory, LinOSS, Mamba, Mamba2, ResidualStack
from pyro_ssm.testing import MemoryContract


def contract(block, state_dim=2, obs_dim=0, input_dim=0, **options):
    wanted = (state_dim, max(obs_dim, 1), input_dim)

    class Subject(MemoryContract):
        state_dim, obs_dim, input_dim = wanted

        def make_component(self):
            seen = state_dim + 2 * obs_dim + input_dim
            made = ResidualStack([block(4)], in_features=seen, out_features=3)
            return BlockMemory(made, state_dim, obs_dim, input_dim, **options)

    return Subject


TestS4D = contract(lambda n: S4D(n, 4))
TestS4DWithoutGaps = contract(lambda n: S4D(n, 4), use_gaps=False)
TestS4 = contract(lambda n: S4(n, 4), input_dim=1)
TestS5OfObservations = contract(lambda n: S5(n, 4), state_dim=0, obs_dim=2)
TestLinOSS = contract(lambda n: LinOSS(n, 4), obs_dim=1)
TestMamba = contract(lambda n: Mamba(n, 2))
TestMambaOfObservations = contract(lambda n: Mamba(n, 2), state_dim=2, obs_dim=2, input_dim=1)
TestMamba2 = contract(lambda n: Mamba2(n, 2, head_size=4))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="sees 3 columns"):
        BlockMemory(S4D(2), state_dim=3)
    with pytest.raises(ValueError, match="must see something"):
        BlockMemory(S4D(2))
    with pytest.raises(TypeError, match="structured block"):
        BlockMemory(torch.nn.Linear(2, 2), state_dim=2)
    memory = BlockMemory(S4D(3), state_dim=2, input_dim=1)
    with pytest.raises(ValueError, match="input_dim=1"):
        memory.sequence(torch.zeros(4, 2), None, None, torch.ones(4, 1), None)
