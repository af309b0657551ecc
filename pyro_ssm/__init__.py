"""Deep state-space models as ordinary Pyro programs.

>>> import torch, pyro_ssm as ssm
>>> model = ssm.StateSpaceModel(
...     initial=ssm.dynamics.NormalInitial(state_dim=2),
...     transition=ssm.dynamics.LinearNormal(state_dim=2),
...     emission=ssm.emissions.LinearNormal(state_dim=2, obs_dim=3),
... )
>>> data = ssm.TimeSeries(times=torch.tensor([0.0, 0.5, 2.0]), values=torch.zeros(3, 3))
>>> ssm.infer.kalman_filter(model, data).log_likelihood.shape
torch.Size([3])
"""

from pyro_ssm import (
    blocks,
    components,
    data,
    diagnostics,
    distributions,
    dynamics,
    emissions,
    guides,
    infer,
    models,
    ops,
    predict,
)
from pyro_ssm._version import __version__
from pyro_ssm.data import TimeSeries
from pyro_ssm.diagnostics import to_inference_data
from pyro_ssm.models import StateSpaceModel

__all__ = [
    "StateSpaceModel",
    "TimeSeries",
    "__version__",
    "blocks",
    "components",
    "data",
    "diagnostics",
    "distributions",
    "dynamics",
    "emissions",
    "guides",
    "infer",
    "models",
    "ops",
    "predict",
    "to_inference_data",
]
