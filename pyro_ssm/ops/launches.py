"""Kernels compiled at run time: which there are, and how they are launched.

What the functions at the end of the files of ``csrc/cuda`` do, for machines where no compiler of the CPU's side was:
the same grids, blocks, structs and pieces of memory, number by number (``tests/ops/test_nvrtc.py`` compares them).
A struct of the C interface is a list of integers here, its first fields and its last ones those that matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

__all__ = ["Launch", "Memory", "Offset", "Program", "launches", "programs"]

_KINDS = ("RealKind", "RealKind", "ComplexKind", "ComplexKind", "PairKind", "PairKind")
_STATE = {"RealKind": 1, "ComplexKind": 2, "PairKind": 2}
_MATRIX = {"RealKind": 1, "ComplexKind": 2, "PairKind": 4}
_SIZES = {"float": 4, "double": 8}
_MOST_CHUNKS = 512
_BOOLS = ("false", "true")


class Program(NamedTuple):
    """What is compiled at once.

    >>> from pyro_ssm.ops.launches import Program
    >>> Program("causal_conv1d", ("outputs<float>",)).source
    'causal_conv1d'
    """

    source: str  # of csrc/cuda
    kernels: tuple[str, ...]


class Offset(int):
    """The address of a piece of the workspace, from where that begins.

    >>> from pyro_ssm.ops.launches import Offset
    >>> Offset(256) + 1000
    1256
    """


class Memory:
    """Hands out pieces of the workspace, whose address is not yet known.

    >>> from pyro_ssm.ops.launches import Memory
    >>> memory = Memory()
    >>> memory.take(3, 4), memory.take(1, 8), memory.used
    (0, 256, 512)
    """

    def __init__(self) -> None:
        self.used = 0

    def take(self, count: int, size: int) -> Offset:
        """A piece for ``count`` numbers of ``size`` bytes."""
        piece = Offset(self.used)
        self.used += -(-count * size // 256) * 256
        return piece


class Launch(NamedTuple):
    """One kernel and its arguments.

    >>> from pyro_ssm.ops.launches import Launch
    >>> Launch("outputs<float>", 1, 1, 128, [0]).rows
    1
    """

    kernel: str
    blocks: int
    rows: int
    threads: int
    task: Sequence[int]


def programs(function: str, code: int) -> list[Program]:
    """What a function needs.

    Args:
        function: ``"linear_scan_forward"``, ... A gradient is of use after its forward pass only, and needs both.
        code: the first field of its struct, which says of what numbers the others are.

    >>> from pyro_ssm.ops.launches import programs
    >>> [program.source for program in programs("selective_backward", 0)]
    ['selective_scan', 'selective_gradient']
    """
    name, _, way = function.rpartition("_")
    T = _real(name, code)
    sums = f"add_parts<{T}, {T}>"
    if name == "linear_scan":
        of = f"{_KINDS[code]}, {T}"
        both = [
            f"{kernel}<{of}>" for kernel in ("ends_forward", "states_forward", "ends_backward", "gradients_backward")
        ]
        return [Program("linear_scan", (*both, *(f"starts<{of}, {back}>" for back in _BOOLS), sums))]
    if name == "convolve":
        kernels = [f"{kernel}<{T}>" for kernel in ("outputs", "of_inputs", "of_weights")]
        return [Program("causal_conv1d", (*kernels, f"add_parts<double, {T}>"))]
    if name == "diag_lti":
        kernels = [f"bank_{kernel}<{T}>" for kernel in ("ends", "adjoint_ends", "states", "gradients")]
        kernels += [f"bank_starts<{T}, {back}>" for back in _BOOLS]
        return [Program("diag_lti", (*kernels, f"add_parts<double, {T}>"))]
    found = [f"selective_states<{T}, {shared}, {ends}>" for shared in _BOOLS for ends in _BOOLS]
    needed = [Program("selective_scan", (*found, f"selective_starts<{T}, false>"))]
    if way == "backward":
        found = [f"{kernel}<{T}, {shared}>" for kernel in ("adjoint_ends", "selective_gradients") for shared in _BOOLS]
        more = (f"selective_starts<{T}, true>", sums, f"to_heads<{T}>", f"steps_to_heads<{T}>")
        needed.append(Program("selective_gradient", (*found, *more)))
    return needed


def launches(function: str, fields: Sequence[int], multiprocessors: int, memory: Memory) -> list[Launch]:
    """What a function launches, in order.

    Args:
        function: ``"linear_scan_forward"``, ...
        fields: of its struct.
        multiprocessors: of the device.
        memory: for intermediate results.

    >>> from pyro_ssm.ops.launches import Memory, launches
    >>> convolution = [0, 2, 10, 3, 4, *[0] * 22]  # float32, 2 series, 10 steps, 3 channels, 4 taps
    >>> [launch[:4] for launch in launches("convolve_forward", convolution, 132, Memory())]
    [('outputs<float>', 22, 1, 128)]
    """
    name, _, way = function.rpartition("_")
    plan = _PLANS[name]
    return list(plan(_real(name, fields[0]), list(fields), way == "backward", multiprocessors, memory))


def _real(name: str, code: int) -> str:
    return ("float", "double")[code % 2 if name == "linear_scan" else code]


def _ceil(x: int, y: int) -> int:
    return -(-x // y)


def _chunks(steps: int, threads: int, wanted: int, least: int) -> tuple[int, int]:
    """How many chunks of time, and how many steps each: one if others fill the device already."""
    count = wanted // threads if threads > 0 else 1
    count = max(1, min(1 if count < 4 else count, _ceil(steps, least), _MOST_CHUNKS))
    length = _ceil(steps, count) if steps > 0 else 1
    return (_ceil(steps, length) if steps > 0 else 1), length


def _sum(From: str, To: str, source: int, to: int, parts: int, size: int) -> Launch:
    return Launch(f"add_parts<{From}, {To}>", _ceil(size, 128), 1, 128, [source, to, parts, size])


def _convolve(T: str, fields: list[int], back: bool, multiprocessors: int, memory: Memory) -> Iterator[Launch]:
    _, batch, times, channels, taps = fields[:5]
    grad_x, grad_weight, grad_bias, grad_initial = fields[-4:]
    tiles, chunks = _ceil(channels, 128), _ceil(times, 256) if times > 0 else 1
    blocks, size = batch * tiles, batch * channels
    weight = memory.take(chunks * size * taps, 8) if back else 0
    bias = memory.take(chunks * size, 8) if back else 0
    task = [*fields, tiles, chunks, weight, bias]
    if not back:
        yield Launch(f"outputs<{T}>", blocks * (times + 1), 1, 128, task)
        return
    if grad_x or grad_initial:
        yield Launch(f"of_inputs<{T}>", blocks * (times + 1), 1, 128, task)
    if grad_weight or grad_bias:
        yield Launch(f"of_weights<{T}>", blocks * (taps + 1), chunks, 128, task)
    if grad_weight:
        yield _sum("double", T, weight, grad_weight, chunks, size * taps)
    if grad_bias:
        yield _sum("double", T, bias, grad_bias, chunks, size)


def _diag_lti(T: str, fields: list[int], back: bool, multiprocessors: int, memory: Memory) -> Iterator[Launch]:
    _, batch, times, channels, n = fields[:5]
    grad_a, grad_b, grad_C = fields[-4:-1]
    row_blocks, tiles = _ceil(channels, 8), _ceil(times, 64)
    blocks, states = batch * row_blocks, batch * channels * n
    chunks, length = _chunks(tiles, blocks * 128, multiprocessors * 1024, 1)
    state = memory.take(chunks * states * 2, _SIZES[T]) if chunks > 1 else 0
    cut = memory.take(chunks * batch, 1) if chunks > 1 else 0
    shares = [memory.take(chunks * states * 2, 8) if back else 0 for _ in range(3)]
    task = [*fields, row_blocks, tiles, chunks, length, state, cut, *shares]
    if chunks > 1:
        yield Launch(f"bank_{'adjoint_' if back else ''}ends<{T}>", blocks, chunks - 1, 128, task)
        yield Launch(f"bank_starts<{T}, {_BOOLS[back]}>", _ceil(states, 128), 1, 128, task)
    yield Launch(f"bank_{'gradients' if back else 'states'}<{T}>", blocks, chunks, 128, task)
    for share, to in zip(shares, (grad_a, grad_b, grad_C), strict=True):
        if back and to:
            yield _sum("double", T, share, to, chunks, states * 2)


def _linear_scan(T: str, fields: list[int], back: bool, multiprocessors: int, memory: Memory) -> Iterator[Launch]:
    code, steps, lanes = fields[:3]
    grad_a, grad_a_steps = fields[-4:-2]
    kind = _KINDS[code]
    of, total = f"{kind}, {T}", lanes
    for size in fields[6:12]:
        total *= size
    chunks, length = _chunks(steps, total, multiprocessors * 2048, 32)
    state, matrix = (count[kind] * chunks * total for count in (_STATE, _MATRIX))
    ends = products = cut = sums = 0
    if chunks > 1:
        ends, products = memory.take(state, _SIZES[T]), memory.take(matrix, _SIZES[T])
        cut = memory.take(chunks * total, 1)
    summed = back and grad_a and grad_a_steps == 1
    if summed:
        sums = memory.take(matrix, _SIZES[T])
    task = [*fields, total, chunks, length, ends, products, sums, cut]
    blocks = _ceil(total, 128)
    first, last = ("ends_backward", "gradients_backward") if back else ("ends_forward", "states_forward")
    if chunks > 1:
        yield Launch(f"{first}<{of}>", blocks, chunks - 1, 128, task)
        yield Launch(f"starts<{of}, {_BOOLS[back]}>", blocks, 1, 128, task)
    yield Launch(f"{last}<{of}>", blocks, chunks, 128, task)
    if summed:
        yield _sum(T, T, sums, grad_a, chunks, total * _MATRIX[kind])


def _selective(T: str, fields: list[int], back: bool, multiprocessors: int, memory: Memory) -> Iterator[Launch]:
    _, batch, times, channels, heads, groups, n, decays = fields[:8]
    grad_u, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_gap, grad_initial = fields[-10:]
    shared, warps, size = decays == 1 and n > 1, 2 if back else 4, _SIZES[T]
    of_group, share = channels // groups, channels // heads
    width = 32 // (16 // (16 // size))  # channels a warp: a thread has 16 bytes of states, a channel 16 states at once
    blocks, tiles = _ceil(of_group, warps * width), _ceil(times, 16)
    chunks, length = _chunks(tiles, batch * groups * blocks * warps * 32, multiprocessors * 1024, 2)
    state = memory.take(chunks * batch * n * channels, size)
    passed, cut = memory.take(chunks * batch * channels, size), memory.take(chunks * batch, 1)
    task = [*fields, of_group, share, blocks, tiles, chunks, length, state, passed, cut]
    of, grid = f"{T}, {_BOOLS[shared]}", blocks * groups * batch
    starts = _ceil(batch * n * channels, 128)
    if not back:
        task += [0] * 7
        yield Launch(f"selective_states<{of}, true>", grid, chunks - 1, warps * 32, task)
        yield Launch(f"selective_starts<{T}, false>", starts, 1, 128, task)
        yield Launch(f"selective_states<{of}, false>", grid, chunks, warps * 32, task)
        return
    rows, per_channel, gaps = batch * times, chunks * batch * channels, blocks * groups
    sums, rates = rows * groups * n, 1 if shared else n
    B = memory.take(blocks * sums, size) if grad_B and blocks > 1 else grad_B
    C = memory.take(blocks * sums, size) if grad_C and blocks > 1 else grad_C
    gap = memory.take(gaps * rows, size) if grad_gap and gaps > 1 else grad_gap
    step = memory.take(rows * channels, size) if grad_dt and share > 1 else grad_dt
    A = memory.take(per_channel * rates, 8)
    D, bias = memory.take(per_channel, 8), memory.take(per_channel, 8)
    task += [B, C, gap, step, A, D, bias]
    yield Launch(f"adjoint_ends<{of}>", grid, chunks - 1, warps * 32, task)
    yield Launch(f"selective_starts<{T}, true>", starts, 1, 128, task)
    yield Launch(f"selective_gradients<{of}>", grid, chunks, warps * 32, task)
    if grad_B and blocks > 1:
        yield _sum(T, T, B, grad_B, blocks, sums)
    if grad_C and blocks > 1:
        yield _sum(T, T, C, grad_C, blocks, sums)
    if grad_gap and gaps > 1:
        yield _sum(T, T, gap, grad_gap, gaps, rows)
    if grad_dt and share > 1:
        yield Launch(f"steps_to_heads<{T}>", _ceil(rows * heads, 128), 1, 128, [step, grad_dt, rows * heads, share])
    for source, to, of_head in ((A, grad_A, rates), (D, grad_D, 1), (bias, grad_bias, 1)):
        if to:
            grid = batch * heads * of_head
            yield Launch(f"to_heads<{T}>", grid, 1, 128, [source, to, chunks, batch, heads, share, of_head])


_PLANS: dict[str, Callable[[str, list[int], bool, int, Memory], Iterator[Launch]]] = {
    "convolve": _convolve,
    "diag_lti": _diag_lti,
    "linear_scan": _linear_scan,
    "selective": _selective,
}
