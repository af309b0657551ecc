"""What a user may get wrong in a call is named, with what was got, what is wanted and the way out."""

import pytest
import torch

from pyro_ssm.guides import Structured
from pyro_ssm.infer import (
    ParticleELBO,
    auxiliary,
    bootstrap,
    guided,
    iterated_filtering,
    locally_optimal,
    particle_filter,
    particle_gibbs,
    pmmh,
    rao_blackwellised,
    smc_squared,
)
from pyro_ssm.infer.smc import Moments, OnlineParticleFilter, Quantiles
from pyro_ssm.ops.hilbert import hilbert_order
from tests.contracts.toys import series, toy
from tests.infer.smc.known_posterior import make_data, make_model


def call(**changes):
    model, data = toy(), series(4)
    return particle_filter(**{"fk": bootstrap(model, data), "num_particles": 10, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"fk": toy()}, TypeError, r"`fk` must be a FeynmanKac process, got StateSpaceModel.*bootstrap\(model, data\)"),
        ({"num_particles": 100.5}, TypeError, "`num_particles` must be an integer of at least 1, got 100.5"),
        ({"num_particles": True}, TypeError, "`num_particles` must be an integer"),
        ({"num_particles": 0}, ValueError, "`num_particles` must be at least 1, got 0"),
        ({"num_particles": None}, ValueError, "`num_particles` must be at least 1, got None: .*`start`"),
        ({"noise": "sobol"}, TypeError, "`noise` must be a Noise .*got 'sobol'.*quasi_random=True"),
        ({"collectors": Moments()}, TypeError, r"`collectors` must be a list.*got Moments.*\[Moments\(\)\]"),
        (
            {"collectors": [Moments]},
            TypeError,
            r"`collectors` must hold objects.*the class Moments. Call it: Moments\(\)",
        ),
        ({"collectors": ["moments"]}, TypeError, "`collectors` must hold objects.*got str"),
        ({"resampling": "best"}, ValueError, "`resampling` must be one of"),
        ({"ess_threshold": "half"}, TypeError, "`ess_threshold` is a fraction.*got 'half'"),
        ({"ess_threshold": 50}, ValueError, "`ess_threshold` is a fraction.*got 50"),
        ({"start": torch.zeros(3)}, TypeError, "`start` must be a Cloud.*got Tensor"),
    ],
)
def test_arguments_of_the_filter(changes, error, says):
    with pytest.raises(error, match=says):
        call(**changes)


@pytest.mark.parametrize(
    "build", [bootstrap, locally_optimal, auxiliary, lambda model, data: guided(model, lambda *args: None, data)]
)
def test_arguments_of_the_builders(build):
    model, data = toy(), series(4)
    with pytest.raises(TypeError, match="`model` is a TimeSeries and `data` a StateSpaceModel: give the model first"):
        build(data, model)
    with pytest.raises(TypeError, match=r"`data` must be a TimeSeries, got Tensor. Wrap it: TimeSeries\(times, values"):
        build(model, torch.zeros(4, 2))
    with pytest.raises(TypeError, match="`model` must be a StateSpaceModel, got int"):
        build(3, data)


def test_functions_and_parts_of_the_builders():
    model, data = toy(), series(4)
    with pytest.raises(TypeError, match="`guide` must be .*the class Structured: make one of it first"):
        guided(model, Structured, data)
    with pytest.raises(TypeError, match="`twist` must be a function"):
        guided(model, lambda *args: None, data, twist=0.5)
    with pytest.raises(TypeError, match="`first_stage` must be a function.*got str"):
        auxiliary(model, data, "exact")
    with pytest.raises(TypeError, match="`base` must be a FeynmanKac process"):
        auxiliary(model, data, base=model)
    with pytest.raises(TypeError, match="`data` must be a TimeSeries, got Tensor"):
        rao_blackwellised(None, None, torch.zeros(4, 1))


def test_arguments_of_collectors_bounds_and_samplers():
    with pytest.raises(TypeError, match=r"`levels` must be a list of numbers.*Quantiles\(\["):
        Quantiles(0.5)
    with pytest.raises(ValueError, match="at least one"):
        Quantiles([])
    with pytest.raises(TypeError, match="`num_particles` must be an integer"):
        ParticleELBO(2.5)
    for sampler in (pmmh, particle_gibbs, smc_squared, iterated_filtering):
        with pytest.raises(TypeError, match="`data` must be a TimeSeries, got Tensor"):
            sampler(make_model(), torch.zeros(4, 1), 10, 10)
    with pytest.raises(ValueError, match="`target_acceptance` is a probability"):
        pmmh(make_model(), make_data(4), 2, 5, target_acceptance=3.0)


def test_models_without_a_state_have_no_order():
    assert hilbert_order(torch.zeros(5, 2, 0)).tolist() == [[k, k] for k in range(5)]


def test_arguments_of_the_online_filter():
    with pytest.raises(TypeError, match="`num_particles` must be an integer of at least 1, got 2.5"):
        OnlineParticleFilter(toy(), 2.5)
