"""Operators over a batch of series: compiled kernels, their registration and derivative, and the composite beside them.

What ``selective_scan``, ``ssd``, ``causal_conv1d`` and the banks share. Each is a map from tensors to ``(y, final)``
whose leading dims broadcast. The kernels know one leading dim: the batch, or a size of 1 that stands for all of it (a
stride of 0).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_ssm.ops.call_plan import PLAIN, Plan, like, looked_at, signature_of
from pyro_ssm.ops.compiled import library
from pyro_ssm.ops.composite import composite_backward, transformed
from pyro_ssm.ops.cuda import DeviceEngine
from pyro_ssm.ops.engine import Engine, engine_of
from pyro_ssm.ops.operator import Way, address, define, way_of

__all__ = ["Argument", "BatchedOperator"]

_HALVES = (torch.float16, torch.bfloat16)
_PLANS = 256  # kept at most


class Argument(NamedTuple):
    """One tensor that an operator takes.

    >>> from pyro_ssm.ops.batched_operator import Argument
    >>> Argument("u", 2, timed=True).solid
    1
    """

    name: str
    event: int  # dims after the batch
    timed: bool = False  # whether the kernel knows a stride over the first of them
    solid: int = 1  # last dims that must be contiguous
    differentiable: bool = True
    optional: bool = False


class BatchedOperator:
    """An operator ``torch.ops.pyro_ssm.NAME(tensors, options, bool keep) -> (y, final, kept)`` and its gradient.

    :meth:`run` takes the kernels where tensors are plain: real float32 or float64, on a CPU or a GPU (halves are
    computed in float32). Their gradient is a kernel too; asked for a graph (``create_graph``), or a batch of
    gradients, it is that of the composite. ``torch.func`` and forward mode meet the composite, ``torch.compile``
    the registered operator.

    Args:
        name: of the operator.
        arguments: its tensors, the first of which has the full batch.
        options: the rest of its schema, ``"bool softplus, int groups"``.
        composite: the map in plain torch, of ``(*tensors, *options)`` with any leading dims.
        sizes: the first fields of the C struct, after the one for the dtype, of ``(*tensors, *options)``.
        shapes: shapes of y, final and kept, of ``(*tensors, *options)``.
        functions: names of the C functions forward and backward. Where a GPU has none of these names
            (:func:`~pyro_ssm.ops.cuda.has_kernels`), the composite does the work there.
        keeps: whether the backward kernel needs what the forward kernel keeps.
        on_cuda: of the options, whether the kernels of a GPU know them; elsewhere the composite does it there.

    >>> from pyro_ssm.ops.batched_operator import BatchedOperator
    >>> BatchedOperator.__name__
    'BatchedOperator'
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[Argument],
        options: str,
        composite: Callable[..., tuple[Tensor, Tensor]],
        sizes: Callable[..., tuple[int, ...]],
        shapes: Callable[..., tuple[tuple[int, ...], ...]],
        functions: tuple[str, str],
        *,
        keeps: bool = False,
        on_cuda: Callable[..., bool] | None = None,
    ) -> None:
        self.name, self.arguments, self.composite = name, tuple(arguments), composite
        self.sizes, self.shapes, self.functions, self.keeps = sizes, shapes, functions, keeps
        self.on_cuda = on_cuda
        self.count = len(self.arguments)
        self.plans: dict[tuple, Plan] = {}
        self.differentiable = [i for i, x in enumerate(self.arguments) if x.differentiable]
        tensors = ", ".join(f"Tensor{'?' if x.optional else ''} {x.name}" for x in self.arguments)
        schema = f"{tensors}, {options}" if options else tensors
        define(
            name,
            f"{schema}, bool keep",
            "(Tensor, Tensor, Tensor)",
            self.forward,
            self._results,
            setup=_setup(self),
            backward=self._derivative,
        )
        define(
            f"{name}_backward",
            f"{schema}, Tensor kept, Tensor? grad_y, Tensor? grad_final, bool[] wanted",
            f"({', '.join(['Tensor'] * len(self.differentiable))})",
            self.backward,
            self._fake_gradients,
        )

        class Scan(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
                y, final, kept = self.forward(*arguments, True)
                _keep(self, ctx, arguments, kept)
                return y, final

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
                return self._derivative(ctx, *grads)

        self.function = Scan

    def run(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """``(y, final)`` of tensors and options; leading dims broadcast, halves are computed in float32."""
        tensors, first = arguments[: self.count], arguments[0]
        dtypes = [x.dtype for x in tensors if x is not None]
        if any(dtype in _HALVES for dtype in dtypes):
            wide = [x.float() if x is not None and x.dtype in _HALVES else x for x in tensors]
            y, final = self.run(*wide, *arguments[self.count :])
            return y.to(first.dtype), final
        way = way_of(*tensors) if self.engine(first, 0, arguments[self.count :]) is not None else Way.TRANSFORM
        if way is Way.TRANSFORM:
            if first.device.type not in ("cpu", "cuda"):
                return self.composite(*arguments)
            with torch.autocast(first.device.type, enabled=False):
                return self.composite(*arguments)
        flat, lead = self._flat(arguments)
        if way is Way.GRADIENT:
            y, final = self.function.apply(*flat)
        elif way is Way.KERNEL:
            y, final, _ = self.forward(*flat, False)
        else:
            y, final, _ = getattr(torch.ops.pyro_ssm, self.name)(*flat, torch.is_grad_enabled())
        if len(lead) == 1:
            return y, final
        return y.reshape(lead + y.shape[1:]), final.reshape(lead + final.shape[1:])

    def recall(self, signature: Sequence[Any]) -> tuple[Tensor, Tensor] | None:
        """``(y, final)`` by a plan that :meth:`remember` made for arguments of these shapes; None where there is none.

        Single steps are short: to check and to arrange their arguments each time anew would cost more than the kernel.
        """
        if torch.compiler.is_compiling():
            return None
        key, tensors = signature_of(signature)
        try:
            plan = self.plans.get(key)
        except TypeError:  # a list, say: what is wrong with it is told by those who check
            return None
        if plan is None or looked_at() or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return None
        functions, _, _, parallel_for = library()
        if functions is None:
            return None
        struct, result, first = type(plan.struct).from_buffer_copy(plan.struct), plan.result, tensors[0]
        try:
            for place, x in zip(plan.places, tensors, strict=True):
                struct[place] = x.data_ptr()
        except RuntimeError:  # inside a transform
            return None
        y = first.new_empty(plan.y) if plan.like_y < 0 else torch.empty_like(tensors[plan.like_y])
        final = first.new_empty(plan.final) if plan.like_final < 0 else torch.empty_like(tensors[plan.like_final])
        struct[result], struct[result + 1] = y.data_ptr(), final.data_ptr()
        struct[result + 2 + self.keeps] = parallel_for
        if getattr(functions, self.functions[0])(ctypes.addressof(struct)):
            raise MemoryError(f"{self.name}: not enough memory")
        return y, final

    def remember(self, signature: Sequence[Any], arguments: Sequence[Any], y: Tensor, final: Tensor) -> None:
        """Keep how a call was arranged, where :meth:`run` took ``arguments`` to the kernel as they stood in memory.

        Args:
            signature: what the user gave; its tensors are those of ``arguments`` in the same order, maybe reshaped.
            arguments: of :meth:`run`.
            y, final: what the user got.
        """
        if torch.compiler.is_compiling() or y.requires_grad:
            return
        given = [x for x in signature if isinstance(x, Tensor)]
        # A view whose numbers have the other sign in memory is of complex numbers: its strides are even.
        if any(x.stride(-1) != 1 for x in given):
            return
        if len(self.plans) > _PLANS:
            self.plans.clear()
        if y.numel() == 0 or way_of(*given) is not Way.KERNEL or library().functions is None or not y.is_cpu:
            return
        if y.dtype in _HALVES or final.dtype != y.dtype:
            return
        flat, _ = self._flat(arguments)
        fields, _ = self._fields(flat)
        pointers = [x.data_ptr() for x in given]
        places, start = [], 1 + len(self.sizes(*flat))
        for x, spec in zip(flat, self.arguments, strict=False):
            if x is not None:
                places.append(start)
            start += 3 if spec.timed else 2
        if [fields[place] for place in places] != pointers:  # something was copied
            return
        rest = 3 + self.keeps + 2 + len(self.differentiable)
        struct = (ctypes.c_int64 * (len(fields) + rest))(*fields)
        likes = [like(out, given) for out in (y, final)]
        self.plans[signature_of(signature)[0]] = Plan(struct, places, len(fields), y.shape, final.shape, *likes)

    def engine(self, first: Tensor, way: int = 0, options: Sequence[Any] = ()) -> Engine | None:
        """What runs the kernels where the first argument is; None where torch does.

        Args:
            first: argument of the operator.
            way: 0 forward, 1 backward.
            options: of the operator.
        """
        engine = engine_of(first, self.functions[way], int(first.dtype == torch.float64))
        if self.on_cuda is not None and isinstance(engine, DeviceEngine) and not self.on_cuda(*options):
            return None
        return engine

    def _flat(self, arguments: Sequence[Any]) -> tuple[list[Any], torch.Size]:
        """The arguments with one leading dim each, and all leading dims."""
        pairs = list(zip(arguments, self.arguments, strict=False))
        first = arguments[0].shape[: -self.arguments[0].event]
        leads = [x.shape[: x.dim() - spec.event] for x, spec in pairs if x is not None]
        simple = len(first) == 1 and all(len(outer) == 0 or outer in (first, (1,)) for outer in leads)
        lead = first if simple else torch.broadcast_shapes(*leads)
        flat = list(arguments)
        for i, (x, spec) in enumerate(pairs):
            if x is None or (x.dim() == spec.event + 1 and len(lead) == 1):
                continue
            outer, inner = x.shape[: x.dim() - spec.event], x.shape[x.dim() - spec.event :]
            alone = outer.numel() == 1
            flat[i] = x.reshape((1,) + inner) if alone else x.expand(lead + inner).reshape((lead.numel(),) + inner)
        if flat[0].shape[0] != lead.numel():
            flat[0] = flat[0].expand((lead.numel(),) + flat[0].shape[1:])
        return flat, lead

    def _fields(self, arguments: Sequence[Any]) -> tuple[list[int], list[Tensor | None]]:
        """The first fields of the C struct, and the tensors whose memory they point to."""
        fields = [int(arguments[0].dtype == torch.float64), *self.sizes(*arguments)]
        tensors = []
        for x, spec in zip(arguments, self.arguments, strict=False):
            if x is None:
                fields += (0, 0, 0) if spec.timed else (0, 0)
                continue
            x = x.resolve_neg()  # the imaginary part of a conjugate is a view whose memory has the other sign
            x = x if x.is_contiguous() else _solid(x, spec.solid)
            stride = x.stride()
            fields += (x.data_ptr(), stride[0] if x.shape[0] > 1 else 0)
            if spec.timed:
                fields.append(stride[1])
            tensors.append(x)
        return fields, tensors

    def _results(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        new, (y, final, kept) = arguments[0].new_empty, self.shapes(*arguments[:-1])
        return new(y), new(final), new(kept if arguments[-1] else (0,))

    def forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        """``(y, final, kept)`` of flat arguments and ``keep``."""
        y, final, kept = out = self._results(*arguments)
        engine = self.engine(y, 0, arguments[self.count : -1])
        if engine is None:
            with torch.no_grad():
                found, state = self.composite(*arguments[:-1])
            y.copy_(found)
            final.copy_(state)
        elif arguments[0].shape[0] * arguments[0].shape[2]:
            fields, alive = self._fields(arguments[:-1])
            fields += (y.data_ptr(), final.data_ptr())
            lent = engine.parallel_for
            fields += (address(kept) if kept.numel() else 0, lent) if self.keeps else (lent,)
            # the gradients of results and arguments, which the forward pass does not read
            engine.run(self.functions[0], fields + [0] * (2 + len(self.differentiable)))
            del alive
        return out

    def backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        """Gradients of the differentiable arguments, in their shapes; what is not wanted comes back empty."""
        *given, kept, grad_y, grad_final, wanted = arguments
        inputs, first = [given[i] for i in self.differentiable], given[0]
        engine = self.engine(first, 1, given[self.count :])
        if engine is None or first.shape[0] * first.shape[2] == 0:
            with torch.no_grad():
                found = self._by_composite(given, wanted, (grad_y, grad_final))
            return tuple(
                first.new_empty(0) if not want else torch.zeros_like(x) if g is None else g.contiguous()
                for g, x, want in zip(found, inputs, wanted, strict=True)
            )
        batch = first.shape[0]
        grads = [
            first.new_empty((batch,) + x.shape[1:] if want else (0,)) for x, want in zip(inputs, wanted, strict=True)
        ]
        outer = [None if g is None else g.resolve_neg().contiguous() for g in (grad_y, grad_final)]
        fields, alive = self._fields(given)
        lent = engine.parallel_for
        fields += (0, 0, address(kept) if kept.numel() else 0, lent) if self.keeps else (0, 0, lent)
        fields += map(address, outer)
        fields += (g.data_ptr() if want else 0 for g, want in zip(grads, wanted, strict=True))
        engine.run(self.functions[1], fields)
        del alive
        return tuple(
            g.sum(0, keepdim=True) if want and x.shape[0] != batch else g
            for g, x, want in zip(grads, inputs, wanted, strict=True)
        )

    def _fake_gradients(self, *arguments: Any) -> tuple[Tensor, ...]:
        wanted, new = arguments[-1], arguments[0].new_empty
        inputs = [arguments[i] for i in self.differentiable]
        return tuple(new(x.shape if want else (0,)) for x, want in zip(inputs, wanted, strict=True))

    def _by_composite(
        self, arguments: Sequence[Any], wanted: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        def composite(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            given = list(arguments)
            for i, x in zip(self.differentiable, tensors, strict=True):
                given[i] = x
            return self.composite(*given)

        return composite_backward(composite, [arguments[i] for i in self.differentiable], wanted, grads)

    def _derivative(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *saved, kept = ctx.saved_tensors
        present = iter(saved)
        arguments = [next(present) if there else None for there in ctx.there] + list(ctx.options)
        wanted = [ctx.needs_input_grad[i] for i in self.differentiable]
        # the tensors of a graph that is being traced are of a class of their own
        compiling = torch.compiler.is_compiling() or any(type(x) not in PLAIN for x in saved)
        if not compiling and (torch.is_grad_enabled() or any(g is not None and transformed(g) for g in grads[:2])):
            found: Sequence[Tensor | None] = self._by_composite(arguments, wanted, grads[:2])
        else:
            call = getattr(torch.ops.pyro_ssm, f"{self.name}_backward") if compiling else self.backward
            found = call(*arguments, kept, *grads[:2], wanted)
        out: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for i, want, grad in zip(self.differentiable, wanted, found, strict=True):
            out[i] = grad if want else None
        return tuple(out)


def _setup(operator: BatchedOperator) -> Callable[..., None]:
    def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _keep(operator, ctx, inputs[:-1], output[2])

    return setup


def _keep(operator: BatchedOperator, ctx: Any, arguments: Sequence[Any], kept: Tensor) -> None:
    tensors = arguments[: operator.count]
    ctx.there = [x is not None for x in tensors]
    ctx.save_for_backward(*(x for x in tensors if x is not None), kept)
    ctx.options = tuple(arguments[operator.count :])
    ctx.set_materialize_grads(False)


def _solid(x: Tensor, last: int) -> Tensor:
    """With its last dims contiguous."""
    shape, stride = x.shape, x.stride()
    expected = 1
    for i in range(1, last + 1):
        if shape[-i] > 1 and stride[-i] != expected:
            return x.contiguous()
        expected *= shape[-i]
    return x
