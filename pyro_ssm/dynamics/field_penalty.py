"""Regularisation of the field of an ordinary differential equation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["FieldPenalty"]


class FieldPenalty:
    """A price on fields that move much or bend much,

    .. math:: R = \\int \\Big( \\lambda_K\\, |f(t, z(t))|^2
        + \\lambda_J\\, \\Big\\| \\frac{\\partial f}{\\partial z}(t, z(t)) \\Big\\|_F^2 \\Big)\\, dt,

    along each path, by the trapezoidal rule on the times of the data (refine them where gaps are long), with
    Hutchinson's estimate of the second term, :math:`E |\\epsilon^T \\partial f / \\partial z|^2` for signs
    :math:`\\epsilon`. Fields with small R are solved in fewer steps, and carry less from the data's noise.

    ``NeuralODE(field, penalty=FieldPenalty(kinetic=0.01))`` adds :math:`-R` of each series to the model's log-density
    as the Pyro site ``"penalty"``, *while the model is in training mode* (as dropout acts), so it plugs into SVI,
    ``infer.fit`` and every ELBO, with the scale of mini-batches. Bounds and predictions that are evaluated
    (``infer.evaluating``, ``model.eval()``) do not have it. It is no part of the model: NUTS and HMC refuse it, call
    ``model.eval()`` for them.

    Args:
        kinetic: :math:`\\lambda_K`, in time over state squared.
        jacobian: :math:`\\lambda_J`, in time.

    Raises:
        ValueError: a weight is negative, or both are 0.

    Randomness: the signs come from torch's generator, one set a call. Differentiable.

    Source: Finlay, Jacobsen, Nurbekyan and Oberman (2020), "How to train your neural ODE: the world of Jacobian and
    kinetic regularization", ICML, section 4.

    >>> import torch
    >>> from pyro_ssm.dynamics import FieldPenalty
    >>> times, path = torch.linspace(0, 2, 5).double(), torch.ones(5, 3)
    >>> FieldPenalty(kinetic=0.5)(lambda z: 2 * z, path, times)        # 1/2 * 2 * |2|^2 in each of 3 coordinates
    tensor(12.)
    """

    def __init__(self, kinetic: float = 0.0, jacobian: float = 0.0) -> None:
        for name, value in (("kinetic", kinetic), ("jacobian", jacobian)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be a finite number of at least 0, got {value}")
        if not kinetic and not jacobian:
            raise ValueError("`kinetic` and `jacobian` are both 0: give one a weight, or leave the penalty out")
        self.kinetic, self.jacobian = float(kinetic), float(jacobian)

    def __call__(self, field: Callable[[Tensor], Tensor], path: Tensor, times: Tensor) -> Tensor:
        """R of each path.

        Args:
            field: states ``(*lead, time, state)`` to slopes of the same shape.
            path: ``(*lead, time, state)``.
            times: ``(time,)`` or ``(*batch, time)`` float64; repeated times (padding) add exactly 0.

        Returns:
            ``(*lead,)``.
        """
        training = torch.is_grad_enabled()
        with torch.set_grad_enabled(training or self.jacobian > 0):
            z = path if path.requires_grad or not self.jacobian else path.detach().requires_grad_()
            slope = field(z)
            density = self.kinetic * slope.square().sum(-1)
            if self.jacobian and slope.requires_grad:
                signs = torch.randint(0, 2, slope.shape, device=slope.device).to(slope) * 2 - 1
                (product,) = torch.autograd.grad(slope, z, signs, create_graph=training, allow_unused=True)
                if product is not None:  # the field depends on the state
                    density = density + self.jacobian * product.square().sum(-1)
        gaps = times.diff(dim=-1).to(density)
        total = (0.5 * (density[..., 1:] + density[..., :-1]) * gaps).sum(-1)
        return total if training else total.detach()

    def __repr__(self) -> str:
        return f"FieldPenalty(kinetic={self.kinetic}, jacobian={self.jacobian})"
