"""The Kalman filter one observation at a time: ``init``, then ``update`` and ``predict`` in turn.

A state is small and immutable: what is known now. Going through a series gives what
:func:`~pyro_ssm.infer.gaussian.kalman_filter` gives for all of it at once.

>>> import torch, pyro_ssm as ssm
>>> from pyro_ssm.infer.gaussian import online
>>> model = ssm.StateSpaceModel(
...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1)).bind()
>>> state = online.init(model, time=0.0)
>>> for time, value in [(1.0, 0.3), (2.0, float("nan")), (4.5, 0.7)]:
...     state = online.update(model, online.predict(model, state, time), torch.tensor([value]))
>>> state.mean.shape, state.time
(torch.Size([2]), tensor(4.5000, dtype=torch.float64))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.components import Affine
from pyro_ssm.infer.gaussian.system import no_pivot, require_linear_gaussian
from pyro_ssm.models.linear_gaussian import check_affine, initial_moments
from pyro_ssm.ops.kalman import HALF_LOG_2PI, _choose, hide_rows, matvec
from pyro_ssm.ops.kalman import predict as predict_law
from pyro_ssm.ops.kalman import update as update_law
from pyro_ssm.ops.kalman_diffuse import DiffuseLaw, diffuse_predict, diffuse_start, diffuse_update
from pyro_ssm.ops.linalg import vanishing_pivots

__all__ = ["OnlineState", "init", "predict", "update"]


class OnlineState(NamedTuple):
    """What is known at one time, given all that was seen up to it.

    >>> from pyro_ssm.infer.gaussian.online import OnlineState
    >>> OnlineState._fields
    ('mean', 'scale_tril', 'time', 'log_likelihood', 'inputs', 'reach', 'left')
    """

    mean: Tensor  # (*batch, state)
    scale_tril: Tensor  # (*batch, state, state)
    time: Tensor  # () or (*batch,), float64
    log_likelihood: Tensor  # (*batch,)  log p(y_1, ..., y_k) so far
    inputs: Tensor | None  # (*batch, input), what holds from ``time`` on
    reach: Tensor | None = None  # (*batch, state, q), while the start is diffuse (see ops.kalman_diffuse)
    left: Tensor | None = None  # (*batch, q, q)

    @property
    def is_proper(self) -> bool:
        """Whether all variances are finite: False while a diffuse start is not determined."""
        return self.reach is None


def init(model: Any, time: Any, inputs: Tensor | None = None) -> OnlineState:
    """The law of the first state, before its observation.

    .. math:: z_1 \\sim N(m, L L^T)

    Args:
        model: a linear-Gaussian model; bound (an unbound one is bound anew at every call).
        time: of the first state, a number or ``(*batch,)``.
        inputs: what holds from then on, ``(*batch, input)``, for a model with inputs.

    Returns:
        Differentiable with respect to the parameters, as what follows from it.

    Raises:
        TypeError: a component is not linear-Gaussian, or the model has a memory.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian import online
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1))
    >>> online.init(model.bind(), time=0.0).log_likelihood
    tensor(0.)
    """
    require_linear_gaussian(model, "online.init")
    time = torch.as_tensor(time, dtype=torch.float64)
    mean, scale_tril, diffuse = initial_moments(model.bind(), time.unsqueeze(-1), _held(inputs))
    dtype = torch.promote_types(mean.dtype, scale_tril.dtype)
    mean, scale_tril = mean.to(dtype), scale_tril.to(dtype)
    zero = mean.new_zeros(mean.shape[:-1])
    if diffuse is None:
        return OnlineState(mean, scale_tril, time, zero, inputs)
    law = diffuse_start(mean.double(), scale_tril.double(), diffuse.double())
    return OnlineState(law.mean, law.scale_tril, time, zero, inputs, law.reach, law.left)


def predict(model: Any, state: OnlineState, time: Any, inputs: Tensor | None = None) -> OnlineState:
    """The law of the state at a later time, before its observation.

    .. math:: m' = F m + b, \\qquad L' L'^T = F L L^T F^T + Q Q^T

    Args:
        model: as for :func:`init`.
        state: at an earlier time.
        time: the new time, a number or ``(*batch,)``.
        inputs: what holds from the *new* time on; the move itself is driven by those that ``state`` holds.

    Raises:
        ValueError: the time is not later.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian import online
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1)).bind()
    >>> online.predict(model, online.init(model, 0.0), 1.5).time
    tensor(1.5000, dtype=torch.float64)
    """
    time = torch.as_tensor(time, dtype=torch.float64, device=state.time.device)
    if not bool((time > state.time).all()):
        raise ValueError(f"online.predict: `time` must be later than that of the state, {state.time}, got {time}")
    old, new = (t.unsqueeze(-1) for t in torch.broadcast_tensors(state.time, time))
    move = model.bind().transition.affine(old, new, _held(state.inputs))
    n = state.mean.shape[-1]
    check_affine("transition", move, n, n)
    if state.reach is None or state.left is None:
        m, L = predict_law(state.mean, state.scale_tril, *_now(move, state.mean.dtype))
        return state._replace(mean=m, scale_tril=L, time=time, inputs=inputs)
    law = DiffuseLaw(state.mean, state.scale_tril, state.reach, state.left)
    law = diffuse_predict(law, *_now(move, torch.float64))
    return state._replace(mean=law.mean, scale_tril=law.scale_tril, reach=law.reach, time=time, inputs=inputs)


def update(model: Any, state: OnlineState, values: Tensor, mask: Tensor | None = None) -> OnlineState:
    """The law of the state given also an observation at its time.

    .. math:: p(z_k \\mid y_{\\le k}) \\propto p(y_k \\mid z_k)\\, p(z_k \\mid y_{<k})

    A missing entry is integrated out exactly and adds exactly 0 to the log-likelihood.

    Args:
        model: as for :func:`init`.
        state: as :func:`init` or :func:`predict` gives it.
        values: ``(*batch, obs)``; NaN is missing.
        mask: bool, as ``values``, True where observed; combined with "is not NaN".

    Raises:
        ValueError: the number of values is not that of the emission.
        torch.linalg.LinAlgError: the law of the observation is singular.

    >>> import torch, pyro_ssm as ssm
    >>> from pyro_ssm.infer.gaussian import online
    >>> model = ssm.StateSpaceModel(
    ...     ssm.dynamics.NormalInitial(2), ssm.dynamics.LinearNormal(2), ssm.emissions.LinearNormal(2, 1)).bind()
    >>> state = online.init(model, 0.0)
    >>> torch.equal(online.update(model, state, torch.tensor([float("nan")])).mean, state.mean)  # nothing was seen
    True
    """
    look = model.bind().emission.affine(state.time.unsqueeze(-1), _held(state.inputs))
    check_affine("emission", look, state.mean.shape[-1])
    if values.shape[-1:] != look.matrix.shape[-2:-1]:
        raise ValueError(
            f"`values` has shape {tuple(values.shape)}, but the emission gives {look.matrix.shape[-2]} values"
        )
    mask = ~values.isnan() if mask is None else mask & ~values.isnan()
    told = None if bool(mask.any(-1).all()) else mask.any(-1)
    dtype = torch.promote_types(state.mean.dtype, values.dtype)
    y, H, d, R = hide_rows(mask, values.to(dtype), *_now(look, dtype))
    old = state.mean.to(dtype), state.scale_tril.to(dtype)
    if state.reach is None or state.left is None:
        m, L, e, s = update_law(*old, y - matvec(H, old[0]) - d, H, R)
        terms = -0.5 * e.square() - s.log() - HALF_LOG_2PI
        m, L = _choose(told, (m, L), old)
        new = state._replace(mean=m, scale_tril=L)
    else:
        law, terms = diffuse_update(DiffuseLaw(*old, state.reach, state.left), y, H, d, R)
        m, L = _choose(told, (law.mean, law.scale_tril), old)
        left = law.left if told is None else torch.where(told[..., None, None], law.left, state.left)
        new = state._replace(mean=m, scale_tril=L, left=left)
        if bool(DiffuseLaw(m, L, state.reach, left).is_proper.all()):
            new = new._replace(reach=None, left=None)
    repeats = state.left is None and bool(vanishing_pivots(R).any()) and bool(no_pivot(H @ old[1], R).any())
    term = torch.where(mask, terms, terms.new_zeros(())).sum(-1)
    if repeats or not bool(term.isfinite().all()):
        raise torch.linalg.LinAlgError(
            f"online.update: the law of what is observed at time {state.time} is singular, so it has no density. Give "
            "the emission noise, or leave out entries that repeat others"
        )
    return new._replace(log_likelihood=state.log_likelihood + term)


def _held(inputs: Tensor | None) -> Tensor | None:
    return None if inputs is None else inputs.unsqueeze(-2)


def _now(law: Affine, dtype: torch.dtype) -> list[Tensor]:
    """The parts at the one time, without a time axis."""
    parts = zip(law, (2, 1, 2), strict=True)
    return [(part.select(-event - 1, 0) if part.dim() > event else part).to(dtype) for part, event in parts]
