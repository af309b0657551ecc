"""EM against a dense hand-written step, against the score, and against the door."""

import warnings
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroSample

from pyro_ssm import StateSpaceModel, TimeSeries
from pyro_ssm.dynamics import LinearNormal, MLPTransition, NormalInitial, OrnsteinUhlenbeck
from pyro_ssm.emissions import LinearNormal as LinearEmission
from pyro_ssm.emissions import Poisson
from pyro_ssm.infer import Marginal, em, kalman_filter
from tests.infer.expectation_maximisation.dense import em_step

D = torch.float64
STORED = Path(__file__).with_name("dynamax_em.npz")
N, P, U = 2, 3, 1


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(D)
    yield
    torch.set_default_dtype(torch.float32)


def random_model(covariance="full", inputs=U, seed=0):
    torch.manual_seed(seed)
    kind = {"input_dim": inputs, "covariance": covariance}
    model = StateSpaceModel(NormalInitial(N, **kind), LinearNormal(N, **kind), LinearEmission(N, P, **kind))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_data(lengths=(5, 7, 4, 6, 7, 5), missing=0.3, inputs=U, seed=1):
    """Ragged series with partial rows and whole steps missing."""
    torch.manual_seed(seed)
    batch, times = len(lengths), max(lengths)
    values = torch.randn(batch, times, P).cumsum(-2) + 1
    values[torch.rand(values.shape) < missing] = float("nan")
    values[:, 2] = float("nan")
    values[:, 0, 0] = 0.5
    held = torch.randn(batch, times, inputs) if inputs else None
    return TimeSeries(torch.arange(float(times)), values, inputs=held, lengths=torch.tensor(lengths))


def square_of(component):
    return component.scale_tril @ component.scale_tril.mT if component.covariance == "full" else component.scale**2


def as_arrays(model):
    """The parameters as the dense step names them."""
    start, move, look = model.initial, model.transition, model.emission
    found = {"M": start.input_matrix, "m": start.loc, "P": square_of(start)}
    found |= {"A": move.matrix, "B": move.input_matrix, "b": move.offset, "Q": square_of(move)}
    found |= {"C": look.matrix, "D": look.input_matrix, "d": look.offset, "R": square_of(look)}
    arrays = {name: value.detach().numpy().copy() for name, value in found.items()}
    return {name: np.diag(a) if name in "PQR" and a.ndim == 1 else a for name, a in arrays.items()}


def as_series(data):
    values = torch.where(data.mask, data.values, torch.nan).numpy()
    return [(y[:n], u[:n]) for y, u, n in zip(values, data.inputs.numpy(), data.lengths.tolist())]


def step(model, data, **options):
    return em(model, data, num_iterations=1, progress=False, **options)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_one_step_is_the_dense_step(covariance):
    """Inputs, offsets, ragged series, missing entries with correlated noise, the likelihood as well."""
    model, data = random_model(covariance), random_data()
    expected, total = em_step(as_arrays(model), as_series(data), diagonal=covariance == "diagonal")
    fitted = step(model, data)
    assert fitted.log_likelihood[0].item() == pytest.approx(total, rel=1e-10)
    assert fitted.num_iterations == 1 and not fitted.converged
    for name, value in as_arrays(model).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-8, atol=1e-9, err_msg=name)
    after = kalman_filter(fitted.model, data).log_likelihood.sum()
    assert after.item() == pytest.approx(fitted.log_likelihood[1].item(), rel=1e-12)
    assert torch.equal(fitted.model.transition.matrix, model.transition.matrix)  # bound copy and model are one


