"""The equation as a component: fields, laws, sites that are right, and errors."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torchsde._core import methods as torchsde_methods

from pyro_ssm.binding import bind, random_parameters
from pyro_ssm.components import Gaussian, SampleOnly
from pyro_ssm.dynamics import (
    ConstantDiffusion,
    ElementwiseDiffusion,
    LinearDrift,
    MLPDiffusion,
    MLPDrift,
    NeuralSDE,
)
from pyro_ssm.ops import BrownianPath
from pyro_ssm.ops.torchsde_path import SOLVERS
from pyro_ssm.testing import TransitionContract, failures

D = torch.float64


class TestEulerContract(TransitionContract):
    def make_component(self):
        return NeuralSDE(MLPDrift(2, 8), ElementwiseDiffusion(2, 4))


class TestInputsAndMatrixContract(TransitionContract):
    input_dim = 2

    def make_component(self):
        return NeuralSDE(MLPDrift(2, 8, input_dim=2), MLPDiffusion(2, 3, 4), noise="general")


class TestMilsteinContract(TransitionContract):
    def make_component(self):
        return NeuralSDE(MLPDrift(2, 8), ElementwiseDiffusion(2, 4), method="milstein")


def test_the_contract_can_fail():
    class Wrong(TransitionContract):
        def make_component(self):
            return NeuralSDE(lambda t, z, u: z.mean(-2, keepdim=True) + 0 * z, ConstantDiffusion(0.5, 2), state_dim=2)

    assert "test_states_are_used_at_their_own_time" in failures(Wrong)


@pytest.mark.parametrize("size", [3, 17])
def test_elementwise_diffusion_is_one_network_a_coordinate(size):
    torch.manual_seed(0)
    g = ElementwiseDiffusion(size, 5, init=0.4).double()
    z = torch.randn(2, 4, size, dtype=D, requires_grad=True)
    found = g(torch.zeros(1, 1, dtype=D), z, None)
    hidden = nn.functional.softplus(z[..., None] * g.slope + g.shift)
    wanted = nn.functional.softplus((hidden * g.weight).sum(-1) + g.bias) + g.floor
    torch.testing.assert_close(found, wanted)
    (jacobian,) = torch.autograd.grad(found[..., 0].sum(), z)
    assert (jacobian[..., 1:] == 0).all() and (jacobian[..., 0] != 0).all()
    drawn = bind(g, {"slope": torch.stack([g.slope, -g.slope]).unsqueeze(1)})
    torch.testing.assert_close(drawn(None, z, None)[0], wanted)
    assert not torch.allclose(drawn(None, z, None)[1], wanted)
    bounded = ElementwiseDiffusion(size, 5, init=0.4, ceiling=1.0).double()
    value = bounded(None, 100 * z, None)
    assert ((value > 0) & (value < 1)).all()


def test_the_euler_law_is_mean_and_covariance_of_a_step():
    torch.manual_seed(0)
    sde = NeuralSDE(MLPDrift(2, 8), MLPDiffusion(2, 3, 8), noise="general").double()
    z, times = torch.randn(4, 3, 2, dtype=D), torch.tensor([0.0, 0.2, 0.5, 1.5], dtype=D)
    law = sde(z, times[:-1], times[1:], None)
    gap = times.diff().unsqueeze(-1)
    torch.testing.assert_close(law.mean, z + gap * sde.drift(None, z, None))
    G = sde.diffusion(None, z, None)
    torch.testing.assert_close(law.covariance_matrix, gap.unsqueeze(-1) * G @ G.mT)


@pytest.mark.parametrize(
    ("noise", "more", "site", "capability"),
    [
        ("diagonal", {}, "path", Gaussian),
        ("general", {"noise_dim": 2}, "path", Gaussian),
        ("general", {"noise_dim": 1}, "noise", Gaussian),
        ("scalar", {}, "noise", Gaussian),
        ("diagonal", {"method": "milstein"}, "noise", SampleOnly),
        ("general", {"method": "heun", "interpretation": "stratonovich", "noise_dim": 3}, "noise", SampleOnly),
        ("diagonal", {"method": "torchsde:srk"}, "girsanov", SampleOnly),
    ],
)
def test_site_and_capability_are_those_that_are_right(noise, more, site, capability):
    sde = NeuralSDE(lambda t, z, u: z, lambda t, z, u: z, noise=noise, state_dim=2, **more)
    assert sde.site == site and isinstance(sde, capability) and isinstance(bind(sde), capability)
    assert not isinstance(sde, SampleOnly if capability is Gaussian else Gaussian)
    assert type(copy.deepcopy(sde)) is type(sde)


def test_pickling():
    sde = NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(0.5, 2), method="milstein")
    again = pickle.loads(pickle.dumps(sde))
    noise = BrownianPath.draw(torch.linspace(0, 1, 4), 2)
    torch.testing.assert_close(again.solve(torch.ones(1, 2), noise), sde.solve(torch.ones(1, 2), noise))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "heun"}, "does not converge to the ito integral for diagonal noise"),
        ({"method": "euler", "interpretation": "stratonovich"}, "does not converge to the stratonovich"),
        ({"method": "milstein", "noise": "general", "noise_dim": 2}, "does not converge"),
        ({"method": "milstein", "site": "path"}, "site='path' is not right"),
        ({"site": "girsanov"}, "site='girsanov' is not right"),
        ({"method": "torchsde:"}, "must name a solver"),
        ({"method": "torchsde:heun"}, r"must name a solver.*\['euler', 'milstein', 'srk'\] for the ito integral"),
        ({"method": "torchsde_adjoint:srk", "interpretation": "stratonovich"}, "must name a solver.*reversible_heun"),
        ({"method": "torchsde:srk", "noise": "general", "noise_dim": 2}, r"must name a solver.*\['euler'\]"),
        ({"method": "rk4"}, "`method` must be one of"),
        ({"method": "other:euler"}, "`method` must be one of 'torchsde'"),
        ({"options": {"substeps": 2}}, "belong to torchsde"),
        ({"method": "torchsde:euler", "options": {"steps": 2}}, "unknown names"),
        ({"noise": "general"}, "`noise_dim` is needed"),
        ({"state_dim": 3}, "but `drift` has 2"),
    ],
)
def test_wrong_combinations_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        NeuralSDE(MLPDrift(2, 4), lambda t, z, u: z, **arguments)


def test_wrong_sizes_are_refused():
    times = torch.tensor([0.0, 1.0], dtype=D)
    with pytest.raises(ValueError, match=r"`drift` must return \(..., time, 2\)"):
        NeuralSDE(lambda t, z, u: z[..., :1], ConstantDiffusion(1.0, 2), state_dim=2)(
            torch.zeros(1, 2), times[:1], times[1:], None
        )
    with pytest.raises(ValueError, match="`diffusion` must return"):
        NeuralSDE(MLPDrift(2, 4), MLPDiffusion(2, 3))(torch.zeros(1, 2), times[:1], times[1:], None)
    with pytest.raises(ValueError, match="does not go with a diffusion that is a matrix"):
        NeuralSDE(MLPDrift(2, 4), ConstantDiffusion(torch.eye(2)))


def test_the_solvers_of_torchsde_are_those_that_it_has():
    for name, (integrals, noises) in SOLVERS.items():
        for integral in ("ito", "stratonovich"):
            solver = torchsde_methods.select(name, integral)
            assert (solver.sde_type == integral) == (integral in integrals)
            assert set(solver.noise_types) == set(noises)


@pytest.mark.parametrize("method", ["torchsde:euler", "torchsde_adjoint:euler", "torchsde:srk", "torchsde:milstein"])
@pytest.mark.parametrize("with_inputs", [False, True])
def test_a_step_of_torchsde_is_drawn_by_its_solver(method, with_inputs):
    """With one Euler step a gap it is that of the chain; the others have the noise of the gap, and more order."""
    times = torch.tensor([[0.0, 0.1, 0.3], [1.0, 1.2, 1.25]], dtype=D)
    torch.manual_seed(1)
    state, inputs = 0.3 * torch.randn(2, 2, 2, dtype=D), torch.randn(2, 2, 1, dtype=D) if with_inputs else None

    def drift(t, z, u):
        return t - z**3 + (0.0 if u is None else u)

    fields = (drift, lambda t, z, u: 0.3 + 0.1 * z)
    laws = [
        NeuralSDE(*fields, state_dim=2, method=name)(state, times[:, :-1], times[:, 1:], inputs)
        for name in (method, "euler")
    ]
    torch.manual_seed(0)
    noise = torch.randn(4000, 2, 2, 2, dtype=D)
    torch.manual_seed(0)
    drawn = laws[0].rsample(torch.Size([4000]))
    euler = laws[1].base_dist.loc + laws[1].base_dist.scale * noise
    off = (drawn - euler).square().mean((0, -1)).sqrt()
    if method.endswith("euler"):
        assert bool((off < 1e-9).all())
    else:
        h = times.diff(dim=-1)
        assert bool((1e-4 < off).all()) and bool((off < h / 2).all())
    with pytest.raises(NotImplementedError, match="Girsanov's ratio"):
        laws[0].log_prob(state)


@pytest.mark.parametrize("method", ["torchsde:srk", "torchsde_adjoint:euler"])
def test_a_model_by_torchsde_filters_and_forecasts(method):
    from pyro_ssm import StateSpaceModel, TimeSeries, infer, predict
    from pyro_ssm.dynamics import NormalInitial, discretize
    from pyro_ssm.emissions import LinearNormal
    from pyro_ssm.guides import PosteriorSDE

    torch.manual_seed(0)

    def made(step):
        sde = NeuralSDE(LinearDrift(torch.tensor([[-1.0]])), ConstantDiffusion(0.7, 1), method=method)
        return StateSpaceModel(NormalInitial(1), step(sde), LinearNormal(1, 1, matrix=torch.eye(1), scale=0.5))

    data = TimeSeries(torch.tensor([0.0, 0.4, 1.0]), torch.tensor([[0.5], [-0.3], [0.8]]))
    exact = made(lambda sde: discretize(NeuralSDE(sde.drift, sde.diffusion), "exact"))
    model = made(lambda sde: sde)
    wanted = infer.kalman_filter(exact.bind(), data)
    found = infer.particle_filter(infer.bootstrap(model.bind(), data.refine(4)), 20_000)
    torch.testing.assert_close(found.total, wanted.log_likelihood.sum(-1), rtol=0, atol=0.05)
    guide = PosteriorSDE(model, 4)
    fine = data.refine(4)
    ahead = predict.forecast(model, guide, fine, times=torch.linspace(1.1, 6.0, 50), num_samples=2000).states[:, -1, 0]
    assert ahead.mean().abs() < 0.06 and abs(ahead.std() / (0.7 / 2**0.5) - 1) < 0.1  # the law at rest


def test_errors_of_the_field_name_time_series_and_norm():
    times = torch.tensor([0.0, 0.5, 2.0], dtype=D)
    sde = NeuralSDE(lambda t, z, u: torch.where(z > 2, torch.nan, z), ConstantDiffusion(1.0, 1), state_dim=1)
    z = torch.ones(3, 2, 1)
    z[1, 1] = 3.0
    with pytest.raises(FloatingPointError, match=r"step 1 \(time 0.5\) of series 1, where the state has norm 3"):
        sde(z, times[:-1], times[1:], None)
    cubic = NeuralSDE(lambda t, z, u: z**5, ConstantDiffusion(0.1, 1), state_dim=1)
    with pytest.raises(FloatingPointError, match=r"the path of 'euler' is not finite at step \d+ .* of series 1"):
        noise = BrownianPath.draw(torch.linspace(0, 30, 31, dtype=D), 1, (2,))
        cubic.solve(torch.tensor([[[0.0]], [[50.0]]]) * torch.tensor([[[1.0]], [[1e3]]]), noise)
    zero = NeuralSDE(lambda t, z, u: z, lambda t, z, u: z * torch.tensor([0.0, 1.0]), state_dim=2)
    with pytest.raises(FloatingPointError, match='site="noise"'):
        zero(torch.ones(2, 2), times[:-1], times[1:], None)


class Mechanism(PyroModule):
    """Logistic growth."""

    event_dims = {"rate": 1, "capacity": 1}
    state_dim = 1

    def __init__(self):
        super().__init__()
        self.rate = PyroSample(dist.LogNormal(0.0, 0.5))
        self.capacity = nn.Parameter(torch.tensor([2.0]))

    def forward(self, t, z, u):
        return self.rate * z * (1 - z / self.capacity)


@pytest.mark.parametrize("method", ["euler", "milstein", "torchsde:euler", "torchsde_adjoint:euler"])
def test_mechanisms_with_priors_bind_and_solve(method):
    """Each draw of a constant has its own path; gradients reach drawn values through every solver."""
    sde = NeuralSDE(Mechanism(), lambda t, z, u: 0.1 * z, method=method)
    assert random_parameters(sde) == ["drift.rate"]
    rates = torch.tensor([0.2, 1.0], requires_grad=True)
    noise = BrownianPath.draw(torch.linspace(0, 1, 5), 1, (2, 3))
    start = torch.full((2, 3, 1, 1), 0.5)
    path = bind(sde, {"drift.rate": rates.reshape(2, 1)}).solve(start, noise)
    for i, rate in enumerate((0.2, 1.0)):
        one = BrownianPath(noise.times, noise.increments[i], noise.seed)
        alone = bind(sde, {"drift.rate": torch.tensor(rate)}).solve(start[i], one)
        torch.testing.assert_close(path[i], alone, atol=1e-6, rtol=1e-5)
    (grad,) = torch.autograd.grad(path[:, :, -1].sum(), rates)
    step = 1e-2
    with torch.no_grad():
        ends = [
            bind(sde, {"drift.rate": (rates + e).reshape(2, 1)}).solve(start, noise)[:, :, -1].sum((1, 2))
            for e in (step, -step)
        ]
    difference = (ends[0] - ends[1]) / (2 * step)
    tolerance = 0.1 if "adjoint" in method else 1e-3  # an adjoint is exact for vanishing steps
    torch.testing.assert_close(grad, difference, rtol=tolerance, atol=1e-4)


def test_adjoint_and_direct_gradients_agree_in_the_limit():
    errors = []
    for substeps in (4, 64):
        grads = []
        for backend in ("torchsde", "torchsde_adjoint"):
            torch.manual_seed(0)
            sde = NeuralSDE(
                LinearDrift(torch.tensor([[-0.7]])),
                ConstantDiffusion(0.8, 1),
                method=f"{backend}:euler",
                options={"substeps": substeps},
            ).double()
            generator = torch.Generator().manual_seed(0)
            noise = BrownianPath.draw(torch.linspace(0, 2, 6, dtype=D), 1, (4,), generator=generator, dtype=D)
            z = sde.solve(torch.ones(4, 1, 1, dtype=D), noise)
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(z.square().sum(), sde.parameters())]))
        errors.append(float((grads[0] / grads[1] - 1).abs().max()))
    assert errors[1] < 1e-3 and errors[1] < errors[0] / 8


def test_the_same_noise_object_gives_the_same_path():
    sde = NeuralSDE(MLPDrift(2, 4), ElementwiseDiffusion(2, 4), method="milstein")
    noise = BrownianPath.draw(torch.linspace(0, 1, 6), 2, (3,))
    assert torch.equal(sde.solve(torch.ones(3, 1, 2), noise), sde.solve(torch.ones(3, 1, 2), noise))
