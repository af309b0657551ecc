"""The selective scan, its dual form and a Mamba stack: compiled against the plain loop over time and against torch.

One thread. The peer does equal work: "loop" is the reference, a Python loop over time; "torch" is what runs where no
library is there. A second table tells nanoseconds a state element (series x steps x channels x N).

    python benchmarks/bench_selective_scan.py            # up to 4096 steps, about a minute
    python benchmarks/bench_selective_scan.py all        # also 65 536 steps
    python benchmarks/bench_selective_scan.py smoke      # seconds: whether it runs; nothing is written
"""

import sys

from harness import RESULTS, Case, largest_difference, pin_threads, run

pin_threads(1)
SIZE = sys.argv[1] if len(sys.argv) > 1 else "small"

import torch  # noqa: E402

from pyro_ssm import blocks, ops  # noqa: E402
from pyro_ssm.ops import compiled  # noqa: E402

#: series, steps, channels, N
SIZES = {
    "smoke": [(2, 32, 16, 16)],
    "small": [(8, 256, 64, 16), (8, 256, 64, 64), (4, 4096, 64, 16)],
    "all": [(8, 256, 64, 16), (8, 256, 64, 64), (4, 4096, 64, 16), (2, 65536, 64, 16)],
}
STEPS = [(1, 1, 16, 16), (8, 1, 64, 16), (1024, 1, 64, 16)]
SOFTPLUS = {"softplus": True}


def selective(batch, length, width, n):
    torch.manual_seed(0)
    u, dt, z = (torch.randn(batch, length, width) for _ in range(3))
    B, C = (torch.randn(batch, length, n) for _ in range(2))
    A, D, bias = -torch.randn(width, n).exp(), torch.randn(width), torch.randn(width)
    names = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial")
    return dict(zip(names, (u, dt - 2, A, B, C, D, z, bias, torch.randn(batch, width, n)), strict=True))


def dual(batch, length, heads, n):
    torch.manual_seed(0)
    x, dt = torch.randn(batch, length, heads, 16), 0.1 * torch.randn(batch, length, heads).exp()
    B, C = (torch.randn(batch, length, 1, n) for _ in range(2))
    return {"x": x, "dt": dt, "A": -torch.rand(heads) - 0.1, "B": B, "C": C, "D": torch.randn(heads)}


def by_torch(function):
    """The same work without the library."""

    def call():
        found = compiled.library()
        compiled._library = compiled.Library(None, "left aside by the benchmark", "", 0)
        try:
            return function()
        finally:
            compiled._library = found

    return call


def forward(function, args, **options):
    def call():
        with torch.no_grad():
            return dict(zip(("y", "final"), function(**args, **options), strict=True))

    return call


def gradient(function, args, **options):
    args = {k: x.clone().requires_grad_() for k, x in args.items()}

    def call():
        y, final = function(**args, **options)
        grads = torch.autograd.grad((y, final), list(args.values()), (torch.ones_like(y), torch.ones_like(final)))
        return dict(zip(args, grads, strict=True))

    return call


def training_step(block):
    torch.manual_seed(0)
    net = blocks.ResidualStack([block() for _ in range(2)], in_features=4, out_features=4)
    u = torch.randn(16, 128, 4)

    def call():
        y, _ = net(u)
        return torch.autograd.grad(y.square().mean(), list(net.parameters()))

    return call


def single_step(block):
    torch.manual_seed(0)
    net = block()
    u, state = torch.randn(64, 32), net.start((64,))

    def call():
        with torch.no_grad():
            return net.step(u, state)[0]

    return call


def cases():
    """Each case with its number of state elements, 0 where that is not the measure."""
    close = {"rtol": 2e-3, "atol": 1e-5}  # float32 sums over time and series in another order
    for size in SIZES[SIZE]:
        args, label = selective(*size), "B={} L={} D={} N={}".format(*size)
        elements = size[0] * size[1] * size[2] * size[3]
        for kind, name in ((forward, "forward"), (gradient, "forward and backward")):
            ours, loop = (kind(f, args, **SOFTPLUS) for f in (ops.selective_scan, ops.selective_scan_reference))
            title = f"selective_scan, {name}: {label}"
            if size[1] <= (4096 if kind is forward else 256):  # a loop under autograd takes minutes
                yield Case(title, ours, loop, "loop", **close), elements
            yield Case(title, ours, by_torch(ours), "torch", **close), elements
    for size in [(8, 256, 4, 16), (8, 256, 4, 64)][: 1 if SIZE == "smoke" else 2]:
        args, label = dual(*size), "B={} L={} heads={} P=16 N={}".format(*size)
        elements = size[0] * size[1] * size[2] * 16 * size[3]
        for kind, name in ((forward, "forward"), (gradient, "forward and backward")):
            ours = kind(ops.ssd, args)
            yield Case(f"ssd, {name}: {label}", ours, by_torch(ours), "torch", **close), elements
    for size in STEPS:
        args, label = selective(*size), "B={0} D={2} N={3}".format(*size)
        ours, loop = (forward(f, args, **SOFTPLUS) for f in (ops.selective_scan, ops.selective_scan_reference))
        yield Case(f"selective_scan, one step: {label}", ours, loop, "loop", **close), 0
    for block in (lambda: blocks.Mamba(32, 16), lambda: blocks.Mamba2(32, 16)):
        name = type(block()).__name__
        step, one = training_step(block), single_step(block)
        yield (
            Case(f"training step of two {name} blocks: B=16 L=128 D=32 N=16", step, by_torch(step), "torch", **close),
            0,
        )
        yield Case(f"{name}.step: B=64 D=32 N=16", one, by_torch(one), "torch", **close), 0


def main():
    found = list(cases())
    if SIZE == "smoke":
        for case, _ in found:
            print(f"{case.name}: {largest_difference(case.ours(), case.peer(), case.rtol, case.atol):.1e}")
        return
    rows = run("selective_scan", [case for case, _ in found], repeats=5, min_seconds=0.01)
    table = ["", "| case | ns a state element |", "|---|---|"]
    for row, (_, elements) in zip(rows, found, strict=True):
        if elements and f"| {row.name} |" not in "\n".join(table):
            table.append(f"| {row.name} | {1e9 * min(row.ours.cpu) / elements:.2f} |")
    with (RESULTS / "selective_scan.md").open("a", encoding="utf-8") as page:
        page.write("\n".join(table) + "\n\nNanoseconds: the smallest of the repeats, results freshly allocated.\n")
    print("\n".join(table))


if __name__ == "__main__":
    main()
