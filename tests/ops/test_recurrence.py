"""Linear recurrences, diagonal and of pairs, compiled and in torch: equal to their loops in every way they can go."""

import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from pyro_ssm.ops import compiled, linear_scan, linear_scan_reference, scan2x2, scan2x2_reference

# torch.func.jvp uses it
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def scan(L=5, lead=(2,), C=3, dtype=torch.float64):
    a = rand(*lead, L, C, dtype=dtype)
    return a / (1 + a.abs()), rand(*lead, L, C, dtype=dtype), rand(*lead, C, dtype=dtype)


def pairs(L=5, lead=(2,), C=3, dtype=torch.float64):
    return 0.5 * rand(*lead, L, C, 2, 2, dtype=dtype), rand(*lead, L, C, 2, dtype=dtype), rand(*lead, C, 2, dtype=dtype)


def close(found, wanted, scale=20):
    """Within some roundings of the largest value."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    if wanted.numel():
        largest = wanted.abs().max().item()
        assert (found - wanted).abs().max().item() <= scale * torch.finfo(wanted.dtype).eps * max(largest, 1e-30)


def gradients(f, inputs, **keywords):
    inputs = [x.detach().requires_grad_() for x in inputs]
    h = f(*inputs, **keywords)
    torch.manual_seed(7)
    return [
        h,
        *torch.autograd.grad(h, inputs, torch.randn(h.shape, dtype=h.dtype), allow_unused=True, materialize_grads=True),
    ]


def same(f, reference, inputs, scale=100, **keywords):
    found, wanted = gradients(f, inputs, **keywords), gradients(reference, inputs, **keywords)
    for one, other in zip(found, wanted, strict=True):
        close(one, other, scale)


# lanes: less than a register, more, many registers with a rest, more than a task has
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("C", [1, 2, 3, 7, 64, 77, 1100])
def test_every_number_of_channels(engine, dtype, C):
    same(linear_scan, linear_scan_reference, scan(9, C=C, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("C", [1, 5, 64, 77, 1030])
def test_every_number_of_pairs(engine, dtype, C):
    same(scan2x2, scan2x2_reference, pairs(6, C=C, dtype=dtype))


@pytest.mark.parametrize("L", [1, 2, 3, 65, 131, 600])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_every_length(engine, L, reverse, last):
    a, b, h = scan(L)
    for reset in (None, torch.rand(2, L) < 0.1):
        keywords = {"reverse": reverse, "last": last, "reset": reset}
        same(linear_scan, linear_scan_reference, (a, b, h), **keywords)
        found, wanted = (
            gradients(lambda b, h, f=f, more=keywords: f(a, b, h, **more), (b, h))
            for f in (linear_scan, linear_scan_reference)
        )
        for one, other in zip(found, wanted, strict=True):
            close(one, other, 100)
    same(scan2x2, scan2x2_reference, pairs(L), reset=reset)


SHAPES = {
    "one coefficient for all": ((1, 1), (2, 70, 3), (2, 3)),
    "constant in time": ((1, 5), (2, 70, 5), (2, 5)),
    "shared by the batch": ((70, 5), (2, 70, 5), (1, 5)),
    "shared by channels": ((2, 70, 1), (70, 5), (5,)),
    "two batches that cross": ((4, 1, 9, 5), (1, 3, 9, 5), (3, 5)),
    "many batches that cross": ((2, 1, 2, 1, 2, 1, 2, 4, 3), (1, 2, 1, 2, 1, 2, 1, 4, 3), (3,)),
    "only the start has a batch": ((9, 5), (9, 5), (3, 5)),
    "one channel of b": ((9, 5), (2, 9, 1), (1,)),
    "one step of b": ((9, 5), (2, 1, 5), (2, 5)),
    "empty batch": ((0, 9, 5), (0, 9, 5), (0, 5)),
    "no channels": ((2, 9, 0), (2, 9, 0), (0,)),
    "no steps": ((2, 0, 5), (2, 0, 5), (2, 5)),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("last", [False, True])
def test_shapes_that_are_shared(engine, case, last):
    a, b, h = (rand(*shape) for shape in SHAPES[case])
    same(linear_scan, linear_scan_reference, (0.6 * a, b, h), last=last)


def test_expanded_turned_and_cut_arguments(engine):
    a = 0.6 * rand(5).expand(2, 9, 5)
    b, h = rand(5, 9, 4).permute(2, 1, 0)[::2], rand(2, 15)[:, ::3]
    same(linear_scan, linear_scan_reference, (a, b, h), reset=(torch.rand(9, 2) < 0.3).mT)
    matrix = 0.5 * rand(2, 2, 5, 9, 2).permute(4, 3, 2, 1, 0)
    same(scan2x2, scan2x2_reference, (matrix, rand(2, 9, 5, 3)[..., 1:], rand(2, 11)[:, 1:].unflatten(1, (5, 2))))
    one = 0.5 * rand(1, 1, 2, 2)
    same(scan2x2, scan2x2_reference, (one, rand(2, 9, 5, 2), rand(5, 2)))
    whole = torch.stack([rand(2, 9, 5)] * 2, -1)
    close(linear_scan(a, whole[..., 0]), linear_scan_reference(a, whole[..., 0]))


def test_pending_conjugates_signs_and_gradients_without_memory(engine):
    a, b, h = scan(dtype=torch.complex128)
    close(linear_scan(a.conj(), b.conj(), h), linear_scan_reference(a.conj(), b.conj(), h))
    close(
        linear_scan(a.conj().imag, b.real, h.conj().imag), linear_scan_reference(a.conj().imag, b.real, h.conj().imag)
    )
    a.requires_grad_()
    found = [torch.autograd.grad(f(a, b, h).real.sum(), a)[0] for f in (linear_scan, linear_scan_reference)]
    close(*found)


def test_only_what_is_wanted_has_a_gradient(engine):
    a, b, h = scan()
    for wanted in ((0,), (1,), (2,), (0, 2)):
        inputs = [x.clone().requires_grad_(i in wanted) for i, x in enumerate((a, b, h))]
        found, plain = (
            torch.autograd.grad(f(*inputs).sin().sum(), [inputs[i] for i in wanted])
            for f in (linear_scan, linear_scan_reference)
        )
        for one, other in zip(found, plain, strict=True):
            close(one, other)


def test_all_reset_and_what_a_reset_hides(engine):
    a, b, h = scan()
    everywhere = torch.ones(5, dtype=torch.bool)
    assert torch.equal(linear_scan(a, b, h, reset=everywhere), b)
    reset = torch.tensor([False, False, True, False, False])
    whole = linear_scan(a, b, h, reset=reset)
    assert torch.equal(whole[:, 2:], linear_scan(a[:, 2:], b[:, 2:], reset=reset[2:]))
    parts = [linear_scan(a[:, :2], b[:, :2], h), linear_scan(a[:, 2:], b[:, 2:])]
    close(whole, torch.cat(parts, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_are_the_whole(engine, dtype, reverse):
    a, b, h = scan(37, C=20, dtype=dtype)
    whole = linear_scan(a, b, h, reverse=reverse)
    cuts = [slice(20, 37), slice(0, 20)] if reverse else [slice(0, 20), slice(20, 37)]
    for cut in cuts:
        piece = linear_scan(a[:, cut], b[:, cut], h, reverse=reverse)
        close(piece, whole[:, cut])
        h = piece[:, 0 if reverse else -1]
    assert torch.equal(linear_scan(a, b, reverse=reverse, last=True), linear_scan(a, b, reverse=reverse)[
        :, 0 if reverse else -1
    ])  # fmt: skip


@pytest.mark.parametrize(("L", "C"), [(65536, 16), (65537, 3)])
def test_single_precision_of_a_long_scan(engine, L, C):
    """Values and gradients to 1e-5 of the largest, the sum over all times of a shared coefficient among them."""
    torch.manual_seed(0)
    a, b = 1 - 1e-3 * torch.rand(1, C, dtype=torch.float64), rand(L, C)
    weight = rand(L, C)
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [x.float().to(dtype).requires_grad_() for x in (a, b)]
        h = linear_scan(*inputs)
        found.append([h, *torch.autograd.grad(h, inputs, weight.to(dtype))])
    for single, exact in zip(*found, strict=True):
        assert (single - exact).abs().max() < 1e-5 * exact.abs().max()


@pytest.mark.parametrize("C", [64, 77])
def test_results_that_go_past_the_caches(C):
    """More than 16 MB; in reverse too, with a row that does not end on a line."""
    a, b, h = scan(70000, lead=(1,), C=C, dtype=torch.float32)
    for reverse in (False, True):
        whole = gradients(linear_scan, (a, b, h), reverse=reverse)
        flip = [x.flip(1) if reverse else x for x in (a, b)]
        want = gradients(linear_scan, (*(x[..., :5].double() for x in flip), h[..., :5].double()))
        weight_free = whole[0].flip(1) if reverse else whole[0]
        assert (weight_free[..., :5] - want[0]).abs().max() < 1e-5 * want[0].abs().max()
        g = torch.randn(1, 70000, C, generator=torch.Generator(torch.get_default_device()).manual_seed(1))
        inputs = [x.clone().requires_grad_() for x in (a, b, h)]
        found = torch.autograd.grad(linear_scan(*inputs, reverse=reverse), inputs, g)
        double = [x[..., -5:].double().detach().requires_grad_() for x in (a, b, h)]
        exact = torch.autograd.grad(linear_scan(*double, reverse=reverse), double, g[..., -5:].double())
        for one, other in zip(found, exact, strict=True):
            assert (one[..., -5:] - other).abs().max() < 1e-5 * other.abs().max()


# -------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(
    ("dtype", "reverse", "constant"), [(torch.float64, False, True), (torch.complex128, True, False)]
)
def test_derivatives_of_scans(engine, dtype, reverse, constant):
    a, b, h = scan(3, lead=(2,), C=2, dtype=dtype)
    inputs = [x.requires_grad_() for x in (a[:1, :1].clone() if constant else a, b, h)]
    reset = torch.tensor([[False, True, False], [False, False, False]])

    def f(a, b, h):
        return linear_scan(a, b, h, reset=reset, reverse=reverse)

    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=not constant, check_batched_grad=True)
    assert gradgradcheck(
        lambda b, h: linear_scan(a.detach(), b, h, reset=reset, reverse=reverse, last=True), inputs[1:]
    )


def test_derivatives_of_pairs(engine):
    inputs = [x.requires_grad_() for x in pairs(3, lead=(), C=2)]
    reset = torch.tensor([False, True, False])

    def f(matrix, drive, h):
        return scan2x2(matrix, drive, h, reset=reset)

    assert gradcheck(f, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, inputs, check_fwd_over_rev=True)


TRANSFORMS = {
    "grad": lambda f, b, h: torch.func.grad(lambda a: f(a, b, h).sin().sum()),
    "vmap": lambda f, b, h: torch.func.vmap(lambda a: f(a, b[0], h[0])),
    "vmap of some": lambda f, b, h: lambda a: torch.func.vmap(f, in_dims=(0, None, 0), out_dims=1)(a, b[1], h),
    "vmap of grad": lambda f, b, h: torch.func.vmap(torch.func.grad(lambda a: f(a, b[0], h[0]).sin().sum())),
    "jvp": lambda f, b, h: lambda a: torch.func.jvp(lambda a: f(a, b, h), (a,), (b,))[1],
    "jacrev": lambda f, b, h: torch.func.jacrev(lambda a: f(a, b, h)),
    "jacfwd": lambda f, b, h: torch.func.jacfwd(lambda a: f(a, b, h)),
    "hessian": lambda f, b, h: torch.func.hessian(lambda a: f(a, b, h).pow(3).sum()),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("reset", [None, torch.tensor([False, True, False, False, False])])
def test_function_transforms(engine, name, reset):
    a, b, h = scan()
    found, wanted = (
        TRANSFORMS[name](lambda *x, f=f: f(*x, reset=reset), b, h)(a) for f in (linear_scan, linear_scan_reference)
    )
    close(found, wanted, 100)


@pytest.mark.parametrize("name", [None, "grad", "jvp", "vmap of grad"])
def test_graphs(engine, name):
    a, b, h = scan()
    torch._dynamo.reset()
    if name is not None:
        compiled_f = torch.compile(TRANSFORMS[name](linear_scan, b, h), fullgraph=True, backend="aot_eager")
        close(compiled_f(a), TRANSFORMS[name](linear_scan_reference, b, h)(a), 100)
        return
    reset = torch.tensor([False, True, False, False, False])

    def total(a, b, h):
        states = linear_scan(a, b, h, reset=reset)
        return states.sin().sum() + linear_scan(a[:, :1], b, h, last=True, reverse=True).cos().sum()

    graph, inputs = torch.compile(total, fullgraph=True, backend="aot_eager"), [x.requires_grad_() for x in (a, b, h)]
    for one, other in zip(*(torch.autograd.grad(f(*inputs), inputs) for f in (graph, total)), strict=True):
        close(one, other)


def test_export_and_trace(engine):
    class Scan(torch.nn.Module):
        def forward(self, a, b):
            return linear_scan(a, b)

    a, b, _ = scan()
    exported = torch.export.export(Scan(), (a, b)).module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: tracing is deprecated; Python loops are recorded
        traced = torch.jit.trace(lambda a, b: linear_scan(a, b), (a, b))
    for f in (exported, traced):
        close(f(a / 2, b), linear_scan_reference(a / 2, b))


OPERATORS = {"linear_scan": (torch.ops.pyro_ssm.linear_scan, scan), "scan2x2": (torch.ops.pyro_ssm.scan2x2, pairs)}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("last", [False, True])
def test_operators(engine, name, last):
    operator, make = OPERATORS[name]
    inputs = [x.requires_grad_() for x in make(3, (1,), 2)]
    reset = torch.tensor([[False, True, False]])
    torch.library.opcheck(operator, (*inputs, reset, True, last))
    torch.library.opcheck(operator, (*inputs[:2], None, None, False, last))
    assert gradcheck(lambda *x: operator(*x, reset, True, last), inputs)
    assert gradgradcheck(lambda *x: operator(*x, reset, True, last), inputs)
    plain = [x.detach() for x in inputs]
    batched = torch.func.vmap(lambda x: operator(plain[0], x, plain[2], reset, True, last))
    drives = torch.stack([plain[1], 2 * plain[1]])
    for got, drive in zip(batched(drives), drives, strict=True):
        close(got, operator(plain[0], drive, plain[2], reset, True, last))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: operator(plain[0], x, plain[2], None, False, last), (plain[1],), (plain[1],))


def test_the_backward_operator_refuses_to_be_differentiated():
    a, b, h = scan(dtype=torch.float64)
    a.requires_grad_()
    arguments = (b, None, a, h, None, b, b.shape, False, [True, True, True])
    found = torch.ops.pyro_ssm.linear_scan_backward(*arguments)
    with pytest.raises(RuntimeError, match="has no derivative"):
        found[1].sum().backward()


# ----------------------------------------------------------------------------- precision, devices, errors


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_single(engine, half):
    a, b = (0.999 * torch.ones(1, 3)).to(half), torch.rand(500, 3).to(half)
    exact = linear_scan(a.double(), b.double())
    found = linear_scan(a, b)
    assert found.dtype == half
    assert (found - exact).abs().max() <= torch.finfo(half).eps * exact.abs().max()
    inputs = [a.requires_grad_(), b.requires_grad_()]
    grads = torch.autograd.grad(linear_scan(*inputs).sum(), inputs)
    assert [x.dtype for x in grads] == [half, half]


def test_autocast_widens_and_never_narrows(engine):
    a, b, _ = scan(dtype=torch.float32)
    with torch.autocast(a.device.type, dtype=torch.bfloat16):
        assert linear_scan(a, b.bfloat16()).dtype == torch.float32
        assert linear_scan(a.bfloat16(), b.bfloat16()).dtype == torch.bfloat16
        assert torch.ops.pyro_ssm.linear_scan(a, b.bfloat16(), None, None, False, False).dtype == torch.float32
        close(linear_scan(a, b), linear_scan_reference(a, b))


def test_tensors_without_data(engine):
    a, b, h = (x.to("meta") for x in scan())
    assert linear_scan(a, b, h).shape == b.shape and linear_scan(a, b, h, last=True).shape == h.shape


def test_wrong_arguments_are_named():
    a, b, h = scan()
    for arguments, keywords, error, message in [
        ((a, b[0, 0], h), {}, ValueError, r"`b` must be \(..., time, channels\)"),
        ((a[:, :3], b, h), {}, ValueError, "sizes that broadcast"),
        ((a, b, h[:, :2]), {}, ValueError, r"`initial` \(2, 2\)"),
        ((a, b, h[0, 0]), {}, ValueError, r"`initial` must be \(..., channels\)"),
        ((a, b, h), {"reset": torch.zeros(4, dtype=torch.bool)}, ValueError, r"with 5 step\(s\)"),
        ((a, b, h), {"reset": torch.zeros(5)}, TypeError, "`reset` must be boolean"),
        ((a.to("meta"), b, h), {}, ValueError, r"`a` is on meta and `b` on cpu"),
        ((a.long(), b.long()), {}, TypeError, "floating-point"),
    ]:
        with pytest.raises(error, match=message):
            linear_scan(*arguments, **keywords)
    matrix, drive, _ = pairs()
    with pytest.raises(ValueError, match=r"`matrix` must be \(..., time, channels, 2, 2\)"):
        scan2x2(matrix[..., 0], drive)
    with pytest.raises(TypeError, match="floating-point"):
        scan2x2(matrix.to(torch.complex64), drive)


@pytest.mark.skipif(compiled.library().functions is None, reason="the compiled library is not in use")
def test_the_number_of_threads_changes_nothing():
    before, found = torch.get_num_threads(), []
    inputs = scan(300, lead=(3,), C=300)
    inputs = (inputs[0][:1, :1], *inputs[1:])
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(gradients(linear_scan, inputs))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(*found, strict=True):  # the sum over time of the shared coefficient is cut elsewhere
        close(one, other)
