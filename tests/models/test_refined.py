"""On a refined grid states live at all times; emission, memory and encoder are called at the observed ones."""

import pytest
import torch
from pyro import poutine

from pyro_ssm.components import gaps
from pyro_ssm.guides import GaussianMarkov, Structured
from pyro_ssm.models import history, observation_law, path_law
from tests.contracts.toys import Leak, See, normal, posterior, remembering, series, toy


class Spy(See):
    """Remembers the times at which it is called."""

    def forward(self, state, time, inputs, memory=None):
        self.__dict__.setdefault("calls", []).append((state.shape[-2], time))
        return super().forward(state, time, inputs, memory)


def test_the_emission_is_called_at_observed_times_only():
    from pyro_ssm.models import StateSpaceModel
    from tests.contracts.toys import Decay, Start

    model = StateSpaceModel(Start(2), Decay(2), Spy(2, 2)).double()
    data = series(num_times=3)
    refined = data.refine(4)
    calls = model.emission.__dict__.setdefault("calls", [])
    z, y = poutine.trace(model).get_trace(refined).nodes["_RETURN"]["value"]
    assert z.shape == (9, 2) and y.shape == (3, 2)
    assert len(calls) == 1 and calls[0][0] == 3
    torch.testing.assert_close(calls[0][1], data.times)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_densities_by_hand(batch):
    model, data = toy().bind(), series(num_times=3, batch=batch, own=bool(batch), missing=True)
    refined = data.refine(3)
    assert refined.observed_index.tolist() == [0, 3, 6]
    z = torch.randn(*batch, 7, 2).double()
    found = path_law(model, refined).log_prob_steps(z)
    terms = [model.initial(refined.times[..., :1], None).log_prob(z[..., :1, :])]
    for k in range(1, 7):
        law = model.transition(z[..., k - 1 : k, :], refined.times[..., k - 1 : k], refined.times[..., k : k + 1], None)
        terms.append(law.log_prob(z[..., k : k + 1, :]))
    torch.testing.assert_close(found, torch.cat(terms, -1))
    y = observation_law(model, refined, z).log_prob_steps(data.values)
    law = normal(z[..., [0, 3, 6], :] @ model.emission.matrix.T + model.emission.offset, model.emission.log_scale.exp())
    wanted = torch.where(data.mask, law.base_dist.log_prob(data.values), torch.zeros(()).double()).sum(-1)
    torch.testing.assert_close(y, wanted)


def test_a_law_that_is_exact_in_gaps_has_the_same_evidence_on_a_finer_grid():
    from pyro_ssm.infer import kalman_filter

    model, data = toy(), series(num_times=4, missing=True)
    wanted = posterior(model, data)[1]
    for n in (1, 2, 5):
        found = kalman_filter(model.bind(), data.refine(n)).log_likelihood.sum()
        torch.testing.assert_close(found, wanted)


def test_memory_stands_still_between_observations():
    model, data = remembering().bind(), series(num_times=3, missing=True)
    refined = data.refine(2)
    z = torch.randn(5, 2).double()
    run = history(model, refined)
    before, after = run.summaries(z)
    assert before.shape == (5, 2) and after.shape == (3, 2)
    at = z[[0, 2, 4]]
    wanted = model.memory.sequence(at, data.values, data.mask, gaps(data.times, z), None)
    torch.testing.assert_close(after, wanted[1])
    # latent steps 0, (1, 2), (3, 4) see what was known before observations 0, 1, 2
    torch.testing.assert_close(before, wanted[0][[0, 1, 1, 2, 2]])


def test_steps_and_sequence_agree_on_a_refined_grid():
    model, data = remembering().bind(), series(num_times=3, batch=(3,), missing=True)
    refined = data.refine(3)
    run = history(model, refined)
    law = path_law(model, refined, run)
    z = law.rsample()
    torch.testing.assert_close(law.log_prob_steps(z), law.log_prob_steps(z.clone()))


def test_joint_simulation_on_a_refined_grid():
    model, data = remembering(), series(num_times=3, batch=(3,)).refine(3)
    traced = poutine.trace(model).get_trace(data.without_values())
    z, y = traced.nodes["z"]["value"], traced.nodes["y"]["value"]
    assert z.shape == (3, 7, 2) and y.shape == (3, 3, 2)
    values = data.replace(values=y)
    again = poutine.trace(poutine.condition(model, data={"z": z.clone()})).get_trace(values)
    torch.testing.assert_close(traced.log_prob_sum(), again.log_prob_sum())


class Counting(Leak):
    def sequence(self, states, values, mask, gap, inputs, carry=None):
        self.__dict__["seen"] = (states.shape[-2], gap.squeeze(-1))
        return super().sequence(states, values, mask, gap, inputs, carry)


def test_memory_sees_observed_states_and_the_gaps_between_them():
    from pyro_ssm.models import StateSpaceModel
    from tests.contracts.toys import Decay, Start

    model = StateSpaceModel(Start(2, 2), Decay(2, 2), See(2, 2, 2), Counting(2, 2)).double()
    data = series(num_times=3)
    bound = model.bind()
    history(bound, data.refine(4)).summaries(torch.randn(9, 2).double())
    steps, gap = bound.memory.seen
    assert steps == 3
    torch.testing.assert_close(gap, torch.cat([torch.ones(1).double(), data.times.diff()]))


@pytest.mark.parametrize("make", [lambda m: Structured(m, 8), lambda m: GaussianMarkov(m, 8)])
def test_the_encoder_reads_observed_times_and_the_path_has_all(make):
    model, data = toy(dtype=torch.float32), series(num_times=3, batch=(3,), dtype=torch.float32)
    guide = make(model)
    lengths = []
    guide.encoder.recurrent.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[-2]))
    z = poutine.trace(guide).get_trace(data.refine(4)).nodes["z"]["value"]
    assert z.shape == (3, 9, 2) and lengths == [3]
    context = guide.encode(data.refine(4), model.bind())
    coarse = guide.encode(data, model.bind())
    torch.testing.assert_close(context.features[:, ::4], coarse.features)  # at observed times nothing is different
