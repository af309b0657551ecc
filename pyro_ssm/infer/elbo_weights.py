"""Importance weights per series: many draws of the paths at once, beside each other in a plate on the left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch import Tensor

__all__ = ["LogWeights", "PlateShape", "log_weights", "plate_shape", "refuse_score_function"]

PARTICLES = "_importance_particles"


class PlateShape(NamedTuple):
    """How the sites of a model and a guide lie in plates.

    Attributes:
        depth: number of batch dims that plates take.
        plated: whether any site lies in a vectorised plate.
        outside: latent sites outside all plates (random parameters), which all series share.

    >>> from pyro_ssm.infer.elbo_weights import PlateShape
    >>> PlateShape(1, True, ("transition.rate",)).depth
    1
    """

    depth: int
    plated: bool
    outside: tuple[str, ...]


class LogWeights(NamedTuple):
    """Log importance weights :math:`\\log p(y, z) - \\log q(z)`, split by who shares them.

    Attributes:
        series: ``(particles, *series)``: the terms of each series, without the scale of a mini-batch.
        shared: ``(particles,)`` or ``()``: the terms that belong to no series (priors of random parameters ...).
        scale: the factor that makes a mini-batch's terms stand for all series (1 for full data).

    >>> from pyro_ssm.infer.elbo_weights import LogWeights
    >>> LogWeights._fields
    ('series', 'shared', 'scale')
    """

    series: Tensor
    shared: Tensor
    scale: float


class _ParticlePlate(PlateMessenger):
    """A plate of independent repetitions; with ``only_plated`` sites outside all other plates are drawn once."""

    def __init__(self, size: int, dim: int, only_plated: bool) -> None:
        super().__init__(PARTICLES, size, dim=dim)
        self.only_plated = only_plated

    def _process_message(self, msg: Any) -> None:
        if not self.only_plated or _frames(msg):
            super()._process_message(msg)


def _frames(site: Any) -> list[Any]:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized and frame.name != PARTICLES]


def _sample_sites(trace: Trace) -> list[Any]:
    return [site for site in prune_subsample_sites(trace).nodes.values() if site["type"] == "sample"]


@torch.no_grad()
def plate_shape(model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> PlateShape:
    """Run guide and model once, and see how their sites lie in plates; leaves the random generators as they are.

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_ssm.infer.elbo_weights import plate_shape
    >>> def model():
    ...     with pyro.plate("series", 3):
    ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(3))
    >>> def guide():
    ...     with pyro.plate("series", 3):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> plate_shape(model, guide)
    PlateShape(depth=1, plated=True, outside=())
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with poutine.block(), torch.random.fork_rng(devices):
        drawn = poutine.trace(guide).get_trace(*args)
        run = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args)
    sites = _sample_sites(drawn) + _sample_sites(run)
    frames = [_frames(site) for site in sites]
    depth = max((-frame.dim for found in frames for frame in found), default=0)
    outside = [site["name"] for site, found in zip(sites, frames, strict=True) if not found and not site["is_observed"]]
    return PlateShape(depth, any(frames), tuple(dict.fromkeys(outside)))


