"""Scans: the compiled operators against copying memory, a loop over time in Python, and the torch path.

    python benchmarks/bench_scans.py            # all rows
    python benchmarks/bench_scans.py linear     # the rows of one operator

In the rows against "copy", the peer copies as many bytes as a scan reads and writes (``torch.Tensor.copy_`` between
tensors that are there): the ratio is the fraction of the machine's copy bandwidth that the scan reaches. Those scans
write to memory that is there, as the copy does; in all other rows results are fresh, and a large one costs more in page
faults than in arithmetic (``THP_MEM_ALLOC_ENABLE=1`` halves that on Linux).

Every family of rows is a function that yields ``(case, elements)``; nanoseconds an element stand below the table.
"""

import sys
from contextlib import contextmanager

from harness import RESULTS, Case, pin_threads, run

pin_threads(1)

import torch  # noqa: E402

from pyro_ssm import ops  # noqa: E402
from pyro_ssm.ops import compiled, recurrence_kernel  # noqa: E402
from pyro_ssm.ops.recurrence_torch import Diagonal  # noqa: E402

#: batch, length, channels
SIZES = [(8, 256, 64), (8, 4096, 64), (1, 65536, 64)]


@contextmanager
def torch_path():
    """Without the compiled library."""
    library = compiled.library()
    compiled._library = compiled.Library(None, "switched off by the benchmark", "", 0)
    try:
        yield
    finally:
        compiled._library = library


def in_torch(work):
    def run_in_torch():
        with torch_path():
            return work()

    return run_in_torch


def without_gradient(work):
    def forward():
        with torch.no_grad():
            return work()

    return forward


def with_gradient(work, inputs):
    """The gradients of all inputs, for fixed gradients of the results."""
    shape = work().shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def both():
        h = work()
        return torch.autograd.grad(h, inputs, weight.to(h.dtype))

    return both


def real(x):
    return [torch.view_as_real(z.resolve_conj()) if z.is_complex() else z for z in ([x] if torch.is_tensor(x) else x)]


def case(name, ours, peer, peer_name, rtol=1e-4):
    return Case(name, lambda: real(ours()), lambda: real(peer()), peer_name, rtol=rtol, atol=1e-5)


def bandwidth():
    """linear_scan into memory that is there."""
    for shape, dtype in [
        ((8, 4096, 1024), torch.float32),
        ((8, 65536, 64), torch.float32),
        ((8, 4096, 512), torch.float64),
        ((8, 4096, 512), torch.complex64),
    ]:
        for constant in (False, True):
            torch.manual_seed(0)
            a = torch.rand(*((1, 1, shape[-1]) if constant else shape), dtype=dtype) / 2
            b, out = torch.rand(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
            moved = (2 if constant else 3) * b.numel() * b.element_size()
            source = torch.ones(moved // 8)  # a copy reads and writes each of its floats
            target = torch.empty_like(source)

            def scan(a=a, b=b, out=out):
                return recurrence_kernel.forward(Diagonal, a, b, None, None, False, False, out=out)

            kind = "constant a" if constant else "a of every step"
            label = f"linear_scan, {str(dtype).removeprefix('torch.')}, {kind}, {'x'.join(map(str, shape))}"
            yield (
                Case(label, scan, lambda s=source, t=target: t.copy_(s), "copy", agree=lambda ours, peer: 0.0),
                b.numel(),
            )


def linear():
    """linear_scan as it is called, forward, and forward and backward."""
    for batch, length, channels in SIZES:
        torch.manual_seed(0)
        a, b = torch.rand(batch, length, channels) / 2, torch.rand(batch, length, channels)
        inputs = [a.requires_grad_(), b.requires_grad_()]
        label, elements = f"linear_scan, float32, {batch}x{length}x{channels}", b.numel()

        def scan(a=a, b=b):
            return ops.linear_scan(a, b)

        def loop(a=a, b=b):
            return ops.linear_scan_reference(a, b)

        forward, both = without_gradient(scan), with_gradient(scan, inputs)
        yield case(f"{label}, forward", forward, in_torch(forward), "torch path"), elements
        yield case(f"{label}, forward", forward, without_gradient(loop), "Python loop"), elements
        yield case(f"{label}, forward and backward", both, in_torch(both), "torch path"), elements
        if length < 65536:
            yield case(f"{label}, forward and backward", both, with_gradient(loop, inputs), "Python loop"), elements


def pairs():
    """scan2x2, the recurrence of LinOSS."""
    for batch, length, channels in SIZES[:2]:
        torch.manual_seed(0)
        matrix = torch.rand(batch, length, channels, 2, 2) / 3
        drive = torch.rand(batch, length, channels, 2)
        inputs = [matrix.requires_grad_(), drive.requires_grad_()]

        def scan(matrix=matrix, drive=drive):
            return ops.scan2x2(matrix, drive)

        label, both = f"scan2x2, float32, {batch}x{length}x{channels}", with_gradient(scan, inputs)
        forward = without_gradient(scan)
        yield case(f"{label}, forward", forward, in_torch(forward), "torch path"), drive.numel()
        yield case(f"{label}, forward and backward", both, in_torch(both), "torch path"), drive.numel()


def lti():
    """diag_lti with one step for all times (S4D); an element is a complex state at one time."""
    states = 8
    for batch, length, channels in SIZES:
        torch.manual_seed(0)
        u, step = torch.randn(batch, length, channels), 0.1 + torch.rand(1, channels) / 4
        A = torch.complex(-0.2 - torch.rand(channels, states), torch.randn(channels, states))
        B, C = (torch.randn(channels, states, dtype=torch.complex64) for _ in range(2))
        inputs = [x.requires_grad_() for x in (u, step, A, B, C)]

        def scan(inputs=inputs):
            return ops.diag_lti(*inputs)[0]

        label = f"diag_lti, {batch}x{length}x{channels}, {states} states"
        elements, forward, both = u.numel() * states, without_gradient(scan), with_gradient(scan, inputs)
        yield case(f"{label}, forward", forward, in_torch(forward), "convolution"), elements
        yield case(f"{label}, forward and backward", both, in_torch(both), "convolution", rtol=1e-4), elements


FAMILIES = {"bandwidth": bandwidth, "linear": linear, "pairs": pairs, "lti": lti}


def report(names):
    cases, elements = zip(*(row for name in names for row in FAMILIES[name]()), strict=True)
    name = "scans" if len(names) == len(FAMILIES) else f"scans_{'_'.join(names)}"
    rows = run(name, cases, repeats=5, min_seconds=0.02)
    lines = ["", "| case | ns of CPU time an element (smallest) |", "|---|---|"]
    seen = {row.name: min(row.ours.cpu) / count * 1e9 for row, count in zip(rows, elements, strict=True)}
    lines += [f"| {label} | {value:.2f} |" for label, value in seen.items()]
    page = RESULTS / f"{name}.md"
    page.write_text(page.read_text(encoding="utf-8") + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    report(sys.argv[1:] or list(FAMILIES))
