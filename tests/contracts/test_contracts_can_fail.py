"""Every test of every contract can fail: a subject that breaks its sentence, and the name of the test that says so."""

import copy

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_ssm.components import Affine, Transition, gap
from pyro_ssm.distributions import MarkovPath
from pyro_ssm.guides import Structured
from pyro_ssm.models import MemoryNormal, RecurrentMemory, StateSpaceModel
from pyro_ssm.testing import (
    EmissionContract,
    GuideContract,
    InitialContract,
    MemoryContract,
    PathLawContract,
    TransitionContract,
    density_z_scores,
    failures,
)
from tests.contracts.toys import Decay, Leak, See, Start, StateLeak, normal, toy

BROKEN = []  # (contract, test that must fail, with which error)


def breaks(*tests, error=AssertionError):
    """Register a contract whose subject must fail these tests (and may fail others)."""

    def register(contract):
        BROKEN.extend(pytest.param(contract, test, error, id=f"{contract.__name__}-{test}") for test in tests)
        return contract

    return register


def transition(component):
    """A contract over one transition."""

    class Subject(TransitionContract):
        exact_in_gaps = getattr(component, "declared_exact", False)
        num_draws = 4000

        def make_component(self):
            torch.manual_seed(11)
            return component(2)

    Subject.__name__ = component.__name__
    return Subject


def emission(component):
    class Subject(EmissionContract):
        num_draws = 4000

        def make_component(self):
            return component(2, 2)

    Subject.__name__ = component.__name__
    return Subject


# ---------------------------------------------------------------------------------------------- the sound ones


class SoundInitial(InitialContract):
    def make_component(self):
        return Start(2)


class SoundInitialWithMemory(InitialContract):
    memory_dim = 2

    def make_component(self):
        return Start(2, 2)


class SoundTransition(TransitionContract):
    exact_in_gaps = True

    def make_component(self):
        return Decay(2)


class SoundEmission(EmissionContract):
    memory_dim = 2

    def make_component(self):
        return See(2, 3, 2)


class SoundMemory(MemoryContract):
    def make_component(self):
        return Leak(2, 1)


class SoundStateMemory(MemoryContract):
    def make_component(self):
        return StateLeak(2)


@pytest.mark.parametrize(
    "contract", [SoundInitial, SoundInitialWithMemory, SoundTransition, SoundEmission, SoundMemory, SoundStateMemory]
)
def test_a_sound_subject_passes(contract):
    assert failures(contract) == {}


# ---------------------------------------------------------------------------------------------- components


@breaks("test_law_has_one_event_dim_and_a_time_axis")
@transition
class NoEventDim(Decay):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).base_dist


@breaks("test_float64_times_leave_a_float32_network_float32")
@transition
class BareDifference(Decay):
    def _parts(self, time, next_time, memory):
        decay = torch.exp(-self.rate * (next_time - time).unsqueeze(-1))
        return decay, (1 - decay) * self.level, self.log_scale.exp() * (1 - decay.square()).sqrt()


@breaks("test_depends_on_the_gap_and_not_on_the_clock")
@transition
class TimesCastFirst(Decay):
    def _parts(self, time, next_time, memory):
        step = (next_time.float() - time.float()).unsqueeze(-1).to(self.rate.dtype)
        decay = torch.exp(-self.rate * step)
        return decay, (1 - decay) * self.level, self.log_scale.exp() * (1 - decay.square()).sqrt() + 1e-3


@breaks("test_two_half_gaps_are_one_gap")
@transition
class NotExactInGaps(Decay):
    declared_exact = True

    def _parts(self, time, next_time, memory):
        step = gap(time, next_time, like=self.rate)
        decay = 1 - self.rate * step  # Euler's step
        return decay, (1 - decay) * self.level, self.log_scale.exp() * step.sqrt()


@breaks("test_two_half_gaps_are_one_gap")
@transition
class NotExactAndNotAffine(Transition):
    declared_exact = True

    def __init__(self, state_dim):
        super().__init__()
        self.state_dim, self.rate = state_dim, nn.Parameter(torch.tensor([0.5]))

    event_dims = {"rate": 1}

    def forward(self, state, time, next_time, inputs, memory=None):
        step = gap(time, next_time, like=state)
        return normal(state * torch.exp(-self.rate * step), step.sqrt().expand(state.shape) + 0.5)


