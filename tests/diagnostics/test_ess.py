"""The picture of the effective sample size shows the trace of its own series."""

import matplotlib
import numpy as np
import pytest
import torch

from pyro_ssm.diagnostics import plot_ess
from pyro_ssm.infer import bootstrap, particle_filter
from tests.contracts.toys import series, toy

matplotlib.use("Agg")


@torch.no_grad()
def test_trace_resampling_and_ceiling():
    model, data = toy(1, 1), series(6, (2,), obs_dim=1)
    data = data.replace(lengths=torch.tensor([6, 4]))
    found = particle_filter(bootstrap(model, data), 80)
    for i, length in ((0, 6), (1, 4)):
        ax = plot_ess(found, data, series=i)
        trace, marks, ceiling = (line.get_xydata() for line in ax.get_lines())
        assert np.allclose(trace[:, 0], data.times[:length]) and np.allclose(trace[:, 1], found.ess[i, :length])
        assert np.allclose(marks[:, 0], data.times[:length][found.resampled[i, :length]])
        assert (ceiling[:, 1] == 80).all()
    later = particle_filter(bootstrap(model, data), start=particle_filter(bootstrap(model, data.split(3)[0]), 80).cloud)
    assert np.allclose(plot_ess(later, data).get_lines()[0].get_xdata(), data.times[3:])
    with pytest.raises(ValueError, match="the data that was filtered"):
        plot_ess(found, series(6, obs_dim=1))
