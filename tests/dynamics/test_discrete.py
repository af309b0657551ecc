"""Components with an index in their state: the contracts, and what the jump process and structural zeros promise."""

import torch

from pyro_ssm import dynamics
from pyro_ssm.testing import InitialContract, TransitionContract
from tests.infer.discrete.brute import random_simplex
from tests.slopes import assert_slope

D = torch.float64


class FiniteContract(TransitionContract):
    def make_state(self, shape):
        return torch.randint(0, 2, (*shape, 1)).float()

    def test_states_are_used_at_their_own_time(self):
        """The contract's own moves a state off its range: swap the states instead."""
        component, case = self._bound(), self.make_case()
        value = self._points(self.call(component, case), self._lead(case))
        other = case._replace(state=torch.cat([1 - case.state[..., :-1, :], case.state[..., -1:, :]], -2))
        last = [self._log_prob(component, c, value)[..., -1] for c in (case, other)]
        assert torch.equal(*last)


class TestCategoricalInitial(InitialContract):
    def make_component(self):
        return dynamics.CategoricalInitial(3, probs=torch.tensor([0.2, 0.3, 0.5]))


class TestCategoricalInitialInputs(InitialContract):
    input_dim = 2

    def make_component(self):
        return dynamics.CategoricalInitial(3, input_dim=2)


class TestMarkovChain(FiniteContract):
    def make_component(self):
        return dynamics.MarkovChain(3, matrix=torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]))


class TestMarkovChainInputs(FiniteContract):
    input_dim = 2

    def make_component(self):
        return dynamics.MarkovChain(3, input_dim=2)


class TestMarkovJump(FiniteContract):
    def make_component(self):
        return dynamics.MarkovJump(2, rates=torch.tensor([[1.0, 0.4], [0.9, 1.0]]))

    def test_gradient_reaches_every_parameter(self):
        """All rates but the diagonal, which is not read."""
        component = self.make_component()
        times = self.make_times()
        component.log_matrix(times[:-1], times[1:], None)[:, 0, 1].sum().backward()
        grad = component.rates_unconstrained.grad
        assert (grad.diagonal() == 0).all() and (grad[0, 1] != 0) and (grad[1, 0] != 0)

    def test_chapman_kolmogorov(self):
        times = torch.tensor([0.0, 0.3, 1.7], dtype=D)
        chain = self.make_component().double()
        steps = chain.log_matrix(times[:-1], times[1:], None).exp()
        torch.testing.assert_close(steps[0] @ steps[1], chain.log_matrix(times[:1], times[2:], None).exp()[0])


def test_jump_process_is_the_matrix_exponential_and_keeps_small_probabilities():
    torch.manual_seed(0)
    allowed = torch.ones(4, 4).tril(1).triu(-1).bool()  # a birth-death chain
    chain = dynamics.MarkovJump(4, rates=0.1 + torch.rand(4, 4), allowed=allowed).double()
    gaps = torch.tensor([1e-6, 0.1, 1.0, 7.0, 500.0], dtype=D)
    found = chain.log_matrix(torch.zeros(5, dtype=D), gaps, None)
    Q = chain.generator()
    assert (Q[~allowed] == 0).all() and Q.sum(-1).abs().max() < 1e-12
    torch.testing.assert_close(found.exp(), torch.matrix_exp(Q * gaps[:, None, None]), rtol=1e-9, atol=1e-12)
    # three jumps within 1e-6: product of rates times gap^3 / 6, far below rounding of 1
    small = Q[0, 1] * Q[1, 2] * Q[2, 3] * gaps[0] ** 3 / 6
    torch.testing.assert_close(found[0, 0, 3].exp(), small, rtol=1e-5, atol=0.0)


def test_equal_gaps_of_own_grids_and_drawn_rates_are_a_loop():
    chain = dynamics.MarkovJump(3).double()
    times = torch.tensor([[0.0, 1.0, 2.0, 4.0], [0.0, 2.0, 3.0, 4.0]], dtype=D)
    whole = chain.log_matrix(times[:, :-1], times[:, 1:], None)
    for i in range(2):
        torch.testing.assert_close(whole[i], chain.log_matrix(times[i, :-1], times[i, 1:], None))
    from pyro_ssm.binding import bind

    rates = 0.5 + torch.rand(5, 2, 3, 3, dtype=D)
    drawn = bind(chain, {"rates": rates})
    both = drawn.log_matrix(times[:, :-1], times[:, 1:], None)
    for s in range(5):
        for i in range(2):
            alone = bind(chain, {"rates": rates[s, i]}).log_matrix(times[i, :-1], times[i, 1:], None)
            torch.testing.assert_close(both[s, i], alone)


class TestSemiMarkov(TransitionContract):
    def make_component(self):
        matrix = torch.tensor([[0.0, 0.6, 0.4], [0.5, 0.0, 0.5], [0.7, 0.3, 0.0]])
        return dynamics.SemiMarkov(3, dynamics.PoissonDuration(3, 5, torch.tensor([0.5, 1.0, 2.0])), matrix)

    def make_state(self, shape):
        return torch.stack([torch.randint(0, 3, shape), torch.randint(1, 3, shape)], -1).float()

    test_states_are_used_at_their_own_time = None  # it moves a state off its range

    def test_gradient_reaches_every_parameter(self):
        component = self.make_component()
        state = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]], [[2.0, 1.0]]])
        t = torch.zeros(1, dtype=D)
        value = torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]], [[0.0, 3.0]]])
        component.double()
        loss = lambda: component(state.double(), t, t + 1, None).log_prob(value.double()).sum()  # noqa: E731
        assert_slope(loss, list(component.parameters()), every=True)


def test_semi_markov_counts_down_and_starts_anew():
    torch.manual_seed(0)
    duration = dynamics.CategoricalDuration(2, 3, random_simplex(2, 3))
    chain = dynamics.SemiMarkov(2, duration)
    t = torch.zeros(2, dtype=D)
    law = chain(torch.tensor([[1.0, 3.0], [1.0, 1.0]]), t, t + 1, None)
    assert law.log_prob(torch.tensor([[1.0, 2.0], [1.0, 2.0]])).tolist() == [0.0, -torch.inf]
    anew = torch.stack([law.log_prob(torch.tensor([0.0, d]))[1] for d in (1.0, 2.0, 3.0)])
    torch.testing.assert_close(anew, duration.log_probs()[0, 0])
    assert law.log_prob(torch.tensor([0.0, 4.0])).tolist() == [-torch.inf, -torch.inf]
