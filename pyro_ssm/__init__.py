"""Deep state-space models as ordinary Pyro programs.

>>> import torch, pyro_ssm as ssm
>>> model = ssm.StateSpaceModel(
...     initial=ssm.dynamics.NormalInitial(state_dim=2),
...     transition=ssm.dynamics.OrnsteinUhlenbeck(state_dim=2),
...     emission=ssm.emissions.LinearNormal(state_dim=2, obs_dim=3),
... )
>>> data = ssm.TimeSeries(times=torch.tensor([0.0, 0.5, 2.0]), values=torch.zeros(3, 3))
>>> ssm.infer.kalman_filter(model, data).log_likelihood.shape
torch.Size([3])
"""

from pyro_ssm.data import TimeSeries

__version__ = "0.1.0"
__all__ = ["TimeSeries"]
