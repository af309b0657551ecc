"""A captured run is the run of the stepper, with the same noise the same numbers."""

from copy import deepcopy

import pytest
import torch
from torch.utils import _pytree as pytree

from pyro_ssm import dynamics, emissions
from pyro_ssm.data import TimeSeries
from pyro_ssm.infer import (
    bootstrap,
    hmm_filter,
    kalman_filter,
    particle_filter,
)
from pyro_ssm.infer.smc import (
    AncestorResampling,
    FixedNoise,
    Genealogy,
    Moments,
)
from pyro_ssm.infer.smc.capture import CudaGraphs
from pyro_ssm.infer.smc.device_stepper import DeviceStepper
from pyro_ssm.infer.smc.graph_run import graph_run
from pyro_ssm.infer.smc.resample import resampling_of
from pyro_ssm.models import StateSpaceModel
from tests.contracts.toys import series, toy
from tests.infer.smc.graph_cases import (
    CASES,
    F,
    HandNoise,
    N,
    Plain,
    assert_equal,
    by_hand,
    case,
    fixed,
    here,
    moved,
    ragged,
    there,
)
from tests.infer.smc.pretend_cuda import pretend_cuda
from tests.infer.smc.programs import D, assert_unbiased, repeated


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_step_by_tensors_alone_is_the_step(name):
    make, data, build, dtype, options = case(name)
    noise = FixedNoise(*fixed(data, options["resampling"], dtype=dtype))
    wanted = particle_filter(build(make(), data), N, noise=noise, **options)
    stepper = DeviceStepper(
        build(make(), data), N, resampling_of(options["resampling"]), options["ess_threshold"], noise
    )
    assert_equal(graph_run(stepper, stepper.init(), Plain()), wanted, dtype)


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
@pytest.mark.parametrize("name", [name for name in CASES if name != "guided, memory, refined"])  # a GRU's transpose_
def test_replays_are_the_run(name, monkeypatch):
    make, data, build, dtype, options = case(name)
    numbers = fixed(data, options["resampling"], dtype=dtype)
    with torch.no_grad():
        wanted = particle_filter(build(make(), data), N, noise=FixedNoise(*numbers), **options)
    with pretend_cuda(monkeypatch) as device:
        fk = build(device.move(make()), moved(data))
        noise = FixedNoise(*there(numbers))
        eager = particle_filter(fk, N, noise=noise, **options)
        found = particle_filter(fk, N, noise=noise, cuda_graph=True, **options)
        assert_equal(here(eager), wanted, dtype)
        assert_equal(here(found), here(eager), dtype)
    replays = sum(graph.replays for graph in device.graphs)
    assert replays + 2 >= min(data.num_times, 5) or data.num_times < 3, "the steps were called, and not replayed"


def test_a_graph_reads_the_data_where_they_lie(monkeypatch):
    """Recorded with one record and replayed with another in its place: nothing of the first is left."""
    one, other = series(6, (2,)), series(6, (2,)).replace(values=torch.randn(6, 2, 2, dtype=D).movedim(0, 1))
    numbers = fixed(one, "systematic")
    with torch.no_grad():
        wanted = particle_filter(bootstrap(toy(), other), N, noise=FixedNoise(*numbers))
    with pretend_cuda(monkeypatch) as device:
        record, noise = moved(one), FixedNoise(*there(numbers))
        fk = bootstrap(device.move(toy()), record)
        whole = fk.log_potential.__closure__[0].cell_contents._values._whole
        stepper = DeviceStepper(fk, N, AncestorResampling(), 0.5, noise)
        run = Changed(lambda: whole.inner.copy_(other.values))
        whole.inner[:, :2] = other.values[:, :2]  # the steps that are called
        found = here(graph_run(stepper, stepper.init(), run))
    assert run.replays == 4
    torch.testing.assert_close(found.log_likelihood, wanted.log_likelihood)


class Changed:
    """Graphs, and something that happens between the record and the first replay."""

    def __init__(self, change):
        self.graphs, self.change, self.replays = CudaGraphs(torch.device("cuda", 0)), change, 0
        self.rehearse, self.finish = self.graphs.rehearse, self.graphs.finish

    def record(self, function):
        replay = self.graphs.record(function)
        self.change()

        def counted():
            self.replays += 1
            replay()

        return counted


