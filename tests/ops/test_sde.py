"""Orders of convergence of the fixed-step schemes, and their agreement with torchsde's."""

import math

import pytest
import torch

from pyro_ssm.ops import BrownianPath, sde_path, torchsde_path
from pyro_ssm.ops.sde import check_path, fixed_step_methods

D = torch.float64
MU, SIGMA = 0.6, 0.8
LEVELS = (16, 32, 64, 128)


def paths(drift, diffusion, method, noise, interpretation, brownian, start):
    """The end of the path at each level, all with the same noise."""
    ends = []
    for n in LEVELS:
        coarse = brownian.coarsen((brownian.times.shape[-1] - 1) // n)
        z = sde_path(
            drift,
            diffusion,
            start,
            coarse.times,
            coarse.increments,
            method=method,
            noise=noise,
            interpretation=interpretation,
        )
        ends.append(z[..., -1, :])
    return torch.stack(ends)


def slope(errors):
    x = -torch.tensor(LEVELS, dtype=D).log()
    y = errors.log()
    return float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())


GEOMETRIC = [
    ("ito", "euler", "diagonal", 0.5),
    ("ito", "milstein", "diagonal", 1.0),
    ("ito", "euler", "scalar", 0.5),
    ("ito", "milstein", "scalar", 1.0),
    ("ito", "euler", "general", 0.5),
    ("stratonovich", "milstein", "diagonal", 1.0),
    ("stratonovich", "euler_heun", "diagonal", 1.0),
    ("stratonovich", "heun", "diagonal", 1.0),
    ("stratonovich", "midpoint", "scalar", 1.0),
    ("stratonovich", "heun", "general", 1.0),
]


@pytest.mark.parametrize(("interpretation", "method", "noise", "order"), GEOMETRIC)
def test_strong_order_on_geometric_brownian_motion(interpretation, method, noise, order):
    """dz = mu z dt + sigma z dW: z(1) = z(0) exp((mu - sigma^2/2) + sigma W), without sigma^2/2 in Stratonovich's."""
    times = torch.linspace(0, 1, LEVELS[-1] + 1, dtype=D)
    noise_path = BrownianPath.draw(times, 1, (3000,), generator=torch.Generator().manual_seed(0), dtype=D)
    matrix = noise != "diagonal"
    ends = paths(
        lambda t, z, u: MU * z,
        lambda t, z, u: SIGMA * z.unsqueeze(-1) if matrix else SIGMA * z,
        method,
        noise,
        interpretation,
        noise_path,
        torch.ones(3000, 1, 1, dtype=D),
    )
    correction = SIGMA**2 / 2 if interpretation == "ito" else 0.0
    exact = torch.exp(MU - correction + SIGMA * noise_path.values[..., -1, :])
    found = slope((ends - exact).square().mean((1, 2)).sqrt())
    assert order - 0.1 < found < order + 0.35, found


OU = [("ito", "euler", "additive", 1.0), ("ito", "milstein", "additive", 1.0), ("ito", "heun", "additive", 2.0)]
OU += [("ito", "euler", "diagonal", 1.0), ("stratonovich", "midpoint", "additive", 2.0)]


@pytest.mark.parametrize(("interpretation", "method", "noise", "order"), OU)
def test_weak_order_on_ornstein_uhlenbeck(interpretation, method, noise, order):
    """The mean and variance of the scheme, *computed* from its own linear steps, against those of the process."""
    rate, q, t = 1.5, 0.7, 1.0
    errors_mean, errors_variance = [], []
    for n in LEVELS:
        h = torch.tensor([0.0, t / n], dtype=D)

        def step(z, dW, h=h):
            return sde_path(
                lambda t, z, u: -rate * z,
                lambda t, z, u: torch.full((1, 1), q, dtype=D) if noise == "additive" else q + 0 * z,
                torch.full((1, 1), z, dtype=D),
                h,
                torch.full((1, 1), dW, dtype=D),
                method=method,
                noise=noise,
                interpretation=interpretation,
            )[-1, 0].item()

        a, b = step(1.0, 0.0), step(0.0, 1.0)  # z' = a z + b dW
        errors_mean.append(abs(a**n - math.exp(-rate * t)))
        variance = b * b * (t / n) * sum(a ** (2 * k) for k in range(n))
        errors_variance.append(abs(variance - q * q / (2 * rate) * (1 - math.exp(-2 * rate * t))))
    for errors in (errors_mean, errors_variance):
        found = slope(torch.tensor(errors, dtype=D))
        assert order - 0.1 < found < order + 0.5, found


def test_weak_order_of_euler_on_geometric_brownian_motion():
    """E z(1) of Euler's and Milstein's chains is (1 + mu h)^n: order 1; the sample mean agrees with it."""
    noise = BrownianPath.draw(torch.linspace(0, 1, LEVELS[-1] + 1, dtype=D), 1, (10000,), dtype=D)
    start = torch.ones(10000, 1, 1, dtype=D)
    for method in ("euler", "milstein"):
        ends = paths(lambda t, z, u: MU * z, lambda t, z, u: SIGMA * z, method, "diagonal", "ito", noise, start)
        chain = torch.tensor([(1 + MU / n) ** n for n in LEVELS], dtype=D)
        z = (ends.mean((1, 2)) - chain) / (ends.std((1, 2)) / 100)
        assert (z.abs() < 4.5).all()
        assert 0.9 < slope((chain - math.exp(MU)).abs()) < 1.1


