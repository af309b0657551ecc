"""The fast Kalman filter equals its reference: compiled and in plain torch, values and gradients."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import (
    compiled,
    kalman_filter,
    kalman_filter_reference,
    kalman_kernel,
    kalman_log_likelihood,
    kalman_problem,
)
from pyro_ssm.ops.kalman_doubling import predicted_covariances
from tests.ops.kalman_systems import NAMES, D, ends, everything, holes, rand, system


@pytest.fixture(params=["compiled", "torch"])
def engine(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))
    elif compiled.library().functions is None:
        pytest.skip(f"the compiled library is not in use: {compiled.library().reason}")
    return request.param


def case(name):
    """Arguments, mask and keywords of a case."""
    torch.manual_seed(3)
    if name == "one step":
        args = system(2, 3, 1)
        return args, everything(args[0]), {}
    if name == "two steps, one state":
        args = system(1, 1, 2)
        return args, everything(args[0]), {}
    if name == "settles":
        args = system(4, 2, 301)
        return args, everything(args[0]), {}
    if name == "settles after a gap":
        args = system(3, 2, 200, batch=(3,))
        mask = everything(args[0])
        mask[:, 5:9] = False
        mask[:, 11, 0] = False
        return args, mask, {}
    if name == "settles, ragged":
        args = system(3, 2, 150, batch=(9,))
        steps = ends((9,), 150)
        return args, steps.unsqueeze(-1).expand(args[0].shape), {"step_mask": steps}
    if name == "settles, never forgets":
        args = system(3, 1, 120, batch=(2,))
        for i, still in ((2, 0.0), (3, 1.0), (5, 0.0)):  # a constant state that is known
            args[i] = args[i].clone()
            args[i][..., 2, :], args[i][..., :, 2] = 0.0, 0.0
            args[i][..., 2, 2] = still
        return args, everything(args[0]), {}
    if name == "n = 13, p = 1, sparse":
        args = system(13, 1, 40)
        args[3] = torch.diag_embed(torch.ones(12, dtype=D), -1).unsqueeze(0)
        args[3][:, 0] = -0.5
        return args, everything(args[0]), {}
    if name == "n = 17, p = 3":
        args = system(17, 3, 20, batch=(2,))
        return args, holes(args[0]), {}
    if name == "more observations than states":
        args = system(2, 5, 12, batch=(3,))
        return args, holes(args[0]), {}
    if name == "varying":
        args = system(5, 2, 15, batch=(3,), varying=True)
        return args, holes(args[0]), {}
    if name == "varying, shared mask":
        args = system(5, 2, 15, batch=(9,), varying=True)
        return args, holes(args[0][0]).expand(args[0].shape), {}
    if name == "varying, ragged, over blocks of times":
        args = system(5, 2, 65, batch=(9,), varying=True)
        steps = ends((9,), 65)
        pattern = holes(args[0][0])
        pattern[31:34] = False
        return args, steps.unsqueeze(-1) & pattern, {"step_mask": steps}
    if name == "own parameters":
        args = system(3, 2, 14, batch=(4,), lead=(4,))
        return args, holes(args[0]), {}
    if name == "draws":
        args = system(3, 2, 14, batch=(4,), lead=(5, 1))
        return args, everything(args[0]), {}
    if name == "draws by series, ragged":
        args = system(3, 2, 14, batch=(2, 4), lead=(5, 1, 4))
        args[1], args[4] = rand(4, 3), rand(5, 1, 1, 1, 3)
        steps = ends((2, 4), 14)
        return args, holes(args[0]) & steps.unsqueeze(-1), {"step_mask": steps}
    if name == "steps switched off":
        args = system(3, 2, 14, batch=(4,))
        return args, holes(args[0]), {"step_mask": torch.rand(4, 14) > 0.3}
    if name == "refined":
        args = system(3, 2, 20, batch=(4,))
        args[0] = args[0][..., ::3, :]
        return args, holes(args[0]), {"num_times": 20, "observed_index": list(range(0, 20, 3))}
    if name == "refined, ragged":
        args = system(3, 2, 20, batch=(4,))
        args[0] = args[0][..., ::3, :]
        steps = ends((4,), 20)
        mask = steps[:, ::3].unsqueeze(-1).expand(args[0].shape)
        return args, mask, {"num_times": 20, "observed_index": list(range(0, 20, 3)), "step_mask": steps}
    if name == "alone, with gaps":
        args = system(4, 2, 40)
        mask = everything(args[0])
        mask[0], mask[7:9, 1], mask[9, 0], mask[20:23] = False, False, False, False
        return args, mask, {}
    if name == "alone, varying, steps switched off":
        args = system(3, 2, 14, varying=True)
        return args, holes(args[0]), {"step_mask": torch.rand(14) > 0.3}
    if name == "alone, refined":
        args = system(3, 2, 20)
        args[0] = args[0][::3].contiguous()
        return args, everything(args[0]), {"num_times": 20, "observed_index": list(range(0, 20, 3))}
    if name == "nothing is seen":
        args = system(3, 2, 9, batch=(2,))
        return args, ~everything(args[0]), {}
    if name == "singular":
        args = system(3, 2, 9, batch=(2,))
        args[2], args[5], args[8] = 0 * args[2], 0 * args[5], args[8].clone()
        args[5][..., 0, 0], args[8][..., 1, :] = 1.0, 0.0  # one noisy state, one exact sensor
        args[8][..., 0, 0], args[6][..., 1, 0] = 1.0, 1.0
        args[1], args[2] = args[1], torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=D))
        return args, everything(args[0]), {}
    raise KeyError(name)


CASES = (
    "one step", "two steps, one state", "settles", "settles after a gap", "settles, ragged", "settles, never forgets",
    "n = 13, p = 1, sparse", "n = 17, p = 3", "more observations than states", "varying", "varying, shared mask",
    "varying, ragged, over blocks of times",
    "own parameters", "draws", "draws by series, ragged", "steps switched off", "refined", "refined, ragged",
    "nothing is seen", "singular", "alone, with gaps", "alone, varying, steps switched off", "alone, refined",
)  # fmt: skip


def covariance(root):
    return root @ root.mT


def close(got, wanted, tolerance):
    """Relative to the largest entry: small entries of a gradient are sums that cancel."""
    got, wanted = torch.broadcast_tensors(got, wanted)
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * max(1.0, float(wanted.abs().max())))


@pytest.mark.parametrize("name", CASES)
def test_values_equal_the_reference(engine, name):
    args, mask, times = case(name)
    fast, plain = (f(args[0], mask, *args[1:], **times) for f in (kalman_filter, kalman_filter_reference))
    for field in ("log_likelihood", "filtered_mean", "predicted_mean"):
        close(getattr(fast, field), getattr(plain, field), 1e-11)
    for field in ("filtered_scale_tril", "predicted_scale_tril"):
        close(covariance(getattr(fast, field)), covariance(getattr(plain, field)), 1e-11)
        assert (getattr(fast, field).triu(1) == 0).all()
    assert fast.log_likelihood.shape == fast.filtered_mean.shape[:-1] == fast.predicted_mean.shape[:-1]
    terms = kalman_log_likelihood(args[0], mask, *args[1:], **times)
    torch.testing.assert_close(terms, fast.log_likelihood, rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("of", ["total", "terms", "means"])
def test_gradients_equal_the_reference(engine, name, of):
    args, mask, times = case(name)
    found = []
    for f in (kalman_filter, kalman_filter_reference):
        inputs = [x.clone().requires_grad_() for x in args]
        steps = f(inputs[0], mask, *inputs[1:], **times)
        torch.manual_seed(0)
        terms, filtered, predicted = (
            x.expand(steps.filtered_mean.shape[: x.dim() - e] + x.shape[x.dim() - e :])
            for x, e in ((steps.log_likelihood, 1), (steps.filtered_mean, 2), (steps.predicted_mean, 2))
        )
        loss = (terms * (torch.randn_like(terms) if of == "terms" else 1.0)).sum()
        if of == "means":
            loss = loss + (filtered * torch.randn_like(filtered)).sum() + (predicted * torch.randn_like(filtered)).sum()
        found.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True) if loss.requires_grad
                     else [torch.zeros_like(x) for x in inputs])  # fmt: skip
    for label, fast, plain in zip(NAMES, *found, strict=True):
        scale = max(1.0, float(plain.abs().max()))
        torch.testing.assert_close(fast, plain, rtol=0, atol=1e-9 * scale, msg=lambda text, label=label: label + text)


def test_gradients_of_square_roots_go_through_the_reference(engine):
    args, mask, times = case("own parameters")
    found = []
    for f in (kalman_filter, kalman_filter_reference):
        inputs = [x.clone().requires_grad_() for x in args]
        steps = f(inputs[0], mask, *inputs[1:], **times)
        loss = covariance(steps.filtered_scale_tril).sum() + steps.predicted_scale_tril[..., 0, 0].sum()
        found.append(torch.autograd.grad(loss, inputs[2:4]))
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives_by_differences(engine, masked):
    torch.manual_seed(1)
    args = [x.requires_grad_() for x in system(2, 2, 3)]
    mask = holes(args[0]) if masked else everything(args[0])

    def total(*inputs):
        return kalman_log_likelihood(inputs[0], mask, *inputs[1:]).sum()

    assert gradcheck(total, args)
    assert gradgradcheck(total, args)


def test_only_what_is_wanted_is_differentiated(engine):
    args, mask, _ = case("settles")
    whole = [x.clone().requires_grad_() for x in args]
    gradients = torch.autograd.grad(kalman_log_likelihood(whole[0], mask, *whole[1:]).sum(), whole)
    for i, expected in enumerate(gradients):
        inputs = [x.clone().requires_grad_(k == i) for k, x in enumerate(args)]
        kalman_log_likelihood(inputs[0], mask, *inputs[1:]).sum().backward()
        torch.testing.assert_close(inputs[i].grad, expected, rtol=1e-12, atol=1e-12)
        assert all(x.grad is None for k, x in enumerate(inputs) if k != i)


def test_batch_is_a_loop(engine):
    args, mask, _ = case("own parameters")
    whole = kalman_filter(args[0], mask, *args[1:])
    for i in range(4):
        one = [x[i] if x.dim() > e else x for x, e in zip(args, (2, 1, 2, 3, 2, 3, 3, 2, 3), strict=True)]
        alone = kalman_filter(one[0], mask[i], *one[1:])
        for all_series, series in zip(whole, alone, strict=True):
            torch.testing.assert_close(all_series[i], series, rtol=1e-12, atol=1e-12)


def test_masked_entries_are_never_read_and_add_exactly_zero(engine):
    args, mask, _ = case("varying")
    mask[:, 4] = False
    clean = kalman_filter(args[0], mask, *args[1:])
    dirty = torch.where(mask, args[0], torch.nan)
    dirty.requires_grad_()
    steps = kalman_filter(dirty, mask, *args[1:])
    assert torch.equal(steps.log_likelihood, clean.log_likelihood)
    assert (steps.log_likelihood[:, 4] == 0).all()
    steps.log_likelihood.sum().backward()
    assert (dirty.grad[~mask] == 0).all() and (dirty.grad[mask] != 0).all()


def test_padding_changes_nothing(engine):
    args, _, _ = case("own parameters")
    longer = [x.clone() for x in args]
    longer[0] = torch.cat([args[0], 1e3 * rand(4, 6, 2)], -2)
    steps = torch.arange(20).expand(4, 20) < 14
    mask = steps.unsqueeze(-1).expand(4, 20, 2)
    found = []
    for inputs, seen, on in ((args, everything(args[0]), None), (longer, mask, steps)):
        inputs = [x.clone().requires_grad_() for x in inputs]
        terms = kalman_log_likelihood(inputs[0], seen, *inputs[1:], step_mask=on)
        found.append((terms, torch.autograd.grad(terms.sum(), inputs[1:])))
    torch.testing.assert_close(found[1][0][:, :14], found[0][0], rtol=1e-13, atol=1e-13)
    assert (found[1][0][:, 14:] == 0).all()
    for padded, plain in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)


def test_empty_batch(engine):
    args = [x.requires_grad_() for x in system(2, 1, 5, batch=(0,))]
    steps = kalman_filter(args[0], everything(args[0]), *args[1:])
    assert steps.log_likelihood.shape == (0, 5) and steps.filtered_mean.shape == (0, 5, 2)
    for gradient in torch.autograd.grad(steps.log_likelihood.sum(), args):
        assert (gradient == 0).all()


def test_other_layouts_in_memory(engine):
    args, mask, _ = case("own parameters")
    expected = kalman_filter(args[0], mask, *args[1:])
    turned = [x.mT.contiguous().mT if x.dim() > 1 else x for x in args]
    turned[0] = turned[0][:, :, None].expand(-1, -1, 3, -1)[:, :, 1]
    for got, wanted in zip(kalman_filter(turned[0], mask.mT.contiguous().mT, *turned[1:]), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_float32_is_computed_in_float64(engine):
    args, mask, _ = case("settles")
    single = [x.float().requires_grad_() for x in args]
    double = [x.detach().double().requires_grad_() for x in single]
    found = []
    for inputs in (single, double):
        terms = kalman_log_likelihood(inputs[0], mask, *inputs[1:])
        found.append((terms, torch.autograd.grad(terms.sum(), inputs)))
    assert found[0][0].dtype == torch.float32
    torch.testing.assert_close(found[0][0], found[1][0].float(), rtol=0, atol=0)
    for low, high in zip(found[0][1], found[1][1], strict=True):
        assert low.dtype == torch.float32
        torch.testing.assert_close(low.double(), high, rtol=1e-6, atol=1e-6 * float(high.abs().max()))


def test_a_large_prior_beside_exact_sensors_keeps_its_digits(engine):
    """A prior deviation of 1e5 beside noise of 1e-4: the plain covariance update would lose every digit."""
    torch.manual_seed(0)
    args = system(4, 2, 30)
    args[2], args[8] = 1e5 * torch.eye(4, dtype=D), 1e-4 * torch.eye(2, dtype=D).unsqueeze(0)
    found = []
    for f in (kalman_filter, kalman_filter_reference):
        inputs = [x.clone().requires_grad_() for x in args]
        steps = f(inputs[0], everything(args[0]), *inputs[1:])
        found.append((steps, torch.autograd.grad(steps.log_likelihood.sum(), inputs[3:])))
    torch.testing.assert_close(found[0][0].log_likelihood, found[1][0].log_likelihood, rtol=1e-9, atol=1e-9)
    roots = [covariance(steps.filtered_scale_tril).diagonal(dim1=-2, dim2=-1) for steps, _ in found]
    torch.testing.assert_close(roots[0], roots[1], rtol=1e-6, atol=0)
    for fast, plain in zip(found[0][1], found[1][1], strict=True):
        close(fast, plain, 1e-6)


def test_sums_of_a_vague_state_that_nothing_has_seen_keep_their_digits(engine):
    """A level of deviation 1e6 and its running sum, first seen at the third time: they differ by far less."""
    one, zero = torch.ones(1, 1, dtype=D), torch.zeros(1, 2, dtype=D)
    F = torch.tensor([[[1.0, 0.0], [1.0, 1.0]]], dtype=D)
    Q = torch.tensor([[[0.5, 0.0], [0.0, 0.0]]], dtype=D)
    L = torch.tensor([[1e6, 0.0], [0.0, 0.0]], dtype=D)
    y = torch.tensor([0.0, 0.0, 3.1, 0.0, 0.0, 2.4], dtype=D).unsqueeze(-1)
    args = (zero[0], L, F, zero, Q, torch.ones(1, 1, 2, dtype=D), one[:1, 0:1], 0.3 * one.unsqueeze(0))
    mask = y != 0
    got, wanted = kalman_filter(y, mask, *args), kalman_filter_reference(y, mask, *args)
    close(got.log_likelihood, wanted.log_likelihood, 1e-9)
    close(got.filtered_mean, wanted.filtered_mean, 1e-9)
    for root, true in ((got[2], wanted[2]), (got[4], wanted[4])):
        size = true.square().sum(-1, keepdim=True).sqrt().clamp(min=1e-9)  # the sum is known at first
        close(root / size, true / size, 1e-8)


@pytest.mark.parametrize("step", [0, 3])
def test_a_singular_innovation_names_its_step(engine, step):
    """A known constant, seen without noise from ``step`` on."""
    one, zero = torch.ones(1, 1, 1, dtype=D), torch.zeros(1, 1, dtype=D)
    y = torch.ones(6, 1, dtype=D)
    mask = torch.arange(6).unsqueeze(-1) >= step
    with pytest.raises(torch.linalg.LinAlgError, match=f"step {step} .* is singular or not finite"):
        kalman_filter(y, mask, zero[0], 0 * one[0], one, zero, 0 * one, one, zero, 0 * one)


def test_two_exact_sensors_of_one_state_are_singular(engine):
    one, zero = torch.ones(1, 1, 1, dtype=D), torch.zeros(1, 1, dtype=D)
    H, R = torch.ones(1, 2, 1, dtype=D), torch.zeros(1, 2, 2, dtype=D)
    y = torch.ones(4, 2, dtype=D)
    with pytest.raises(torch.linalg.LinAlgError, match="step 0"):
        kalman_filter(y, everything(y), zero[0], one[0], one, zero, one, H, torch.zeros(1, 2, dtype=D), R)


def test_an_explosive_system_is_refused_where_it_overflows(engine):
    args = system(1, 1, 800, decay=10.0)
    mask = torch.arange(800).unsqueeze(-1) >= 700
    with pytest.raises(torch.linalg.LinAlgError, match=r"step \d+ .* not finite"):
        kalman_filter(args[0], mask, *args[1:])


def test_covariances_stand_still_within_the_stated_tolerance(engine):
    """With a mask that hides nothing but is told as varying, the recursion runs to the end."""
    args, mask, _ = case("settles")
    whole = kalman_filter_reference(args[0], mask, *args[1:])
    fast = kalman_filter(args[0], mask, *args[1:])
    exact, found = covariance(whole.predicted_scale_tril), covariance(fast.predicted_scale_tril)
    deviation = exact.diagonal(dim1=-2, dim2=-1).sqrt()
    assert ((found - exact).abs() / deviation.unsqueeze(-1) / deviation.unsqueeze(-2)).max() < 3e-12


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func.jvp uses it
def test_under_torch_func_the_reference_runs(engine):
    args, mask, _ = case("varying, shared mask")
    whole = kalman_log_likelihood(args[0], mask, *args[1:])
    mapped = torch.func.vmap(lambda y: kalman_log_likelihood(y, mask[0], *args[1:]))
    torch.testing.assert_close(mapped(args[0]), whole)

    def total(F):
        return kalman_log_likelihood(args[0], mask, *args[1:3], F, *args[4:]).sum()

    gradient = torch.func.grad(total)(args[3])
    direction = torch.randn_like(args[3])
    value, slope = torch.func.jvp(total, (args[3],), (direction,))
    torch.testing.assert_close(value, whole.sum())
    torch.testing.assert_close(slope, (gradient * direction).sum())


def test_compiles_as_one_graph(engine):
    args, mask, _ = case("own parameters")
    inputs = [x.clone().requires_grad_() for x in args]

    def total(*inputs):
        return kalman_filter(inputs[0], mask, *inputs[1:]).log_likelihood.sum()

    compiled_total = torch.compile(total, fullgraph=True, backend="aot_eager")
    expected, got = total(*inputs), compiled_total(*inputs)
    torch.testing.assert_close(got, expected)
    for one, other in zip(*(torch.autograd.grad(x, inputs) for x in (got, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["settles, ragged", "own parameters"])
def test_operator_passes_opcheck(engine, name):
    args, mask, times = case(name)
    step_mask = times.get("step_mask")
    arguments = kalman_problem.problem(args[0], mask, *args[1:], args[0].shape[-2], None, step_mask).arguments
    floats = [x.clone().requires_grad_() if torch.is_tensor(x) and x.is_floating_point() else x for x in arguments]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.pyro_ssm.kalman_forward, (*floats, 1), test_utils=tests)


def test_operator_has_right_second_derivatives(engine):
    args, mask, times = case("settles, ragged")
    arguments = kalman_problem.problem(
        args[0][:2, :4], mask[:2, :4], *args[1:], 4, None, times["step_mask"][:2, :4]
    ).arguments

    def total(L, F):
        return torch.ops.pyro_ssm.kalman_forward(*arguments[:6], L, F, *arguments[8:], 0)[0].sum()

    inputs = [arguments[6].clone().requires_grad_(), arguments[7].clone().requires_grad_()]
    assert gradcheck(total, inputs) and gradgradcheck(total, inputs)


@pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")
@pytest.mark.parametrize("name", ["varying", "own parameters", "draws by series, ragged", "steps switched off"])
def test_filtering_again_is_as_good_as_a_tape(monkeypatch, name):
    args, mask, times = case(name)
    inputs = [x.clone().requires_grad_() for x in args]
    found = []
    for near in (kalman_kernel.NEAR, 0):
        monkeypatch.setattr(kalman_kernel, "NEAR", near)
        steps = kalman_filter(inputs[0], mask, *inputs[1:], **times)
        weight = torch.arange(1.0, 1.0 + steps.log_likelihood.shape[-1], dtype=D)
        total = (weight * steps.log_likelihood).sum() + steps.filtered_mean.square().sum()
        found.append([total, *torch.autograd.grad(total, inputs)])
    for taped, anew in zip(*found, strict=True):
        torch.testing.assert_close(anew, taped, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scales", [False, True])
def test_covariances_by_doubling_equal_the_reference(scales):
    """Also where states are measured in units that differ by 1e12."""
    torch.manual_seed(0)
    args = system(4, 2, 50, batch=(3,), lead=(3,))
    unit = torch.logspace(-6, 6, 4, dtype=D) if scales else torch.ones(4, dtype=D)
    args[2], args[5] = (unit.unsqueeze(-1) * x for x in (args[2], args[5]))
    args[3] = unit.unsqueeze(-1) * args[3] / unit
    args[6] = args[6] / unit
    exact = covariance(kalman_filter_reference(args[0], everything(args[0]), *args[1:]).predicted_scale_tril)
    found = predicted_covariances(args[2], *(args[i][:, 0] for i in (3, 5, 6, 8)), 50)
    exact, found = (x / unit.unsqueeze(-1) / unit for x in (exact, found))
    torch.testing.assert_close(found, exact[:, : found.shape[1]], rtol=0, atol=1e-11)


def test_covariances_are_not_doubled_where_an_observation_is_nearly_exact():
    args = system(2, 1, 40)
    L, F, Q, H, R = (args[i].reshape(1, *args[i].shape[-2:]) for i in (2, 3, 5, 6, 8))
    assert predicted_covariances(L, F, Q, H, R, 40) is not None
    assert predicted_covariances(L, F, Q, H, 1e-4 * R, 40) is None
    assert predicted_covariances(L, F, Q, H, 0 * R, 40) is None


@pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")
def test_the_number_of_threads_changes_nothing():
    args, mask, _ = case("settles, ragged")
    inputs = [x.clone().requires_grad_() for x in args]
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            terms = kalman_log_likelihood(inputs[0], mask, *inputs[1:])
            found.append([terms, *torch.autograd.grad(terms.sum(), inputs)])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
