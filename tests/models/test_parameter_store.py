"""Models that share names with others in Pyro's global store: MCMC refuses; so does fit where no plate covers a dim."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC, MCMC, NUTS, SVI, TraceEnum_ELBO
from pyro.infer.autoguide import AutoNormal
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


@pytest.mark.parametrize("wrap", [lambda model: model, Marginal])
def test_mcmc_takes_a_model_whose_namesakes_have_the_same_values(wrap, data):
    pyro.clear_param_store()
    run(wrap(made(1.0)), data, NUTS)
    run(wrap(made(1.0)), data, NUTS)  # one model a record, built anew: nothing of the first would be read
    with pytest.raises(RuntimeError, match=r"\['emission.offset'\], which belong to another model"):
        run(wrap(made(2.0)), data, NUTS)


def test_mcmc_takes_a_bound_model_which_reads_no_store(data):
    pyro.clear_param_store()
    made(1.0)(data.without_values())
    second = made(2.0)
    bound = second.bind({"emission.matrix": torch.ones(1, 1)})
    run(bound, data, NUTS)
    assert bound.emission.offset.item() == 2.0


def test_an_automatic_guide_under_enumeration_is_no_mcmc(data):
    """It prepares itself inside the handler that enumerates; a particle filter is right for SVI, and not for MCMC."""
    program = Marginal(made(1.0), infer.ParticleMarginal(20))
    optimiser = pyro.optim.Adam({"lr": 0.01})
    inference = SVI(program, AutoNormal(program), optimiser, TraceEnum_ELBO(max_plate_nesting=1))
    with pytest.warns(UserWarning, match="no sample sites configured for enumeration"):
        assert inference.step(data) > 0  # minus the logarithm of a density below 1
    with pytest.raises(ValueError, match="one smooth function"):
        run(program, data, NUTS)


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
