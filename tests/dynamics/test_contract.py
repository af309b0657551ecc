"""Every initial law and transition against the checks that hold for all components."""

import pytest
import torch

from pyro_ssm import dynamics
from pyro_ssm.components import Initial
from pyro_ssm.testing import InitialContract, TransitionContract, failures
from tests.blocks.component_checks import check_component, jitter


def sine(state, inputs):
    return torch.sin(state)


MAKERS = {
    "NormalInitial": lambda: dynamics.NormalInitial(2),
    "NormalInitial, full, inputs": lambda: jitter(dynamics.NormalInitial(2, input_dim=3, covariance="full")),
    "LinearNormal": lambda: jitter(dynamics.LinearNormal(2)),
    "LinearNormal, full, inputs": lambda: jitter(dynamics.LinearNormal(2, input_dim=3, covariance="full")),
    "OrnsteinUhlenbeck": lambda: dynamics.OrnsteinUhlenbeck(2, mean=torch.tensor([1.0, -1.0])),
    "OrnsteinUhlenbeck, inputs": lambda: jitter(dynamics.OrnsteinUhlenbeck(2, input_dim=3)),
    "StationaryInitial": lambda: jitter(dynamics.OrnsteinUhlenbeck(2)).stationary(),
    "GatedTransition": lambda: dynamics.GatedTransition(2, 8),
    "GatedTransition, all": lambda: dynamics.GatedTransition(2, 8, input_dim=3, memory_dim=2, uses_gap=True),
    "MLPTransition": lambda: dynamics.MLPTransition(2, (8, 8)),
    "MLPTransition, all": lambda: dynamics.MLPTransition(
        2, 8, input_dim=3, memory_dim=2, uses_gap=True, residual=False, activation="tanh"
    ),
    "RBFTransition": lambda: jitter(dynamics.RBFTransition(2, torch.randn(3, 2))),
    "RBFTransition, full, inputs": lambda: jitter(
        dynamics.RBFTransition(2, torch.randn(3, 2), width=0.7, input_dim=3, covariance="full")
    ),
    "CorrectedTransition": lambda: jitter(dynamics.CorrectedTransition(dynamics.LinearNormal(2), 8)),
    "CorrectedTransition, all": lambda: jitter(
        dynamics.CorrectedTransition(
            dynamics.OrnsteinUhlenbeck(2, input_dim=3), (8, 8), input_dim=3, memory_dim=2, uses_gap=True
        )
    ),
    "FunctionTransition": lambda: dynamics.FunctionTransition(2, sine),
    "FunctionTransition, full": lambda: jitter(dynamics.FunctionTransition(2, sine, covariance="full")),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_contract(make):
    check_component(make)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_public_contract(make):
    """The contract that users subclass for their own components holds for those of the package."""
    component = make()
    kind = InitialContract if isinstance(component, Initial) else TransitionContract
    fields = {
        "make_component": lambda self: make(),
        "input_dim": getattr(component, "input_dim", 0),
        "memory_dim": getattr(component, "memory_dim", 0),
        "num_draws": 5000,
    }
    if isinstance(component, dynamics.OrnsteinUhlenbeck) and not component.input_dim:
        fields["exact_in_gaps"] = True
    assert failures(type("Subject", (kind,), fields)) == {}
