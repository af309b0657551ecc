"""The operators of particle filters: compiled equals plain, no index leaves its range, and the normals are normal."""

import math

import pytest
import torch

from pyro_ssm.ops import compiled, normalise, normalise_reference, standard_normals
from pyro_ssm.ops.gaussian_particles import affine_draw, affine_draw_reference, normal_density, normal_density_reference
from pyro_ssm.ops.resampling import SCHEMES, chosen_particles, resample_some

D = torch.float64
needs_library = pytest.mark.skipif(
    compiled.library().functions is None, reason=f"the compiled library is not in use: {compiled.library().reason}"
)


def rand(*shape, dtype=D, seed=0):
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def plain(monkeypatch):
    """A function that evaluates another without the compiled library."""

    def evaluate(function):
        with monkeypatch.context() as patch:
            patch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
            return function()

    return evaluate


SHAPES = [(1,), (7,), (64,), (1000,), (5, 1), (1, 3), (33, 2), (40, 3), (257, 32), (65, 64), (50, 70), (9, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalise_is_its_definition(shape, dtype):
    x, factor = 5 * rand(*shape, dtype=dtype), 300 * rand(*shape, dtype=dtype, seed=1)
    factor[:1] = -math.inf if shape[0] > 2 else 0.0
    wanted = (x.double() + factor.double()) if dtype == D else (x + factor).double()
    total = wanted.logsumexp(0)
    weights = (wanted - total).exp()
    found = normalise(x, factor)
    tolerance = 1e-12 if dtype == D else 1e-5
    torch.testing.assert_close(found.log_total.double(), total, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.weights.double(), weights, rtol=tolerance, atol=1e-300 if dtype == D else 1e-30)
    torch.testing.assert_close(found.log_weights.double(), wanted - total, rtol=tolerance, atol=10 * tolerance)
    torch.testing.assert_close(found.ess.double(), 1 / weights.square().sum(0), rtol=10 * tolerance, atol=0)
    assert (found.weights[wanted == -math.inf] == 0).all()


@pytest.mark.parametrize("batch", [(), (3,)])
def test_normalise_shows_what_went_wrong(batch):
    x = rand(6, *batch)
    dead, broken, infinite = torch.full_like(x, -math.inf), x.clone(), x.clone()
    broken[2], infinite[2] = math.nan, math.inf
    assert (normalise(dead).log_total == -math.inf).all() and normalise(dead).weights.isnan().all()
    assert normalise(broken).log_total.isnan().all() and normalise(broken).weights.isnan().all()
    assert not normalise(infinite).log_total.isfinite().any()
    only = dead.clone()
    only[4] = 3.0
    assert (normalise(only).log_total == 3).all() and (normalise(only).ess == 1).all()
    mixed = dead.clone()
    mixed[1] = math.nan
    assert normalise(mixed).log_total.isnan().all()


def test_normalise_broadcasts_and_takes_any_memory():
    x, factor = rand(3, 8).mT, rand(8, 1, seed=1)
    for one, other in ((x, factor), (x, torch.zeros(())), (torch.zeros(()).expand(8, 3).to(D), x), (x, None)):
        for mine, wanted in zip(normalise(one, other), normalise_reference(one, other), strict=True):
            torch.testing.assert_close(mine, wanted)


def test_normalise_is_differentiable():
    x, factor = rand(5, 2).requires_grad_(), rand(5, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, f: tuple(normalise(x, f)), (x, factor))
    assert torch.autograd.gradcheck(lambda x: tuple(normalise(x)), (x[:, 0].detach().requires_grad_(),))
    grads = torch.func.grad(lambda x: normalise(x).ess.sum())(x.detach())
    torch.testing.assert_close(grads, torch.autograd.grad(normalise(x).ess.sum(), x)[0])
    rows = torch.func.vmap(lambda x: normalise(x).log_total)(rand(4, 5))
    torch.testing.assert_close(rows, rand(4, 5).logsumexp(-1))


def test_normalise_is_an_operator():
    torch.library.opcheck(torch.ops.pyro_ssm.normalise.default, (rand(6, 3),))
    torch.library.opcheck(torch.ops.pyro_ssm.normalise.default, (rand(6),))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("shape", [(1,), (5,), (511,), (512,), (5000,), (3, 1), (700, 2), (40, 9), (20, 2, 3)], ids=str)
@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_compiled_ancestors_are_the_plain_ones(name, shape, dtype, plain):
    for seed in range(3):
        weights = (2 * rand(*shape, dtype=dtype, seed=seed)).exp()
        weights[rand(*shape, seed=seed + 5) > 1] = 0  # the first and the last among them, now and then
        weights[shape[0] // 2] = 1.0
        generator = torch.Generator().manual_seed(seed)
        u = torch.rand((SCHEMES[name].rows(shape[0]), *shape[1:]), dtype=D, generator=generator)
        found = SCHEMES[name].ancestors(weights, u)
        assert torch.equal(found, plain(lambda: SCHEMES[name].ancestors(weights, u)))  # noqa: B023
        assert (weights.gather(0, found) > 0).all()
        if len(shape) > 1:
            need = torch.arange(weights[0].numel()).reshape(shape[1:]) % 3 == 1
            some = resample_some(SCHEMES[name].ancestors, weights, u, need)
            itself = torch.arange(shape[0]).reshape((-1,) + (1,) * (len(shape) - 1))
            assert torch.equal(some, torch.where(need, found, itself))


@pytest.mark.parametrize("u", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("name", ["systematic", "stratified"])
def test_uniforms_at_the_ends_of_their_range(name, u):
    for num in (1, 4, 600, 4096):
        weights = torch.full((num,), 0.1)
        uniforms = torch.full((SCHEMES[name].rows(num),), u, dtype=D)
        found = SCHEMES[name].ancestors(weights, uniforms)
        assert int(found.min()) >= 0 and int(found.max()) < num and (found.diff() >= 0).all()
        weights[-num // 2 :] = 0
        assert num == 1 or int(SCHEMES[name].ancestors(weights, uniforms).max()) < num - num // 2


@pytest.mark.parametrize("event", [(), (1,), (3,), (2, 2)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, D, torch.int64, torch.bool])
def test_chosen_particles(event, batch, dtype):
    x = (3 * rand(6, *batch, *event)).to(dtype)
    ancestors = torch.randint(6, (5, *batch))
    index = ancestors.reshape(ancestors.shape + (1,) * len(event)).expand(ancestors.shape + event)
    assert torch.equal(chosen_particles(x, ancestors, torch.Size(batch)), x.gather(0, index))
    if dtype == D:
        x.requires_grad_()
        assert torch.autograd.gradcheck(lambda x: chosen_particles(x, ancestors, torch.Size(batch)), (x,))


def test_an_ancestor_out_of_range_is_refused():
    for wrong in (6, -1):
        with pytest.raises((IndexError, RuntimeError), match="range|must lie|out of"):
            chosen_particles(rand(6), torch.tensor([0, wrong]), torch.Size())


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_affine_draw(dim, batch, dtype):
    state, noise = rand(7, *batch, 1, dim, dtype=dtype), rand(7, *batch, 1, dim, dtype=dtype, seed=1)
    matrix, offset, scale = rand(1, dim, dim, dtype=dtype), rand(dim, dtype=dtype), rand(1, dim, dtype=dtype).exp()
    own = rand(*batch, 1, dim, dim, dtype=dtype), rand(*batch, 1, dim, dtype=dtype), rand(*batch, 1, dim, dtype=dtype)
    for parts in ((matrix, offset, scale), own):
        mine, wanted = affine_draw(state, *parts, noise), affine_draw_reference(state, *parts, noise)
        torch.testing.assert_close(mine, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize(
    "shape", [(7, 1, 1), (300, 1, 3), (1, 1, 2), (70, 4, 1, 1), (90, 4, 1, 3), (3, 3, 1, 1)], ids=str
)
def test_normal_density(shape, dtype):
    forms = [shape, shape[1:], shape[-1:], (1,) * len(shape), (), (shape[0],) + (1,) * (len(shape) - 1)]
    for i, v in enumerate(forms):
        for m in forms:
            for s in forms:
                value, loc, scale = rand(*v, dtype=dtype), rand(*m, dtype=dtype, seed=i), rand(*s, dtype=dtype).exp()
                if len(torch.broadcast_shapes(v, m, s)) < 3:
                    continue
                wanted = torch.distributions.Normal(loc.double(), scale.double()).log_prob(value.double())
                wanted = wanted.sum(-1).squeeze(-1)
                tolerance = 1e-12 if dtype == D else 2e-5
                for function in (normal_density, normal_density_reference):
                    found = function(value, loc, scale)
                    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


def test_density_of_extreme_scales():
    scale = torch.tensor([1e-42, 1e-38, 1e-30, 1.0, 1e30, 3e38, math.inf, 0.0, -1.0, math.nan]).reshape(-1, 1, 1)
    mine, wanted = (f(torch.zeros(1, 1), torch.zeros(1), scale) for f in (normal_density, normal_density_reference))
    torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=0, equal_nan=True)


@needs_library
def test_normals_repeat_and_differ():
    torch.manual_seed(0)
    one, two = standard_normals((100_003,)), standard_normals((100_003,))
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        again = standard_normals((100_003,))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, again) and abs(float(torch.corrcoef(torch.stack([one, two]))[0, 1])) < 0.015
    torch.manual_seed(0)
    assert torch.equal(standard_normals((64,)), one[:64])  # a chunk begins the same whatever its length
    assert standard_normals((0,)).shape == (0,) and standard_normals((3, 2), dtype=D).dtype == D


@needs_library
def test_normals_are_normal():
    """Moments, quantiles (a chi-square over 200 cells) and tails; independence of neighbours, of squares, of lanes."""
    torch.manual_seed(11)
    num = 2_000_000
    x = standard_normals((num,)).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((x**power).mean()) - moment) < 4.5 * math.sqrt(variance / num), power
    edges = torch.special.ndtri(torch.arange(1, 200, dtype=D) / 200)
    counts = torch.bincount(torch.bucketize(x, edges), minlength=200).double()
    chi_square = float(((counts - num / 200) ** 2 / (num / 200)).sum())
    assert abs(chi_square - 199) < 4.5 * math.sqrt(2 * 199)
    for bound in (3.0, 4.0):
        tail = 2 * float(torch.special.ndtr(torch.tensor(-bound, dtype=D)))
        assert abs(float((x.abs() > bound).double().mean()) - tail) < 4.5 * math.sqrt(tail / num)
    for lag in (1, 2, 31, 32, 33, 64, 65536):  # lanes stand 32 apart, the two of a pair as well
        for y in (x, x.square() - 1):
            scale = float(y.square().mean())
            assert abs(float((y[:-lag] * y[lag:]).mean())) / scale < 4.5 / math.sqrt(num - lag), lag
