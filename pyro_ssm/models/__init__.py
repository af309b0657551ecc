"""State-space models as Pyro programs, and named models as short factories."""

from pyro_ssm.models.laws import batch_shape, emission_law, history, observation_law, path_law
from pyro_ssm.models.plates import series_plate, site_name
from pyro_ssm.models.state_space import StateSpaceModel

__all__ = [
    "StateSpaceModel",
    "batch_shape",
    "emission_law",
    "history",
    "observation_law",
    "path_law",
    "series_plate",
    "site_name",
]
