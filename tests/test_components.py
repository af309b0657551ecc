"""Times, the base classes' errors, and capabilities."""

import pytest
import torch

from pyro_ssm.components import (
    Affine,
    AffineGaussian,
    Component,
    Emission,
    FiniteState,
    Gaussian,
    Initial,
    Memory,
    SampleOnly,
    Transition,
    gap,
    gaps,
    require,
)
from tests.contracts.toys import Decay, Leak, See, Start, StateLeak


def test_gap_is_subtracted_in_float64_and_then_cast():
    time = torch.tensor([2.0**24, 2.0**24 + 0.25], dtype=torch.float64)
    found = gap(time[:-1], time[1:], like=torch.zeros(1))
    assert found.dtype == torch.float32
    assert found.tolist() == [[0.25]]  # in float32 the two times would be equal


def test_gap_of_own_grids_has_shape_batch_time_1():
    times = torch.rand(3, 4, dtype=torch.float64).cumsum(-1)
    found = gap(times[..., :-1], times[..., 1:], like=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(found, times.diff(dim=-1).unsqueeze(-1))


def test_gap_before_the_first_time_is_one():
    times = torch.tensor([[3.0, 3.5, 5.0], [0.0, 2.0, 2.5]], dtype=torch.float64)
    assert gaps(times, like=torch.zeros(1)).squeeze(-1).tolist() == [[1.0, 0.5, 1.5], [1.0, 2.0, 0.5]]


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (lambda: Initial()(None, None), "forward(time, inputs, memory=None)"),
        (lambda: Transition()(None, None, None, None), "forward(state, time, next_time, inputs, memory=None)"),
        (lambda: Emission()(None, None, None), "forward(state, time, inputs, memory=None)"),
        (lambda: Memory().start(()), "start(shape)"),
        (lambda: Memory().see_state(None, None, None, None), "see_state"),
        (lambda: Memory().see_observation(None, None, None), "see_observation"),
        (lambda: AffineGaussian().affine(), "affine"),
    ],
)
def test_what_a_subclass_must_define_is_named(call, wanted):
    with pytest.raises(NotImplementedError) as raised:
        call()
    assert wanted in str(raised.value)


def test_capabilities_are_classes():
    assert isinstance(Decay(2), AffineGaussian) and isinstance(Decay(2), Gaussian)
    assert not isinstance(Decay(2), (FiniteState, SampleOnly))
    assert Affine(1, 2, 3).matrix == 1
    assert issubclass(Transition, Component)


@pytest.mark.parametrize("component", [Decay(2), See(2, 1), Start(2)])
def test_require_passes_what_has_the_capability(component):
    require(component, Gaussian, "extended_kalman_filter", "a particle filter")


def test_require_names_method_component_capability_and_way_out():
    with pytest.raises(TypeError) as raised:
        require(Start(2), FiniteState, "forward_backward", "kalman_filter")
    for word in ("forward_backward", "Start", "FiniteState", "kalman_filter"):
        assert word in str(raised.value)


def test_the_base_sequence_is_the_loop():
    memory = Leak(2, 1)
    states, values = torch.randn(4, 3, 5, 2), torch.randn(3, 5, 1)
    mask, step = torch.rand(3, 5, 1) < 0.5, torch.ones(5, 1)
    before, after, final = memory.sequence(states, values, mask, step, None)
    m = memory.first.expand(4, 3, 2)
    for k in range(5):
        torch.testing.assert_close(before[..., k, :], m)
        m = m + states[..., k, :] @ memory.state_weight.T
        torch.testing.assert_close(after[..., k, :], m)
        m = memory.keep * m + (mask[:, k] * values[:, k]) @ memory.value_weight.T
    torch.testing.assert_close(final.squeeze(-2), m)


def test_a_memory_of_states_needs_no_values_and_one_of_observations_does():
    states, step = torch.randn(3, 5, 2), torch.ones(5, 1)
    assert StateLeak(2).sequence(states, None, None, step, None)[0].shape == (3, 5, 2)
    with pytest.raises(ValueError, match="values"):
        Leak(2, 1).sequence(states, None, None, step, None)


def test_the_base_sequence_cannot_resume_and_says_so():
    memory = StateLeak(2)
    with pytest.raises(NotImplementedError, match="carry"):
        memory.sequence(torch.randn(5, 2), None, None, torch.ones(5, 1), None, carry=memory.start(())[0])
