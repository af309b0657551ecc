"""Noise as an object: what a particle filter draws from, so that a run can be repeated, or made quasi-random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pyro_ssm.infer.smc.draws import from_normals, from_uniforms, like_draws, normal_dim
from pyro_ssm.infer.smc.step_index import StepIndex, row, same_step
from pyro_ssm.ops import standard_normals

__all__ = ["FixedNoise", "Noise", "Pathwise", "PseudoRandom", "QuasiRandom"]

_BLOCK = 2**16  # numbers drawn at a time: fewer calls where particles are few, no more memory where they are many
_SOBOL_BITS = 30


class Noise:
    """What a particle filter draws from; a run asks once a step for uniforms (if it resamples), then for a state.

    A subclass defines ``draw`` and ``uniforms``. A new run calls ``restart`` first, and one that is captured then
    ``capture``: ``k`` is an int64 tensor ``(1,)`` on the device from step 1 on, whose value must not be read.

    >>> from pyro_ssm.infer.smc import Noise, PseudoRandom
    >>> issubclass(PseudoRandom, Noise)
    True
    """

    def restart(self, state_dim: int | None = None) -> None:
        """Begin a new run; ``state_dim`` is given where it goes on from a cloud of such states."""

    def capture(self, num_times: int) -> None:
        """Get ready to be asked with ``k`` on the device; refuse if that cannot be.

        Raises:
            TypeError: this noise must know k.
            ValueError: it does not hold ``num_times`` steps.
        """
        raise TypeError(
            "`cuda_graph` needs noise that is drawn on the device without a look at the step, and "
            f"{type(self).__name__} does not say that it is. Use PseudoRandom or FixedNoise, or define "
            "capture(num_times)"
        )

    def draw(self, k: Any, law: Any, shape: torch.Size) -> Tensor:
        """A draw of ``law`` for step ``k``, of batch ``shape`` ``(N, *batch, 1)``, to which the law's broadcasts."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(k, law, shape)")

    def uniforms(self, k: Any, shape: torch.Size, device: torch.device) -> Tensor:
        """Uniforms in [0, 1) for the resampling before step ``k``, float64 of ``shape`` ``(rows, *batch)``."""
        raise NotImplementedError(f"{type(self).__name__} must define uniforms(k, shape, device)")


class PseudoRandom(Noise):
    """Draws from torch's global generator, for many steps at a time where particles are few.

    A Gaussian law is drawn as a map of standard normals, hence differentiable in its parameters; another law by its
    own ``rsample``, or ``sample``. The normals are those of ``ops.standard_normals``: with the compiled library,
    float32 on a CPU, its own generator, which torch's generator starts; elsewhere ``torch.randn``. In a captured run
    every replay draws anew.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc import PseudoRandom
    >>> law = dist.Normal(torch.zeros(1, 2), 1.0).to_event(1)
    >>> PseudoRandom().draw(0, law, torch.Size([5, 1])).shape
    torch.Size([5, 1, 2])
    """

    def __init__(self) -> None:
        self._normals, self._uniforms = _Blocks(standard_normals), _Blocks(torch.rand)

    def restart(self, state_dim: int | None = None) -> None:
        """Forget what was drawn in advance."""
        self.__init__()  # type: ignore[misc]

    def capture(self, num_times: int) -> None:
        pass

    def draw(self, k: StepIndex, law: Any, shape: torch.Size) -> Tensor:
        dim = normal_dim(law)
        if dim is None:
            law = law if law.batch_shape == shape else law.expand(shape)
            return law.rsample() if law.has_rsample else law.sample()
        return from_normals(law, self._take(k, shape, dim, like_draws(law)))

    def normals(self, k: int, shape: torch.Size, state: Tensor) -> Tensor:
        """Standard normals for the states of step ``k``, of the shape, dtype and device of ``state``."""
        return self._take(k, state.shape[:-1], state.shape[-1], state)

    def _take(self, k: StepIndex, shape: torch.Size, dim: int, like: Tensor) -> Tensor:
        if isinstance(k, Tensor):  # a replay draws the numbers of one step
            return torch.randn(shape + (dim,), dtype=like.dtype, device=like.device)
        return self._normals.take(shape, dim, like.dtype, like.device)

    def uniforms(self, k: StepIndex, shape: torch.Size, device: torch.device) -> Tensor:
        if isinstance(k, Tensor):
            return torch.rand(shape, dtype=torch.float64, device=device)
        return self._uniforms.take(shape, None, torch.float64, device)


