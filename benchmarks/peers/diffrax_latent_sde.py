"""The latent stochastic differential equation of `torchsde_latent_sde.py` in diffrax: compiled, float32.

The state is augmented by the running path KL, as in torchsde's `logqp=True`, and the four diffusion networks are
stacked. `UnsafeBrownianPath` is no choice: diffrax refuses to differentiate in reverse through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax
from jax.scipy.stats import norm
from peers.torchsde_latent_sde import LatentSDE
from torch import Tensor, nn

Array = jax.Array
Layers = list[tuple[Array, Array]]


def lean_softplus(x: Array) -> Array:
    """The values of `jax.nn.softplus` without its care for infinite arguments: a sixth of the whole step less."""
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


@dataclass(frozen=True)
class Use:
    """A way to use diffrax.

    Attributes:
        noise: a ``"tree"`` (`VirtualBrownianTree`), increments ``"drawn"`` all at once, or ``"stored"`` ones.
        checkpoints: of `RecursiveCheckpointAdjoint`; None is its default.
        two_terms: drift and diffusion are terms of their own, as in its documentation, and both evaluate the diffusion.
        manual: `Euler.step` in a `jax.lax.scan`, each step under `jax.checkpoint`, in place of `diffeqsolve`.
        softplus: of the networks.
    """

    noise: str = "tree"
    checkpoints: int | None = None
    two_terms: bool = False
    manual: bool = False
    softplus: Callable[[Array], Array] = lean_softplus


class Networks(eqx.Module):
    """The parameters of a :class:`LatentSDE`, or their gradients."""

    f: Layers
    h: Layers
    g: list[Array]
    first: Layers
    emit: Layers
    softplus: Callable[[Array], Array] = eqx.field(static=True)

    @classmethod
    def of(cls, peer: LatentSDE, softplus: Callable, read: Callable[[Tensor], Tensor] = Tensor.detach) -> Networks:
        """What ``read`` finds for each parameter."""

        def layers(net: nn.Module) -> Layers:
            linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
            return [tuple(jnp.array(read(p).numpy()) for p in (m.weight, m.bias)) for m in linear]

        g = [(w[:, 0], b, v[0], c[0]) for (w, b), (v, c) in map(layers, peer.g_nets)]
        stacked = [jnp.stack(part) for part in zip(*g, strict=True)]
        return cls(layers(peer.f_net), layers(peer.h_net), stacked, layers(peer.first), layers(peer.emit), softplus)

    def apply(self, layers: Layers, x: Array) -> Array:
        for weight, bias in layers[:-1]:
            x = self.softplus(x @ weight.T + bias)
        weight, bias = layers[-1]
        return x @ weight.T + bias

    def diffusion(self, z: Array) -> Array:
        slope, shift, weight, bias = self.g
        return jax.nn.sigmoid((self.softplus(z[..., None] * slope + shift) * weight).sum(-1) + bias)

    def parts(self, z: Array, context: Array) -> tuple[Array, Array, Array]:
        """Drift, diffusion and the rate of the path KL."""
        f, h, g = self.apply(self.f, jnp.concatenate([z, context], -1)), self.apply(self.h, z), self.diffusion(z)
        return f, g, 0.5 * (((f - h) / g) ** 2).sum(-1)


def context_after(t: Array, context: Array) -> Array:
    """The context of the end of the step that begins at ``t``."""
    return context[jnp.round(t * (len(context) - 1)).astype(jnp.int32) + 1]


class StoredPath(diffrax.AbstractBrownianPath):
    """Increments that were drawn before, one a step on the unit interval: a pair, of the state's noise and of KL's."""

    increments: tuple[Array, Array]
    levy_area: type = diffrax.BrownianIncrement
    t0 = property(lambda self: 0.0)
    t1 = property(lambda self: 1.0)

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        k = jnp.round(t0 * len(self.increments[0])).astype(jnp.int32)
        return self.increments[0][k], self.increments[1][k]


class OneTerm(diffrax.AbstractTerm):
    """Drift and noise together, so that a step evaluates each network once."""

    path: diffrax.AbstractBrownianPath

    def vf(self, t, y, args):
        networks, context = args
        return networks.parts(y[0], context_after(t, context))

    def contr(self, t0, t1, **kwargs):
        return t1 - t0, self.path.evaluate(t0, t1)[0]

    def prod(self, vf, control):
        (f, g, rate), (dt, dW) = vf, control
        return f * dt + g * dW, rate * dt


def two_terms(path: diffrax.AbstractBrownianPath) -> diffrax.MultiTerm:
    def drift(t, y, args):
        f, _, rate = args[0].parts(y[0], context_after(t, args[1]))
        return f, rate

    def diffusion(t, y, args):
        return lineax.DiagonalLinearOperator((args[0].diffusion(y[0]), jnp.zeros_like(y[1])))

    return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))


def brownian(use: Use, source: Array, steps: int, shape: tuple[int, int]) -> diffrax.AbstractBrownianPath:
    """The path of the noise; ``source`` is a key, or standard normal ``(steps, *shape)``."""
    if use.noise == "tree":
        both = tuple(jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, shape[:1]))
        return diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.5 / steps, shape=both, key=source)
    normal = source if use.noise == "stored" else jax.random.normal(source, (steps, *shape))
    return StoredPath((normal * steps**-0.5, jnp.zeros((steps, shape[0]))))


def standard_noise(use: Use, source: Array, steps: int, shape: tuple[int, int]) -> Array:
    """The increments that a solve sees, divided by the root of the step."""
    path, ts = brownian(use, source, steps, shape), jnp.linspace(0, 1, steps + 1)
    return jax.lax.map(lambda ends: path.evaluate(*ends)[0], (ts[:-1], ts[1:])) * steps**0.5


def solve(use: Use, networks: Networks, context: Array, z0: Array, source: Array) -> tuple[Array, Array]:
    """The path ``(time, batch, state)`` and its KL."""
    steps, y0, solver = len(context) - 1, (z0, jnp.zeros(len(z0))), diffrax.Euler()
    path, ts = brownian(use, source, steps, z0.shape), jnp.linspace(0, 1, steps + 1)
    terms = two_terms(path) if use.two_terms else OneTerm(path)
    if not use.manual:
        adjoint = diffrax.RecursiveCheckpointAdjoint(use.checkpoints)
        save, control = diffrax.SaveAt(ts=ts), diffrax.StepTo(ts=ts)
        room = {} if use.checkpoints is None else {"max_steps": use.checkpoints}
        given = {"args": (networks, context), "saveat": save, "stepsize_controller": control, "adjoint": adjoint}
        z, kl = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, None, y0, **given, **room).ys
        return z, kl[-1]

    @jax.checkpoint
    def step(y, ends):
        y = solver.step(terms, *ends, y, (networks, context), None, made_jump=False)[0]
        return y, y[0]

    (_, kl), later = jax.lax.scan(step, y0, (ts[:-1], ts[1:]))
    return jnp.concatenate([z0[None], later]), kl


def gradient(
    use: Use, peer: LatentSDE, context: Tensor, values: Tensor, start: Tensor, source: Array
) -> Callable[[], tuple[Array, tuple[Networks, Array]]]:
    """The negative bound of all series, its gradients with respect to all parameters and the context, when called.

    ``context`` and ``values`` are time-major, ``start`` is the standard normal noise of the first state, ``source`` as
    in :func:`brownian`.
    """
    values, start = jnp.array(values.numpy()), jnp.array(start.numpy())

    def loss(networks: Networks, context: Array) -> Array:
        loc, raw = jnp.split(networks.apply(networks.first, context[0]), 2, -1)
        scale = jax.nn.softplus(raw) + 1e-4
        z, kl = solve(use, networks, context, loc + scale * start, source)
        seen = norm.logpdf(values, networks.apply(networks.emit, z), peer.obs_scale).sum()
        first = (0.5 * (scale**2 + loc**2 - 1) - jnp.log(scale)).sum()  # from the standard normal prior
        return first + kl.sum() - seen

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1)))
    arguments = Networks.of(peer, use.softplus), jnp.array(context.detach().numpy())
    return lambda: jax.block_until_ready(compiled(*arguments))


def largest_difference(found: Any, expected: Any) -> float:
    """The largest distance of two arrays in two trees, relative to the norm of the second."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())) for a, b in pairs)
