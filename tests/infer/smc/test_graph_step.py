"""The step of a captured run as a function of tensors: Python looks at none of them."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pyro_ssm.infer import (
    FeynmanKac,
    auxiliary,
    bootstrap,
    locally_optimal,
    particle_filter,
)
from pyro_ssm.infer.smc import (
    AncestorResampling,
    Cloud,
    FixedNoise,
    PseudoRandom,
    Step,
)
from pyro_ssm.infer.smc.device_stepper import DeviceStepper
from pyro_ssm.infer.smc.resample import resampling_of
from pyro_ssm.ops import compiled
from pyro_ssm.ops.reading import no_reading
from tests.contracts.toys import remembering, series, toy
from tests.infer.smc.graph_cases import CASES, HandNoise, N, by_hand, case, fixed, moved
from tests.infer.smc.pretend_cuda import pretend_cuda
from tests.infer.smc.programs import D


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