@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize(
    ("method", "noise", "interpretation"),
    [
        ("euler", "diagonal", "ito"),
        ("euler", "general", "ito"),
        ("milstein", "diagonal", "ito"),
        ("heun", "diagonal", "stratonovich"),
        ("midpoint", "additive", "stratonovich"),
        ("euler_heun", "scalar", "stratonovich"),
    ],
)
def test_torchsde_takes_the_same_steps(method, noise, interpretation, adjoint):
    """With one step a gap the same scheme gives the same path: own grids, inputs, leading dims."""
    torch.manual_seed(0)
    times = torch.stack([torch.linspace(0, 1, 9, dtype=D), torch.linspace(1, 3, 9, dtype=D) ** 1.1])
    m = {"diagonal": 2, "scalar": 1}.get(noise, 3)
    brownian = BrownianPath.draw(times, m, (4, 2), dtype=D)
    inputs, start = torch.randn(2, 9, 1, dtype=D), torch.randn(4, 2, 1, 2, dtype=D)
    G = 0.3 * torch.randn(2, m, dtype=D)

    def drift(t, z, u):
        return torch.tanh(z.flip(-1)) * u - z * torch.cos(t)

    def diffusion(t, z, u):
        if noise == "diagonal":
            return 0.3 + 0.1 * torch.sin(z)
        return G.expand(z.shape + (m,)) if noise == "additive" else G * (1 + 0.2 * torch.sin(z).unsqueeze(-1))

    kind = {"method": method, "noise": noise, "interpretation": interpretation, "inputs": inputs}
    ours = sde_path(drift, diffusion, start, times, brownian.increments, **kind)
    params = [G.clone().requires_grad_()] if adjoint else None
    if adjoint and (noise, interpretation) == ("general", "ito"):
        pytest.skip("torchsde has no adjoint for general noise in Itô's form")
    theirs = torchsde_path(drift, diffusion, start, brownian, adjoint_params=params, **kind)
    # torchsde's Milstein differentiates the diffusion, ours takes a difference: equal to the order of the scheme
    tolerance = 2e-3 if method == "milstein" else 1e-10
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("options", [{"substeps": 64}, {"adaptive": True, "rtol": 1e-4, "atol": 1e-4}])
def test_finer_solvers_see_the_same_noise(options):
    """A finer solution with the noise pinned at the grid is nearer to the exact one, and repeatable."""
    times = torch.linspace(0, 1, 5, dtype=D)
    brownian = BrownianPath.draw(times, 1, (50,), generator=torch.Generator().manual_seed(1), dtype=D)
    start = torch.ones(50, 1, 1, dtype=D)

    def end(**more):
        method = more.pop("method", "milstein")
        path = torchsde_path(lambda t, z, u: MU * z, lambda t, z, u: SIGMA * z, start, brownian, method=method, **more)
        return path[:, -1]

    exact = torch.exp(MU - SIGMA**2 / 2 + SIGMA * brownian.values[:, -1])
    coarse, fine = end(), end(**options)
    assert (fine - exact).abs().mean() < 0.15 * (coarse - exact).abs().mean()
    assert torch.equal(fine, end(**options))


def test_batch_is_a_loop_and_gradients_are_right():
    torch.manual_seed(0)
    times = torch.stack([torch.linspace(0, 1, 4, dtype=D), torch.linspace(0, 2, 4, dtype=D)])
    brownian = BrownianPath.draw(times, 2, (2,), dtype=D)
    start, a = torch.randn(2, 1, 2, dtype=D), torch.tensor([0.4, 0.9], dtype=D)

    def solve(start, increments, a, times=times, method="milstein"):
        return sde_path(
            lambda t, z, u: -a * z.sin(), lambda t, z, u: 0.2 + a * z.cos() / 4, start, times, increments, method=method
        )

    whole = solve(start, brownian.increments, a)
    for i in range(2):
        torch.testing.assert_close(solve(start[i], brownian.increments[i], a, times[i]), whole[i])
    args = [x.clone().requires_grad_() for x in (start, brownian.increments, a)]
    for method in ("euler", "milstein"):
        assert torch.autograd.gradcheck(lambda *x, m=method: solve(*x, method=m), args)
    single = solve(start, brownian.increments[:, :0], a, times[:, :1])
    torch.testing.assert_close(single, start)


def test_schemes_know_their_integrals():
    assert fixed_step_methods("ito", "diagonal") == ["euler", "milstein"]
    assert "heun" in fixed_step_methods("ito", "additive")
    assert "euler" not in fixed_step_methods("stratonovich", "general")


def test_a_path_that_blows_up_is_named():
    path = torch.ones(2, 3, 5, 1)
    path[1, 2, 3] = float("nan")
    times = torch.linspace(0, 1, 5)
    with pytest.raises(FloatingPointError, match=r"step 3 \(time 0.75\) of series \(1, 2\): the state before"):
        check_path(path, times, "the path")
    with pytest.raises(FloatingPointError, match="this is the start"):
        check_path(path[1, 2, 3:], times[3:], "the path")