def test_five_steps_are_those_of_dynamax():
    """Numbers of dynamax 1.0.3 (made by make_dynamax_em.py, which says why one series): offsets, full covariances."""
    stored = {name: torch.as_tensor(value) for name, value in np.load(STORED).items()}
    start = {name.removeprefix("start_"): value for name, value in stored.items() if name.startswith("start_")}
    end = {name.removeprefix("end_"): value for name, value in stored.items() if name.startswith("end_")}
    model = random_model(inputs=0)
    with torch.no_grad():
        model.initial.loc.copy_(start["initial_mean"])
        model.initial.scale_tril = torch.linalg.cholesky(start["initial_covariance"])
        for part, theirs in ((model.transition, "dynamics"), (model.emission, "emission")):
            part.matrix.copy_(start[f"{theirs}_weights"])
            part.offset.copy_(start[f"{theirs}_bias"])
            part.scale_tril = torch.linalg.cholesky(start[f"{theirs}_covariance"])
    data = TimeSeries(torch.arange(40.0), stored["y"])
    fitted = em(model, data, num_iterations=5, tolerance=0, progress=False)
    torch.testing.assert_close(fitted.log_likelihood[:5], stored["trace"], rtol=1e-8, atol=0)
    found = {"initial_mean": fitted.model.initial.loc, "initial_covariance": square_of(fitted.model.initial)}
    for part, theirs in ((fitted.model.transition, "dynamics"), (fitted.model.emission, "emission")):
        found |= {f"{theirs}_weights": part.matrix, f"{theirs}_bias": part.offset}
        found[f"{theirs}_covariance"] = square_of(part)
    for name, value in end.items():
        torch.testing.assert_close(found[name].detach(), value, rtol=1e-6, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_padding_changes_nothing():
    data = random_data()
    values = torch.where(data.mask, data.values, torch.nan)
    longer = TimeSeries(
        torch.arange(12.0),
        torch.cat([values, torch.full((6, 5, P), 9.0)], -2),
        inputs=torch.cat([data.inputs, torch.full((6, 5, U), 9.0)], -2),
        lengths=data.lengths,
    )
    short, long = random_model(), random_model()
    step(short, data)
    step(long, longer)
    for one, two in zip(short.parameters(), long.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_refined_and_own_grids_pool_like_a_batch():
    """A refined grid is a record with steps at which nothing was seen."""
    one, two = random_model(), random_model()
    data = random_data(lengths=(5, 5), missing=0.2)
    refined = data.refine(2)
    values = torch.full((2, 9, P), torch.nan)
    values[:, ::2] = torch.where(data.mask, data.values, torch.nan)
    own = (torch.arange(9.0) + 0.3 * torch.rand(2, 9)).sort(-1).values
    step(one, refined)
    step(two, TimeSeries(own, values, inputs=refined.inputs))
    for first, second in zip(one.parameters(), two.parameters()):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-11)


def test_single_precision_model_is_fitted_in_double():
    model, data = random_model(), random_data()
    single = random_model().float()
    trace = step(single, data.to(dtype=torch.float32)).log_likelihood
    assert trace.dtype == D and single.transition.matrix.dtype == torch.float32
    step(model, data)
    for one, two in zip(single.parameters(), model.parameters()):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accelerate", [False, True])
def test_ends_where_the_score_vanishes_and_never_falls(accelerate):
    """One loading of two is held, and the noise is correlated: the rows are solved together."""
    torch.manual_seed(3)
    root = torch.tensor([[0.6, 0.0], [0.3, 0.5]])
    loadings = torch.tensor([[1.0], [1.5]])
    look = LinearEmission(1, 2, covariance="full", matrix=torch.ones(2, 1), scale=root)
    model = StateSpaceModel(NormalInitial(1), LinearNormal(1), look)
    z = torch.randn(60, 10, 1)
    for k in range(9):
        z[:, k + 1] = 0.7 * z[:, k] + torch.randn(60, 1)
    values = z @ loadings.mT + torch.randn(60, 10, 2) @ root.mT
    values[torch.rand(values.shape) < 0.1] = torch.nan
    data = TimeSeries(torch.arange(10.0), values)
    entry = torch.tensor([[True], [False]])
    fixed = {"emission.matrix": entry, "emission.scale_tril": True, "emission.offset": True}

    def score():
        model.zero_grad()
        kalman_filter(model, data).log_likelihood.sum().backward()
        look.matrix.grad[entry] = 0
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if n not in held])

    held = ("emission.scale_tril_unconstrained", "emission.offset")
    start = score().norm()
    fitted = em(model, data, tolerance=1e-7, fixed=fixed, accelerate=accelerate, progress=False)
    assert fitted.converged and fitted.num_iterations <= (14 if accelerate else 40)
    assert (fitted.log_likelihood.diff() > -1e-9).all()
    assert look.matrix[0] == 1 and torch.equal(look.offset, torch.zeros(2))
    assert score().norm() < 1e-4 * start


def test_an_accelerated_fit_gains_what_a_plain_one_gains():
    data = random_data(inputs=0)
    plain, fast = random_model(inputs=0), random_model(inputs=0)
    slow = em(plain, data, num_iterations=24, tolerance=0, fixed=["initial"], progress=False)
    quick = em(fast, data, num_iterations=24, tolerance=0, fixed=["initial"], accelerate=True, progress=False)
    assert (quick.log_likelihood.diff() > -1e-8).all()
    assert quick.log_likelihood[-1] > slow.log_likelihood[-1] + 0.1


def test_what_is_fixed_stays_to_the_last_bit():
    model, data = random_model("diagonal"), random_data()
    model.initial.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    corner = torch.tensor([[True, False], [False, True]])
    fixed = {"transition.matrix": corner, "emission.scale": torch.tensor([True, False, False]), "emission.offset": True}
    step(model, data, fixed=fixed)
    after = dict(model.named_parameters())
    for name, value in before.items():
        same = after[name] == value
        if name.startswith("initial") or name == "emission.offset":
            assert same.all(), name
        elif name == "transition.matrix":
            assert torch.equal(same, corner)
        elif name == "emission.scale_unconstrained":
            assert same.tolist() == [True, False, False]
        else:
            assert not same.any(), name


