"""The contract of an emission."""

from __future__ import annotations

from typing import Any

import torch

from pyro_ssm.components import AffineGaussian, Emission
from pyro_ssm.testing.affine import assert_affine
from pyro_ssm.testing.checks import hold, skip
from pyro_ssm.testing.component import Case, ComponentContract

__all__ = ["EmissionContract"]


class EmissionContract(ComponentContract):
    """Tests of an :class:`~pyro_ssm.components.Emission`: ``forward(state, time, inputs, memory=None)``.

    >>> from pyro_ssm.emissions import LinearNormal
    >>> from pyro_ssm.testing import EmissionContract, failures
    >>> class TestLinearNormal(EmissionContract):
    ...     input_dim = 2
    ...     def make_component(self):
    ...         return LinearNormal(state_dim=2, obs_dim=3, input_dim=2)
    >>> failures(TestLinearNormal)
    {}
    """

    kind = Emission

    def call(self, component: Any, case: Case) -> Any:
        return component(case.state, case.time, case.inputs, memory=case.memory)

    def make_case(self, sample: tuple[int, ...] = (), series: int | None = None, own_grids: bool = True) -> Case:
        series = self.num_series if series is None else series
        times = self._grids(series, own_grids)
        shape = (series, times.shape[-1])
        return Case(
            state=self.make_state((*sample, *shape)),
            time=times,
            next_time=None,
            inputs=self.make_inputs(shape),
            memory=self.make_memory((*sample, *shape)),
        )

    def event_size(self, component: Any) -> int:
        return component.obs_dim

    def test_says_its_observation_size(self) -> None:
        """An emission says its ``obs_dim``."""
        hold(isinstance(getattr(self.make_component(), "obs_dim", None), int), "an emission says its `obs_dim`")

    def test_affine_is_the_mean_and_covariance(self) -> None:
        """An ``AffineGaussian``'s ``affine`` gives the mean and covariance of its law."""
        component, case = self._bound(), self.make_case((2,))
        if not isinstance(component, AffineGaussian):
            skip("not AffineGaussian")
        parts = component.affine(case.time, case.inputs, memory=case.memory)
        assert_affine(self, parts, case.state, self.call(component, case))

    def test_states_are_used_at_their_own_time(self) -> None:
        """The law at one time depends on the state at that time alone."""
        component, case = self._bound(), self.make_case()
        value = self._points(self.call(component, case), self._lead(case))
        moved = case.state.clone()
        moved[..., 1:, :] += 1.0
        self.assert_equal(
            self._log_prob(component, case._replace(state=moved), value)[..., :1],
            self._log_prob(component, case, value)[..., :1],
            "the law at the first time must not depend on later states",
        )
        moved = case.state.clone()
        moved[..., :-1, :] += torch.randn(())
        self.assert_equal(
            self._log_prob(component, case._replace(state=moved), value)[..., -1:],
            self._log_prob(component, case, value)[..., -1:],
            "the law at the last time must not depend on earlier states",
        )
