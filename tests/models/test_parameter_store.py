"""Models that share names with others in Pyro's global store: MCMC refuses; so does fit where no plate covers a dim."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS
from pyro.nn import PyroModule, PyroSample

from pyro_ssm import StateSpaceModel, TimeSeries, infer
from pyro_ssm.dynamics import LinearNormal, NormalInitial
from pyro_ssm.emissions import LinearNormal as LinearEmission
from pyro_ssm.guides import Structured
from pyro_ssm.infer import Marginal


def made(level):
    model = StateSpaceModel(NormalInitial(1), LinearNormal(1), LinearEmission(1, 1))
    with torch.no_grad():
        model.emission.offset.fill_(level)
    model.emission.matrix = PyroSample(dist.Normal(torch.ones(1, 1), 0.1).to_event(2))
    return model


def run(program, data, kernel):
    MCMC(kernel(program), num_samples=2, warmup_steps=1, disable_progbar=True).run(data)


@pytest.fixture
def data():
    return TimeSeries(torch.arange(4.0), torch.zeros(4, 1))


@pytest.mark.parametrize("wrap", [lambda model: model, Marginal])
@pytest.mark.parametrize("kernel", [NUTS, lambda program: HMC(program, num_steps=1)])
def test_mcmc_refuses_the_parameters_of_another_model(wrap, kernel, data):
    pyro.clear_param_store()
    first, second = made(1.0), made(2.0)
    first(data.without_values())  # puts its parameters into the store
    run(wrap(first), data, kernel)  # they are its own
    with pytest.raises(RuntimeError, match="emission.offset.*belong to another model.*clear_param_store"):
        run(wrap(second), data, kernel)
    pyro.clear_param_store()
    program = wrap(second)
    run(program, data, kernel)
    assert pyro.get_param_store()["emission.offset"] is second.emission.offset
    assert second.emission.offset.item() == 2.0


def test_a_local_store_has_no_strangers(data):
    pyro.clear_param_store()
    made(1.0)(data.without_values())
    with infer.local_parameters():
        run(Marginal(made(2.0)), data, NUTS)


class InPlate(PyroModule):
    """A program inside a plate over the first batch dim."""

    def __init__(self, inner, name=""):
        super().__init__(name)
        self.inner = inner

    def forward(self, data):
        with pyro.plate("outer", data.batch_shape[0], dim=-2):
            return self.inner(data)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_fit_names_the_batch_dims_that_no_plate_covers(batch_size):
    data = TimeSeries(torch.arange(4.0), torch.randn(2, 5, 4, 1))
    more = {"num_steps": 2, "batch_size": batch_size, "progress": False}
    for wrap in (lambda model: model, Marginal):
        model = StateSpaceModel(NormalInitial(1), LinearNormal(1), LinearEmission(1, 1))
        guide = Structured(model, 4) if wrap is not Marginal else None
        with pytest.raises(ValueError, match=r"batch shape \(2, 5\).*one plate.*\[-2\] have none"):
            infer.fit(wrap(model), guide, data, **more)
    model = StateSpaceModel(NormalInitial(1), LinearNormal(1), LinearEmission(1, 1))
    fitted = infer.fit(InPlate(model), InPlate(Structured(model, 4), "guide"), data, **more)
    assert fitted.num_steps == 2
    flat = TimeSeries(data.times, data.values.flatten(0, -3))
    model = StateSpaceModel(NormalInitial(1), LinearNormal(1), LinearEmission(1, 1))
    assert infer.fit(model, Structured(model, 4), flat, **more).num_steps == 2
