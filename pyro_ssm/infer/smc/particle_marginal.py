"""A particle filter in the place of an exact one: what `Marginal` integrates the states out by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.data import TimeSeries
from pyro_ssm.infer.smc.bootstrap import bootstrap
from pyro_ssm.infer.smc.check import NoEvidenceError, check_fraction, check_number
from pyro_ssm.infer.smc.feynman_kac import FeynmanKac
from pyro_ssm.infer.smc.filter import ParticleFiltered, particle_filter
from pyro_ssm.infer.smc.noise import FixedNoise, Noise, Pathwise, PseudoRandom
from pyro_ssm.infer.smc.resample import Resampling, resampling_of
from pyro_ssm.infer.smc.stepper import Cloud

__all__ = ["ParticleMarginal"]


class ParticleMarginal:
    """A differentiable particle filter as the ``filter`` of :class:`~pyro_ssm.infer.Marginal`.

    .. math:: E \\log \\hat p(y \\mid \\theta) \\le \\log p(y \\mid \\theta)

    *Under SVI* the objective is therefore a lower bound of the evidence,
    :math:`E_q[\\log \\hat p(y \\mid \\theta) + \\log p(\\theta) - \\log q(\\theta)] \\le \\log p(y)`, whatever the
    resampling. Its gradient is that of the resampling: see ``particle_filter(differentiable=True)`` and the classes
    :class:`~pyro_ssm.infer.smc.StopGradientResampling`, ``SoftResampling``, ``TransportResampling`` and
    ``DiffusionResampling``.

    *Under NUTS and HMC* the density must be one smooth function of the parameters: noise drawn once
    (:class:`~pyro_ssm.infer.smc.FixedNoise`), resampling that moves particles smoothly (``TransportResampling``,
    ``DiffusionResampling``) at every step (``ess_threshold=1``) or none at all (``ess_threshold=0``). ``Marginal``
    refuses other filters there, and says why. The chain then explores the density of *this* approximation,
    :math:`\\hat p(y \\mid \\theta)\\, p(\\theta)` for the noise that was drawn, which is not the posterior; it tends
    to it as N grows and the regularisation (or the bandwidth) goes to 0.

    Args:
        num_particles: N.
        build: ``(bound model, data) -> FeynmanKac``: ``bootstrap``, ``locally_optimal``, or a function around
            ``guided``.
        resampling: as for :func:`~pyro_ssm.infer.particle_filter`.
        ess_threshold: as for ``particle_filter``.
        noise: as for ``particle_filter``.

    Raises:
        ValueError: an argument out of its range.
        NotImplementedError: in a run with gradients, draws of states that are not reparameterised.

    >>> import torch, pyro, pyro.distributions as dist, pyro_ssm as ssm
    >>> from pyro.nn import PyroSample
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(1), ssm.dynamics.OrnsteinUhlenbeck(1), ssm.emissions.LinearNormal(1, 1))
    >>> model.transition.rate = PyroSample(dist.LogNormal(0.0, 0.7))
    >>> data = ssm.TimeSeries(torch.arange(4.0), torch.zeros(3, 4, 1))
    >>> program = ssm.infer.Marginal(model, filter=ssm.infer.ParticleMarginal(num_particles=50))
    >>> guide = pyro.infer.autoguide.AutoNormal(program)
    >>> svi = pyro.infer.SVI(program, guide, pyro.optim.Adam({"lr": 0.01}), pyro.infer.Trace_ELBO())
    >>> isinstance(svi.step(data), float)
    True
    >>> smooth = ssm.infer.smc.TransportResampling()
    >>> noise = ssm.infer.smc.FixedNoise(torch.randn(4, 50, 3, 1))
    >>> ssm.infer.ParticleMarginal(50, resampling=smooth, ess_threshold=1.0, noise=noise).for_nuts
    True
    """

    def __init__(
        self,
        num_particles: int,
        *,
        build: Callable[[Any, TimeSeries], FeynmanKac] = bootstrap,
        resampling: str | Resampling = "systematic",
        ess_threshold: float = 0.5,
        noise: Noise | None = None,
    ) -> None:
        check_number(num_particles)
        check_fraction(ess_threshold)
        self.num_particles, self.build = num_particles, build
        self.resampling, self.ess_threshold = resampling_of(resampling), ess_threshold
        self.noise = PseudoRandom() if noise is None else noise

    def __call__(self, model: Any, data: TimeSeries) -> ParticleFiltered:
        """The filter, with gradients where they are enabled.

        Where the filter would stop because the data are impossible, or a law returned NaN, a density for NUTS is 0: a
        trajectory that came there is rejected, as it is with an exact filter.
        """
        process = self.build(model, data)
        try:
            return self._run(process)
        except NoEvidenceError:
            if not self.for_nuts:
                raise
            return _impossible(process, data.values)

    def _run(self, process: FeynmanKac) -> ParticleFiltered:
        return particle_filter(
            process,
            self.num_particles,
            resampling=self.resampling,
            ess_threshold=self.ess_threshold,
            noise=Pathwise(self.noise, "ParticleMarginal"),
            differentiable=True,
        )

    @property
    def for_nuts(self) -> bool:
        """Whether the density is one smooth function of the parameters."""
        return not self.obstacles

    @property
    def obstacles(self) -> list[str]:
        """Why the density is not a smooth function of the parameters; empty where it is."""
        found = []
        if not isinstance(self.noise, FixedNoise):
            found.append(
                f"{type(self.noise).__name__} draws new noise at every evaluation, so that the density is another each "
                "time: give noise=smc.FixedNoise(normals)"
            )
        if self.ess_threshold > 0 and not self.resampling.smooth:
            found.append(
                f"{type(self.resampling).__name__} chooses ancestors, which jump as parameters move: give "
                "resampling=smc.TransportResampling(), or ess_threshold=0"
            )
        if 0 < self.ess_threshold < 1:
            found.append(
                f"ess_threshold={self.ess_threshold} decides at each step whether to resample, and the density jumps "
                "where the decision turns: give ess_threshold=1 or 0"
            )
        return found


def _impossible(process: FeynmanKac, like: Tensor) -> ParticleFiltered:
    """A run that ended at once."""
    none = like.new_full(tuple(process.batch_shape) + (process.num_times,), -torch.inf)
    cloud = Cloud(none[..., 0].unsqueeze(0), none[..., 0].unsqueeze(0), 0)
    return ParticleFiltered(none, cloud, none.exp(), none == 0, {})