@pytest.mark.parametrize("build", [lambda: [Moments()], lambda: [Genealogy(), Moments()]])
def test_collectors_and_going_on(build, monkeypatch):
    """The second half of a run, from the cloud that the first half left."""
    data = ragged()
    numbers = fixed(data, "systematic")
    with pretend_cuda(monkeypatch) as device:
        fk, noise = bootstrap(device.move(toy()), moved(data)), FixedNoise(*there(numbers))
        stepper = DeviceStepper(fk, N, AncestorResampling(), 0.5, noise)
        middle = stepper.init()
        for _ in range(3):
            middle = stepper.step(middle)
        pairs = []
        for start in (None, middle.cloud):
            two = (
                particle_filter(fk, N, noise=noise, collectors=build(), start=start, cuda_graph=cuda_graph)
                for cuda_graph in (True, False)
            )
            pairs.append([here(found) for found in two])
    for one, other in pairs:
        assert_equal(one, other)
        for name, value in other.collected.items():
            for a, b in zip(*map(pytree.tree_leaves, (one.collected[name], value)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_quasi_random_points_are_those_of_the_run(monkeypatch):
    data = series(6, (2,))
    with torch.no_grad():
        torch.manual_seed(3)
        wanted = particle_filter(bootstrap(toy(), data), 32, quasi_random=True)
    with pretend_cuda(monkeypatch) as device:
        fk = bootstrap(device.move(toy()), moved(data))
        torch.manual_seed(3)
        assert_equal(here(particle_filter(fk, 32, quasi_random=True, cuda_graph=True)), wanted)


@torch.no_grad()
def test_every_replay_draws_anew_and_the_evidence_is_unbiased(monkeypatch):
    model, data = toy(), repeated(series(6, obs_dim=2), 300)
    exact = kalman_filter(model, series(6)).log_likelihood.sum()
    torch.manual_seed(0)
    with pretend_cuda(monkeypatch) as device:
        fk = bootstrap(device.move(toy()), moved(data))
        found = here(particle_filter(fk, 200, cuda_graph=True))
    assert_unbiased(found.total, exact)


OBSERVED = {"count": lambda x: x.abs().round(), "binary": lambda x: (x > 0).to(x), "real": lambda x: x}
COMPONENTS = {
    "GatedTransition": (lambda: dynamics.GatedTransition(2, 4), lambda: emissions.Poisson(2, 2), "count"),
    "MLPTransition": (lambda: dynamics.MLPTransition(2, 4), lambda: emissions.NegativeBinomial(2, 2), "count"),
    "Matern": (lambda: dynamics.Matern(1.5), lambda: emissions.Bernoulli(2, 2), "binary"),
    "HarmonicOscillator": (lambda: dynamics.HarmonicOscillator(), lambda: emissions.StudentT(2, 2), "real"),
    "IntegratedWiener": (lambda: dynamics.IntegratedWiener(), lambda: emissions.Normal(2, 2), "real"),
    "NeuralSDE": (
        lambda: dynamics.NeuralSDE(dynamics.MLPDrift(2, 4), dynamics.ElementwiseDiffusion(2, 4)),
        lambda: emissions.LinearNormal(2, 2),
        "real",
    ),
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_components_of_the_library_are_captured(name, monkeypatch):
    transition, emission, kind = COMPONENTS[name]
    data = series(5, (2,), missing=True)
    data = TimeSeries(data.times, torch.where(data.mask, OBSERVED[kind](data.values), torch.nan))
    torch.manual_seed(0)
    model = StateSpaceModel(dynamics.NormalInitial(2), transition(), emission()).to(D)
    other, numbers = deepcopy(model), fixed(data, "systematic")
    with torch.no_grad():
        wanted = particle_filter(bootstrap(model, data), N, noise=FixedNoise(*numbers))
    with pretend_cuda(monkeypatch) as device:
        fk = bootstrap(device.move(other), moved(data))
        assert_equal(here(particle_filter(fk, N, noise=FixedNoise(*there(numbers)), cuda_graph=True)), wanted)


def test_a_hidden_markov_model_is_captured(monkeypatch):
    torch.manual_seed(1)
    model = StateSpaceModel(
        dynamics.CategoricalInitial(3), dynamics.MarkovChain(3), emissions.NormalTable(3, 1, loc=torch.randn(3, 1))
    ).to(D)
    data = series(5, obs_dim=1)
    exact, other = hmm_filter(model, data).log_likelihood.sum().detach(), deepcopy(model)
    with pretend_cuda(monkeypatch) as device:
        fk = bootstrap(device.move(other), moved(repeated(data, 300)))
        found = here(particle_filter(fk, 100, cuda_graph=True))
    assert_unbiased(found.total, exact)


def test_what_reads_by_nature_is_refused(monkeypatch):
    """The number of squarings of a matrix exponential depends on the matrix."""
    with pretend_cuda(monkeypatch) as device:
        model = StateSpaceModel(
            dynamics.CategoricalInitial(3), dynamics.MarkovJump(3), emissions.NormalTable(3, 1)
        )  # fmt: skip
        fk = bootstrap(device.move(model), moved(series(6, obs_dim=1, dtype=F)))
        with pytest.raises(RuntimeError, match=r"a step cannot be captured: RuntimeError at .*\.py:\d+: .*capturing"):
            particle_filter(fk, N, cuda_graph=True)


# ---------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_on_a_gpu_replays_are_the_run(name):
    make, data, build, dtype, options = case(name)
    numbers = [x.cuda() for x in fixed(data, options["resampling"], dtype=dtype)]
    fk = build(make().cuda(), data.to("cuda"))
    wanted = particle_filter(fk, N, noise=FixedNoise(*numbers), **options)
    for _ in range(2):
        found = particle_filter(fk, N, noise=FixedNoise(*numbers), cuda_graph=True, **options)
        assert_equal(found, wanted, dtype)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@torch.no_grad()
def test_on_a_gpu_the_evidence_is_unbiased_and_errors_come():
    model, data = toy().cuda(), repeated(series(6), 300).to("cuda")
    exact = kalman_filter(toy(), series(6)).log_likelihood.sum()
    assert_unbiased(particle_filter(bootstrap(model, data), 200, cuda_graph=True).total.cpu(), exact)
    y = torch.randn(6, 2, device="cuda")
    look = by_hand(y, lambda k: int(k))
    with pytest.raises(RuntimeError, match="a step cannot be captured"):
        particle_filter(look, N, noise=HandNoise(), cuda_graph=True)
    assert particle_filter(bootstrap(model, data), 50, cuda_graph=True).total.isfinite().all()  # and goes on
