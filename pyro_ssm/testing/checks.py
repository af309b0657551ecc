"""What the contracts share: assertions that repeat the sentence that broke, and parameters to try."""

from __future__ import annotations

import copy
import pickle
import unittest
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from pyro_ssm.binding import parameter_names, random_parameters

__all__ = ["Contract", "copies", "drawn_parameters", "equal", "failures", "hold", "perturb", "skip"]


class Contract:
    """The base of all contracts: each test starts from the same seed and an empty parameter store.

    >>> from pyro_ssm.testing.checks import Contract
    >>> Contract.seed
    0
    """

    #: of torch's generator, before each test
    seed: int = 0
    #: relative and absolute tolerance between two ways to compute the same float32 number
    tolerance: tuple[float, float] = (1e-4, 1e-5)

    def setup_method(self) -> None:
        """Called by pytest before each test."""
        torch.manual_seed(self.seed)
        pyro.clear_param_store()

    def assert_equal(self, actual: Tensor, wanted: Tensor, sentence: str) -> None:
        """Fail with ``sentence`` unless two tensors agree to :attr:`tolerance`, shapes included."""
        equal(actual, wanted, sentence, *self.tolerance)


def failures(contract: type[Contract]) -> dict[str, str]:
    """Run every test of a contract without pytest: the names of those that failed, and why (skipped ones pass).

    >>> from pyro_ssm.dynamics import NormalInitial
    >>> from pyro_ssm.testing import InitialContract, failures
    >>> class TestNormalInitial(InitialContract):
    ...     def make_component(self):
    ...         return NormalInitial(state_dim=2)
    >>> failures(TestNormalInitial)
    {}
    """
    broken = {}
    for name in dir(contract):
        if name.startswith("test_"):
            test = contract()
            test.setup_method()
            try:
                getattr(test, name)()
            except unittest.SkipTest:
                continue
            except Exception as error:  # what a contract finds may be any error of the subject
                broken[name] = f"{type(error).__name__}: {error}"
    return broken


def skip(reason: str) -> NoReturn:
    """Leave a test that does not apply; pytest reports it as skipped."""
    raise unittest.SkipTest(reason)


def hold(condition: bool, sentence: str) -> None:
    """Fail with ``sentence`` unless ``condition``."""
    if not condition:
        raise AssertionError(sentence)


def equal(actual: Tensor, wanted: Tensor, sentence: str, rtol: float, atol: float) -> None:
    """Fail with ``sentence`` and the largest difference unless two tensors agree."""
    torch.testing.assert_close(
        actual.detach(), wanted.detach(), rtol=rtol, atol=atol, msg=lambda found: f"{sentence}\n{found}"
    )


def copies(subject: Any) -> list[tuple[str, Any]]:
    """``subject`` through pickle and through copy.deepcopy."""
    return [("pickle", pickle.loads(pickle.dumps(subject))), ("copy.deepcopy", copy.deepcopy(subject))]


def perturb(module: nn.Module, scale: float = 0.1) -> None:
    """Move every parameter a little, so that none stands at a value (0, say) where gradients vanish."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(scale * torch.randn_like(parameter))


def drawn_parameters(module: Any, shape: Sequence[int], scale: float = 0.1) -> dict[str, Tensor]:
    """Values ``(*shape, *event)`` for every parameter that ``bind`` accepts: from priors, or near the present value.

    >>> from pyro_ssm.dynamics import NormalInitial
    >>> from pyro_ssm.testing.checks import drawn_parameters
    >>> {name: tuple(value.shape) for name, value in drawn_parameters(NormalInitial(2), (5,)).items()}
    {'scale': (5, 2), 'loc': (5, 2)}
    """
    values = {}
    random = set(random_parameters(module))
    for dotted in parameter_names(module):
        path, _, name = dotted.rpartition(".")
        owner = module.get_submodule(path)
        if dotted in random:
            prior = owner._pyro_samples[name]
            law = prior if hasattr(prior, "sample") else prior(owner)
            values[dotted] = law.sample(torch.Size(shape))
        else:
            values[dotted] = _near(owner, name, tuple(shape), scale)
    return values


def _near(owner: Any, name: str, shape: tuple[int, ...], scale: float) -> Tensor:
    value = getattr(owner, name).detach()
    constraint, _ = owner.__dict__.get("_pyro_params", {}).get(name, (constraints.real, None))
    transform = transform_to(constraint)
    free = transform.inv(value)
    return transform(free + scale * torch.randn(shape + free.shape, dtype=free.dtype))


def gradients(total: Tensor, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of ``total`` by name; 0 where it does not depend on a parameter."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    if not total.requires_grad:
        return {name: torch.zeros_like(p) for name, p in named}
    found = torch.autograd.grad(total, [p for _, p in named], allow_unused=True, retain_graph=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named, found, strict=True)}
