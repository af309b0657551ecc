"""The contract of a law over whole paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyro_ssm.testing.checks import Contract, gradients, hold, skip
from pyro_ssm.testing.goodness import density_z_scores

__all__ = ["PathLawContract"]


class PathLawContract(Contract):
    """Tests of a path law with event ``(time, state)``: draws, terms of the density, their cache, padding.

    A subclass defines ``make_parameters`` (tensors, or an empty list) and ``make_law(parameters, step_mask)``, a law of
    batch shape ``(num_series,)``; ``step_mask`` is None or bool ``(num_series, time)``, False on padding.
    ``conditional`` gives the law of one state given the path before it, for the test against a plain loop.

    >>> import torch, pyro.distributions as dist
    >>> from pyro_ssm.distributions import MarkovPath
    >>> from pyro_ssm.testing import PathLawContract, failures
    >>> class TestRandomWalk(PathLawContract):
    ...     def make_parameters(self):
    ...         return [torch.tensor(0.5)]
    ...     def conditional(self, parameters, before, k):
    ...         last = before[..., -1:, :] if k else torch.zeros(1, 2)
    ...         return dist.Normal(last, parameters[0].exp()).to_event(1)
    ...     def make_law(self, parameters, step_mask):
    ...         def step(state, k, summary):
    ...             return dist.Normal(torch.zeros(1, 2) if state is None else state, parameters[0].exp()).to_event(1)
    ...         return MarkovPath.over(step, 4, 2, step_mask=step_mask, batch_shape=(3,))
    >>> failures(TestRandomWalk)
    {}
    """

    num_series: int = 3
    num_draws: int = 20_000
    largest_z: float = 4.5
    #: whether draws are differentiable functions of the parameters
    has_rsample: bool = True

    def make_parameters(self) -> list[Tensor]:
        """Tensors that the law depends on; gradients with respect to them are tested."""
        raise NotImplementedError(f"{type(self).__name__} must define make_parameters()")

    def make_law(self, parameters: list[Tensor], step_mask: Tensor | None) -> Any:
        """The law; batch shape ``(num_series,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define make_law(parameters, step_mask)")

    def conditional(self, parameters: list[Tensor], before: Tensor, k: int) -> Any:
        """The law of ``z[k]`` given ``before = z[:k]``: batch ``(..., 1)``, event ``(state,)``; or None."""
        return None

    def _parameters(self) -> list[Tensor]:
        return [nn.Parameter(p.detach().clone()) for p in self.make_parameters()]

    def _grads(self, total: Tensor, parameters: list[Tensor]) -> list[Tensor]:
        return list(gradients(total, [(str(i), p) for i, p in enumerate(parameters)]).values())

    def _step_mask(self, num_times: int) -> Tensor:
        lengths = torch.arange(self.num_series).remainder(num_times) + 1  # 1, 2, ...
        return torch.arange(num_times) < lengths.unsqueeze(-1)

    # ------------------------------------------------------------------------------------------- tests

    def test_shapes(self) -> None:
        """A draw has ``(*sample, series, time, state)``, the density ``(*sample, series)``, its terms one dim more."""
        law = self.make_law(self._parameters(), None)
        hold(len(law.event_shape) == 2, f"the event must be (time, state), got {tuple(law.event_shape)}")
        hold(
            law.batch_shape == (self.num_series,),
            f"the batch must be ({self.num_series},), got {tuple(law.batch_shape)}",
        )
        for sample in ((), (2,), (4, 2)):
            for draw in (law.sample, law.rsample)[: 1 + self.has_rsample]:
                z = draw(torch.Size(sample))
                wanted = torch.Size(sample) + law.batch_shape + law.event_shape
                hold(
                    z.shape == wanted,
                    f"{draw.__name__}({sample}) must have shape {tuple(wanted)}, got {tuple(z.shape)}",
                )
                for value in (z, z.clone()):
                    hold(law.log_prob(value).shape == wanted[:-2], f"log_prob must have shape {tuple(wanted[:-2])}")
                    hold(law.log_prob_steps(value).shape == wanted[:-1], f"log_prob_steps: {tuple(wanted[:-1])}")

    def test_a_sample_carries_no_gradient(self) -> None:
        """``sample`` is detached, and its density still has the partial gradient."""
        parameters = self._parameters()
        law = self.make_law(parameters, None)
        z = law.sample()
        hold(not z.requires_grad, "sample() must carry no gradient")
        for fresh, again in zip(
            self._grads(law.log_prob(z).sum(), parameters),
            self._grads(law.log_prob(z.clone()).sum(), parameters),
            strict=True,
        ):
            self.assert_equal(fresh, again, "the density of a detached draw must have the gradient of the density")

    def test_density_is_the_sum_of_its_terms(self) -> None:
        """``log_prob = log_prob_steps.sum(-1)``."""
        law = self.make_law(self._parameters(), None)
        z = law.sample(torch.Size([2]))
        self.assert_equal(law.log_prob(z), law.log_prob_steps(z).sum(-1), "log_prob must be the sum of log_prob_steps")

    def test_terms_are_the_conditionals(self) -> None:
        """Each term is :math:`\\log p(z_k | z_{<k})`, by a plain loop."""
        parameters = self._parameters()
        law = self.make_law(parameters, None)
        z = law.sample(torch.Size([2])).clone()
        laws = [self.conditional(parameters, z[..., :k, :], k) for k in range(z.shape[-2])]
        if any(each is None for each in laws):
            skip("no `conditional` given")
        terms = [each.log_prob(z[..., k : k + 1, :]).expand(z.shape[:-2] + (1,)) for k, each in enumerate(laws)]
        self.assert_equal(law.log_prob_steps(z), torch.cat(terms, -1), "the terms must be the conditional densities")

    def test_fresh_terms_are_the_recomputed_ones(self) -> None:
        """What is cached with a draw is the density there, in value and in total gradient."""
        if not self.has_rsample:
            skip("no rsample")
        for mask in (None, True):
            parameters = self._parameters()
            num_times = self.make_law(parameters, None).event_shape[0]
            law = self.make_law(parameters, None if mask is None else self._step_mask(num_times))
            z = law.rsample(torch.Size([2]))
            fresh, again = law.log_prob_steps(z), law.log_prob_steps(z.clone())
            self.assert_equal(fresh, again, "the cached terms of a fresh draw must equal the recomputed ones")
            weights = torch.randn_like(fresh)
            for a, b in zip(
                self._grads((weights * fresh).sum(), parameters),
                self._grads((weights * again).sum(), parameters),
                strict=True,
            ):
                self.assert_equal(a, b, "cached terms must have the total gradient of the recomputed ones")
            hold(
                bool((law.log_prob(z.detach() + 1.0) != law.log_prob(z)).any()),
                "the cache must be keyed by the identity of the draw",
            )

    def test_expand(self) -> None:
        """``expand`` (plates call it) keeps the density, and draws independently."""
        law = self.make_law(self._parameters(), None)
        wide = law.expand(torch.Size([2, self.num_series]))
        z = wide.rsample() if self.has_rsample else wide.sample()
        hold(
            z.shape == torch.Size([2, self.num_series]) + law.event_shape,
            f"a draw of the expanded law: {tuple(z.shape)}",
        )
        hold(bool((z[0] != z[1]).any()), "an expanded law must draw independently")
        self.assert_equal(wide.log_prob(z), law.log_prob(z.clone()), "expand must keep the density")
        self.assert_equal(
            wide.log_prob(z[0].clone()).expand(2, -1), law.log_prob(z[0].clone()).expand(2, -1), "broadcast"
        )

    def test_draws_follow_the_density(self) -> None:
        """``sample`` and ``log_prob`` belong together, the normalising constant included."""
        law = _First(self.make_law(self._parameters(), None))
        worst = density_z_scores(law, self.num_draws).abs().max()
        hold(bool(worst < self.largest_z), f"draws do not follow the density: deviation of {worst:.1f} standard errors")

    def test_padding_adds_exactly_zero(self) -> None:
        """A padded step adds exactly 0 to the density and to every gradient, whatever stands there."""
        parameters = self._parameters()
        full = self.make_law(parameters, None)
        mask = self._step_mask(full.event_shape[0])
        law = self.make_law(parameters, mask)
        z = full.sample().clone()
        terms = law.log_prob_steps(z)
        hold(bool((terms[~mask] == 0).all()), "a padded step must add exactly 0")
        self.assert_equal(terms[mask], full.log_prob_steps(z)[mask], "real steps must keep their terms")
        other = torch.where(mask.unsqueeze(-1), z, 10.0 * z + 5.0).requires_grad_()
        hold(bool((law.log_prob(other) == law.log_prob(z)).all()), "the density must not depend on padded states")
        (grad,) = torch.autograd.grad(law.log_prob(other).sum(), other, retain_graph=True)
        hold(bool((grad[~mask] == 0).all()), "the gradient with respect to padded states must be exactly 0")
        for a, b in zip(
            self._grads(law.log_prob(other).sum(), parameters),
            self._grads(full.log_prob_steps(z)[mask].sum(), parameters),
            strict=True,
        ):
            self.assert_equal(a, b, "padded steps must add nothing to the gradient of parameters")


class _First:
    """One series of a batch of path laws, as a law of its own."""

    def __init__(self, law: Any) -> None:
        self.law, self.support = law, law.support

    def sample(self, shape: torch.Size) -> Tensor:
        self.drawn = self.law.sample(shape)
        return self.drawn[:, 0]

    def log_prob(self, value: Tensor) -> Tensor:
        return self.law.log_prob(self.drawn.clone())[:, 0]
