"""A captured run is the run of the stepper, with the same noise the same numbers, and Python reads nothing."""

from copy import deepcopy

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pyro_ssm import dynamics, emissions
from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Structured
from pyro_ssm.infer import (
    FeynmanKac,
    auxiliary,
    bootstrap,
    guided,
    hmm_filter,
    kalman_filter,
    locally_optimal,
    particle_filter,
)
from pyro_ssm.infer.smc import (
    AncestorResampling,
    Cloud,
    DiffusionResampling,
    FixedNoise,
    Genealogy,
    Moments,
    PseudoRandom,
    SoftResampling,
    Step,
    TransportResampling,
)
from pyro_ssm.infer.smc.capture import CudaGraphs
from pyro_ssm.infer.smc.device_stepper import DeviceStepper
from pyro_ssm.infer.smc.graph_run import captured_run, graph_run
from pyro_ssm.infer.smc.resample import resampling_of
from pyro_ssm.models import StateSpaceModel
from pyro_ssm.ops import compiled
from pyro_ssm.ops.reading import no_reading
from tests.contracts.toys import remembering, series, toy
from tests.infer.smc.pretend_cuda import OnDevice, PretendCuda, pretend_cuda
from tests.infer.smc.programs import D, Replayed, assert_unbiased, repeated

N = 24
F = torch.float32


class Plain:
    """No graph: what was taken down is called again."""

    def rehearse(self, function):
        function()

    def record(self, function):
        return function

    def finish(self):
        pass


def ragged(own=False, dtype=D):
    data = series(9, (3,), own=own, missing=True, dtype=dtype)
    values = data.values.clone()
    values[:, 4] = float("nan")  # nobody sees anything
    return TimeSeries(data.times, torch.where(data.mask, values, torch.nan), lengths=[8, 5, 2])


def refined(batch=()):
    return series(4, batch, missing=True).refine(3)


def fixed(data, resampling, dim=2, dtype=D):
    generator, rows = torch.Generator().manual_seed(0), resampling_of(resampling).rows(N)
    shape = (data.num_times, N, *data.batch_shape, dim)
    normals = torch.randn(shape, dtype=D, generator=generator).to(dtype)
    return normals, torch.rand((data.num_times, rows, *data.batch_shape), dtype=D, generator=generator)


def past_guided(model, data):
    torch.manual_seed(0)
    guide = Structured(model, hidden_dim=4, direction="past").to(D)
    if isinstance(data.values, OnDevice):
        PretendCuda.move(guide)
    else:
        guide.to(data.values.device)
    return guided(model, guide, data)


#: model, data, process, options
CASES = {
    "ragged": (toy, ragged, bootstrap, {}),
    "own times, always": (toy, lambda: ragged(True), bootstrap, {"ess_threshold": 1.0}),
    "one series, never": (toy, lambda: series(6), bootstrap, {"ess_threshold": 0.0}),
    "float32": (lambda: toy(dtype=F), lambda: ragged(dtype=F), bootstrap, {"dtype": F}),
    "memory": (remembering, ragged, bootstrap, {}),
    "memory, never": (remembering, lambda: series(5, (2,)), bootstrap, {"ess_threshold": 0.0}),
    "refined": (toy, refined, bootstrap, {}),
    "memory, refined": (remembering, lambda: refined((2,)), bootstrap, {}),
    "locally optimal": (toy, ragged, locally_optimal, {}),
    "locally optimal, refined": (toy, refined, locally_optimal, {}),
    "auxiliary": (toy, ragged, auxiliary, {}),
    "auxiliary, memory, refined": (remembering, refined, auxiliary, {}),
    "guided": (toy, ragged, past_guided, {}),
    "guided, memory, refined": (remembering, lambda: refined((2,)), past_guided, {}),
    "soft": (toy, lambda: series(6, (2,)), bootstrap, {"resampling": SoftResampling(0.5)}),
    "diffusion": (toy, lambda: series(6, (2,)), bootstrap, {"resampling": DiffusionResampling(), "rows": 64}),
    "two steps": (toy, lambda: series(2, (2,)), bootstrap, {}),
    "one step": (toy, lambda: series(1), bootstrap, {}),
}
for scheme in ("stratified", "multinomial", "residual", "ssp", "killing", "hilbert-systematic"):
    CASES[scheme] = (toy, lambda: series(6, (2,)), bootstrap, {"resampling": scheme})


