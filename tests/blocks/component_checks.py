"""What every component is held to: draws equal a loop, gradients reach all parameters, it pickles, dtypes hold."""

import pickle

import pytest
import torch
from pyro.nn import PyroModule

from pyro_ssm.binding import bind, parameter_names
from pyro_ssm.components import Emission, Initial

TIMES = torch.tensor([0.0, 0.5, 2.0, 2.25, 4.0, 5.0], dtype=torch.float64)
STEPS = 5


def call(component, state, inputs=None, memory=None):
    """The law of any component on the times above; an initial law sees the first."""
    if isinstance(component, Initial):
        first = None if inputs is None else inputs[..., :1, :]
        return component(TIMES[:1].expand(state.shape[:-2] + (1,)), first)
    if isinstance(component, Emission):
        return component(state, TIMES[:-1], inputs, memory)
    return component(state, TIMES[:-1], TIMES[1:], inputs, memory)


def tensors(component, *lead):
    """A state, inputs and a memory of the sizes that the component was built with."""
    sizes = component.state_dim, getattr(component, "input_dim", 0), getattr(component, "memory_dim", 0)
    return [torch.randn(*lead, STEPS, size) if size else None for size in sizes]


def owner(component, name):
    path, _, attribute = name.rpartition(".")
    return component.get_submodule(path), attribute


def varied(component, *lead):
    """Another value of every parameter for each of ``lead``, ``(*lead, *event)``; constrained ones stay in place."""
    values = {}
    for name in parameter_names(component):
        module, attribute = owner(component, name)
        value = getattr(module, attribute).detach()
        noise = torch.rand(lead + (1,) * value.dim()) if attribute in module._pyro_params else None
        if noise is not None:
            values[name] = value * (1 + noise)
        else:
            values[name] = value + 0.3 * torch.randn(lead + value.shape)
    return values


def check_component(make):
    """All checks; ``make()`` builds the component, whose series number 2 equals its state dimension."""
    draws_equal_a_loop(make())
    plates_equal_a_loop(make())
    draws_of_plates_equal_a_loop(make())
    gradients_reach_every_parameter(make())
    batch_equals_a_loop(make())
    pickles(make())
    follows_its_seed(make)
    keeps_dtypes(make())
    refuses_wrong_sizes(make())
    assert "dim=" in repr(make())


def draws_equal_a_loop(component):
    values = varied(component, 3)
    state, inputs, memory = tensors(component)
    law = call(bind(component, values), state, inputs, memory)
    y = law.sample()
    for s in range(3):
        alone = call(bind(component, {k: v[s] for k, v in values.items()}), state, inputs, memory)
        torch.testing.assert_close(law.log_prob(y)[s], alone.log_prob(y[s]))


def plates_equal_a_loop(component):
    series = 2
    values = varied(component, series)
    state, inputs, memory = tensors(component, series)
    law = call(bind(component, values), state, inputs, memory)
    y = law.sample()
    for b in range(series):
        own = [x if x is None else x[b] for x in (state, inputs, memory)]
        alone = call(bind(component, {k: v[b] for k, v in values.items()}), *own)
        torch.testing.assert_close(law.log_prob(y)[b], alone.log_prob(y[b]))


def draws_of_plates_equal_a_loop(component):
    """Draws ``(3, 1)`` of some parameters and ``(3, 2)`` of others against a batch of two series."""
    values = varied(component, 3, 2)
    shared = list(values)[::2]
    values.update({name: values[name][:, :1] for name in shared})
    state, inputs, memory = tensors(component, 2)
    law = call(bind(component, values), state, inputs, memory)
    y = law.sample()
    assert law.batch_shape[:2] == (3, 2)
    for s in range(3):
        for b in range(2):
            own = [x if x is None else x[b] for x in (state, inputs, memory)]
            value = {k: v[s, 0 if k in shared else b] for k, v in values.items()}
            torch.testing.assert_close(law.log_prob(y)[s, b], call(bind(component, value), *own).log_prob(y[s, b]))


def gradients_reach_every_parameter(component):
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    law = call(bind(component), *tensors(component, 4))
    law.log_prob(law.sample()).sum().backward()
    for name, parameter in component.named_parameters():
        grad = parameter.grad
        assert grad is not None and torch.isfinite(grad).all() and bool((grad != 0).any()), name


def batch_equals_a_loop(component):
    component = bind(component)
    state, inputs, memory = tensors(component, 2, 3)
    law = call(component, state, inputs, memory)
    y = law.sample()
    for i in range(2):
        for j in range(3):
            alone = call(component, *[x if x is None else x[i, j] for x in (state, inputs, memory)])
            torch.testing.assert_close(law.log_prob(y)[i, j], alone.log_prob(y[i, j]))


def pickles(component):
    given = tensors(component)
    law = call(bind(component), *given)
    y = law.sample()
    again = call(bind(pickle.loads(pickle.dumps(component))), *given)
    assert torch.equal(law.log_prob(y), again.log_prob(y))


def follows_its_seed(make):
    made = []
    for _ in range(2):
        torch.manual_seed(7)
        made.append(make().state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def keeps_dtypes(component):
    """Float64 times promote nothing; a float64 model works in float64."""
    state, inputs, memory = tensors(component)
    law = call(bind(component), state, inputs, memory)
    y = law.sample()
    assert y.dtype == law.log_prob(y).dtype == torch.float32
    component.to(torch.float64)
    double = [x if x is None else x.double() for x in (state, inputs, memory)]
    exact = call(bind(component), *double).log_prob(y.double())
    assert exact.dtype == torch.float64
    torch.testing.assert_close(law.log_prob(y).double(), exact, rtol=1e-4, atol=1e-4)


def refuses_wrong_sizes(component):
    state, inputs, memory = tensors(component)
    bound = bind(component)
    if not isinstance(component, Initial):
        with pytest.raises(ValueError, match=f"state_dim={component.state_dim}"):
            call(bound, torch.zeros(STEPS, component.state_dim + 1), inputs, memory)
    if inputs is not None:
        with pytest.raises(ValueError, match=r"needs `inputs` of shape"):
            call(bound, state, None, memory)
        with pytest.raises(ValueError, match=r"its last dimension must be"):
            call(bound, state, inputs[..., :-1], memory)
        assert not torch.equal(density(bound, state, inputs, memory), density(bound, state, inputs + 1, memory))
    if memory is not None:
        with pytest.raises(ValueError, match=r"needs `memory` of shape"):
            call(bound, state, inputs, None)
        assert not torch.equal(density(bound, state, inputs, memory), density(bound, state, inputs, memory + 1))
    if inputs is None:
        ignored = torch.randn(STEPS, 7)
        y = call(bound, state).sample()
        assert torch.equal(call(bound, state).log_prob(y), call(bound, state, ignored).log_prob(y))


def density(component, *given):
    """The log-density at zero, which moves when the law's location does."""
    y = torch.zeros(component.obs_dim if isinstance(component, Emission) else component.state_dim)
    return call(component, *given).log_prob(y)


def jitter(component: PyroModule):
    """The component with weights that start at zero or the identity moved to generic values."""
    with torch.no_grad():
        for parameter in component.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return component
