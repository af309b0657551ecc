"""Records of irregular times with holes, for tests of models in continuous time."""

import torch

from pyro_ssm import TimeSeries


def series(batch=(3,), num=6, obs=2, lengths=None, seed=1, dtype=torch.float64):
    """Own times of each series from 2 on, about 0.6 apart; every first value is seen, and 60 % of the others."""
    generator = torch.Generator().manual_seed(seed)
    times = (torch.rand(*batch, num, generator=generator, dtype=torch.float64) + 0.1).cumsum(-1) + 2.0
    values = torch.randn(*batch, num, obs, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.rand(*batch, num, obs, generator=generator) < 0.6
    mask[..., 0, :] = True
    return TimeSeries(times, values, mask=mask, lengths=lengths)