def log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int,
    shape: PlateShape,
    repeat_shared: bool,
    reparameterised: bool = False,
) -> LogWeights:
    """Draw from the guide ``num_particles`` times, in one run of guide and model, and weigh each series.

    .. math:: \\log w_{kb} = \\log p(y_b, z_{kb} \\mid \\theta) - \\log q(z_{kb} \\mid y_b, \\theta)

    A *series* is an index of the plates that all plated sites share; other plates are summed over. Masks count; the
    scale of a mini-batch is taken out and returned. When no site is plated, the whole program is one series.

    Args:
        model: the model.
        guide: the guide; its plated sites must be as many draws as the plates ask for.
        *args: what both take.
        num_particles: number of draws.
        shape: from :func:`plate_shape`.
        repeat_shared: whether sites outside all plates are drawn once per particle, or once.
        reparameterised: whether to refuse draws of the guide without a pathwise gradient.

    Returns:
        :class:`LogWeights`; differentiable as ``log_prob`` of the sites is.

    Raises:
        ValueError: a site outside all plates depends on the particle.
        NotImplementedError: a draw is not reparameterised, and ``reparameterised`` is set.

    >>> import pyro, torch
    >>> import pyro.distributions as dist
    >>> from pyro_ssm.infer.elbo_weights import log_weights, plate_shape
    >>> def program(y=None):
    ...     with pyro.plate("series", 3):
    ...         pyro.sample("z", dist.Normal(0.0, 1.0))
    >>> shape = plate_shape(program, program)
    >>> log_weights(program, program, num_particles=2, shape=shape, repeat_shared=False).series  # log p - log q
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    only_plated = shape.plated and not repeat_shared
    # one particle needs no plate, and then takes the very random numbers that Trace_ELBO takes
    repeats = num_particles > 1

    def repeated(program: Callable[..., Any]) -> Callable[..., Any]:
        return _ParticlePlate(num_particles, -shape.depth - 1, only_plated)(program) if repeats else program

    drawn = poutine.trace(repeated(guide)).get_trace(*args)
    if reparameterised:
        refuse_score_function(drawn)
    run = poutine.trace(poutine.replay(repeated(model), trace=drawn)).get_trace(*args)
    signed = [(site, 1.0) for site in _sample_sites(run)] + [(site, -1.0) for site in _sample_sites(drawn)]
    plated = [site for site, _ in signed if _frames(site)]
    common = set.intersection(*({*_frames(site)} for site in plated)) if plated else set()
    scale = 1.0
    for frame in common:
        scale = scale * (frame.full_size or frame.size) / frame.size
    kept = {frame.dim for frame in common}

    series: Tensor | float = 0.0
    shared: Tensor | float = 0.0
    for site, sign in signed:
        inside = bool(_frames(site)) or not shape.plated
        own_scale = site["scale"] / scale if _frames(site) else site["scale"]
        terms = scale_and_mask(site["fn"].log_prob(site["value"]), own_scale, site["mask"])
        terms = _by_particle(
            site, terms, shape.depth, kept if inside else set(), repeats and not (only_plated and not inside)
        )
        if inside:
            series = series + sign * terms
        else:
            shared = shared + sign * terms
    series, shared = torch.as_tensor(series), torch.as_tensor(shared)
    if not repeats:
        series = series.unsqueeze(0)
    return LogWeights(series, shared, float(scale))


def refuse_score_function(guide_trace: Trace) -> None:
    """Raise for a guide with draws that have no pathwise gradient.

    >>> from pyro.poutine import Trace
    >>> from pyro_ssm.infer.elbo_weights import refuse_score_function
    >>> refuse_score_function(Trace())
    """
    for name, site in guide_trace.nodes.items():
        drawn = site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        if drawn and not getattr(site["fn"], "has_rsample", False):
            raise NotImplementedError(
                f"this bound needs reparameterised draws, and the guide's site `{name}` ({type(site['fn']).__name__}) "
                "has none. Use pyro.infer.Trace_ELBO, which has a score-function gradient"
            )


def _by_particle(site: Any, terms: Tensor, depth: int, kept: set[int], repeated: bool) -> Tensor:
    """Sum a site's terms over all dims but the particles' and the series'."""
    full = depth + 1 if repeated else depth
    padded = terms.reshape((1,) * (full - terms.dim()) + terms.shape)
    own = {frame.dim for frame in _frames(site)}
    if padded.dim() > full or any(padded.shape[dim] != 1 for dim in range(-depth, 0) if dim not in own):
        raise ValueError(
            f"site `{site['name']}` has terms of shape {tuple(terms.shape)}, which its plates do not explain. "
            "Put it inside the plate over series (a factor that depends on the path belongs there)"
        )
    summed = [dim for dim in range(-depth, 0) if dim not in kept]
    return padded.sum(summed) if summed else padded
