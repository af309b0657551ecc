"""The contract of a memory: steps and sequence are one thing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.binding import bind, random_parameters
from pyro_ssm.components import Memory, gaps
from pyro_ssm.testing.checks import Contract, copies, drawn_parameters, gradients, hold, perturb, skip

__all__ = ["MemoryContract", "Record"]


class Record(NamedTuple):
    """What a memory is run along: states ``(*sample, series, time, state)``, the rest without sample dims.

    >>> from pyro_ssm.testing.memory import Record
    >>> Record._fields
    ('states', 'values', 'mask', 'gap', 'inputs')
    """

    states: Tensor
    values: Tensor | None
    mask: Tensor | None
    gap: Tensor
    inputs: Tensor | None

    def steps(self, k: slice) -> Record:
        """The same record at some steps only."""
        return Record(*(None if x is None else x[..., k, :] for x in self))


def _tensors(carry: Any) -> Iterator[Tensor]:
    if isinstance(carry, Tensor):
        yield carry
    elif isinstance(carry, (tuple, list)):
        for part in carry:
            yield from _tensors(part)
    elif carry is not None:
        raise AssertionError(f"a carry is a tensor or a nested tuple of tensors, got {type(carry).__name__}")


class MemoryContract(Contract):
    """Tests of a :class:`~pyro_ssm.components.Memory`: its step form against its sequence form, and what it may see.

    A subclass defines ``make_component``; ``state_dim``, ``obs_dim`` and ``input_dim`` say what it is run along.

    >>> import torch
    >>> from pyro_ssm.models import RecurrentMemory
    >>> from pyro_ssm.testing import MemoryContract, failures
    >>> class TestRecurrentMemory(MemoryContract):
    ...     state_dim, obs_dim = 2, 1
    ...     def make_component(self):
    ...         return RecurrentMemory(obs_dim=1, hidden_dim=4, state_dim=2)
    >>> failures(TestRecurrentMemory)
    {}
    """

    state_dim: int = 2
    obs_dim: int = 1
    input_dim: int = 0
    num_series: int = 3
    num_times: int = 5
    #: parameters that the summaries do not depend on, by design
    without_gradient: tuple[str, ...] = ()

    def make_component(self) -> Any:
        """A fresh memory, unbound, in float32."""
        raise NotImplementedError(f"{type(self).__name__} must define make_component()")

    def make_values(self, shape: tuple[int, ...]) -> Tensor:
        """Observations ``(*shape, obs)``."""
        return torch.randn(*shape, self.obs_dim)

    def make_record(self, sample: tuple[int, ...] = ()) -> Record:
        """States with sample dims, values without; some entries missing; irregular times."""
        shape = (self.num_series, self.num_times)
        times = torch.rand(shape, dtype=torch.float64).add(0.1).cumsum(-1)
        states = torch.randn(*sample, *shape, self.state_dim)
        return Record(
            states=states,
            values=self.make_values(shape),
            mask=torch.rand(*shape, self.obs_dim) < 0.7,
            gap=gaps(times, states),
            inputs=torch.randn(*shape, self.input_dim) if self.input_dim else None,
        )

    def _bound(self) -> tuple[Any, Any]:
        component = self.make_component()
        perturb(component)
        random = random_parameters(component)
        drawn = {n: v for n, v in drawn_parameters(component, ()).items() if n in random}
        return component, bind(component, drawn)

    def _loop(self, memory: Any, record: Record) -> tuple[Tensor, Tensor, Any]:
        carry, summary = memory.start(record.states.shape[:-2])
        before, after = [], []
        for k in range(self.num_times):
            now = record.steps(slice(k, k + 1))
            before.append(summary)
            carry, summary = memory.see_state(carry, now.states, now.gap, now.inputs)
            after.append(summary)
            if memory.sees_observations:
                carry, summary = memory.see_observation(carry, now.values, now.mask)
        lead = record.states.shape[:-2] + (1, memory.features)
        return torch.cat([x.expand(lead) for x in before], -2), torch.cat([x.expand(lead) for x in after], -2), carry

    def _assert_same(
        self, found: tuple[Tensor, Tensor, Any], wanted: tuple[Tensor, Tensor, Any], sentence: str
    ) -> None:
        for name, a, b in zip(("summaries before", "summaries after z"), found[:2], wanted[:2], strict=True):
            self.assert_equal(a.expand(b.shape), b, f"{sentence}: {name}")

    # ------------------------------------------------------------------------------------------- tests

    def test_is_a_memory(self) -> None:
        """It is a ``Memory`` that says how many ``features`` its summary has."""
        memory = self.make_component()
        hold(isinstance(memory, Memory), f"make_component() must give a Memory, got {type(memory).__name__}")
        hold(isinstance(memory.features, int), "a memory says its `features`")

    def test_steps_are_the_sequence(self) -> None:
        """The step form and ``sequence`` agree to rounding, with and without sample dims."""
        for sample in ((), (2,), (4, 2)):
            _, memory = self._bound()
            record = self.make_record(sample)
            found, loop = memory.sequence(*record), self._loop(memory, record)
            self._assert_same(found, loop, "sequence must agree with the steps")
            for a, b in zip(_tensors(found[2]), _tensors(loop[2]), strict=True):
                self.assert_equal(a.expand(b.shape), b, "the final carry of sequence must be that of the steps")

    def test_summaries_have_leading_dims_time_and_features(self) -> None:
        """A summary is one tensor ``(*sample, series, time, features)``."""
        _, memory = self._bound()
        record = self.make_record((2,))
        wanted = record.states.shape[:-1] + (memory.features,)
        start = memory.start(record.states.shape[:-2])[1]
        first = wanted[:-2] + (1, memory.features)
        hold(start.shape == first, f"the first summary must have shape {tuple(first)}, got {tuple(start.shape)}")
        for name, x in zip(("before", "after z"), memory.sequence(*record)[:2], strict=True):
            hold(x.shape == wanted, f"summaries {name} must have shape {tuple(wanted)}, got {tuple(x.shape)}")

    def test_carries_have_the_leading_dims_of_the_state(self) -> None:
        """Resampling reorders carries along the sample dims, so every tensor of a carry has them."""
        _, memory = self._bound()
        record = self.make_record((2,))
        lead = record.states.shape[:-2]
        carry, _ = memory.start(lead)
        for k in range(2):
            for x in _tensors(carry):
                hold(x.shape[: len(lead)] == lead, f"a carry must lead with {tuple(lead)}, got {tuple(x.shape)}")
            now = record.steps(slice(k, k + 1))
            carry, _ = memory.see_state(carry, now.states, now.gap, now.inputs)
            if memory.sees_observations:
                carry, _ = memory.see_observation(carry, now.values, now.mask)

    def test_values_without_sample_dims_broadcast(self) -> None:
        """Values and mask may lack the state's sample dims."""
        _, memory = self._bound()
        if not memory.sees_observations:
            skip("sees no observations")
        record = self.make_record((2,))
        full = record._replace(
            values=record.values.expand((2, *record.values.shape)), mask=record.mask.expand((2, *record.mask.shape))
        )
        self._assert_same(memory.sequence(*record), memory.sequence(*full), "values without sample dims must broadcast")

    def test_sample_dims_are_a_loop_over_draws(self) -> None:
        """Draws of the path do not see each other."""
        _, memory = self._bound()
        record = self.make_record((4,))
        whole = memory.sequence(*record)
        for s in range(4):
            alone = memory.sequence(*record._replace(states=record.states[s]))
            self._assert_same((whole[0][s], whole[1][s], None), alone, "sample dims must equal a loop over draws")

    def test_a_batch_is_a_loop_over_series(self) -> None:
        """Series do not see each other."""
        _, memory = self._bound()
        record = self.make_record()
        whole = memory.sequence(*record)
        for i in range(self.num_series):
            alone = memory.sequence(*(None if x is None else x[i] for x in record))
            self._assert_same((whole[0][i], whole[1][i], None), alone, "a batch must equal a loop over series")

    def test_hidden_values_do_not_matter(self) -> None:
        """A missing observation is skipped: what stands in its place changes nothing."""
        _, memory = self._bound()
        if not memory.sees_observations:
            skip("sees no observations")
        record = self.make_record()
        other = record._replace(values=torch.where(record.mask, record.values, 3.0 + record.values))
        self._assert_same(
            memory.sequence(*other), memory.sequence(*record), "a hidden value must not matter (sequence)"
        )
        self._assert_same(
            self._loop(memory, other), self._loop(memory, record), "a hidden value must not matter (steps)"
        )

    def test_sees_observations_is_true(self) -> None:
        """``sees_observations`` says whether the values matter."""
        _, memory = self._bound()
        record = self.make_record()
        record = record._replace(mask=torch.ones_like(record.mask))
        found = memory.sequence(*record)
        other = memory.sequence(*record._replace(values=record.values + 1.0))
        moved = bool((found[0] != other[0]).any() | (found[1] != other[1]).any())
        hold(
            moved == memory.sees_observations,
            f"sees_observations is {memory.sees_observations}, and values matter: {moved}",
        )

    def test_sees_the_past_only(self) -> None:
        """Before step k nothing of step k is known; after its state, not its observation."""
        _, memory = self._bound()
        record, k = self.make_record(), self.num_times // 2
        record = record._replace(mask=torch.ones_like(record.mask))
        base = memory.sequence(*record)
        states, values = record.states.clone(), record.values.clone()
        states[..., k:, :] += 1.0
        values[..., k:, :] += 1.0
        moved = memory.sequence(*record._replace(states=states, values=values))
        now = slice(0, k + 1)
        self.assert_equal(moved[0][..., now, :], base[0][..., now, :], "the summary before step k must not see step k")
        if memory.sees_observations:
            moved = memory.sequence(*record._replace(values=values))
            self.assert_equal(moved[1][..., now, :], base[1][..., now, :], "the summary after z[k] must not see y[k]")

    def test_a_sequence_goes_on_from_a_carry(self) -> None:
        """``sequence(..., carry=)`` on the second part is the whole's second part."""
        _, memory = self._bound()
        record, k = self.make_record((2,)), self.num_times // 2
        whole = memory.sequence(*record)
        carry = memory.sequence(*record.steps(slice(0, k)))[2]
        try:
            rest = memory.sequence(*record.steps(slice(k, None)), carry=carry)
        except NotImplementedError as reason:
            skip(str(reason))
        self._assert_same(
            rest, (whole[0][..., k:, :], whole[1][..., k:, :], None), "a sequence must go on from a carry"
        )

    def test_float64_and_float32(self) -> None:
        """The summaries follow the dtype of states and parameters."""
        _, memory = self._bound()
        record = self.make_record()
        hold(memory.sequence(*record)[0].dtype == torch.float32, "float32 states must give float32 summaries")

    def test_gradient_reaches_every_parameter(self) -> None:
        """The summaries depend on each learnable parameter."""
        component, memory = self._bound()
        before, after, _ = memory.sequence(*self.make_record())
        found = gradients(before.square().sum() + after.square().sum(), component.named_parameters())
        without = sorted(name for name, g in found.items() if not bool(g.abs().sum() > 0))
        wanted = sorted(name for name in self.without_gradient if name in found)
        hold(without == wanted, f"parameters without gradient: {without}; declared `without_gradient`: {wanted}")

    def test_copies_are_equal(self) -> None:
        """``pickle`` and ``copy.deepcopy`` give the same memory."""
        component = self.make_component()
        if random_parameters(component):
            skip("random parameters are read at bind")
        record = self.make_record()
        for way, copied in copies(component):
            self._assert_same(bind(copied).sequence(*record), bind(component).sequence(*record), way)
