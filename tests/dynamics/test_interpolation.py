"""Inputs as coefficients: the path of the inputs stays as it is whatever is done to the series."""

import pytest
import torch

from pyro_ssm import TimeSeries
from pyro_ssm.dynamics import InputPath, interpolate_inputs

D = torch.float64


def series(dtype=D, lengths=None):
    torch.manual_seed(0)
    times = torch.rand(2, 5, dtype=D).cumsum(-1) + 30000.0  # days since 1900: float32 has none of their fractions
    return TimeSeries(
        times, torch.zeros(2, 5, 1, dtype=dtype), inputs=torch.randn(2, 5, 3, dtype=dtype), lengths=lengths
    )


@pytest.mark.parametrize("kind", ["held", "rectilinear", "linear", "cubic"])
@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_refinement_and_splits_leave_the_path_alone(kind, dtype):
    data, path = interpolate_inputs(series(dtype), kind), InputPath(kind)
    fine = data.refine(4)
    values = path.at(fine.inputs, fine.times)
    own = torch.repeat_interleave(data.inputs[:, :-1], 4, 1)
    start = torch.repeat_interleave(data.times[:, :-1], 4, 1)
    torch.testing.assert_close(values[:, :-1], path.after(own, (fine.times[:, :-1] - start).to(dtype).unsqueeze(-1)))
    torch.testing.assert_close(path.at(data.inputs, data.times), series(dtype).inputs, atol=1e-6, rtol=0)
    before, after = fine.split(6)
    torch.testing.assert_close(path.at(after.inputs, after.times), values[:, 6:], rtol=0, atol=0)
    torch.testing.assert_close(path.at(before.inputs, before.times), values[:, :6], rtol=0, atol=0)
    if kind == "linear":  # halfway between neighbours
        torch.testing.assert_close(values[:, 2:-1:4], (values[:, :-1:4] + values[:, 4::4]) / 2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "cubic"])
def test_padding_does_not_reach_the_last_real_value(kind):
    lengths = torch.tensor([3, 5])
    data = series(lengths=lengths)
    rows = interpolate_inputs(data, kind).inputs
    alone = interpolate_inputs(
        TimeSeries(data.times[0, :3], data.values[0, :3], inputs=data.inputs[0, :3]), kind
    ).inputs
    torch.testing.assert_close(rows[0, :3], alone)


def test_what_does_not_fit_is_refused():
    data = series()
    with pytest.raises(ValueError, match="has no inputs to interpolate"):
        interpolate_inputs(TimeSeries([0.0, 1.0], torch.zeros(2, 1)))
    with pytest.raises(ValueError, match="interpolate first, refine afterwards"):
        interpolate_inputs(data.refine(2))
    with pytest.raises(ValueError, match="`kind` must be one of"):
        InputPath("spline")
    with pytest.raises(ValueError, match=r"Prepare the data: dynamics.interpolate_inputs\(data, 'cubic'\)"):
        InputPath("cubic").at(data.inputs, data.times)
