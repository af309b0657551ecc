import pickle

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_ssm.binding import bind, parameter_names
from pyro_ssm.blocks import MLP, Linear, activation_function, with_normal_priors


def test_is_layers_and_activations():
    network = MLP(2, (3, 4), 5, activation="tanh")
    x = torch.randn(6, 2)
    first, second, third = network.layers
    assert torch.equal(network(x), third(torch.tanh(second(torch.tanh(first(x))))))


def test_without_hidden_layers_is_affine():
    network = MLP(2, (), 5)
    x = torch.randn(6, 2)
    assert torch.equal(network(x), network.layers[0](x))


@pytest.mark.parametrize("name", ["elu", "gelu", "relu", "sigmoid", "silu", "softplus", "tanh"])
def test_activations_are_those_of_their_names(name):
    x = torch.linspace(-3, 3, 7)
    wanted = {"silu": nn.SiLU(), "gelu": nn.GELU(), "elu": nn.ELU(), "softplus": nn.Softplus()}
    torch.testing.assert_close(activation_function(name)(x), wanted.get(name, getattr(torch, name, None))(x))


def test_draws_equal_a_loop():
    network = MLP(2, (3, 4), 5)
    values = {name: torch.randn(6, *network.get_parameter(name).shape) for name in parameter_names(network)}
    x = torch.randn(7, 2)
    together = bind(network, values)(x)
    alone = [bind(network, {name: value[s] for name, value in values.items()})(x) for s in range(6)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_normal_priors_have_the_width_they_say():
    network = with_normal_priors(MLP(4, 3, 2), scale=2.0)
    trace = poutine.trace(network).get_trace(torch.zeros(5, 4))
    sites = {name: site["fn"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    assert list(sites) == [f"layers.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")]
    assert sites["layers.0.weight"].event_shape == (3, 4)
    torch.testing.assert_close(sites["layers.0.weight"].variance, torch.ones(3, 4))  # 2^2 / 4
    torch.testing.assert_close(sites["layers.1.weight"].variance, torch.full((2, 3), 4 / 3))
    torch.testing.assert_close(sites["layers.1.bias"].variance, torch.full((2,), 4.0))


def test_priors_may_be_set_one_by_one_and_enter_through_bind():
    network = MLP(1, 3, 1)
    with_normal_priors(network.layers[0])
    weight, bias = torch.randn(4, 3, 1), torch.randn(4, 3)
    x = torch.randn(5, 1)
    together = bind(network, {"layers.0.weight": weight, "layers.0.bias": bias})(x)
    last = network.layers[1]
    alone = [last((x @ w.T + b).relu()) for w, b in zip(weight, bias, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


def test_draws_in_a_plate_are_per_series():
    network = with_normal_priors(MLP(2, 3, 1))
    x = torch.randn(2, 6, 2)
    with pyro.plate("series", 2):
        bound = bind_in_trace(network)
    assert bound.layers[0].weight.shape == (2, 1, 3, 2)
    y = bound(x)
    for b in range(2):
        hidden = x[b] @ bound.layers[0].weight[b, 0].T + bound.layers[0].bias[b, 0]
        wanted = hidden.relu() @ bound.layers[1].weight[b, 0].T + bound.layers[1].bias[b, 0]
        torch.testing.assert_close(y[b], wanted)


def bind_in_trace(module):
    bound = []
    poutine.trace(lambda: bound.append(bind(module))).get_trace()
    return bound[0]


def test_pickles_with_and_without_priors():
    x = torch.randn(3, 2)
    network = MLP(2, (3,), 1, activation="gelu")
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), network(x))
    assert parameter_names(pickle.loads(pickle.dumps(with_normal_priors(network)))) == parameter_names(network)


def test_errors_say_what_is_wanted():
    with pytest.raises(ValueError, match="`activation` must be one of 'elu'"):
        MLP(1, 2, 1, activation="rleu")
    with pytest.raises(TypeError, match="name or a function"):
        MLP(1, 2, 1, activation=3)
    with pytest.raises(ValueError, match="`hidden` must be at least 1"):
        MLP(1, (2, 0), 1)
    with pytest.raises(ValueError, match=r"no blocks\.Linear below GRU"):
        with_normal_priors(nn.GRU(1, 1))
    with pytest.raises(ValueError, match="`scale` must be positive"):
        with_normal_priors(Linear(1, 1), scale=0.0)
