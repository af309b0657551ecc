"""The contract of a guide: one path site, steps that are the path's law, truth about the future."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import Tensor

from pyro_ssm.binding import random_parameters
from pyro_ssm.data import TimeSeries
from pyro_ssm.distributions.moments import gaussian_moments
from pyro_ssm.guides import Guide
from pyro_ssm.models import history, site_name
from pyro_ssm.testing.checks import Contract, hold, perturb, skip

__all__ = ["GuideContract"]


class GuideContract(Contract):
    """Tests of a :class:`~pyro_ssm.guides.Guide`.

    A subclass defines ``make_model`` and ``make_guide(model, **options)``; ``options`` holds ``parameters=`` for the
    guide over random parameters. ``make_values`` gives observations that the model's emission can see.

    >>> from pyro_ssm.dynamics import LinearNormal, NormalInitial
    >>> from pyro_ssm.emissions import Bernoulli
    >>> from pyro_ssm.guides import Structured
    >>> from pyro_ssm.models import StateSpaceModel
    >>> from pyro_ssm.testing import GuideContract, failures
    >>> class TestStructured(GuideContract):
    ...     def make_model(self):
    ...         return StateSpaceModel(NormalInitial(2), LinearNormal(2), Bernoulli(2, 3))
    ...     def make_guide(self, model, **options):
    ...         return Structured(model, hidden_dim=8, direction="past", **options)
    ...     def make_values(self, shape):
    ...         return torch.rand(shape).round()
    >>> import torch
    >>> failures(TestStructured)
    {}
    """

    #: steps of each series of the ragged data
    lengths: tuple[int, ...] = (5, 3, 4)
    #: columns of inputs
    input_dim: int = 0
    #: parameters of the guide that the path's density does not depend on, by design
    without_gradient: tuple[str, ...] = ()

    def make_model(self) -> Any:
        """A fresh model."""
        raise NotImplementedError(f"{type(self).__name__} must define make_model()")

    def make_guide(self, model: Any, **options: Any) -> Any:
        """A fresh guide of ``model``."""
        raise NotImplementedError(f"{type(self).__name__} must define make_guide(model, **options)")

    def make_values(self, shape: tuple[int, ...]) -> Tensor:
        """Observations ``(series, time, obs)``."""
        return torch.randn(shape)

    def make_data(self) -> TimeSeries:
        """A ragged batch on its own time grids, with missing entries."""
        series, num_times = len(self.lengths), max(self.lengths)
        shape = (series, num_times, self.make_model().emission.obs_dim)
        mask = torch.rand(shape) < 0.7
        mask[:, :2] = True
        return TimeSeries(
            times=torch.rand(series, num_times, dtype=torch.float64).add(0.1).cumsum(-1),
            values=self.make_values(shape),
            mask=mask,
            inputs=torch.randn(series, num_times, self.input_dim) if self.input_dim else None,
            lengths=torch.tensor(self.lengths),
        )

    def _made(self) -> tuple[Any, Any]:
        model = self.make_model()
        guide = self.make_guide(model)
        perturb(guide)
        return model, guide

    def _bound(self, guide: Any, data: TimeSeries) -> Any:
        with torch.no_grad(), poutine.block():
            return guide.bind_model({n: v.detach() for n, v in guide.parameters_given(data).items()})

    # ------------------------------------------------------------------------------------------- sites

    def test_site_names(self) -> None:
        """The guide samples the model's path under the model's name, the parameters under theirs, and nothing else."""
        model, guide = self._made()
        data = self.make_data()
        sites = {n for n, s in poutine.trace(model).get_trace(data).nodes.items() if _is_latent(s)}
        traced = poutine.trace(guide).get_trace(data)
        found = {n for n, s in traced.nodes.items() if _is_latent(s) and not s["infer"].get("is_auxiliary")}
        hold(found == sites, f"the guide must have the latent sites of the model, {sorted(sites)}; got {sorted(found)}")
        hold(site_name(model, "z") in sites, "the path site is the model's `z`")
        z = traced.nodes[site_name(model, "z")]["value"]
        wanted = data.batch_shape + (data.num_times, model.initial.state_dim)
        hold(z.shape == wanted, f"the path must have shape {tuple(wanted)}, got {tuple(z.shape)}")

    def test_names_in_the_parameter_store(self) -> None:
        """Model and guide share no name: the guide's root is named ``guide``, and it does not register the model."""
        model, guide = self._made()
        hold(isinstance(guide, Guide), f"make_guide must give a Guide, got {type(guide).__name__}")
        hold(guide._pyro_name == "guide", 'the root of a guide must be named "guide"')
        hold(guide.model is model, "`guide.model` must be the model that was given")
        hold(all(module is not model for module in guide.modules()), "the guide must hold the model unregistered")
        data = self.make_data()
        pyro.clear_param_store()
        poutine.trace(model).get_trace(data)
        mine = set(pyro.get_param_store().keys())
        poutine.trace(guide).get_trace(data)
        theirs = set(pyro.get_param_store().keys()) - mine
        shared = {name for name, _ in guide.named_parameters()} & {name for name, _ in model.named_parameters()}
        hold(
            all(name.startswith("guide") for name in theirs),
            f"parameters of the guide must be named guide..., got {sorted(theirs)} (shared names: {sorted(shared)})",
        )

    def test_a_parameter_guide_that_leaves_one_out_raises(self) -> None:
        """Every parameter with a prior needs a posterior, also with ``parameters=``."""
        model = self.make_model()
        _give_prior(model)
        guide = self.make_guide(model, parameters=lambda data: None)
        try:
            guide(self.make_data())
        except ValueError as error:
            missing = random_parameters(model)[0]
            hold(missing in str(error), f"the error must name {missing}, it says: {error}")
        else:
            raise AssertionError("a guide over parameters that leaves one out must raise a ValueError")

    def test_random_parameters_have_a_posterior(self) -> None:
        """By default every ``PyroSample`` of the model has a site in the guide, and the path is drawn given it."""
        model = self.make_model()
        name = _give_prior(model)
        guide = self.make_guide(model)
        data = self.make_data()
        guide(data)
        traced = poutine.trace(guide).get_trace(data)
        hold(site_name(model, name) in traced.nodes, f"the guide must sample {name}")
        replayed = poutine.trace(poutine.replay(model, trace=traced)).get_trace(data)
        same = replayed.nodes[site_name(model, name)]["value"] is traced.nodes[site_name(model, name)]["value"]
        hold(same, "the model must read the parameter that the guide drew")
        hold(bool(torch.isfinite(replayed.log_prob_sum() - traced.log_prob_sum())), "the weight must be finite")

    # ------------------------------------------------------------------------------------------- densities

    def test_the_density_of_a_draw_is_the_density(self) -> None:
        """The path's cached terms equal those of an equal path."""
        model, guide = self._made()
        data = self.make_data()
        law = guide.path(data, self._bound(guide, data))
        z = law.rsample()
        self.assert_equal(
            law.log_prob_steps(z), law.log_prob_steps(z.clone()), "a draw's terms must be the density's terms"
        )

    def test_one_call_of_step_is_a_loop_over_steps(self) -> None:
        """``step`` over a slice of steps gives what it gives one by one, and the path's law is the product."""
        model, guide = self._made()
        data = self.make_data()
        bound = self._bound(guide, data)
        context, law = guide.encode(data, bound), guide.path(data, bound)
        z = law.rsample().detach().clone()
        run = history(bound, data)
        before = None if run is None else run.summaries(z)[0]
        terms = []
        for k in range(data.num_times):
            now = slice(k, k + 1)
            state = None if k == 0 else z[..., k - 1 : k, :]
            step = guide.step(state, now, context, None if before is None else before[..., now, :])
            terms.append(step.log_prob(z[..., now, :]).expand(data.batch_shape + (1,)))
        loop = torch.where(data.step_mask, torch.cat(terms, -1), torch.zeros(()))
        self.assert_equal(law.log_prob_steps(z), loop, "the path's law must be the product of steps")

    def test_a_drawn_path_is_the_stepped_path(self) -> None:
        """``draw`` gives, for the same noise, the path that stepping gives; and its scales."""
        model, guide = self._made()
        data = self.make_data()
        bound = self._bound(guide, data)
        context = guide.encode(data, bound)
        draw = guide.draw(context)
        if draw is None or bound.memory is not None:
            skip("the guide steps its paths")
        for sample in ((), (2,)):
            shape = torch.Size(sample) + data.batch_shape + (data.num_times, bound.initial.state_dim)
            path, noise, scale = draw(shape)
            hold(
                path.shape == noise.shape == scale.shape == shape,
                "draw(shape) must give path, noise and scale of that shape",
            )
            state = None
            for k in range(data.num_times):
                law = guide.step(state, slice(k, k + 1), context, None)
                state, scales = _drawn_with(law, noise[..., k : k + 1, :])
                self.assert_equal(path[..., k : k + 1, :], state, f"step {k} of a drawn path must be the stepped one")
                self.assert_equal(scale[..., k : k + 1, :], scales.expand(state.shape), f"the scale of step {k}")

    def test_looks_ahead_is_true(self) -> None:
        """A guide that says it does not look ahead sees nothing of later data."""
        model, guide = self._made()
        hold(isinstance(guide.looks_ahead, bool), "a guide says whether it `looks_ahead`")
        data = self.make_data()
        bound = self._bound(guide, data)
        base = guide.path(data, bound)
        z = base.rsample().detach().clone()
        terms = base.log_prob_steps(z)
        moved = []
        for k in range(1, data.num_times):
            flipped = data.mask.clone()
            flipped[..., k:, :] = data.observed_step_mask[..., k:].unsqueeze(-1)
            values = torch.where(data.mask, data.values, torch.ones(()))
            values[..., k:, :] = self.make_values(tuple(values.shape))[..., k:, :]
            changed = data.replace(values=values, mask=flipped)
            moved.append(
                bool((guide.path(changed, bound).log_prob_steps(z)[..., :k] - terms[..., :k]).abs().max() > 1e-6)
            )
        if not guide.looks_ahead:
            hold(not any(moved), "looks_ahead is False, and the law of a state depends on later observations")
        else:
            hold(any(moved), "looks_ahead is True, and no law depends on later observations: declare it False")

    # ------------------------------------------------------------------------------------------- series

    def test_a_ragged_batch_is_a_loop_over_series(self) -> None:
        """The density of each series is what it is alone, without padding."""
        model, guide = self._made()
        data = self.make_data()
        bound = self._bound(guide, data)
        law = guide.path(data, bound)
        z = law.rsample().detach().clone()
        for i, length in enumerate(self.lengths):
            alone = guide.path(data.series(i), bound)
            wanted = alone.log_prob_steps(z[i, :length].clone())
            found = law.log_prob_steps(z)[i]
            self.assert_equal(found[:length], wanted, f"series {i} of a ragged batch must be as it is alone")
            hold(bool((found[length:] == 0).all()), "padding must add exactly 0")

    def test_a_batch_is_drawn_as_its_series_are(self) -> None:
        """Given the same noise, a ragged batch draws the paths that its series draw alone."""
        model, guide = self._made()
        data = self.make_data()
        bound = self._bound(guide, data)
        if bound.memory is not None:
            skip("with a memory paths are stepped")
        draw = guide.draw(guide.encode(data, bound))
        if draw is None:
            skip("the guide steps its paths")
        path, noise, _ = draw(data.batch_shape + (data.num_times, bound.initial.state_dim))
        for i, length in enumerate(self.lengths):
            context, state = guide.encode(data.series(i), bound), None
            for k in range(length):
                state, _ = _drawn_with(guide.step(state, slice(k, k + 1), context, None), noise[i, k : k + 1])
                self.assert_equal(path[i, k : k + 1], state, f"step {k} of series {i} must be drawn as it is alone")

    def test_padding_and_hidden_values_do_not_matter(self) -> None:
        """What stands in padded or missing places changes no density of the path and no gradient."""
        model, guide = self._made()
        data = self.make_data()
        bound = self._bound(guide, data)
        z = guide.path(data, bound).rsample().detach().clone()
        garbage = data.replace(values=torch.where(data.mask, data.values, 7.0 + data.values), mask=data.mask)
        total = [guide.path(d, bound).log_prob(z).sum() for d in (data, garbage)]
        self.assert_equal(total[1], total[0], "hidden and padded values must not matter")
        padded = torch.where(data.step_mask.unsqueeze(-1), z, 100.0 + z)
        self.assert_equal(guide.path(data, bound).log_prob(padded).sum(), total[0], "padded states must not matter")
        parameters = [p for p in guide.parameters() if p.requires_grad]
        grads = [torch.autograd.grad(t, parameters, allow_unused=True) for t in total]
        for a, b in zip(*grads, strict=True):
            if b is not None:
                self.assert_equal(a, b, "hidden and padded values must not matter to gradients")

    def test_gradient_reaches_every_parameter(self) -> None:
        """The bound, on these data or on a refined grid, depends on each learnable parameter of the guide."""
        model, guide = self._made()
        data = self.make_data()
        loss = sum(Trace_ELBO().differentiable_loss(model, guide, each) for each in (data, data.refine(2)))
        named = [(n, p) for n, p in guide.named_parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
        without = sorted(n for (n, _), g in zip(named, found, strict=True) if g is None or not bool(g.abs().sum() > 0))
        wanted = sorted(self.without_gradient)
        hold(without == wanted, f"parameters without gradient: {without}; declared `without_gradient`: {wanted}")

    def test_a_refined_grid_has_a_path_too(self) -> None:
        """On ``data.refine(n)`` the path lives at all times, and its density is the product of steps."""
        model, guide = self._made()
        data = self.make_data().refine(2)
        bound = self._bound(guide, data)
        law = guide.path(data, bound)
        z = law.rsample()
        hold(z.shape[-2] == data.num_times, f"the path must have {data.num_times} steps, got {z.shape[-2]}")
        self.assert_equal(
            law.log_prob_steps(z), law.log_prob_steps(z.clone()), "a draw's terms must be the density's terms"
        )

    def test_particles_are_vectorised(self) -> None:
        """With ``vectorize_particles`` the path has the particles leftmost."""
        model, guide = self._made()
        data = self.make_data()
        depth = len(data.batch_shape)
        elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=depth)
        hold(bool(torch.isfinite(torch.as_tensor(elbo.loss(model, guide, data)))), "the bound must be finite")

    def test_copies_keep_their_model(self) -> None:
        """A deep copy of ``(model, guide)`` is a pair again, with the same densities."""
        model, guide = self._made()
        data = self.make_data()
        twin_model, twin = copy.deepcopy((model, guide))
        hold(twin.model is twin_model, "a deep copy of (model, guide) must hold the copied model")
        bound = self._bound(guide, data)
        z = guide.path(data, bound).rsample().detach().clone()
        torch.manual_seed(self.seed)
        self.assert_equal(
            twin.path(data, twin.bind_model({n: _plain(bound, n) for n in random_parameters(model)})).log_prob(z),
            guide.path(data, bound).log_prob(z),
            "a deep copy must have the same density",
        )


