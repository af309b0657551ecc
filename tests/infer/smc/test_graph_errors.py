"""What cannot be captured is refused, and what goes wrong in a captured run is found and named."""

import pytest
import torch

from pyro_ssm.infer import (
    FeynmanKac,
    bootstrap,
    particle_filter,
)
from pyro_ssm.infer.smc import (
    AncestorResampling,
    FixedNoise,
    PseudoRandom,
    TransportResampling,
)
from pyro_ssm.infer.smc.device_stepper import DeviceStepper
from pyro_ssm.infer.smc.graph_run import captured_run, graph_run
from tests.contracts.toys import series, toy
from tests.infer.smc.graph_cases import HandNoise, N, Plain, by_hand
from tests.infer.smc.pretend_cuda import OnDevice, pretend_cuda
from tests.infer.smc.programs import Replayed


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
    with pytest.raises(ValueError, match="TransportResampling looks at values.*num_iterations=30"):
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
