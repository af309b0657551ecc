"""The effective sample size of a particle filter along time."""

from __future__ import annotations

from typing import Any

from pyro_ssm.data import TimeSeries
from pyro_ssm.diagnostics.plots import DRAWN, FUTURE, SEEN, _axes, _finish, _labels, _one, _position
from pyro_ssm.infer import ParticleFiltered

__all__ = ["plot_ess"]


def plot_ess(filtered: ParticleFiltered, data: TimeSeries, series: int | str = 0, *, ax: Any = None) -> Any:
    """How many particles count after each step, and where the cloud was resampled.

    .. math:: ESS_k = 1 / \\sum_n (W_k^n)^2

    A curve that touches the ground says that estimates rest on a few particles there: a proposal that sees the
    observation, a first stage, or more particles will help; so does a look at the observation.

    Args:
        filtered: what :func:`~pyro_ssm.infer.particle_filter` returned.
        data: what was filtered.
        series: position or name of the series.
        ax: matplotlib axes to draw on; default: new ones.

    Returns:
        The matplotlib axes.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: there is no such series; the result is of other data, or of a batch of parameters.

    >>> import torch, pyro_ssm as ssm
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> found = ssm.infer.particle_filter(ssm.infer.bootstrap(model, data), 100)
    >>> ssm.diagnostics.plot_ess(found, data, series=2).get_ylabel()
    'effective particles'
    """
    if filtered.ess.shape[:-1] != data.batch_shape:
        raise ValueError(
            f"`filtered` has series of shape {tuple(filtered.ess.shape[:-1])}, `data` of {tuple(data.batch_shape)}: "
            "give the data that was filtered, and parameters without sample dims"
        )
    at = _position(data, series)
    time = _labels(_one(data.without_values().replace(observed_index=None), at))
    first = data.num_times - filtered.ess.shape[-1]  # a run that went on from a cloud has the later times only
    time = time[first:]
    ess, resampled = (tensor[at][: len(time)].cpu().numpy() for tensor in (filtered.ess, filtered.resampled))
    ax = _axes(1)[0] if ax is None else ax
    ax.plot(time, ess, color=DRAWN, lw=1.2, label="after the step")
    ax.plot(time[resampled], ess[resampled], "|", color=FUTURE, label="resampled before it")
    ax.axhline(filtered.cloud.num_particles, color=SEEN, lw=0.6)
    ax.set_ylim(0, 1.05 * filtered.cloud.num_particles)
    ax.set_ylabel("effective particles")
    _finish(ax, data, series)
    return ax