@breaks("test_affine_is_the_mean_and_covariance")
@transition
class AffineWithVariance(Decay):
    def affine(self, *args, **kwargs):
        parts = super().affine(*args, **kwargs)
        return parts._replace(scale_tril=parts.scale_tril.square())


@breaks("test_affine_is_the_mean_and_covariance")
@transition
class AffineWithRows(Decay):
    """Row convention instead of columns."""

    def __init__(self, state_dim):
        super().__init__(state_dim)
        self.mix = nn.Parameter(torch.tensor([[0.5, 0.4], [-0.3, 0.2]]))

    event_dims = {**Decay.event_dims, "mix": 2}

    def forward(self, state, time, next_time, inputs, memory=None):
        return super().forward((self.mix @ state.unsqueeze(-1)).squeeze(-1), time, next_time, inputs, memory)

    def affine(self, *args, **kwargs):
        parts = super().affine(*args, **kwargs)
        return Affine((parts.matrix @ self.mix).mT, parts.offset, parts.scale_tril)


@breaks("test_parameters_per_series_when_series_and_event_have_one_size")
@transition
class SqueezesTheTimeAxis(Decay):
    """Undoes what ``bind`` does: a value per series then stands where the state's coordinates stand."""

    def _parts(self, time, next_time, memory):
        rate = self.rate if self.rate.dim() == 1 else self.rate.squeeze(-2)
        if rate.dim() == 2:
            rate = rate[:, 0]
        decay = torch.exp(-rate * gap(time, next_time, like=rate))
        return decay, (1 - decay) * self.level, self.log_scale.exp() * (1 - decay.square()).sqrt()


@breaks("test_drawn_parameters_are_a_loop_over_draws")
@transition
class OneDrawForAll(Decay):
    def _parts(self, time, next_time, memory):
        rate = self.rate if self.rate.dim() < 4 else self.rate[:1]
        decay = torch.exp(-rate * gap(time, next_time, like=rate))
        return decay, (1 - decay) * self.level, self.log_scale.exp() * (1 - decay.square()).sqrt()


@breaks("test_one_call_over_time_is_a_loop_over_steps", "test_states_are_used_at_their_own_time")
@transition
class SeesOtherSteps(Decay):
    def forward(self, state, *args, **kwargs):
        return super().forward(state + 0.1 * state.mean(-2, keepdim=True), *args, **kwargs)


@breaks("test_a_batch_is_a_loop_over_series_on_their_own_grids")
@transition
class SeesOtherSeries(Decay):
    def forward(self, state, *args, **kwargs):
        mean = state.mean(-3, keepdim=True) if state.dim() > 2 else state
        return super().forward(state + 0.1 * mean, *args, **kwargs)


@breaks("test_a_batch_is_a_loop_over_series_on_their_own_grids")
@transition
class FirstGridForAll(Decay):
    def _parts(self, time, next_time, memory):
        if time.dim() > 1:
            time, next_time = time[0], next_time[0]
        return super()._parts(time, next_time, memory)


@breaks("test_one_grid_serves_all_series")
@transition
class NeedsOwnGrids(Decay):
    def _parts(self, time, next_time, memory):
        return super()._parts(0.0 * time if time.dim() == 1 else time, next_time, memory)


@breaks("test_sample_dims_are_a_loop_over_draws")
@transition
class SeesOtherDraws(Decay):
    def forward(self, state, *args, **kwargs):
        mean = state.mean(0, keepdim=True) if state.dim() > 3 else state
        return super().forward(state + 0.1 * mean, *args, **kwargs)


@breaks("test_gradient_reaches_every_parameter")
@transition
class DetachedRate(Decay):
    def _parts(self, time, next_time, memory):
        decay = torch.exp(-self.rate.detach() * gap(time, next_time, like=self.rate))
        return decay, (1 - decay) * self.level, self.log_scale.exp() * (1 - decay.square()).sqrt()


class Unnormalised(dist.Normal):
    """Forgets its constant."""

    def log_prob(self, value):
        return super().log_prob(value) + 0.1