def case(name):
    make, records, build, options = CASES[name]
    options = {"resampling": "systematic", "ess_threshold": 0.7, "dtype": D} | options
    torch.manual_seed(0)
    return make, records(), build, options.pop("dtype"), {k: x for k, x in options.items() if k != "rows"}


def assert_equal(found, wanted, dtype=D):
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == D else {"rtol": 2e-4, "atol": 2e-4}
    assert torch.equal(found.resampled, wanted.resampled)
    assert torch.equal(found.log_likelihood == 0, wanted.log_likelihood == 0)
    assert found.cloud.k == wanted.cloud.k
    pairs = (found.log_likelihood, found.ess, found.cloud), (wanted.log_likelihood, wanted.ess, wanted.cloud)
    for one, other in zip(*map(pytree.tree_leaves, pairs), strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, **tolerance)


def there(tree):
    return pytree.tree_map_only(torch.Tensor, OnDevice, tree)


def here(tree):
    return pytree.tree_map_only(OnDevice, lambda x: x.inner, tree)


def moved(data):
    """The record on the device, without a look at it."""
    found = object.__new__(TimeSeries)
    found.__dict__.update(there(dict(vars(data))))
    return found


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


# ------------------------------------------------------------------------------------------- nothing is looked at


def off(monkeypatch):
    """Torch's own operations, which can be traced."""
    monkeypatch.setattr(compiled, "_library", compiled.Library(None, "switched off by the test", "", 0))


def second(stepper):
    """The step after the first, with its index in a tensor."""
    first = stepper.init()
    k = torch.tensor([0])
    return stepper.step(first._replace(cloud=first.cloud._replace(k=k)))


def faked(tree, mode):
    return pytree.tree_map_only(torch.Tensor, mode.from_tensor, tree)


