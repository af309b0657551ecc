"""Guides that read the first frames of a record."""

import torch

from pyro_ssm import infer, models
from pyro_ssm.guides import FirstFrames, PositionVelocity
from tests.models.records import series

D = torch.float64


def test_position_and_velocity_read_their_frames():
    torch.manual_seed(0)
    model = models.ode2vae(2, 2, hidden=3, emission_dim=3)
    guide, data = PositionVelocity(model, 8, num_frames=3), series(dtype=torch.float32)

    def moments(data):
        law = guide.start(data, model.bind(infer.sample_prior(model)))._step(None, slice(0, 1), None)
        return law.base_dist.loc.squeeze(-2), law.base_dist.scale.squeeze(-2)

    def changed(k):
        values, mask = data.values.clone(), torch.ones_like(data.mask)
        values[:, k] += 1.0
        return data.replace(values=values, mask=mask)

    seen = data.replace(values=data.values, mask=torch.ones_like(data.mask))
    for k, which in {0: "both", 2: "velocity", 3: "neither"}.items():
        for before, after in zip(moments(seen), moments(changed(k)), strict=True):
            x, v = (before - after).abs().split(2, -1)
            assert (x.max() > 1e-4) == (which == "both"), k
            assert (v.max() > 1e-4) == (which != "neither"), k


def test_first_frames_see_masks_gaps_and_no_padding():
    torch.manual_seed(0)
    model = models.latent_ode(2, 2, hidden=3).double()
    encoder = FirstFrames(model, 8, num_frames=4).double()
    data = series(lengths=torch.tensor([6, 2, 4]))
    found = encoder(data, None).features
    assert found.shape == (3, 1, 8)
    for i in range(3):  # a batch is a loop; a short series has empty frames
        torch.testing.assert_close(encoder(data.series(i), None).features, found[i])
    other = data.replace(values=torch.where(data.mask, data.values, 1e6), mask=data.mask)
    assert torch.equal(encoder(other, None).features, found)
    assert torch.equal(encoder(data.refine(3), None).features, found)
    later = data.replace(times=torch.cat([data.times[:, :1], data.times[:, 1:] + 0.5], -1))
    assert (encoder(later, None).features - found).abs().max() > 1e-3  # gaps matter
    shifted = data.replace(times=data.times + 9.0)
    torch.testing.assert_close(encoder(shifted, None).features, found)  # the clock does not