@breaks("test_draws_follow_the_density")
@transition
class WrongConstant(Decay):
    def forward(self, *args, **kwargs):
        base = super().forward(*args, **kwargs).base_dist
        return Unnormalised(base.loc, base.scale).to_event(1)


class Shifted(dist.Normal):
    def sample(self, sample_shape=torch.Size()):
        return super().sample(sample_shape) + 0.2 * self.scale


@breaks("test_draws_follow_the_density")
@transition
class WrongDraws(Decay):
    def forward(self, *args, **kwargs):
        base = super().forward(*args, **kwargs).base_dist
        return Shifted(base.loc, base.scale).to_event(1)


class ForgetsWhenCopied(Decay):
    def __init__(self, state_dim):
        super().__init__(state_dim)
        self.__dict__["shift"] = 1.0

    def __getstate__(self):
        return {**self.__dict__, "shift": 0.0}

    def _parts(self, time, next_time, memory):
        decay, offset, scale = super()._parts(time, next_time, memory)
        return decay, offset + self.shift, scale


breaks("test_copies_are_equal")(transition(ForgetsWhenCopied))


@breaks("test_moves_to_another_dtype_and_device", error=RuntimeError)
@transition
class HiddenConstant(Decay):
    def __init__(self, state_dim):
        super().__init__(state_dim)
        self.__dict__["weight"] = torch.eye(state_dim)  # neither parameter nor buffer

    def forward(self, state, *args, **kwargs):
        return super().forward(state @ self.weight, *args, **kwargs)


@breaks("test_is_a_component_of_its_kind")
class AnEmissionIsNoTransition(TransitionContract):
    def make_component(self):
        return See(2, 2)


@breaks("test_states_are_used_at_their_own_time")
@emission
class SeesLaterStates(See):
    def forward(self, state, *args, **kwargs):
        return super().forward(state + 0.2 * state.flip(-2), *args, **kwargs)


@breaks("test_affine_is_the_mean_and_covariance")
@emission
class AffineWithoutOffset(See):
    def affine(self, *args, **kwargs):
        parts = super().affine(*args, **kwargs)
        return parts._replace(offset=torch.zeros(2))


@breaks("test_says_its_observation_size")
@emission
class NoObservationSize(See):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        del self.obs_dim


@breaks("test_law_has_one_event_dim_and_a_time_axis")
class InitialWithoutTime(InitialContract):
    def make_component(self):
        class Timeless(Start):
            def forward(self, time, inputs, memory=None):
                return normal(torch.zeros(7, 2), torch.ones(2))

        return Timeless(2)


# -------------------------------------------------------------------------------------------------- memory


def memory(component):
    class Subject(MemoryContract):
        def make_component(self):
            torch.manual_seed(11)
            return component(2, 1)

    Subject.__name__ = component.__name__
    return Subject


@breaks("test_steps_are_the_sequence")
@memory
class SequenceForgetsTheFirst(Leak):
    def sequence(self, states, *args, **kwargs):
        before, after, carry = super().sequence(states, *args, **kwargs)
        return before.roll(1, -2), after, carry


@breaks("test_carries_have_the_leading_dims_of_the_state")
@memory
class CarryWithTimeInFront(Leak):
    def start(self, shape):
        carry, summary = super().start(shape)
        return carry.movedim(-2, 0), summary

    def see_state(self, carry, *args):
        carry, summary = super().see_state(carry.movedim(0, -2), *args)
        return carry.movedim(-2, 0), summary

    def see_observation(self, carry, *args):
        carry, summary = super().see_observation(carry.movedim(0, -2), *args)
        return carry.movedim(-2, 0), summary


@breaks("test_hidden_values_do_not_matter")
@memory
class ReadsHiddenValues(Leak):
    def see_observation(self, carry, values, mask):
        return super().see_observation(carry, values, torch.ones_like(mask))


@breaks("test_sees_the_past_only")
@memory
class SeesTheFuture(Leak):
    def sequence(self, states, *args, **kwargs):
        return super().sequence(states + 0.1 * states.flip(-2), *args, **kwargs)


