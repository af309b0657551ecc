"""What the tests of captured runs share: cases, noise, and the way of a model and its data to a device."""

import torch
from torch.utils import _pytree as pytree

from pyro_ssm.data import TimeSeries
from pyro_ssm.guides import Structured
from pyro_ssm.infer import (
    FeynmanKac,
    auxiliary,
    bootstrap,
    guided,
    locally_optimal,
)
from pyro_ssm.infer.smc import (
    DiffusionResampling,
    PseudoRandom,
    SoftResampling,
    TransportResampling,
)
from pyro_ssm.infer.smc.resample import resampling_of
from tests.contracts.toys import remembering, series, toy
from tests.infer.smc.pretend_cuda import OnDevice, PretendCuda
from tests.infer.smc.programs import D

N = 24
F = torch.float32


class Plain:
    """No graph: what was taken down is called again."""

    def rehearse(self, function):
        function()

    def record(self, function):
        return function

    def finish(self):
        pass


def ragged(own=False, dtype=D):
    data = series(9, (3,), own=own, missing=True, dtype=dtype)
    values = data.values.clone()
    values[:, 4] = float("nan")  # nobody sees anything
    return TimeSeries(data.times, torch.where(data.mask, values, torch.nan), lengths=[8, 5, 2])


def refined(batch=()):
    return series(4, batch, missing=True).refine(3)


def fixed(data, resampling, dim=2, dtype=D):
    generator, rows = torch.Generator().manual_seed(0), resampling_of(resampling).rows(N)
    shape = (data.num_times, N, *data.batch_shape, dim)
    normals = torch.randn(shape, dtype=D, generator=generator).to(dtype)
    return normals, torch.rand((data.num_times, rows, *data.batch_shape), dtype=D, generator=generator)


def past_guided(model, data):
    torch.manual_seed(0)
    guide = Structured(model, hidden_dim=4, direction="past").to(D)
    if isinstance(data.values, OnDevice):
        PretendCuda.move(guide)
    else:
        guide.to(data.values.device)
    return guided(model, guide, data)


#: model, data, process, options
CASES = {
    "ragged": (toy, ragged, bootstrap, {}),
    "own times, always": (toy, lambda: ragged(True), bootstrap, {"ess_threshold": 1.0}),
    "one series, never": (toy, lambda: series(6), bootstrap, {"ess_threshold": 0.0}),
    "float32": (lambda: toy(dtype=F), lambda: ragged(dtype=F), bootstrap, {"dtype": F}),
    "memory": (remembering, ragged, bootstrap, {}),
    "memory, never": (remembering, lambda: series(5, (2,)), bootstrap, {"ess_threshold": 0.0}),
    "refined": (toy, refined, bootstrap, {}),
    "memory, refined": (remembering, lambda: refined((2,)), bootstrap, {}),
    "locally optimal": (toy, ragged, locally_optimal, {}),
    "locally optimal, refined": (toy, refined, locally_optimal, {}),
    "auxiliary": (toy, ragged, auxiliary, {}),
    "auxiliary, memory, refined": (remembering, refined, auxiliary, {}),
    "guided": (toy, ragged, past_guided, {}),
    "guided, memory, refined": (remembering, lambda: refined((2,)), past_guided, {}),
    "soft": (toy, lambda: series(6, (2,)), bootstrap, {"resampling": SoftResampling(0.5)}),
    "diffusion": (toy, lambda: series(6, (2,)), bootstrap, {"resampling": DiffusionResampling(), "rows": 64}),
    "transport": (toy, lambda: series(6, (2,)), bootstrap, {"resampling": TransportResampling(num_iterations=12)}),
    "two steps": (toy, lambda: series(2, (2,)), bootstrap, {}),
    "one step": (toy, lambda: series(1), bootstrap, {}),
}
for scheme in ("stratified", "multinomial", "residual", "ssp", "killing", "hilbert-systematic"):
    CASES[scheme] = (toy, lambda: series(6, (2,)), bootstrap, {"resampling": scheme})


def case(name):
    make, records, build, options = CASES[name]
    options = {"resampling": "systematic", "ess_threshold": 0.7, "dtype": D} | options
    torch.manual_seed(0)
    return make, records(), build, options.pop("dtype"), {k: x for k, x in options.items() if k != "rows"}


def assert_equal(found, wanted, dtype=D):
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if dtype == D else {"rtol": 2e-4, "atol": 2e-4}
    assert torch.equal(found.resampled, wanted.resampled)
    assert torch.equal(found.log_likelihood == 0, wanted.log_likelihood == 0)
    assert found.cloud.k == wanted.cloud.k
    pairs = (found.log_likelihood, found.ess, found.cloud), (wanted.log_likelihood, wanted.ess, wanted.cloud)
    for one, other in zip(*map(pytree.tree_leaves, pairs), strict=True):
        if isinstance(other, torch.Tensor):
            torch.testing.assert_close(one, other, **tolerance)


def there(tree):
    return pytree.tree_map_only(torch.Tensor, OnDevice, tree)


def here(tree):
    return pytree.tree_map_only(OnDevice, lambda x: x.inner, tree)


def moved(data):
    """The record on the device, without a look at it."""
    found = object.__new__(TimeSeries)
    found.__dict__.update(there(dict(vars(data))))
    return found


class HandNoise(PseudoRandom):
    def draw(self, k, law, shape):
        return torch.randn(shape, device=law.mean.device)


def by_hand(y, look=lambda k: k):
    """A random walk, of series ``y`` ``(time, *batch)``, without a model."""
    return FeynmanKac(
        lambda draw, shape: draw(torch.distributions.Normal(y.new_zeros(1), 1.0), shape + (1,)),
        lambda k, x, draw: x + 0.5 * torch.randn_like(x),
        lambda k, previous, x: -0.5 * (y[look(k)] - x[..., 0]).square(),
        len(y),
        y.shape[1:],
    )
