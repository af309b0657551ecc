"""The training recipe: every parameter in one group, and the same options for torch's and Pyro's optimisers."""

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

import pyro_ssm as ssm
from pyro_ssm import blocks, emissions
from pyro_ssm.guides import Structured
from pyro_ssm.infer import fit, parameter_groups


def model_and_guide():
    block = blocks.ResidualStack([blocks.S4D(4, 4), blocks.Mamba(4, 2)], in_features=2)
    model = ssm.StateSpaceModel(
        ssm.dynamics.NormalInitial(2),
        ssm.dynamics.LinearNormal(2),
        emissions.Structured(block, emissions.Normal(4, 1)),
    )
    return model, Structured(model, 4, cell=blocks.S5)


DATA = ssm.TimeSeries(torch.arange(6.0), torch.randn(3, 6, 1))


def test_every_parameter_is_in_one_group():
    model, guide = model_and_guide()
    groups = parameter_groups(model, guide, lr=1e-2, slow=0.1, weight_decay=0.05)
    wanted = [p for m in (model, guide) for p in m.parameters()]
    found = [p for group in groups for p in group["params"]]
    assert len(found) == len(wanted) and {id(p) for p in found} == {id(p) for p in wanted}
    slow, vectors, matrices = groups
    assert (slow["lr"], slow["weight_decay"]) == (pytest.approx(1e-3), 0.0)
    assert (matrices["lr"], matrices["weight_decay"]) == (1e-2, 0.05) and vectors["weight_decay"] == 0.0
    names = {id(p): n for m in (model, guide) for n, p in m.named_parameters()}
    in_slow = {names[id(p)].split(".")[-1] for p in slow["params"]}
    assert in_slow == {"log_step", "log_decay", "frequency", "log_A", "step_bias", "B_real", "B_imag"}
    assert all(p.dim() > 1 for p in matrices["params"]) and all(p.dim() < 2 for p in vectors["params"])


def test_fit_trains_with_the_groups_and_its_own_rate():
    model, guide = model_and_guide()
    seen = []

    def adam(groups, lr):
        seen.extend(groups)
        return torch.optim.AdamW(groups, lr=lr)

    optimizer = parameter_groups(model, guide, lr=1e-3, slow=0.1).optimizer(adam)
    fitted = fit(model, guide, DATA, optimizer=optimizer, lr=2e-2, num_steps=30, progress=False)
    assert fitted.losses[-5:].mean() < fitted.losses[:5].mean()
    assert sorted({group["lr"] for group in seen}) == pytest.approx([2e-3, 2e-2])


def test_pyro_optimisers_find_the_options_by_name():
    model, guide = model_and_guide()
    groups = parameter_groups(model, guide, lr=1e-2, slow=0.1)
    asked = {}

    def options(name):
        asked[name] = groups(name)
        return asked[name]

    svi = SVI(model, guide, pyro.optim.AdamW(options), Trace_ELBO())
    losses = [svi.step(DATA) for _ in range(15)]
    assert sum(losses[-3:]) < sum(losses[:3])
    rates = {name: found["lr"] for name, found in asked.items()}
    assert {name in groups.kind_of_name for name in rates} == {True}
    for name, rate in rates.items():
        is_slow = name.split(".")[-1] in (
            "log_step",
            "log_decay",
            "frequency",
            "log_A",
            "step_bias",
            "B_real",
            "B_imag",
        )
        assert rate == pytest.approx(1e-3 if is_slow else 1e-2), name
    SVI(model, guide, pyro.optim.AdamW(groups), Trace_ELBO()).step(DATA)


def test_what_is_refused():
    with pytest.raises(ValueError, match="`slow` must be"):
        parameter_groups(blocks.S4D(2), slow=0.0)
    with pytest.raises(ValueError, match="nothing to train"):
        parameter_groups(torch.nn.ReLU())