@breaks("test_sees_observations_is_true")
@memory
class ClaimsToSee(Leak):
    def see_observation(self, carry, values, mask):
        return carry, carry


@breaks("test_values_without_sample_dims_broadcast", error=RuntimeError)
@memory
class NeedsSampleDims(RecurrentMemory):
    def __init__(self, state_dim, obs_dim):
        super().__init__(obs_dim, 4, state_dim)

    def _with_observation(self, seen_state, values, mask):
        seen = self.observation_net(torch.cat([torch.where(mask, values, torch.zeros(())), mask.float()], -1))
        return torch.cat([seen, seen_state], -1)  # raises unless the dims agree


@breaks("test_sample_dims_are_a_loop_over_draws", "test_a_batch_is_a_loop_over_series")
@memory
class MixesDraws(Leak):
    def see_state(self, carry, state, gap, inputs):
        for dim in range(state.dim() - 2):
            state = state + 0.1 * state.mean(dim, keepdim=True)
        return super().see_state(carry, state, gap, inputs)


@breaks("test_summaries_have_leading_dims_time_and_features")
@memory
class SummaryWithoutSampleDims(Leak):
    def start(self, shape):
        return super().start(shape)[0], self.first.expand(1, 2)


@breaks("test_gradient_reaches_every_parameter")
@memory
class IdleParameter(Leak):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.idle = nn.Parameter(torch.ones(1))


@breaks("test_a_sequence_goes_on_from_a_carry")
@memory
class StartsAfresh(RecurrentMemory):
    def __init__(self, state_dim, obs_dim):
        super().__init__(obs_dim, 4, state_dim)

    def sequence(self, states, values, mask, gap, inputs, carry=None):
        return super().sequence(states, values, mask, gap, inputs)


@breaks("test_float64_and_float32")
@memory
class PromotesToFloat64(Leak):
    def see_observation(self, carry, values, mask):
        carry, summary = super().see_observation(carry, values, mask)
        return carry.double().float() + torch.zeros(1).double(), summary + torch.zeros(1).double()


class MemoryForgetsWhenCopied(Leak):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.__dict__["shift"] = 1.0

    def __getstate__(self):
        return {**self.__dict__, "shift": 0.0}

    def see_state(self, carry, state, gap, inputs):
        return super().see_state(carry, state + self.shift, gap, inputs)


breaks("test_copies_are_equal")(memory(MemoryForgetsWhenCopied))


@breaks("test_is_a_memory")
class ATransitionIsNoMemory(MemoryContract):
    def make_component(self):
        return Decay(2)


# ------------------------------------------------------------------------------------------------ path laws


class Walk(PathLawContract):
    """A sound random walk with drift; what breaks it comes from the subclass."""

    law = MarkovPath
    num_draws = 4000

    def make_parameters(self):
        return [torch.tensor([0.3, -0.2]), torch.tensor(0.2)]

    def conditional(self, parameters, before, k):
        last = before[..., -1:, :] if k else torch.zeros(1, 2)
        return normal(last + parameters[0], parameters[1].exp().expand(2))

    def make_law(self, parameters, step_mask):
        def step(state, k, summary):
            before = torch.zeros(1, 2) if state is None else state
            return normal(before + parameters[0], parameters[1].exp().expand(2))

        return self.law.over(step, 4, 2, step_mask=step_mask, batch_shape=(3,))


def test_a_sound_path_law_passes():
    assert failures(Walk) == {}


def walk(law):
    Subject = type(law.__name__, (Walk,), {"law": law})
    return Subject


class _Path(MarkovPath):
    """A MarkovPath whose subclass survives ``expand``."""

    def expand(self, batch_shape, _instance=None):
        wide = copy.copy(self)
        rest = torch.Size(batch_shape), self._draw, self._discrete
        wide._set(self._step, *self.event_shape, self._history, self._step_mask, *rest)
        return wide


@breaks("test_terms_are_the_conditionals", "test_fresh_terms_are_the_recomputed_ones")
@walk
class DropsTheFirstTerm(_Path):
    def log_prob_steps(self, value):
        if self._fresh is not None and self._fresh[0] is value:
            return self._fresh[1]
        terms = super().log_prob_steps(value)
        return torch.cat([torch.zeros_like(terms[..., :1]), terms[..., 1:]], -1)


