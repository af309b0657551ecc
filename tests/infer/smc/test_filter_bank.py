"""Particle filters of many parameters at once are those of each, and one that fails fails alone."""

import math

import torch

from pyro_ssm.infer import bootstrap, particle_filter
from pyro_ssm.infer.smc import AncestorResampling, FixedNoise
from pyro_ssm.infer.smc.filter_bank import FilterBank
from tests.infer.smc.known_posterior import D, make_data, make_model

T, N, B = 9, 25, 2


def setting(members, keep_paths=True, resampling="systematic"):
    """A bank of members at rates exp(vectors), and the noise it uses."""
    model, data = make_model(one=True), make_data(T, (B,))
    generator = torch.Generator().manual_seed(4)
    normals = torch.randn(T, N, members, B, 1, dtype=D, generator=generator)
    uniforms = torch.rand(T, 1, members, B, dtype=D, generator=generator)

    def process(vectors):
        return bootstrap(model.bind({"transition.rate": vectors.exp()}), data)

    def bank(vectors):
        noise = FixedNoise(normals, uniforms)
        return FilterBank(
            process, vectors, torch.zeros(members), N, AncestorResampling(resampling), 0.6, noise, keep_paths
        )

    return model, data, bank, normals, uniforms


def test_bank_is_the_loop_with_the_same_noise():
    model, data, bank, normals, uniforms = setting(3)
    vectors = torch.tensor([[-1.0], [0.0], [1.0]], dtype=D)
    found = bank(vectors).run()
    for s in range(3):
        fk = bootstrap(model.bind({"transition.rate": vectors[s].exp()}), data)
        noise = FixedNoise(normals[:, :, s], uniforms[:, :, s])
        alone = particle_filter(fk, N, ess_threshold=0.6, noise=noise).total.sum()
        assert torch.allclose(found.log_likelihood[s], alone, atol=1e-10)


def test_a_failure_stays_alone():
    _, _, bank, _, _ = setting(3)
    good = torch.tensor([[-1.0], [0.0], [1.0]], dtype=D)
    bad = good.clone()
    bad[1] = math.nan
    with_failure, without = bank(bad).run().log_likelihood, bank(good).run().log_likelihood
    assert with_failure[1] == -math.inf
    assert torch.equal(with_failure[[0, 2]], without[[0, 2]])


def test_taking_members_in_the_middle_changes_nothing():
    """Choose at step 4, put back, go on: what was known, and what comes, is as if nothing had been."""
    _, _, bank, _, _ = setting(3)
    vectors = torch.tensor([[-1.0], [0.0], [1.0]], dtype=D)
    whole, part = bank(vectors).run(), bank(vectors).run(4)
    turned = part.take(torch.tensor([2, 0, 1]))
    assert torch.equal(turned.vectors[:, 0], vectors[[2, 0, 1], 0])
    assert torch.equal(turned.log_likelihood, part.log_likelihood[[2, 0, 1]])
    back = turned.take(torch.tensor([1, 2, 0]))
    back.run()
    assert torch.allclose(back.log_likelihood, whole.log_likelihood, atol=1e-12)
    torch.manual_seed(0)
    path = whole.paths()
    torch.manual_seed(0)
    assert torch.allclose(back.paths(), path)


def test_where_chooses_whole_members():
    _, _, bank, _, _ = setting(3)
    ones, others = torch.zeros(3, 1, dtype=D), torch.ones(3, 1, dtype=D)
    a, b = bank(ones).run(5), bank(others).run(5)
    mixed = a.where(torch.tensor([False, True, False]), b)
    assert mixed.k == 5
    for s, source in enumerate((a, b, a)):
        for part, whole in zip(
            mixed.take(torch.tensor([s])).parts(), source.take(torch.tensor([s])).parts(), strict=True
        ):
            assert torch.equal(part, whole)


def test_paths_pass_through_the_clouds_and_follow_the_weights():
    _, _, bank, _, _ = setting(2)
    one = bank(torch.zeros(2, 1, dtype=D)).run()
    drawn = torch.stack([one.paths() for _ in range(400)])  # (draws, S, B, T, 1)
    clouds = torch.stack(one._states)  # (T, N, S, B, 1)
    for k in range(T):
        found = (drawn[:, None, :, :, k] == clouds[k][None]).any(1)
        assert bool(found.all())
    weights = one._last.cloud.weights  # of the last step
    exact = (weights.unsqueeze(-1) * clouds[-1]).sum(0)
    spread = ((weights.unsqueeze(-1) * (clouds[-1] - exact) ** 2).sum(0) / 400).sqrt()
    assert bool(((drawn[:, :, :, -1].mean(0) - exact).abs() < 4.5 * spread).all())
