"""What a user may get wrong in a call is named, with what was got, what is wanted and the way out."""

import pytest
import torch

from pyro_ssm.infer import auxiliary, bootstrap, guided, locally_optimal, particle_filter
from pyro_ssm.infer.smc import Moments, OnlineParticleFilter
from tests.contracts.toys import series, toy


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


def test_arguments_of_the_online_filter():
    with pytest.raises(TypeError, match="`num_particles` must be an integer of at least 1, got 2.5"):
        OnlineParticleFilter(toy(), 2.5)