class FixedNoise(Noise):
    """Given numbers: the same run again, or one whose noise is correlated with another's.

    Args:
        normals: ``(time, N, *batch, dim)`` standard normals, one row of them for each step's state.
        uniforms: ``(time, rows, *batch)`` in [0, 1), for the resampling before each step; as many rows as the
            resampling scheme asks for (1 for ``"systematic"``, N for ``"stratified"``: see ``ops.resampling.SCHEMES``).
            ``DiffusionResampling`` asks for max(N, 64). May be left out where it asks for none
            (``TransportResampling``, or no resampling at all).

    Raises:
        TypeError: in a run, for a law that is not a map of standard normals.
        ValueError: in a run, for a step or a shape that was not given.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc import FixedNoise
    >>> noise = FixedNoise(torch.ones(4, 5, 2), torch.zeros(4, 1))
    >>> noise.draw(3, dist.Normal(torch.zeros(1, 2), 1.0).to_event(1), torch.Size([5, 1]))[0]
    tensor([[1., 1.]])
    """

    def __init__(self, normals: Tensor, uniforms: Tensor | None = None) -> None:
        self._normals, self._uniforms = normals, uniforms

    def capture(self, num_times: int) -> None:
        for name, given in (("normals", self._normals), ("uniforms", self._uniforms)):
            if given is not None and len(given) < num_times:
                raise ValueError(f"FixedNoise: `{name}` has {len(given)} steps, and the run has {num_times}")

    def draw(self, k: StepIndex, law: Any, shape: torch.Size) -> Tensor:
        dim = normal_dim(law)
        if dim is None:
            raise TypeError(
                f"FixedNoise holds standard normals, and {type(law).__name__} is not drawn from them. "
                "Leave `noise` out, or use Gaussian laws"
            )
        return from_normals(law, self._at(self._normals, k, shape[:-1] + (dim,), "normals").unsqueeze(-2))

    def normals(self, k: int, shape: torch.Size, state: Tensor) -> Tensor:
        """As those of :class:`PseudoRandom`; ``shape``: ``(N, *batch)``."""
        return self._at(self._normals, k, shape + state.shape[-1:], "normals").reshape(state.shape).contiguous()

    @property
    def dtype(self) -> torch.dtype:
        """Of the normals."""
        return self._normals.dtype

    def uniforms(self, k: StepIndex, shape: torch.Size, device: torch.device) -> Tensor:
        if not shape[0]:  # a resampling that needs none
            return torch.empty(shape, dtype=torch.float64, device=device)
        if self._uniforms is None:
            raise ValueError(f"FixedNoise: {_step(k)} resamples, and needs `uniforms` of shape {tuple(shape)} a step")
        return self._at(self._uniforms, k, shape, "uniforms").to(device=device, dtype=torch.float64).contiguous()

    def _at(self, given: Tensor, k: StepIndex, shape: torch.Size, name: str) -> Tensor:
        if given.shape[1:] != shape or (isinstance(k, int) and k >= len(given)):
            raise ValueError(
                f"FixedNoise: {_step(k)} needs `{name}` of shape {tuple(shape)}, but `{name}` has shape "
                f"{tuple(given.shape)} (one row a step)"
            )
        return row(given, k, 0)


def _step(k: StepIndex) -> str:
    return f"step {k}" if isinstance(k, int) else "a step"


class Pathwise(Noise):
    """Another noise, which refuses laws whose draws carry no gradient while gradients are wanted.

    Args:
        noise: what to draw from.
        wanted_by: who wants the gradient, for the error.

    Raises:
        NotImplementedError: in a run, for such a law.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc.noise import Pathwise, PseudoRandom
    >>> law = dist.Normal(torch.zeros(1, 2), 1.0).to_event(1)
    >>> Pathwise(PseudoRandom(), "this loss").draw(0, law, torch.Size([5, 1])).shape
    torch.Size([5, 1, 2])
    """

    def __init__(self, noise: Noise, wanted_by: str) -> None:
        self._noise, self._wanted_by = noise, wanted_by

    def restart(self, state_dim: int | None = None) -> None:
        self._noise.restart(state_dim)

    def draw(self, k: int, law: Any, shape: torch.Size) -> Tensor:
        if torch.is_grad_enabled() and not law.has_rsample:
            name = type(getattr(law, "base_dist", law)).__name__
            raise NotImplementedError(
                f"{self._wanted_by} differentiates through the draws of states, and those of step {k} ({name}) are not "
                "reparameterised. Use a proposal with reparameterised draws (guided), or smc.fisher_score, whose "
                "gradient needs densities only"
            )
        return self._noise.draw(k, law, shape)

    def uniforms(self, k: int, shape: torch.Size, device: torch.device) -> Tensor:
        return self._noise.uniforms(k, shape, device)


