"""A softplus network in pieces is the network layer by layer: values, gradients, second derivatives, transforms."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.blocks import MLP
from pyro_ssm.ops import softplus_network, softplus_network_reference

D = torch.float64
module = __import__("pyro_ssm.ops.softplus_network", fromlist=["_ROWS"])


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "_ROWS", 4)
    monkeypatch.setattr(module, "_LEAST", 1)


def parts(lead, sizes=(3, 5, 4, 2), dtype=D):
    x = torch.randn(*lead, sizes[0], dtype=dtype, requires_grad=True)
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return x, [torch.randn(*s, dtype=dtype, requires_grad=True) for i, o in pairs for s in ((o, i), (o,))]


@pytest.mark.parametrize("lead", [(1,), (4,), (9,), (2, 3, 5), ()])
@pytest.mark.parametrize("sizes", [(3, 5, 4, 2), (1, 6, 1)])
def test_values_and_gradients_are_those_of_the_layers(lead, sizes, small_pieces):
    x, network = parts(lead, sizes)
    found, wanted = softplus_network(x, network), softplus_network_reference(x, network)
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(softplus_network(x.detach(), [w.detach() for w in network]), wanted.detach())
    weight = torch.randn_like(wanted)
    for one, other in zip(
        *(torch.autograd.grad((weight * y).sum(), [x, *network]) for y in (found, wanted)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_derivatives_by_finite_differences_and_of_some_arguments_alone(small_pieces):
    x, network = parts((6,), (2, 3, 2))
    assert gradcheck(lambda x, *w: softplus_network(x, w), (x, *network))
    assert gradgradcheck(lambda x, *w: softplus_network(x, w), (x, *network))
    whole = torch.autograd.grad(softplus_network(x, network).sum(), [x, network[2]])
    frozen = [w.detach() for w in network]
    torch.testing.assert_close(torch.autograd.grad(softplus_network(x, frozen).sum(), x)[0], whole[0])
    one = [w if i == 2 else f for i, (w, f) in enumerate(zip(network, frozen, strict=True))]
    torch.testing.assert_close(torch.autograd.grad(softplus_network(x.detach(), one).sum(), network[2])[0], whole[1])


def test_transposed_rows_and_none(small_pieces):
    x, network = parts((3, 7))
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(softplus_network(turned, network), softplus_network_reference(x, network))
    assert softplus_network(torch.zeros(0, 3, dtype=D), network).shape == (0, 2)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp uses it
def test_transforms_look_into_it(small_pieces):
    x, network = parts((5,))
    x, network = x.detach(), [w.detach() for w in network]
    found = torch.func.vmap(torch.func.jacrev(lambda x: softplus_network(x, network)))(x)
    wanted = torch.func.vmap(torch.func.jacrev(lambda x: softplus_network_reference(x, network)))(x)
    torch.testing.assert_close(found, wanted)
    tangent = torch.randn_like(x)
    found = torch.func.jvp(lambda x: softplus_network(x, network), (x,), (tangent,))
    wanted = torch.func.jvp(lambda x: softplus_network_reference(x, network), (x,), (tangent,))
    torch.testing.assert_close(found, wanted)


def test_many_rows_of_an_mlp_go_in_pieces_and_are_the_same(monkeypatch):
    net = MLP(3, (16, 16), 2, "softplus")
    x = torch.randn(5, 1000, 3, requires_grad=True)
    calls = []
    inner = module._SoftplusNetwork.apply
    monkeypatch.setattr(module._SoftplusNetwork, "apply", lambda *a: calls.append(1) or inner(*a))
    found = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    assert calls == [1]
    plain = softplus_network_reference(x, list(net.parameters())).square().sum()
    for one, other in zip(found, torch.autograd.grad(plain, [x, *net.parameters()]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert MLP(3, 4, 2, "tanh").softplus_layers() is None
    with pytest.raises(ValueError, match="3 feature"):
        net(torch.zeros(5, 2))
