"""Binding: read every parameter of a model once, and get a copy that speaks no Pyro.

A drawn value is reshaped to ``(*draws, *plates, 1, *event)`` so that it broadcasts against states ``(*sample, *batch,
time, state)``. Without the time axis a per-series scalar would be silently wrong whenever the number of series equals
the state dimension. Without reading once, a law that Pyro evaluates after the model returned would draw its parameters
again, and one trace would have two log-probabilities.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NoReturn

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

__all__ = ["bind", "is_bound", "parameter_names", "random_parameters"]

_bound_classes: dict[type, type] = {}


def is_bound(module: nn.Module) -> bool:
    """Whether a model or component is a bound copy, whose parameters are plain tensors.

    >>> from pyro_ssm.binding import bind, is_bound
    >>> from pyro_ssm.components import Component
    >>> component = Component()
    >>> is_bound(component), is_bound(bind(component))
    (False, True)
    """
    return "_is_bound" in type(module).__dict__


def _bound_class(cls: type) -> type:
    """A subclass of ``cls`` (so that capabilities hold) whose attribute access and calls are those of a plain
    ``nn.Module``.
    """
    if cls not in _bound_classes:
        plain: dict[str, Any] = {
            "__getattr__": nn.Module.__getattr__,
            "__call__": nn.Module.__call__,
            "__module__": cls.__module__,
        }
        plain["_is_bound"] = True
        _bound_classes[cls] = type(cls)(f"Bound{cls.__name__}", (cls,), plain)
    return _bound_classes[cls]


def _pyro_parameters(module: PyroModule) -> dict[str, Any]:
    """The parameters that a PyroModule itself holds: ``name -> PyroSample prior | PyroParam | nn.Parameter``."""
    own: dict[str, Any] = dict(module.__dict__.get("_pyro_samples", {}))
    constrained = module.__dict__.get("_pyro_params", {})
    own.update(constrained)
    hidden = {f"{name}_unconstrained" for name in constrained}
    own.update({name: value for name, value in module._parameters.items() if name not in hidden and value is not None})
    return own


def _pyro_modules(root: PyroModule) -> dict[str, PyroModule]:
    """All PyroModules below (and with) ``root`` by their path; a plain ``nn.Module`` ends the walk.

    A module that two components share stands here once, under the name that Pyro gave it.
    """
    found: dict[str, PyroModule] = {}

    def walk(module: PyroModule, path: str) -> None:
        found[_path(root, module, path)] = module
        for name, child in module._modules.items():
            if isinstance(child, PyroModule):
                walk(child, f"{path}.{name}" if path else name)

    walk(root, "")
    return found


def _path(root: PyroModule, module: PyroModule, path: str) -> str:
    """The dotted name of ``module`` relative to ``root``: Pyro's, where it has given one."""
    prefix = f"{root._pyro_name}." if root._pyro_name else ""
    name = module._pyro_name
    return name.removeprefix(prefix) if module is not root and name and name.startswith(prefix) else path


def parameter_names(root: PyroModule) -> list[str]:
    """The dotted names that :func:`bind` accepts.

    >>> import torch
    >>> from pyro.nn import PyroParam
    >>> from pyro_ssm.binding import parameter_names
    >>> from pyro_ssm.components import Component
    >>> component = Component()
    >>> component.rate = PyroParam(torch.tensor(1.0))
    >>> parameter_names(component)
    ['rate']
    """
    return [
        f"{path}.{name}" if path else name
        for path, module in _pyro_modules(root).items()
        for name in _pyro_parameters(module)
    ]


def random_parameters(root: PyroModule) -> list[str]:
    """The dotted names of the parameters that have a prior (``PyroSample``).

    >>> import pyro.distributions as dist
    >>> from pyro.nn import PyroSample
    >>> from pyro_ssm.binding import random_parameters
    >>> from pyro_ssm.components import Component
    >>> component = Component()
    >>> component.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> random_parameters(component)
    ['rate']
    """
    return [
        f"{path}.{name}" if path else name
        for path, module in _pyro_modules(root).items()
        for name in module.__dict__.get("_pyro_samples", {})
    ]


def _refuse_unknown(unknown: set[str], known: list[str]) -> NoReturn:
    hints = [close for name in sorted(unknown) for close in difflib.get_close_matches(name, known, n=1)]
    did_you_mean = f" Did you mean {', '.join(hints)}?" if hints else ""
    raise KeyError(f"bind got values for unknown parameters {sorted(unknown)}; the model has {known}.{did_you_mean}")


def _with_time_axis(name: str, value: Tensor, own: int, declared: int) -> Tensor:
    """Reshape ``(*lead, *event)`` to ``(*lead, 1, *event)``, the event padded with ones up to its declared
    dimensions.
    """
    if own > declared:
        raise ValueError(
            f"parameter `{name}` is declared with {declared} event dim(s), but its value of shape {tuple(value.shape)} "
            f"has {own}. Give it a prior of event dim {declared}, or declare `event_dims` on the component"
        )
    split = value.dim() - own
    return value.reshape(value.shape[:split] + (1,) * (1 + declared - own) + value.shape[split:])


