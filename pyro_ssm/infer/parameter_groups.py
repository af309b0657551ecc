"""Which parameters train slowly and do not decay: the recipe that structured state spaces need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_ssm.blocks import StructuredBlock

__all__ = ["ParameterGroups", "parameter_groups"]


class ParameterGroups(list[dict[str, Any]]):
    """Options of parameters, for every kind of optimiser.

    * ``torch.optim.AdamW(groups)``: it is the list of groups that torch's optimisers take;
    * ``pyro.optim.AdamW(groups)``: called with a parameter's name, it gives that parameter's options;
    * ``fit(..., optimizer=groups.optimizer(torch.optim.AdamW), lr=...)``: the rate of ``fit`` takes the place of
      ``lr``, and slow parameters keep their share of it.

    >>> import torch
    >>> from pyro_ssm.blocks import S4D
    >>> from pyro_ssm.infer import parameter_groups
    >>> groups = parameter_groups(S4D(4), lr=4e-3)
    >>> groups("log_step")["lr"], groups("direct")["lr"]
    (0.001, 0.004)
    """

    def __init__(self, lr: float, slow: float, weight_decay: float) -> None:
        self.lr = lr
        self.options = {
            "slow": {"lr": lr * slow, "weight_decay": 0.0},
            "vector": {"lr": lr, "weight_decay": 0.0},
            "matrix": {"lr": lr, "weight_decay": weight_decay},
        }
        self.kind_of: dict[int, str] = {}  # by identity of the parameter
        self.kind_of_name: dict[str, str] = {}
        super().__init__()

    def __call__(self, name: str) -> dict[str, float]:
        """The options of the parameter of that name in Pyro's store; those of a vector for a name that is not known."""
        return dict(self.options[self.kind_of_name.get(name, "vector")])

    def optimizer(self, kind: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
        """What :func:`~pyro_ssm.infer.fit` takes: ``kind`` over these groups, with ``fit``'s learning rate."""

        def build(parameters: Iterable[Tensor], lr: float) -> Optimizer:
            return kind(self._split(parameters, lr / self.lr), lr=lr)

        return build

    def _split(self, parameters: Iterable[Tensor], factor: float) -> list[dict[str, Any]]:
        members: dict[str, list[Tensor]] = {name: [] for name in self.options}
        for parameter in parameters:
            members[self.kind_of.get(id(parameter), "vector")].append(parameter)
        return [
            {"params": found, **self.options[name], "lr": self.options[name]["lr"] * factor}
            for name, found in members.items()
            if found
        ]


def parameter_groups(
    *modules: nn.Module, lr: float = 1e-3, slow: float = 0.25, weight_decay: float = 0.01
) -> ParameterGroups:
    """Sort the parameters of modules by how they should be trained.

    ======== ============================================================ ================ ================
    group    parameters                                                   rate             weight decay
    ======== ============================================================ ================ ================
    slow     state matrix, input matrix and step of structured blocks     ``slow * lr``    0
             (their ``slow_parameters``)
    vector   other vectors and numbers: biases, norms, scales             ``lr``           0
    matrix   everything else                                              ``lr``           ``weight_decay``
    ======== ============================================================ ================ ================

    A decay would pull :math:`\\log \\Delta` to a step of 1 and :math:`\\log(-A)` to a decay of 1, whatever the data
    say; and a large rate moves poles faster than the rest can follow.

    Args:
        modules: a model, a guide, a block ...; all parameters that require a gradient.
        lr: learning rate.
        slow: the share of it that slow parameters get.
        weight_decay: of matrices; it acts as such in AdamW, and as a penalty in Adam.

    Returns:
        :class:`ParameterGroups`, which torch's and Pyro's optimisers take, and from which ``fit`` gets its optimiser.

    Raises:
        ValueError: an option out of its range, or nothing to train.

    Source: A. Gu, K. Goel, C. Re (2022), Efficiently modeling long sequences with structured state spaces, appendix D;
    J. T. H. Smith et al. (2023), Simplified state space layers, appendix G.

    >>> import torch
    >>> from pyro_ssm.blocks import Mamba, ResidualStack
    >>> from pyro_ssm.infer import parameter_groups
    >>> adam = torch.optim.AdamW(parameter_groups(ResidualStack([Mamba(4)]), lr=1e-2))
    >>> [(group["lr"], group["weight_decay"]) for group in adam.param_groups]
    [(0.0025, 0.0), (0.01, 0.0), (0.01, 0.01)]
    """
    for name, value in (("lr", lr), ("slow", slow)):
        if not value > 0:
            raise ValueError(f"`{name}` must be greater than 0, got {value}")
    if weight_decay < 0:
        raise ValueError(f"`weight_decay` must not be negative, got {weight_decay}")
    groups, parameters = ParameterGroups(lr, slow, weight_decay), {}
    for module in modules:
        root = getattr(module, "_pyro_name", "")
        for path, parameter, is_slow in _parameters(module):
            kind = "slow" if is_slow else "matrix" if parameter.dim() > 1 else "vector"
            if groups.kind_of.get(id(parameter)) != "slow":
                groups.kind_of[id(parameter)] = kind
            parameters[id(parameter)] = parameter
            groups.kind_of_name[f"{root}.{path}" if root else path] = groups.kind_of[id(parameter)]
    groups.extend(groups._split(parameters.values(), 1.0))
    if not groups:
        raise ValueError("no parameter requires a gradient: nothing to train")
    return groups


def _parameters(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """The path (as Pyro's store names it), the parameter, and whether it is slow."""
    for path, child in module.named_modules(remove_duplicate=False):
        slow = child.slow_parameters if isinstance(child, StructuredBlock) else ()
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.requires_grad:
                name = name.removesuffix("_unconstrained")
                yield (f"{path}.{name}" if path else name), parameter, name in slow
