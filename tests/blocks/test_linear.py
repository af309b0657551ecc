import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pyro_ssm.binding import bind
from pyro_ssm.blocks import Linear, linear


def loop(x, weight, bias):
    """One product a row: weight and bias broadcast over all dims but their own."""
    lead = torch.broadcast_shapes(x.shape[:-1], weight.shape[:-2], bias.shape[:-1])
    rows = [t.expand(lead + t.shape[-d:]).reshape(-1, *t.shape[-d:]) for t, d in ((x, 1), (weight, 2), (bias, 1))]
    return torch.stack([w @ v + b for v, w, b in zip(*rows, strict=True)]).reshape(lead + weight.shape[-2:-1])


@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((5,), (), ()),
        ((3, 5), (), ()),
        ((5,), (4, 1), (4, 1)),  # draws
        ((3, 5), (4, 1, 1), (4, 1, 1)),  # draws against a batch
        ((3, 5), (3, 1), (3, 1)),  # plates
        ((3, 5), (4, 3, 1), (4, 1, 1)),  # draws of plates, shared bias
        ((3, 5), (1, 3, 1), (3, 1)),
        ((4, 3, 5), (4, 1, 1), ()),  # sampled states beside draws
        ((4, 3, 2, 5), (4, 1, 1, 1), (4, 3, 1, 1)),
        ((3, 5), (5,), (5,)),  # one matrix a step
        ((3, 5), (4, 1, 5), ()),
        ((3, 5), (), (4, 1, 1)),  # only the bias is drawn
        ((5,), (6, 4, 1, 1, 1), ()),  # more leading dims than x has
        ((1, 5), (4, 3, 1), (4, 3, 1)),
    ],
)
def test_equals_a_loop_over_rows(x, weight, bias):
    x = torch.randn(*x, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*weight, 7, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(*bias, 7, dtype=torch.float64, requires_grad=True)
    y = linear(x, weight, bias)
    torch.testing.assert_close(y, loop(x, weight, bias))
    got = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    wanted = torch.autograd.grad(loop(x, weight, bias).square().sum(), (x, weight, bias))
    torch.testing.assert_close(got, wanted)


def test_is_the_plain_linear_map_without_draws():
    torch.manual_seed(1)
    plain = nn.Linear(3, 4)
    torch.manual_seed(1)
    ours = Linear(3, 4)
    x = torch.randn(6, 5, 3)
    assert torch.equal(ours.weight, plain.weight) and torch.equal(ours(x), plain(x))
    assert torch.equal(bind(ours)(x), F.linear(x, ours.weight, ours.bias))


def test_without_bias():
    layer = Linear(3, 4, bias=False)
    x = torch.randn(5, 3)
    assert torch.equal(bind(layer)(x), x @ layer.weight.T)
    drawn = torch.randn(2, 4, 3)
    torch.testing.assert_close(bind(layer, {"weight": drawn})(x), torch.stack([x @ w.T for w in drawn]))
    assert repr(layer) == "Linear(3, 4, bias=False)"
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_shared_draws_are_not_copied_to_each_series():
    """The product with 50 draws of a (30, 30) matrix for 40 series never holds 50 x 40 matrices."""
    x, weight = torch.randn(40, 2, 30), torch.randn(50, 1, 1, 30, 30)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear(x, weight)
    largest = max(event.cpu_memory_usage for event in profile.key_averages())
    assert largest <= 4 * 50 * 40 * 2 * 30 * 2


def test_wrong_features_are_named():
    with pytest.raises(ValueError, match=r"linear map of 3 feature\(s\) got 2"):
        Linear(3, 4)(torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"weights of torch.float32 got x of torch.float64.*data.to\(dtype"):
        Linear(3, 4)(torch.zeros(5, 3, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):  # which casts by itself
        assert Linear(3, 4)(torch.zeros(5, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="in_features"):
        Linear(0, 4)
    with pytest.raises(TypeError, match="out_features"):
        Linear(2, 1.5)