def _drawn_with(law: Any, noise: Tensor) -> tuple[Tensor, Tensor]:
    """What a normal law draws from that noise, and the diagonal of its square root."""
    mean, scale_tril = gaussian_moments(law)
    return mean + (scale_tril @ noise.unsqueeze(-1)).squeeze(-1), scale_tril.diagonal(dim1=-2, dim2=-1)


def _is_latent(site: dict[str, Any]) -> bool:
    if site["type"] != "sample" or site["is_observed"] or type(site["fn"]).__name__ == "_Subsample":
        return False
    return not site["infer"].get("_deterministic", False)


def _give_prior(model: Any) -> str:
    """A prior on the model's first learnable, unconstrained parameter, around its value."""
    for module in model.modules():
        if not isinstance(module, PyroModule):
            continue
        hidden = {f"{name}_unconstrained" for name in module.__dict__.get("_pyro_params", {})}
        for name, value in module._parameters.items():
            if value is not None and name not in hidden:
                start = value.detach().clone()
                known = random_parameters(model)
                setattr(module, name, PyroSample(dist.Normal(start, 0.1).to_event(start.dim())))
                return next(new for new in random_parameters(model) if new not in known)
    skip("the model has no unconstrained parameter")


def _plain(bound: Any, dotted: str) -> Tensor:
    """A bound parameter without its time axis."""
    path, _, name = dotted.rpartition(".")
    owner = bound.get_submodule(path)
    value = getattr(owner, name)
    return value.squeeze(-1 - type(owner).event_dims.get(name, 1))
