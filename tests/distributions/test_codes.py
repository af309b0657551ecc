"""Draws of an index, with and without a look at numbers, have the law's frequencies."""

import torch

from pyro_ssm.distributions.codes import index_law
from pyro_ssm.ops.reading import no_reading


def test_frequencies_without_a_look():
    torch.manual_seed(0)
    probs, runs = torch.tensor([[0.1, 0.0, 0.6, 0.3], [0.25, 0.25, 0.25, 0.25]], dtype=torch.float64), 100_000
    law = index_law(probs.log())
    with no_reading():
        found = law.sample(torch.Size([runs]))
    usual = law.sample(torch.Size([runs]))
    assert found.shape == usual.shape == (runs, 2, 1) and found.dtype == usual.dtype
    for drawn in (found, usual):
        counts = torch.stack([(drawn == j).double().mean(0).squeeze(-1) for j in range(4)], -1)
        error = (probs * (1 - probs) / runs).sqrt()
        assert ((counts - probs).abs() <= 4.5 * error).all()
