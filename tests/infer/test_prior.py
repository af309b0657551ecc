"""Draws of random parameters, and parameters without a global store."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam, PyroSample

from pyro_ssm.binding import bind
from pyro_ssm.components import Component
from pyro_ssm.infer import local_parameters, sample_prior


def two_levels():
    root = Component()
    root.top = PyroSample(dist.Normal(torch.zeros(()), 1.0))
    root.child = Component()
    root.child.vector = PyroSample(lambda self: dist.Normal(root.top[..., None] + torch.zeros(3), 1e-6).to_event(1))
    root.child.rate = PyroParam(torch.tensor(2.0))
    return root


def test_priors_that_depend_see_the_values_returned():
    torch.manual_seed(0)
    drawn = sample_prior(two_levels(), num_samples=100)
    assert drawn["top"].shape == (100,) and drawn["child.vector"].shape == (100, 3)
    torch.testing.assert_close(drawn["child.vector"], drawn["top"].unsqueeze(-1).expand(100, 3), atol=1e-4, rtol=0)
    assert abs(drawn["top"].mean()) < 0.4 and 0.7 < drawn["top"].std() < 1.3
    assert "child.rate" not in drawn


@pytest.mark.parametrize("num_samples", [None, 4])
def test_draws_bind(num_samples):
    root = two_levels()
    drawn = sample_prior(root, num_samples)
    bound = bind(root, drawn)
    lead = () if num_samples is None else (num_samples,)
    assert bound.top.shape == (*lead, 1, 1) and bound.child.vector.shape == (*lead, 1, 3)
    torch.testing.assert_close(bound.top.flatten(), drawn["top"].reshape(-1))


def test_nothing_leaks_into_a_trace_around_it():
    with pyro.poutine.trace() as traced:
        sample_prior(two_levels())
    assert not traced.trace.nodes
    assert len(pyro.get_param_store()) == 0


def test_bound_models_have_no_prior():
    root = two_levels()
    with pytest.raises(TypeError, match="unbound PyroModule.*BoundComponent"):
        sample_prior(bind(root, sample_prior(root)))
    with pytest.raises(ValueError, match="`num_samples` must be at least 1"):
        sample_prior(root, 0)


class Rate(PyroModule):
    def __init__(self, value):
        super().__init__()
        self.rate = PyroParam(torch.tensor(value))

    def forward(self):
        return self.rate


def test_modules_keep_to_themselves_and_nest():
    pyro.clear_param_store()
    first, second = Rate(1.0), Rate(2.0)
    assert first().item() == 1.0  # in the global store now
    with local_parameters():
        assert second().item() == 2.0
        with local_parameters():
            assert second().item() == 2.0
        assert second().item() == 2.0
        third = Rate(3.0)
        assert third().item() == 3.0
    assert not pyro.settings.get("module_local_params")
    assert second().item() == 1.0  # Pyro's own mode again: the first one's value
    pyro.clear_param_store()
