"""The contract of a transition."""

from __future__ import annotations

import math
from typing import Any

import torch

from pyro_ssm.components import AffineGaussian, Transition
from pyro_ssm.testing.affine import assert_affine, compose
from pyro_ssm.testing.checks import hold, skip
from pyro_ssm.testing.component import Case, ComponentContract

__all__ = ["TransitionContract"]


class TransitionContract(ComponentContract):
    """Tests of a :class:`~pyro_ssm.components.Transition`: ``forward(state, time, next_time, inputs, memory=None)``.

    Set ``exact_in_gaps`` for a law closed under gaps (Ornstein-Uhlenbeck and the like): then the Chapman-Kolmogorov
    equation is tested,

    .. math:: p(z(t_2) \\mid z(t_0)) = \\int p(z(t_2) \\mid z(t_1))\\, p(z(t_1) \\mid z(t_0))\\, dz(t_1).

    >>> from pyro_ssm.dynamics import LinearNormal
    >>> from pyro_ssm.testing import TransitionContract, failures
    >>> class TestLinearNormal(TransitionContract):
    ...     def make_component(self):
    ...         return LinearNormal(state_dim=2)
    >>> failures(TestLinearNormal)
    {}
    """

    kind = Transition
    #: whether two steps over half a gap are one step over the gap
    exact_in_gaps: bool = False

    def call(self, component: Any, case: Case) -> Any:
        return component(case.state, case.time, case.next_time, case.inputs, memory=case.memory)

    def make_case(self, sample: tuple[int, ...] = (), series: int | None = None, own_grids: bool = True) -> Case:
        series = self.num_series if series is None else series
        times = self._grids(series, own_grids)
        shape = (series, times.shape[-1] - 1)
        return Case(
            state=self.make_state((*sample, *shape)),
            time=times[..., :-1],
            next_time=times[..., 1:],
            inputs=self.make_inputs(shape),
            memory=self.make_memory((*sample, *shape)),
        )

    def test_affine_is_the_mean_and_covariance(self) -> None:
        """An ``AffineGaussian``'s ``affine`` gives the mean and covariance of its law."""
        component, case = self._bound(), self.make_case((2,))
        if not isinstance(component, AffineGaussian):
            skip("not AffineGaussian")
        parts = component.affine(case.time, case.next_time, case.inputs, memory=case.memory)
        assert_affine(self, parts, case.state, self.call(component, case))

    def test_states_are_used_at_their_own_time(self) -> None:
        """The law of one step depends on the state before that step alone."""
        component, case = self._bound(), self.make_case()
        value = self._points(self.call(component, case), self._lead(case))
        terms = self._log_prob(component, case, value)
        for kept, moved in ((slice(0, 1), slice(1, None)), (slice(-1, None), slice(0, -1))):
            state = case.state.clone()
            state[..., moved, :] += 1.0
            self.assert_equal(
                self._log_prob(component, case._replace(state=state), value)[..., kept],
                terms[..., kept],
                "the law of a step must depend on the state right before it alone",
            )

    def test_depends_on_the_gap_and_not_on_the_clock(self) -> None:
        """``components.gap`` in float64: a series far from time 0 has the same law (unless it ``reads_the_clock``)."""
        if self.reads_the_clock:
            skip("the law reads the clock")
        component, case = self._bound(), self.make_case()
        value = self._points(self.call(component, case), self._lead(case))
        far = case._replace(time=case.time + 2.0**24, next_time=case.next_time + 2.0**24)
        self.assert_equal(
            self._log_prob(component, far, value),
            self._log_prob(component, case, value),
            "times far from 0 must give the same law: take `components.gap(time, next_time, like=state)`",
        )

    #: whether the law depends on the time itself (a season, say) and not on the gap alone
    reads_the_clock: bool = False

    def test_two_half_gaps_are_one_gap(self) -> None:
        """The Chapman-Kolmogorov equation, where ``exact_in_gaps``: exactly for an affine law, else by simulation."""
        if not self.exact_in_gaps:
            skip("not declared exact in gaps")
        component, case = self._bound(), self.make_case(series=1)
        case = case.steps(slice(0, 1))
        middle = case.time + 0.3 * (case.next_time - case.time)
        early, late = case._replace(next_time=middle), case._replace(time=middle)
        if isinstance(component, AffineGaussian):
            parts = [component.affine(c.time, c.next_time, c.inputs, memory=c.memory) for c in (early, late, case)]
            matrix, offset, square = compose(parts[0], parts[1])
            whole = parts[2]
            self.assert_equal(matrix, whole.matrix, "Chapman-Kolmogorov: the matrix over two parts of a gap")
            self.assert_equal(offset, whole.offset.expand(offset.shape), "Chapman-Kolmogorov: the offset")
            self.assert_equal(square, whole.scale_tril @ whole.scale_tril.mT, "Chapman-Kolmogorov: the covariance")
            return
        law = self.call(component, case)
        points = law.sample(torch.Size([8]))
        via = self.call(component, early).sample(torch.Size([self.num_draws]))
        density = self.call(component, late._replace(state=via)).log_prob(points.unsqueeze(1)).exp().reshape(8, -1)
        error = density.std(-1) / math.sqrt(self.num_draws)
        worst = ((density.mean(-1) - law.log_prob(points).exp().reshape(8)) / error).abs().max()
        hold(bool(worst < self.largest_z), f"Chapman-Kolmogorov fails by {worst:.1f} standard errors")
