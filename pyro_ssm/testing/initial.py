"""The contract of an initial law."""

from __future__ import annotations

from typing import Any

from pyro_ssm.components import Initial
from pyro_ssm.testing.component import Case, ComponentContract

__all__ = ["InitialContract"]


class InitialContract(ComponentContract):
    """Tests of an :class:`~pyro_ssm.components.Initial`: ``forward(time, inputs, memory=None)``.

    >>> from pyro_ssm.dynamics import NormalInitial
    >>> from pyro_ssm.testing import InitialContract, failures
    >>> class TestNormalInitial(InitialContract):
    ...     def make_component(self):
    ...         return NormalInitial(state_dim=3, covariance="full")
    >>> failures(TestNormalInitial)
    {}
    """

    kind = Initial

    def call(self, component: Any, case: Case) -> Any:
        return component(case.time, case.inputs, memory=case.memory)

    def make_case(self, sample: tuple[int, ...] = (), series: int | None = None, own_grids: bool = True) -> Case:
        series = self.num_series if series is None else series
        return Case(
            state=None,
            time=self._grids(series, own_grids)[..., :1],
            next_time=None,
            inputs=self.make_inputs((series, 1)),
            memory=self.make_memory((*sample, series, 1)),
        )