def fake_step(stepper, last):
    """A step on tensors without numbers, where a look at one raises."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, no_reading():
        return stepper.step(faked(last, mode))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("one step", "two steps")])
@torch.no_grad()
def test_a_step_needs_no_numbers(name, monkeypatch):
    off(monkeypatch)
    make, data, build, dtype, options = case(name)
    resampling = resampling_of(options["resampling"])
    noise = FixedNoise(*fixed(data, resampling, dtype=dtype))
    stepper = DeviceStepper(build(make(), data), N, resampling, options["ess_threshold"], noise)
    last = second(stepper)
    found = fake_step(stepper, last)
    with no_reading():
        wanted = stepper.step(last)
    shapes = [[(x.shape, x.dtype) for x in pytree.tree_leaves(step) if isinstance(x, torch.Tensor)] for step in
              (found, wanted)]  # fmt: skip
    assert shapes[0] == shapes[1]


class Curious(AncestorResampling):
    """It looks whether there is anything to do."""

    def __call__(self, weighted, uniforms):
        if weighted.need is not None and not bool(weighted.need.any()):
            raise AssertionError("the test wants a cloud that is resampled")
        return super().__call__(weighted, uniforms)


def by_hand(y, look=lambda k: k):
    """A random walk, of series ``y`` ``(time, *batch)``, without a model."""
    return FeynmanKac(
        lambda draw, shape: draw(torch.distributions.Normal(y.new_zeros(1), 1.0), shape + (1,)),
        lambda k, x, draw: x + 0.5 * torch.randn_like(x),
        lambda k, previous, x: -0.5 * (y[look(k)] - x[..., 0]).square(),
        len(y),
        y.shape[1:],
    )


LOOKS = {
    "int": lambda k: int(k),
    "branch": lambda k: k if k > 0 else 0,
    "item": lambda k: k if isinstance(k, int) else k.item(),
}


@pytest.mark.parametrize("look", LOOKS)
@torch.no_grad()
def test_a_look_is_found(look, monkeypatch):
    off(monkeypatch)
    stepper = DeviceStepper(by_hand(torch.randn(5, 2), LOOKS[look]), N, AncestorResampling(), 0.5, HandNoise())
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        fake_step(stepper, stepper.init()._replace(cloud=stepper.init().cloud._replace(k=torch.tensor([0]))))


@torch.no_grad()
def test_a_look_of_a_resampling_is_found(monkeypatch):
    off(monkeypatch)
    stepper = DeviceStepper(bootstrap(toy(), series(5, (2,))), N, Curious(), 1 - 1e-9, PseudoRandom())
    with pytest.raises(DataDependentOutputException):
        fake_step(stepper, second(stepper))


class HandNoise(PseudoRandom):
    def draw(self, k, law, shape):
        return torch.randn(shape, device=law.mean.device)


@pytest.mark.parametrize("shape", [(), (2,)])
@torch.no_grad()
def test_a_traced_step_serves_other_numbers(shape, monkeypatch):
    """Nothing of the first data, cloud, noise or of k stands in the trace."""
    off(monkeypatch)

    def step(y, k, x, log_weights, weights, ess, uniforms, normals):
        fk = FeynmanKac(
            None,
            lambda k, x, draw: 0.9 * x + normals[k].squeeze(0),
            lambda k, previous, x: -0.5 * (y[k] - x[..., 0]).square(),
            len(y),
            y.shape[1:],
        )
        stepper = DeviceStepper(fk, N, AncestorResampling(), 0.6, FixedNoise(normals, uniforms))
        with no_reading():
            found = stepper.step(Step(Cloud(x, log_weights, k), weights, ess, ess, None, None, False))
        return found.cloud.particles, found.cloud.log_weights, found.log_likelihood, found.resampled

    def numbers(seed, k):
        torch.manual_seed(seed)
        log_weights = (torch.randn(N, *shape) * seed).log_softmax(0)
        weights = log_weights.exp()
        uniforms, normals = torch.rand(6, 1, *shape, dtype=D), torch.randn(6, N, *shape, 1)
        cloud = torch.randn(N, *shape, 1), log_weights, weights, weights.square().sum(0).reciprocal()
        return torch.randn(6, *shape), torch.tensor([k]), *cloud, uniforms, normals

    traced = make_fx(step, tracing_mode="fake")(*numbers(1, 0))
    resampled = []
    for seed, k in ((1, 0), (0, 2), (2, 4), (3, 1)):
        found, wanted = traced(*numbers(seed, k)), step(*numbers(seed, k))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        resampled += found[-1].flatten().tolist()
    assert len(set(resampled)) == 2  # both ways were taken


def waits(device, make, build, num_times):
    before, data = device.looks, series(num_times, (3,), missing=True)
    particle_filter(build(device.move(make()), moved(data)), N, ess_threshold=0.7)
    return device.looks - before


@pytest.mark.parametrize(
    "make, build", [(toy, bootstrap), (toy, locally_optimal), (toy, auxiliary), (remembering, bootstrap)]
)
def test_a_step_on_a_device_does_not_wait_for_it(make, build, monkeypatch):
    """Without a graph, too: the host looks a few times a run."""
    with pretend_cuda(monkeypatch) as device:
        assert waits(device, make, build, 5) == waits(device, make, build, 8) < 12


# ------------------------------------------------------------------------------------------------------ the run


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


# ------------------------------------------------------------------------------------------------------ components

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


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("wrong, message", [(float("nan"), "NaN"), (-float("inf"), "every weight is 0")])
def test_bad_weights_are_found_and_named(wrong, message, monkeypatch):
    """At the end of the run: step 4 of series 1, as without a graph."""
    y = torch.zeros(6, 2)
    y[4, 1] = 1.0

    def process(y):
        return FeynmanKac(
            lambda draw, shape: torch.randn(shape + (1,), device=y.device),
            lambda k, x, draw: x + torch.randn_like(x),
            lambda k, previous, x: torch.where(y[k] > 0, wrong, -x[..., 0].square()),
            6,
            y.shape[1:],
        )

    with pytest.raises(ValueError, match=rf"step 4, series 1: .*{message}"), torch.no_grad():
        particle_filter(process(y), N)
    with pretend_cuda(monkeypatch) as device:
        with pytest.raises(ValueError, match=rf"step 4, series 1: .*{message}"):
            particle_filter(process(OnDevice(y)), N, cuda_graph=True)
        assert sum(graph.replays for graph in device.graphs) == 4


def test_a_state_that_ends_as_nan_is_found(monkeypatch):
    with pretend_cuda(monkeypatch):
        step = OnDevice(torch.arange(6.0))
        fk = FeynmanKac(
            lambda draw, shape: torch.randn(shape + (1,), device=step.device),
            lambda k, x, draw: torch.where(step[k].unsqueeze(-1) == 5, torch.nan, x),
            lambda k, previous, x: 0 * x[..., 0].nan_to_num(),
            6,
        )
        with pytest.raises(ValueError, match="step 5: a particle is NaN"):
            particle_filter(fk, N, cuda_graph=True)


class Validated(torch.distributions.Distribution):
    """A law that looks at what it is given, unless nobody wants that."""

    arg_constraints = {"x": torch.distributions.constraints.real}
    support = torch.distributions.constraints.real

    def __init__(self, x, validate_args=None):
        self.x = x
        super().__init__(x.shape, validate_args=validate_args)

    def log_prob(self, value):
        return -(value - self.x).square()


def test_laws_do_not_look_at_their_arguments_in_a_capture(monkeypatch):
    before = torch.distributions.Distribution._validate_args
    with pretend_cuda(monkeypatch) as device:
        y = OnDevice(torch.zeros(5))
        fk = FeynmanKac(
            lambda draw, shape: torch.randn(shape + (1,), device=y.device),
            lambda k, x, draw: x,
            lambda k, previous, x: Validated(x[..., 0]).log_prob(y[k]),
            5,
        )
        particle_filter(fk, N, cuda_graph=True)
        assert len(device.graphs) == 1
    assert torch.distributions.Distribution._validate_args is before is True


@pytest.mark.parametrize("look", [lambda k: int(k), lambda k: {4: 0}[k], lambda k: slice(k, k + 1)])
def test_a_step_that_cannot_be_captured_is_refused(look, monkeypatch):
    with pretend_cuda(monkeypatch):
        fk = by_hand(OnDevice(torch.randn(6, 2)), lambda k: k if isinstance(k, int) else look(k))
        with pytest.raises(RuntimeError, match="a step cannot be captured.*int64 tensor.*leave `cuda_graph` out"):
            particle_filter(fk, N, noise=HandNoise(), cuda_graph=True)


def test_what_cannot_be_captured_is_refused(monkeypatch):
    fk = bootstrap(toy(), series(5))
    with pytest.raises(ValueError, match="on a CUDA device, and the particles are on cpu. Move the model"):
        particle_filter(fk, N, cuda_graph=True)
    with pytest.raises(ValueError, match="leave it out, or `differentiable`"):
        particle_filter(fk, N, cuda_graph=True, differentiable=True)
    with pytest.raises(ValueError, match="TransportResampling iterates until"):
        particle_filter(fk, N, cuda_graph=True, resampling=TransportResampling())
    with pytest.raises(ValueError, match="`normals` has 3 steps, and the run has 5"):
        particle_filter(fk, N, cuda_graph=True, noise=FixedNoise(torch.zeros(3, N, 2), torch.zeros(5, 1)))
    with pytest.raises(TypeError, match="Replayed does not say that it is"):
        captured_run(fk, N, AncestorResampling(), 0.5, Replayed(0, [0]))


def test_particles_that_change_their_shape_are_refused():
    fk = FeynmanKac(
        lambda draw, shape: torch.randn(shape + (1,)),
        lambda k, x, draw: torch.cat([x, x], -1),
        lambda k, previous, x: -x[..., 0].square(),
        5,
    )
    stepper = DeviceStepper(fk, N, AncestorResampling(), 0.5, PseudoRandom())
    with pytest.raises(ValueError, match="particles changed from .* to .* and a captured step has fixed ones"):
        graph_run(stepper, stepper.init(), Plain())


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