def test_a_component_that_is_held_may_be_of_any_class():
    torch.manual_seed(0)
    move = OrnsteinUhlenbeck(1)
    model = StateSpaceModel(NormalInitial(1), move, LinearEmission(1, 1))
    data = TimeSeries(torch.tensor([0.0, 0.3, 1.7, 2.0, 4.0]), torch.randn(4, 5, 1))
    rate = move.rate.detach().clone()
    trace = em(model, data, num_iterations=3, fixed=["transition"], progress=False).log_likelihood
    assert (trace.diff() > 0).all() and torch.equal(move.rate, rate)


def test_one_time_and_a_coordinate_that_was_never_seen():
    model = random_model("diagonal", inputs=0)
    values = torch.randn(7, 1, P)
    values[..., 2] = torch.nan
    old = model.emission.scale.detach().clone(), model.transition.scale.detach().clone()
    trace = step(model, TimeSeries([0.0], values)).log_likelihood
    assert trace[1] > trace[0]
    assert model.emission.scale[2] == old[0][2] and torch.equal(model.transition.scale, old[1])
    assert (model.emission.scale[:2] != old[0][:2]).all()


def test_a_noise_free_record_ends_at_the_floor():
    model = StateSpaceModel(
        NormalInitial(1), LinearNormal(1), LinearEmission(1, 2, covariance="full", matrix=torch.ones(2, 1), floor=0.01)
    )
    level = torch.linspace(0, 1, 20).sin().view(20, 1)
    data = TimeSeries(torch.arange(20.0), level.expand(20, 2))
    fitted = em(model, data, num_iterations=40, fixed=["initial"], progress=False)
    assert (fitted.log_likelihood.diff() > -1e-6).all()
    assert model.emission.scale_tril.diagonal().min().item() == pytest.approx(0.01, rel=0.02)


def test_convergence_is_told():
    model, data = random_model(inputs=0), random_data(inputs=0)
    assert em(model, data, num_iterations=5, tolerance=1e9, progress=False)[2:] == (1, True)
    assert em(model, data, num_iterations=3, tolerance=0.0, progress=False)[2:] == (3, False)


def test_a_fall_is_an_error_with_numbers():
    """A smoother that lies about the covariances, and about being exact."""
    from pyro_ssm.infer import kalman_smoother

    def liar(model, data):
        honest = kalman_smoother(model, data)
        return honest._replace(scale_tril=5 * honest.scale_tril)

    model, data = random_model(inputs=0), random_data(inputs=0)
    em(model, data, num_iterations=20, progress=False)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="EM iteration 1 took the log-likelihood from -"):
        step(model, data, smoother=liar)
    for one, two in zip(before, model.parameters()):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_refusals_say_what_to_do():
    model, data = random_model(), random_data()
    with pytest.raises(KeyError, match="Did you mean 'emission.matrix'"):
        step(model, data, fixed=["emision.matrix"])
    with pytest.raises(TypeError, match="must be a collection of names"):
        step(model, data, fixed="emission.matrix")
    with pytest.raises(TypeError, match="must be boolean"):
        step(model, data, fixed={"emission.matrix": torch.zeros(P, N)})
    with pytest.raises(ValueError, match=r"has shape \(3, 3\), but the parameter has \(3, 2\)"):
        step(model, data, fixed={"emission.matrix": torch.zeros(3, 3, dtype=torch.bool)})
    with pytest.raises(ValueError, match="some entries of emission.scale_tril"):
        step(model, data, fixed={"emission.scale_tril": torch.eye(P, dtype=torch.bool)})
    with pytest.raises(ValueError, match="nothing to fit"):
        step(model, data, fixed=["initial", "transition", "emission"])
    with pytest.raises(ValueError, match="no values"):
        step(model, data.without_values())
    with pytest.raises(TypeError, match="unbound StateSpaceModel, got BoundStateSpaceModel"):
        step(model.bind(), data)
    with pytest.raises(TypeError, match="unbound StateSpaceModel, got Marginal"):
        step(Marginal(model), data)
    with pytest.raises(ValueError, match="`num_iterations` must be at least 1"):
        em(model, data, num_iterations=0)
    with pytest.raises(ValueError, match="`tolerance` must not be negative"):
        em(model, data, tolerance=-1.0)
    for part, component in (("transition", MLPTransition(N, 4)), ("emission", Poisson(N, P, 4))):
        other = random_model()
        setattr(other, part, component)
        with pytest.raises(TypeError, match=rf"closed-form M-step for the {part}.*infer.fit\(infer.Marginal\(model\)"):
            step(other, data)
    model.transition.offset = PyroSample(dist.Normal(torch.zeros(N), 1.0).to_event(1))
    with pytest.raises(ValueError, match=r"\['transition.offset'\] have one.*AutoDelta"):
        step(model, data)


def test_no_warning_escapes():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(random_model(), random_data())
