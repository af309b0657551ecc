"""What every component must satisfy, whatever its kind."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.binding import bind, parameter_names, random_parameters
from pyro_ssm.components import Component, SampleOnly
from pyro_ssm.testing.checks import Contract, copies, drawn_parameters, gradients, hold, perturb, skip
from pyro_ssm.testing.goodness import density_z_scores

__all__ = ["Case", "ComponentContract"]


class Case(NamedTuple):
    """The arguments of one call of a component: ``state`` and ``memory`` ``(*sample, series, time, .)``.

    >>> from pyro_ssm.testing.component import Case
    >>> Case._fields
    ('state', 'time', 'next_time', 'inputs', 'memory')
    """

    state: Tensor | None
    time: Tensor
    next_time: Tensor | None
    inputs: Tensor | None
    memory: Tensor | None

    def steps(self, k: slice) -> Case:
        """The same call at some steps only."""
        times = [None if t is None else t[..., k] for t in (self.time, self.next_time)]
        state, inputs, memory = (None if x is None else x[..., k, :] for x in (self.state, self.inputs, self.memory))
        return Case(state, times[0], times[1], inputs, memory)

    def series(self, i: int) -> Case:
        """The same call for one series, without its batch dim."""
        times = [t if t is None or t.dim() == 1 else t[i] for t in (self.time, self.next_time)]
        state, inputs, memory = (None if x is None else x[..., i, :, :] for x in (self.state, self.inputs, self.memory))
        return Case(state, times[0], times[1], inputs, memory)

    def draw(self, s: int) -> Case:
        """The same call for one draw along the first sample dim."""
        return self._replace(
            state=None if self.state is None else self.state[s],
            memory=None if self.memory is None else self.memory[s],
        )

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Case:
        """States, inputs and memory of another dtype; times stay float64."""
        times = [None if t is None else t.to(device) for t in (self.time, self.next_time)]
        state, inputs, memory = (
            None if x is None else x.to(device=device, dtype=dtype) for x in (self.state, self.inputs, self.memory)
        )
        return Case(state, times[0], times[1], inputs, memory)


class ComponentContract(Contract):
    """Shapes, broadcasting, dtypes, gradients, copies, drawn parameters, and draws that follow the density.

    Use :class:`InitialContract`, :class:`TransitionContract` or :class:`EmissionContract`. A subclass defines
    ``make_component``; it may set ``input_dim`` and ``memory_dim`` (columns that the component needs; 0 for none), and
    replace ``make_times``, ``make_state``, ``make_inputs`` and ``make_memory``.

    >>> from pyro_ssm.testing import ComponentContract, TransitionContract
    >>> issubclass(TransitionContract, ComponentContract)
    True
    """

    #: columns of inputs and of memory's summary that the component reads
    input_dim: int = 0
    memory_dim: int = 0
    num_series: int = 3
    num_draws: int = 20_000
    #: parameters that the density does not depend on, by design
    without_gradient: tuple[str, ...] = ()
    #: largest standardised deviation of the draws from the density
    largest_z: float = 4.5

    # ------------------------------------------------------------------------------------ what is tested

    def make_component(self) -> Any:
        """A fresh component, unbound, in float32."""
        raise NotImplementedError(f"{type(self).__name__} must define make_component()")

    def make_times(self) -> Tensor:
        """Times ``(time,)`` in float64, irregular."""
        return torch.tensor([0.0, 0.7, 1.0, 2.1, 2.6], dtype=torch.float64)

    def make_state(self, shape: tuple[int, ...]) -> Tensor:
        """States ``(*shape, state)`` of ordinary size."""
        return torch.randn(*shape, self.make_component().state_dim)

    def make_inputs(self, shape: tuple[int, ...]) -> Tensor | None:
        """Inputs ``(*shape, input_dim)``, or None."""
        return torch.randn(*shape, self.input_dim) if self.input_dim else None

    def make_memory(self, shape: tuple[int, ...]) -> Tensor | None:
        """Summaries ``(*shape, memory_dim)``, or None."""
        return torch.randn(*shape, self.memory_dim) if self.memory_dim else None

    # --------------------------------------------------------------------------- what the kinds define

    kind: type[Component] = Component

    def call(self, component: Any, case: Case) -> Any:
        """The component's law for one set of arguments."""
        raise NotImplementedError

    def make_case(self, sample: tuple[int, ...] = (), series: int | None = None, own_grids: bool = True) -> Case:
        """Arguments with leading dims ``(*sample, series, time)``."""
        raise NotImplementedError

    def event_size(self, component: Any) -> int:
        """Size of the law's one event dim."""
        return component.state_dim

    def _grids(self, series: int, own_grids: bool) -> Tensor:
        times = self.make_times()
        if not own_grids:
            return times
        return times * torch.linspace(0.5, 1.5, series, dtype=torch.float64).unsqueeze(-1)

    def _lead(self, case: Case) -> torch.Size:
        shapes = [case.time.shape]
        shapes += [x.shape[:-1] for x in (case.state, case.inputs, case.memory) if x is not None]
        return torch.broadcast_shapes(*shapes)

    def _points(self, law: Any, lead: torch.Size) -> Tensor:
        """Values to evaluate densities at."""
        return law.sample().detach().expand(lead + law.event_shape)

    def _log_prob(self, component: Any, case: Case, value: Tensor) -> Tensor:
        lead = value.shape[:-1]
        return self.call(component, case).log_prob(value).expand(lead)

    def _component(self) -> tuple[Any, dict[str, Tensor]]:
        """A component away from its first values, and a value for each of its random parameters."""
        component = self.make_component()
        if isinstance(component, SampleOnly):
            skip("the component is SampleOnly: it has no density")
        perturb(component)
        random = random_parameters(component)
        return component, {name: value for name, value in drawn_parameters(component, ()).items() if name in random}

    def _bound(self) -> Any:
        return bind(*self._component())

    def _needs_lead(self, case: Case, what: str) -> None:
        if case.state is None and case.memory is None:
            skip(f"the law depends on neither state nor memory, so it has no {what} dims of its own")

    # ------------------------------------------------------------------------------------------- tests

    def test_is_a_component_of_its_kind(self) -> None:
        """The component is of the class that the model asks for, and says its sizes."""
        component = self.make_component()
        hold(
            isinstance(component, self.kind),
            f"make_component() must give a {self.kind.__name__}, got {type(component)}",
        )
        hold(isinstance(component.state_dim, int), "a component says its `state_dim`")

    def test_law_has_one_event_dim_and_a_time_axis(self) -> None:
        """``forward`` returns a law with batch ``(*sample, series, time)`` and event ``(state,)`` or ``(obs,)``."""
        component = self._bound()
        for sample in ((), (2,), (4, 2)):
            case = self.make_case(sample)
            law, lead = self.call(component, case), self._lead(case)
            event = torch.Size([self.event_size(component)])
            hold(
                law.event_shape == event, f"the law must have event shape {tuple(event)}, got {tuple(law.event_shape)}"
            )
            hold(
                torch.broadcast_shapes(law.batch_shape, lead) == lead,
                f"the law must have batch shape {tuple(lead)} = (*sample, series, time), got {tuple(law.batch_shape)}",
            )
            terms = law.log_prob(self._points(law, lead))
            hold(terms.shape == lead, f"log_prob must have shape {tuple(lead)}, got {tuple(terms.shape)}")

    def test_one_call_over_time_is_a_loop_over_steps(self) -> None:
        """One call evaluates all steps; one step is time = 1."""
        component, case = self._bound(), self.make_case((2,))
        value = self._points(self.call(component, case), self._lead(case))
        steps = [slice(k, k + 1) for k in range(value.shape[-2])]
        loop = torch.cat([self._log_prob(component, case.steps(k), value[..., k, :]) for k in steps], -1)
        self.assert_equal(
            self._log_prob(component, case, value), loop, "one call over time must equal a loop over steps"
        )

    def test_a_batch_is_a_loop_over_series_on_their_own_grids(self) -> None:
        """Each series has its own times."""
        component, case = self._bound(), self.make_case(own_grids=True)
        value = self._points(self.call(component, case), self._lead(case))
        loop = torch.stack([self._log_prob(component, case.series(i), value[i]) for i in range(len(value))])
        self.assert_equal(
            self._log_prob(component, case, value), loop, "a batch with own time grids must equal a loop over series"
        )

    def test_one_grid_serves_all_series(self) -> None:
        """Times ``(time,)`` broadcast over the series."""
        component, case = self._bound(), self.make_case(own_grids=False)
        expanded = case._replace(
            time=case.time.expand(self.num_series, -1),
            next_time=None if case.next_time is None else case.next_time.expand(self.num_series, -1),
        )
        value = self._points(self.call(component, expanded), self._lead(expanded))
        self.assert_equal(
            self._log_prob(component, case, value),
            self._log_prob(component, expanded, value),
            "times (time,) must mean the same as times (series, time)",
        )

    def test_sample_dims_are_a_loop_over_draws(self) -> None:
        """Particles and draws are sample dims, leftmost."""
        component, case = self._bound(), self.make_case((4,))
        self._needs_lead(case, "sample")
        value = self._points(self.call(component, case), self._lead(case))
        loop = torch.stack([self._log_prob(component, case.draw(s), value[s]) for s in range(4)])
        self.assert_equal(self._log_prob(component, case, value), loop, "sample dims must equal a loop over draws")

    def test_float64_times_leave_a_float32_network_float32(self) -> None:
        """Take differences with ``components.gap``, which casts."""
        component, case = self._bound(), self.make_case((2,))
        law = self.call(component, case)
        value = self._points(law, self._lead(case))
        for what, tensor in (("a draw", value), ("log_prob", law.log_prob(value))):
            hold(tensor.dtype == torch.float32, f"{what} must stay float32 with float64 times, got {tensor.dtype}")

    def test_moves_to_another_dtype_and_device(self) -> None:
        """All that the law depends on is a parameter or a buffer."""
        for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
            component, random = self._component()
            case, bound = self.make_case((2,)), bind(component, random)
            value = self._points(self.call(bound, case), self._lead(case))
            moved = copy.deepcopy(component).to(device=device, dtype=torch.float64)
            moved = bind(moved, {name: v.to(device, torch.float64) for name, v in random.items()})
            terms = self._log_prob(moved, case.to(torch.float64, device), value.to(device, torch.float64))
            hold(terms.dtype == torch.float64, f"after .to(float64) the density must be float64, got {terms.dtype}")
            wanted = self._log_prob(bound, case, value).double()
            self.assert_equal(terms.cpu(), wanted, f"the density must be the same in float64 on {device}")

    def test_gradient_reaches_every_parameter(self) -> None:
        """The density of some value depends on each learnable parameter."""
        component, random = self._component()
        case, bound = self.make_case((2,)), bind(component, random)
        value = self._points(self.call(bound, case), self._lead(case))
        found = gradients(self._log_prob(bound, case, value).sum(), component.named_parameters())
        without = sorted(name for name, g in found.items() if not bool(g.abs().sum() > 0))
        wanted = sorted(name for name in self.without_gradient if name in found)
        hold(without == wanted, f"parameters without gradient: {without}; declared `without_gradient`: {wanted}")

    def test_draws_follow_the_density(self) -> None:
        """``sample`` and ``log_prob`` of the law belong together, the normalising constant included."""
        component = self._bound()
        case = self.make_case(series=1)
        k = slice(-1, None)
        law = self.call(component, case.steps(k))
        worst = density_z_scores(law, self.num_draws).abs().max()
        hold(bool(worst < self.largest_z), f"draws do not follow the density: deviation of {worst:.1f} standard errors")

    def test_copies_are_equal(self) -> None:
        """``pickle`` and ``copy.deepcopy`` give the same law."""
        component, values = self._component()
        case, bound = self.make_case(), bind(component, values)
        value = self._points(self.call(bound, case), self._lead(case))
        for way, copied in copies(component):
            terms = self._log_prob(bind(copied, values), case, value)
            self.assert_equal(terms, self._log_prob(bound, case, value), f"{way} must give the same law")

    def test_drawn_parameters_are_a_loop_over_draws(self) -> None:
        """``bind`` takes values ``(draws, 1, *event)``, which broadcast as leftmost sample dims over the series."""
        component = self.make_component()
        if not parameter_names(component) or isinstance(component, SampleOnly):
            skip("no parameter, or no density")
        case, num = self.make_case(), 4
        values = drawn_parameters(component, (num, 1))
        bound = bind(component, values)
        lead = torch.Size([num]) + self._lead(case)
        value = self._points(self.call(bound, case), lead)
        each = [bind(component, {name: v[s, 0] for name, v in values.items()}) for s in range(num)]
        loop = torch.stack([self._log_prob(each[s], case, value[s]) for s in range(num)])
        self.assert_equal(
            self._log_prob(bound, case, value), loop, "batched parameter draws must equal a loop over draws"
        )

    def test_parameters_per_series_when_series_and_event_have_one_size(self) -> None:
        """A value ``(series, *event)`` belongs to the series, also where there are as many series as coordinates."""
        component = self.make_component()
        if not parameter_names(component) or isinstance(component, SampleOnly):
            skip("no parameter, or no density")
        for num in sorted({component.state_dim, self.event_size(component)}):
            case = self.make_case(series=num)
            values = drawn_parameters(component, (num,), scale=0.3)
            bound = bind(component, values)
            value = self._points(self.call(bound, case), self._lead(case))
            each = [bind(component, {name: v[i] for name, v in values.items()}) for i in range(num)]
            loop = torch.stack([self._log_prob(each[i], case.series(i), value[i]) for i in range(num)])
            self.assert_equal(
                self._log_prob(bound, case, value), loop, f"parameters per series must equal a loop over {num} series"
            )