@breaks("test_fresh_terms_are_the_recomputed_ones")
@walk
class CachesWithoutGradient(_Path):
    def rsample(self, sample_shape=torch.Size()):
        path = super().rsample(sample_shape)
        self._fresh = (path, self._fresh[1].detach())
        return path


@breaks("test_fresh_terms_are_the_recomputed_ones")
@walk
class CachesWhateverIsAsked(_Path):
    def log_prob_steps(self, value):
        if self._fresh is not None and self._fresh[0].shape == value.shape:
            return self._fresh[1]
        return super().log_prob_steps(value)


@breaks("test_density_is_the_sum_of_its_terms")
@walk
class LosesATermInTheSum(_Path):
    def log_prob(self, value):
        return self.log_prob_steps(value)[..., 1:].sum(-1)


@breaks("test_a_sample_carries_no_gradient")
@walk
class SampleWithGradient(_Path):
    def sample(self, sample_shape=torch.Size()):
        return self.rsample(sample_shape)


@breaks("test_shapes", "test_expand")
@walk
class DrawsOneForTheBatch(_Path):
    def _rsample_by_steps(self, shape):
        path = super()._rsample_by_steps(torch.Size(()))
        return path.expand(shape + path.shape) if len(shape) < 2 else path


@breaks("test_expand")
@walk
class ExpandsToCopies(_Path):
    def _rsample_by_steps(self, shape):
        path = super()._rsample_by_steps(shape[-1:])
        self._fresh = None
        return path.expand(shape + path.shape[1:])


@breaks("test_padding_adds_exactly_zero")
@walk
class CountsPadding(_Path):
    def _hide_padding(self, terms):
        return terms


@breaks("test_padding_adds_exactly_zero")
@walk
class PadsWithASmallNumber(_Path):
    def _hide_padding(self, terms):
        return terms if self._step_mask is None else torch.where(self._step_mask, terms, 1e-6 * terms)


@breaks("test_draws_follow_the_density")
@walk
class DrawsTooWide(_Path):
    def sample(self, sample_shape=torch.Size()):
        return 1.15 * super().sample(sample_shape)


# --------------------------------------------------------------------------------------------------- guides


class GuideSubject(GuideContract):
    guide_class = Structured
    direction = "past"

    def make_model(self):
        return toy(dtype=torch.float32)

    def make_guide(self, model, **options):
        return self.guide_class(model, 8, direction=self.direction, **options)


def test_a_sound_guide_passes():
    assert failures(GuideSubject) == {}


def guide(guide_class, direction="past"):
    return type(guide_class.__name__, (GuideSubject,), {"guide_class": guide_class, "direction": direction})


@breaks("test_looks_ahead_is_true")
@guide
class HidesThatItLooksAhead(Structured):
    def __init__(self, model, hidden_dim, direction, **options):
        super().__init__(model, hidden_dim, direction="both", **options)
        self.looks_ahead = False


@breaks("test_looks_ahead_is_true")
@guide
class SaysThatItLooksAhead(Structured):
    def __init__(self, model, hidden_dim, direction, **options):
        super().__init__(model, hidden_dim, direction="past", **options)
        self.looks_ahead = True


@breaks("test_one_call_of_step_is_a_loop_over_steps", "test_a_ragged_batch_is_a_loop_over_series")
@guide
class StepSeesOtherSteps(Structured):
    def step(self, state, k, context, memory=None):
        law = super().step(state, k, context, memory).base_dist
        return normal(law.loc + law.loc.mean(-2, keepdim=True), law.scale)


@breaks("test_a_drawn_path_is_the_stepped_path", "test_the_density_of_a_draw_is_the_density")
@guide
class DrawsAnotherPath(Structured):
    def draw(self, context):
        inner = super().draw(context)

        def path(shape):
            z, noise, scale = inner(shape)
            return z + 0.1, noise, scale

        return path


@breaks("test_site_names")
@guide
class NamesItsOwnSite(Structured):
    def forward(self, data):
        import pyro

        z = super().forward(data)
        pyro.sample("extra", dist.Normal(0.0, 1.0))
        return z


