"""What is seen is linear in the state, with Gaussian noise."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import MultivariateNormal
from torch import Tensor

from pyro_ssm.blocks._checks import check_choice, check_positive, check_size
from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.blocks._gaussian import AffineNormal, diagonal_normal, first_matrix, noise_tril, with_time
from pyro_ssm.blocks.linear import linear
from pyro_ssm.components import Affine, Emission
from pyro_ssm.emissions.noise import KnownNoise
from pyro_ssm.ops import tria

__all__ = ["LinearNormal"]


class LinearNormal(AffineNormal, Emission):
    """A linear Gaussian emission,

    .. math:: y_k = C z_k + D u_k + d + R \\varepsilon_k, \\qquad \\varepsilon_k \\sim N(0, I).

    Args:
        state_dim: size of the state.
        obs_dim: size of an observation.
        input_dim: size of the inputs; 0 ignores them.
        covariance: ``"diagonal"`` (parameter ``scale``) or ``"full"`` (parameter ``scale_tril``).
        matrix: first value of ``C`` ``(obs, state)``; None draws it from :math:`N(0, 1 / \\text{state})`.
        scale: first value of the noise's standard deviations (a number, ``(obs,)``, or a whole factor if full).
        floor: lower bound of the learnable standard deviations.
        noise: noise that is known and differs from step to step, in the place of the learnable one (or on top of it, if
            it says so): :class:`StandardErrors` reads the standard error of every entry from ``data.inputs``,
            :class:`NoiseFunction` takes a function. Columns of inputs that hold errors do not count in ``input_dim``.

    Parameters: ``matrix`` ``(obs, state)``, ``input_matrix`` ``(obs, input)`` (from zero), ``offset`` ``(obs,)``,
    ``scale`` ``(obs,)`` or ``scale_tril`` ``(obs, obs)`` (neither where all noise is known).

    Raises:
        ValueError: a size is wrong; or, when called, the state or inputs have another size or are missing, or the noise
            has another shape.
        TypeError: ``noise`` is of another kind.

    >>> import torch
    >>> from pyro_ssm.emissions import LinearNormal
    >>> emission = LinearNormal(state_dim=2, obs_dim=3, matrix=torch.ones(3, 2))
    >>> emission(torch.ones(4, 2), torch.arange(4.0), None).mean[0]
    tensor([2., 2., 2.], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self,
        state_dim: int,
        obs_dim: int,
        input_dim: int = 0,
        covariance: str = "diagonal",
        matrix: Tensor | None = None,
        scale: float | Tensor = 0.5,
        floor: float = 1e-4,
        noise: KnownNoise | None = None,
    ) -> None:
        super().__init__()
        self.state_dim = check_size("state_dim", state_dim)
        self.obs_dim = check_size("obs_dim", obs_dim)
        start = first_matrix(matrix, (obs_dim, state_dim), lambda: torch.randn(obs_dim, state_dim) / state_dim**0.5)
        if noise is not None and not isinstance(noise, KnownNoise):
            raise TypeError(
                f"`noise` must be emissions.StandardErrors, NoiseFunction or another KnownNoise, got "
                f"{type(noise).__name__}. For noise that is learned leave it out"
            )
        self.covariance, self.floor = check_choice("covariance", covariance, ("diagonal", "full")), floor
        learned = noise is None or noise.plus_learned
        self._declare(start, input_dim, covariance, scale, check_positive("floor", floor), learned)
        self.noise = noise

    def forward(self, state: Tensor, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Any:
        """The law of the observations; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        check_state(self, state)
        if self.noise is None:
            return self._law(state, inputs)
        loc = linear(state, self.matrix, self._shift(self.noise.drivers(inputs)))
        if self.noise.correlated or self.covariance == "full":
            return MultivariateNormal(loc, scale_tril=self._known_root(time, inputs), validate_args=False)
        scale = self._known_root(time, inputs).diagonal(dim1=-2, dim2=-1)
        return diagonal_normal(loc, torch.where(scale > 0, scale, self.floor))  # 0 where padded; see StandardErrors

    def affine(self, time: Tensor, inputs: Tensor | None, memory: Tensor | None = None) -> Affine:
        """:math:`(C,\\; D u_k + d,\\; R)`, with a time axis of 1 where it does not vary."""
        if self.noise is None:
            return self._affine(inputs, self.obs_dim)
        shift = with_time(self._shift(self.noise.drivers(inputs)), 1)
        offset = shift.expand(shift.shape[:-1] + (self.obs_dim,))
        return Affine(with_time(self.matrix, 2), offset, self._known_root(time, inputs))

    def _known_root(self, time: Tensor, inputs: Tensor | None) -> Tensor:
        """The square root ``(..., time, obs, obs)`` of the covariance of each step."""
        noise, p = self.noise, self.obs_dim
        root = noise.root(time, inputs).to(self.matrix.dtype)
        event = 2 if noise.correlated else 1
        if root.dim() <= event or any(size != p for size in root.shape[-event:]):
            wanted = ", ".join(["time"] + [str(p)] * event)
            raise ValueError(
                f"{type(noise).__name__} gives noise of shape {tuple(root.shape)}, but (..., {wanted}) is wanted, "
                f"{'factors' if event == 2 else 'standard deviations'} of {p} observed coordinate(s)"
            )
        if noise.plus_learned and not noise.correlated and self.covariance == "diagonal":
            return torch.diag_embed((root.square() + with_time(self.scale, 1).square()).sqrt())
        root = root if noise.correlated else torch.diag_embed(root)
        if not noise.plus_learned:
            return root
        own = noise_tril(self, p)
        lead = torch.broadcast_shapes(root.shape[:-2], own.shape[:-2])
        return tria(torch.cat([part.expand(lead + (p, p)) for part in (root, own)], -1))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return (
            f"state_dim={self.state_dim}, obs_dim={self.obs_dim}, input_dim={self.input_dim}, "
            f"covariance={self.covariance!r}"
        )
