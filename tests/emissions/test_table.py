"""Tables of emissions against the contract, and against their laws written out."""

import pyro.distributions as dist
import pytest
import torch

from pyro_ssm import emissions
from pyro_ssm.testing import EmissionContract


class TableContract(EmissionContract):
    def make_state(self, shape):
        return torch.randint(0, 3, (*shape, 1)).float()

    def test_states_are_used_at_their_own_time(self):
        """The contract's own moves a state off its range: change the later states to another index."""
        component, case = self._bound(), self.make_case()
        value = self._points(self.call(component, case), self._lead(case))
        other = torch.cat([case.state[..., :1, :], 2 - case.state[..., 1:, :]], -2)
        terms = [self._log_prob(component, c, value)[..., 0] for c in (case, case._replace(state=other))]
        assert torch.equal(*terms)


class TestNormalTable(TableContract):
    def make_component(self):
        return emissions.NormalTable(3, 2, loc=torch.tensor([-1.0, 0.0, 1.0]), scale=0.7)


class TestNormalTableFull(TableContract):
    def make_component(self):
        return emissions.NormalTable(3, 2, "full")


class TestStudentTTable(TableContract):
    def make_component(self):
        return emissions.StudentTTable(3, 2, df=torch.tensor([3.0, 5.0, 9.0]))


class TestPoissonTable(TableContract):
    def make_component(self):
        return emissions.PoissonTable(3, 2)


class TestCategoricalTable(TableContract):
    def make_component(self):
        return emissions.CategoricalTable(3, 2, 4)


def test_rows_are_the_laws_of_their_states():
    loc, scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 1.0], [2.0, 0.1]])
    law = emissions.NormalTable(2, 2, loc=loc, scale=scale)(torch.tensor([[1.0], [0.0]]), torch.arange(2.0), None)
    y = torch.randn(2, 2)
    wanted = dist.Normal(loc.flip(0), scale.flip(0)).log_prob(y).sum(-1)
    torch.testing.assert_close(law.log_prob(y), wanted)
    state = torch.tensor([[1.0, 7.0], [0.0, 2.0]])  # a semi-Markov state: the remaining duration is not read
    wide = emissions.NormalTable(2, 2, loc=loc, scale=scale, state_dim=2)(state, torch.arange(2.0), None)
    torch.testing.assert_close(wide.log_prob(y), wanted)


def test_bad_tables_stop_at_the_door():
    with pytest.raises(ValueError, match=r"`loc` must broadcast to shape \(3, 2\)"):
        emissions.NormalTable(3, 2, loc=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="`scale` must lie above its floor"):
        emissions.NormalTable(3, 2, scale=0.0)
    with pytest.raises(ValueError, match=r"`probs` must have shape \(2, 1, 3\)"):
        emissions.CategoricalTable(2, 1, 3, probs=torch.ones(2, 4) / 4)
    with pytest.raises(ValueError, match="probabilities that sum to 1"):
        emissions.CategoricalTable(2, 1, 3, probs=torch.ones(2, 3))
    with pytest.raises(TypeError, match="must be a function of the index"):
        emissions.ByState(2, 1, 3)
    with pytest.raises(ValueError, match="state_dim=1"):
        emissions.PoissonTable(2, 1)(torch.zeros(5, 2), torch.arange(5.0), None)