@breaks("test_names_in_the_parameter_store")
@guide
class RegistersTheModel(Structured):
    def __init__(self, model, *args, **options):
        super().__init__(model, *args, **options)
        self.add_module("held", nn.ModuleList([model]))


@breaks("test_names_in_the_parameter_store")
@guide
class NamelessRoot(Structured):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._pyro_name = ""


@breaks("test_a_parameter_guide_that_leaves_one_out_raises", "test_random_parameters_have_a_posterior")
@guide
class LeavesParametersOut(Structured):
    def parameters_given(self, data):
        from pyro_ssm.binding import random_parameters

        return {name: torch.ones(2) for name in random_parameters(self.model)}


@breaks("test_a_ragged_batch_is_a_loop_over_series", "test_a_batch_is_drawn_as_its_series_are")
@guide
class MixesSeries(Structured):
    def encode(self, data, model):
        context = super().encode(data, model)
        features = context.features
        return context._replace(features=features + features.mean(0, keepdim=True) if data.batch_shape else features)


@breaks("test_padding_and_hidden_values_do_not_matter", "test_a_ragged_batch_is_a_loop_over_series")
@guide
class CountsPaddedSteps(Structured):
    def path(self, data, model):
        return super().path(data._derive(lengths=None), model)


@breaks("test_gradient_reaches_every_parameter")
@guide
class IdleGuideParameter(Structured):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.idle = nn.Parameter(torch.ones(1))


@breaks("test_a_refined_grid_has_a_path_too")
@guide
class IgnoresTheRefinedGrid(Structured):
    def path(self, data, model):
        return super().path(data._derive(observed_index=None, times=data.observed_times, lengths=None), model)


@breaks("test_particles_are_vectorised", error=ValueError)
@guide
class OneParticle(Structured):
    def path(self, data, model):
        law = super().path(data, model)
        law.expand = lambda shape, _instance=None: law
        return law


@breaks("test_copies_keep_their_model")
@guide
class HoldsTheFirstModel(Structured):
    def __deepcopy__(self, memo):
        memo[id(self)] = self
        return self


# ------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize(("contract", "test", "error"), BROKEN)
def test_the_contract_finds_it(contract, test, error):
    subject = contract()
    subject.setup_method()
    with pytest.raises(error):
        getattr(subject, test)()


def test_every_test_of_every_contract_can_fail():
    contracts = (InitialContract, TransitionContract, EmissionContract, MemoryContract, PathLawContract, GuideContract)
    tests = {name for contract in contracts for name in dir(contract) if name.startswith("test_")}
    assert tests - {param.values[1] for param in BROKEN} == set()


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        (dist.Poisson(torch.tensor([2.0])).to_event(1), dist.Poisson(torch.tensor([2.2])).to_event(1)),
        (dist.LogNormal(torch.zeros(2), 0.5).to_event(1), dist.LogNormal(torch.zeros(2), 0.6).to_event(1)),
        (dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])), dist.Dirichlet(torch.tensor([2.0, 3.0, 3.5]))),
        (dist.Beta(torch.tensor([2.0]), 3.0).to_event(1), dist.Beta(torch.tensor([2.2]), 3.0).to_event(1)),
        (
            dist.MultivariateNormal(torch.zeros(2), torch.eye(2)),
            dist.MultivariateNormal(torch.zeros(2), 1.1 * torch.eye(2)),
        ),
    ],
    ids=["poisson", "lognormal", "dirichlet", "beta", "normal"],
)
def test_goodness_of_fit_tells_right_from_wrong(law, wrong):
    class Mixed:
        support, event_shape = law.support, law.event_shape
        sample, log_prob = law.sample, wrong.log_prob

    assert density_z_scores(law, 20_000).abs().max() < 4.5
    assert density_z_scores(Mixed(), 20_000).abs().max() > 4.5


def test_a_law_that_reads_memory_needs_it():
    with pytest.raises(ValueError, match="memory"):
        MemoryNormal(2, nn.Linear(4, 4))(torch.zeros(3, 2), torch.zeros(3), torch.ones(3), None)
    assert isinstance(toy(), StateSpaceModel)