class _Reader:
    """One reading of every parameter of a model: in a trace, from given values, or plainly."""

    def __init__(self, root: PyroModule, values: Mapping[str, Tensor], tracing: bool) -> None:
        self.root, self.values, self.tracing = root, values, tracing
        self.lead = torch.Size()  # (*draws, *plates), over all parameters
        self.copies: dict[PyroModule, PyroModule] = {}

    def _shaped(self, name: str, value: Tensor, own: int, declared: int) -> Tensor:
        shaped = _with_time_axis(name, value, own, declared)
        self.lead = torch.broadcast_shapes(self.lead, shaped.shape[: -1 - declared])
        return shaped

    def value(self, path: str, module: PyroModule, name: str) -> Any:
        dotted = f"{path}.{name}" if path else name
        prior = module.__dict__.get("_pyro_samples", {}).get(name)
        declared = getattr(module, "event_dims", {}).get(name)
        if prior is not None:
            return self._random(dotted, module, name, prior, declared)
        held = module._parameters.get(name)
        # a parameter that is held makes no site: Pyro's store would set requires_grad, and SVI would train it
        value = held if held is not None and not held.requires_grad else getattr(module, name)
        if dotted in self.values:
            given = torch.as_tensor(self.values[dotted], dtype=value.dtype, device=value.device)
            declared = max(value.dim(), 1) if declared is None else declared
            return self._shaped(dotted, given, min(given.dim(), value.dim()), declared)
        return value

    def _random(self, dotted: str, module: PyroModule, name: str, prior: Any, declared: int | None) -> Tensor:
        if dotted not in self.values and not self.tracing:
            raise RuntimeError(
                f"parameter `{dotted}` is random (it has a prior) and no value was given. Outside a Pyro trace pass "
                f"bind({{'{dotted}': value}}), or draw one with infer.sample_prior(model)"
            )
        law = prior if hasattr(prior, "sample") else prior(module)
        if isinstance(
            law, Tensor
        ):  # a PyroSample whose function returns a tensor is a deterministic function of others
            own = law.dim() if declared is None else min(law.dim(), declared)
        else:
            own = law.event_dim
        if dotted in self.values:
            value = torch.as_tensor(self.values[dotted])
            if value.dim() < own:
                raise ValueError(
                    f"parameter `{dotted}` needs a value of at least {own} dim(s) (the event of its prior), "
                    f"got shape {tuple(value.shape)}"
                )
        else:
            value = getattr(module, name)
        return self._shaped(dotted, value, own, max(own, 1) if declared is None else declared)

    def copy(self, path: str, module: PyroModule) -> PyroModule:
        """A bound copy of ``module``: shared parameters and plain children, drawn values as ordinary attributes."""
        if module in self.copies:
            return self.copies[module]
        path = _path(self.root, module, path)
        cls = _bound_class(type(module))
        bound = cls.__new__(cls)  # type: ignore[call-overload]
        state = dict(module.__dict__)
        for table in ("_parameters", "_buffers", "_modules"):
            state[table] = dict(state[table])
        for name in _pyro_parameters(module):
            value = self.value(path, module, name)
            if value is not module._parameters.get(name):
                state["_parameters"].pop(name, None)
                state[name] = value
        for name, child in module._modules.items():
            if isinstance(child, PyroModule):
                state["_modules"][name] = self.copy(f"{path}.{name}" if path else name, child)
            elif self.tracing and child is not None:
                getattr(module, name)  # Pyro registers the parameters of a plain nn.Module when it is read
        for table in ("_pyro_params", "_pyro_samples"):
            state.pop(table, None)
        bound.__dict__.update(state)
        self.copies[module] = bound
        return bound


def bind(root: PyroModule, values: Mapping[str, Any] | None = None) -> Any:
    """Read every parameter of a model or component once and return a shallow copy that speaks no Pyro.

    While a trace runs, random parameters (``PyroSample``) become Pyro sites, each exactly once; learnable ones are
    registered with Pyro, and those with ``requires_grad=False`` are not, so that ``SVI`` leaves them alone. Values that
    are given take the place of a draw (or of a learnable parameter) and make no site. The copy shares every
    ``nn.Parameter``, so gradients flow; there is no handler traffic in loops over it, and
    ``torch.compile(fullgraph=True)`` works. Its attribute ``parameter_shape`` is the ``(*draws, *plates)`` shape of all
    drawn values together.

    Args:
        root: the model or component.
        values: dotted name to value ``(*draws, *plates, *event)``; posterior draws broadcast as leftmost sample dims.

    Raises:
        KeyError: a name is unknown.
        RuntimeError: a random parameter has no value, and no trace runs.
        ValueError: a value has more event dims than the parameter declares.

    >>> import torch, pyro.distributions as dist
    >>> from pyro.nn import PyroSample
    >>> from pyro_ssm.binding import bind
    >>> from pyro_ssm.components import Component
    >>> component = Component()
    >>> component.rate = PyroSample(dist.LogNormal(0.0, 1.0))
    >>> bind(component, {"rate": torch.tensor([0.1, 0.2, 0.3])}).rate.shape  # three draws, a time axis, one event dim
    torch.Size([3, 1, 1])
    """
    values = {} if values is None else dict(values)
    if is_bound(root):
        if values:
            raise ValueError(f"the model is bound already; bind the original to {sorted(values)} instead")
        return root
    known = parameter_names(root)
    if unknown := set(values) - set(known):
        _refuse_unknown(unknown, known)
    tracing = bool(root._pyro_context.active) or pyro.poutine.runtime.am_i_wrapped()
    with ExitStack() as stack:
        if tracing or (values and _has_dependent_priors(root)):
            stack.enter_context(root._pyro_context)
            # given values condition the reading, so that priors that depend on them are read right, and leave no site
            given = {root._pyro_get_fullname(name): torch.as_tensor(value) for name, value in values.items()}
            stack.enter_context(pyro.poutine.block(hide=list(given)))
            stack.enter_context(pyro.poutine.condition(data=given))
        reader = _Reader(root, values, tracing)
        bound = reader.copy("", root)
    bound.__dict__["parameter_shape"] = reader.lead
    return bound


def _has_dependent_priors(root: PyroModule) -> bool:
    priors = [p for m in _pyro_modules(root).values() for p in m.__dict__.get("_pyro_samples", {}).values()]
    return any(not hasattr(prior, "sample") for prior in priors)