class QuasiRandom(Noise):
    """Scrambled Sobol' points for sequential quasi-Monte Carlo: resampling and motion share each step's points.

    A step takes N points in dimension 1 + dim: the first coordinate, sorted, chooses the ancestors along Hilbert's
    curve, the others move the states. One scrambled net (Matousek) serves all steps; each step and each series shifts
    it digit by digit at random, so that every point is uniform by itself and the evidence is unbiased. N should be a
    power of 2.

    Source: Gerber and Chopin (2015), "Sequential quasi-Monte Carlo", J. R. Statist. Soc. B 77, section 3.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.infer.smc import QuasiRandom
    >>> law = dist.Normal(torch.zeros(1, 2), 1.0).to_event(1)
    >>> QuasiRandom().draw(0, law, torch.Size([8, 1])).shape
    torch.Size([8, 1, 2])
    """

    def __init__(self) -> None:
        self._nets: dict[tuple[int, int], Tensor] = {}
        self._dim: int | None = None
        self._moves: tuple[StepIndex, Tensor] | None = None

    def restart(self, state_dim: int | None = None) -> None:
        """Scramble anew."""
        self.__init__()  # type: ignore[misc]
        self._dim = state_dim

    def capture(self, num_times: int) -> None:
        pass

    def draw(self, k: StepIndex, law: Any, shape: torch.Size) -> Tensor:
        dim, num = law.event_shape[-1], shape[0]
        if self._moves is not None and same_step(self._moves[0], k):
            points = self._moves[1]
        else:
            points = self._points(num, shape[1:-1], dim, law.mean.device)
        if points.shape[-1] != dim:
            raise ValueError(
                f"quasi-random {_step(k)} draws {dim} numbers, and the step before drew {points.shape[-1]}: "
                "every step must draw one state of the same size. Run particle_filter with quasi_random=False"
            )
        self._dim, self._moves = dim, None
        return from_uniforms(law, points.unsqueeze(-2))

    def uniforms(self, k: StepIndex, shape: torch.Size, device: torch.device) -> Tensor:
        dim = 1 if self._dim is None else self._dim
        points = self._points(shape[0], shape[1:], 1 + dim, device)
        first, order = points[..., 0].sort(0)
        self._moves = (k, points[..., 1:].gather(0, order.unsqueeze(-1).expand(order.shape + (dim,))))
        return first

    def _points(self, num: int, batch: torch.Size, dim: int, device: torch.device) -> Tensor:
        """``(num, *batch, dim)`` in (0, 1)."""
        if (num, dim) not in self._nets:
            engine = torch.quasirandom.SobolEngine(dim, scramble=True)
            net = engine.draw(num, dtype=torch.float64).mul_(2**_SOBOL_BITS).long()
            self._nets[num, dim] = net.reshape((num,) + (1,) * len(batch) + (dim,)).to(device)
        shift = torch.randint(2**_SOBOL_BITS, batch + (dim,), device=device)
        return ((self._nets[num, dim] ^ shift) + 0.5) / 2**_SOBOL_BITS


class _Blocks:
    """Numbers of one shape, drawn for several steps at once."""

    def __init__(self, generate: Callable[..., Tensor]) -> None:
        self._generate = generate
        self._kind: tuple[Any, ...] | None = None
        self._left: Iterator[Tensor] = iter(())

    def take(self, shape: torch.Size, dim: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Numbers of ``shape``, or of ``shape + (dim,)``."""
        kind = (shape, dim, dtype, device)
        found = next(self._left, None) if kind == self._kind else None
        if found is None:
            whole = shape if dim is None else shape + (dim,)
            steps = max(1, min(256, _BLOCK // max(whole.numel(), 1)))
            self._kind = kind
            self._left = iter(self._generate((steps, *whole), dtype=dtype, device=device).unbind(0))
            found = next(self._left)
        return found
