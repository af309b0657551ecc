"""The GRU memory, laws that read memory alone, and the named models over them."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from pyro_ssm import emissions
from pyro_ssm.blocks import MLP
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Structured
from pyro_ssm.models import MemoryNormal, MemoryNormalInitial, RecurrentMemory, dmm, srnn, vrnn
from pyro_ssm.testing import InitialContract, MemoryContract, TransitionContract
from tests.contracts.toys import series


class TestMemoryOfStatesAndObservations(MemoryContract):
    obs_dim, input_dim = 2, 3

    def make_component(self):
        return RecurrentMemory(2, 4, state_dim=2, input_dim=3)


class TestMemoryOfObservations(MemoryContract):
    obs_dim = 2

    def make_component(self):
        return RecurrentMemory(2, 4)


class TestMemoryNormalInitial(InitialContract):
    memory_dim = 4

    def make_component(self):
        return MemoryNormalInitial(2, MLP(4, (8,), 4))


class TestMemoryNormal(TransitionContract):
    memory_dim = 4

    def make_component(self):
        return MemoryNormal(2, MLP(4, (8,), 4))


def test_inputs_that_are_missing_raise():
    memory = RecurrentMemory(1, 4, input_dim=2)
    with pytest.raises(ValueError, match="input_dim=2"):
        memory.see_state(memory.start((3,))[0], torch.zeros(3, 1, 2), torch.ones(1, 1), None)
    with pytest.raises(ValueError, match="`values` and `mask`"):
        memory.sequence(torch.zeros(3, 5, 2), None, None, torch.ones(5, 1), None)


@pytest.mark.parametrize("make", [vrnn, srnn])
def test_models_with_memory_train_and_simulate(make):
    data = series(num_times=5, batch=(6,), dtype=torch.float32, missing=True)
    model = make(2, 2, hidden_dim=8)
    guide = Structured(model, 8, direction="past" if make is vrnn else "future", structured=make is srnn)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = [svi.step(data) for _ in range(25)]
    assert sum(losses[-5:]) < sum(losses[:5])
    z, y = model(data.without_values())
    assert z.shape == (6, 5, 2) and y.shape == (6, 5, 2)
    # the density of the simulated pair is that of the pair given
    traced = poutine.trace(model).get_trace(data.without_values())
    given = data.replace(values=traced.nodes["y"]["value"].detach())
    again = poutine.trace(poutine.condition(model, data={"z": traced.nodes["z"]["value"].detach()})).get_trace(given)
    torch.testing.assert_close(traced.log_prob_sum(), again.log_prob_sum(), rtol=1e-4, atol=1e-3)


def test_the_first_law_of_vrnn_is_its_other_laws_network():
    model = vrnn(2, 2, hidden_dim=8)
    assert model.initial.net is model.transition.net
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) and sum("net.layers.0.weight" in n for n in names) >= 1


def test_dmm_sees_inputs_and_takes_any_emission():
    model = dmm(3, 4, transition_dim=8, emission_dim=8, input_dim=2, emission=emissions.Bernoulli)
    data = TimeSeries(torch.arange(5.0), inputs=torch.randn(6, 5, 2))
    z, y = model(data)
    assert z.shape == (6, 5, 3) and y.shape == (6, 5, 4) and set(y.unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="input"):
        model(TimeSeries(torch.arange(5.0).expand(6, 5)))
