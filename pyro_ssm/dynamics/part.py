"""Parts that add up: motions that say which sum of their coordinates is seen, and where they start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_ssm.blocks._conditioning import check_state
from pyro_ssm.components import AffineGaussian, Initial, Transition
from pyro_ssm.distributions import affine_law

__all__ = ["Part", "Parts"]


class Part(AffineGaussian, Transition):
    """A linear Gaussian motion that knows what it contributes to a sum, so that parts can be added,

    .. math:: x_k = h_k^T z_k, \\qquad y_k = x_k^{(1)} + x_k^{(2)} + \\dots + \\text{noise}.

    ``Level() + Seasonal(12)`` is a :class:`Parts`, which ``models.structural`` turns into a model. A subclass sets
    ``state_dim``, defines ``affine`` and may define :meth:`row`, :meth:`input_columns` and :meth:`usual_start`.

    Attributes:
        label: the name in a sum, unless another is given.

    >>> from pyro_ssm.dynamics import IntegratedWiener, Matern
    >>> (IntegratedWiener(order=1) + Matern(nu=1.5)).names
    ('integrated_wiener', 'matern')
    """

    label: str = "part"
    has_own_name: bool = False
    _start: ClassVar[tuple[Initial, ...]] = ()

    def named(self, name: str | None, start: Initial | None = None) -> Any:
        """This part under another name in a sum and with another initial law (None leaves each as it is).

        >>> from pyro_ssm.dynamics import Matern
        >>> (Matern().named("fast") + Matern(lengthscale=10.0).named("slow")).names
        ('fast', 'slow')
        """
        if name is not None:
            if not name.isidentifier():
                raise ValueError(f"the name of a part must be an identifier, as `level`, got {name!r}")
            self.__dict__["label"] = name
            self.__dict__["has_own_name"] = True
        if start is not None:
            if not isinstance(start, Initial):
                raise TypeError(f"`start` must be a components.Initial, got {type(start).__name__}")
            if start.state_dim != self.state_dim:
                raise ValueError(f"`start` has state_dim={start.state_dim}, the part {self.label} {self.state_dim}")
            self.__dict__["_start"] = (start,)  # in a tuple: its parameters belong to the model's initial law
        return self

    def row(self) -> Tensor:
        """:math:`h` ``(state,)``, without what inputs add: by default the first coordinate is seen."""
        row = torch.zeros(self.state_dim)
        row[0] = 1.0
        return row

    def input_columns(self) -> Mapping[int, int]:
        """Coordinates whose entry of :math:`h_k` is an input: coordinate -> column of ``inputs``."""
        return {}

    def usual_start(self) -> Initial:
        """The initial law where no other is given."""
        raise NotImplementedError(f"{type(self).__name__} must define usual_start() and return a components.Initial")

    def start(self) -> Initial:
        """The initial law in a model."""
        return self._start[0] if self._start else self.usual_start()

    def forward(
        self, state: Tensor, time: Tensor, next_time: Tensor, inputs: Tensor | None, memory: Tensor | None = None
    ) -> Any:
        """The law of the next states; ``state`` ``(..., time, state)``, ``inputs`` ``(..., time, input)`` or None."""
        check_state(self, state)
        return affine_law(self.affine(time, next_time, inputs), state)

    def __add__(self, other: Part | Parts) -> Parts:
        return Parts.of(self) + other


class Parts:
    """A sum of named parts; made by adding them.

    Args:
        parts: name -> part.

    Raises:
        TypeError: a value is not a :class:`Part`.
        ValueError: nothing is given, or one part stands twice.

    >>> from pyro_ssm.dynamics import Matern
    >>> from pyro_ssm.dynamics.structural import Level, Seasonal
    >>> parts = Level() + Seasonal(12) + Seasonal(7) + Matern().named("wiggle")
    >>> parts.names
    ('level', 'seasonal', 'seasonal_2', 'wiggle')
    """

    def __init__(self, parts: Mapping[str, Part]) -> None:
        for name, part in parts.items():
            if not isinstance(part, Part):
                raise TypeError(
                    f"`parts[{name!r}]` must be a dynamics.Part (structural.Level(), dynamics.Matern() ...), got "
                    f"{type(part).__name__}"
                )
        if not parts:
            raise ValueError("`parts` must hold at least one part, got none")
        if len({id(part) for part in parts.values()}) < len(parts):
            raise ValueError("one part stands twice in a sum: build a second object, which has parameters of its own")
        self._parts = dict(parts)

    @classmethod
    def of(cls, parts: Part | Parts | Mapping[str, Part]) -> Parts:
        """Parts from one part, a sum, or a mapping of names."""
        if isinstance(parts, Parts):
            return parts
        if isinstance(parts, Part):
            return cls({parts.label: parts})
        if isinstance(parts, Mapping):
            return cls(parts)
        raise TypeError(f"`parts` must be a part, a sum of parts or a mapping name -> part, got {type(parts).__name__}")

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(self._parts)

    def items(self) -> Iterator[tuple[str, Part]]:
        """Pairs of a name and a part, in order."""
        return iter(self._parts.items())

    def __len__(self) -> int:
        return len(self._parts)

    def __add__(self, other: Part | Parts) -> Parts:
        if not isinstance(other, (Part, Parts)):
            return NotImplemented
        joined = dict(self._parts)
        for name, part in Parts.of(other).items():
            if name in joined and part.has_own_name:
                raise ValueError(f"two parts of the sum are called {name!r}. Give one another name: part.named('...')")
            free, number = name, 2
            while free in joined:
                free, number = f"{name}_{number}", number + 1
            joined[free] = part
        return Parts(joined)
