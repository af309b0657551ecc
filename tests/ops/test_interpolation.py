"""Interpolation: through the values, smooth where it should be, causal where it says so."""

import pytest
import torch
from scipy.interpolate import CubicHermiteSpline
from torch.autograd import gradcheck

from pyro_ssm.ops import (
    fill_forward,
    fill_linear,
    interpolate,
    interpolation_coefficients,
    interpolation_slope,
    rectilinear_path,
)

D = torch.float64
KINDS = ("held", "rectilinear", "linear", "cubic")


def grid(*batch, num=7, features=2):
    torch.manual_seed(0)
    return torch.rand(*batch, num, dtype=D).cumsum(-1) + 5.0, torch.randn(*batch, num, features, dtype=D)


@pytest.mark.parametrize("kind", KINDS)
def test_it_passes_through_the_values(kind):
    times, values = grid(3)
    c = interpolation_coefficients(times, values, kind)
    torch.testing.assert_close(interpolate(c, torch.zeros(1, 1, dtype=D), 2), values)
    torch.testing.assert_close(c[..., :2], values)
    if kind in ("linear", "cubic"):  # and reaches the next one from the left
        gap = times.diff(dim=-1).unsqueeze(-1)
        torch.testing.assert_close(interpolate(c[..., :-1, :], gap, 2), values[..., 1:, :])
        torch.testing.assert_close(interpolate(c[..., -1:, :], torch.ones(1, 1, dtype=D), 2), values[..., -1:, :])


def test_the_cubic_is_hermites_with_backward_differences():
    times, values = grid()
    c = interpolation_coefficients(times, values, "cubic")
    v = values.diff(dim=-2) / times.diff().unsqueeze(-1)
    slopes = torch.cat([v[:1], v], 0)
    spline = CubicHermiteSpline(times.numpy(), values.numpy(), slopes.numpy())
    part = 0.3 * times.diff()
    at = times[:-1] + part
    found = interpolate(c[:-1], part.unsqueeze(-1), 2)
    torch.testing.assert_close(found, torch.from_numpy(spline(at.numpy())))
    found = interpolation_slope(c[:-1], part.unsqueeze(-1), 2)
    torch.testing.assert_close(found, torch.from_numpy(spline(at.numpy(), 1)))
    gap = times.diff().unsqueeze(-1)  # the slope is continuous
    torch.testing.assert_close(
        interpolation_slope(c[:-2], gap[:-1], 2), interpolation_slope(c[1:-1], torch.zeros(1, 1, dtype=D), 2)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_values_after_the_next_one_change_nothing_before(kind):
    times, values = grid()
    whole, cut = (
        interpolation_coefficients(times, values, kind),
        interpolation_coefficients(times[:5], values[:5], kind),
    )
    torch.testing.assert_close(whole[:4], cut[:4], rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_a_loop_and_gradients_are_right(kind):
    times, values = grid(3, num=4)
    c = interpolation_coefficients(times, values, kind)
    for i in range(3):
        torch.testing.assert_close(c[i], interpolation_coefficients(times[i], values[i], kind))
    shared = interpolation_coefficients(times[0], values, kind)
    torch.testing.assert_close(shared[1], interpolation_coefficients(times[0], values[1], kind))
    one = interpolation_coefficients(times[0, :1], values[0, :1], kind)
    assert one.shape == (1, c.shape[-1]) and (one[:, 2:] == 0).all()
    elapsed = torch.tensor([[0.2]], dtype=D)
    gradcheck(
        lambda x: interpolate(interpolation_coefficients(times, x, kind), elapsed, 2), values.clone().requires_grad_()
    )


def test_the_rectilinear_path_moves_in_one_coordinate_at_a_time():
    times, values = grid(2, num=4)
    path = rectilinear_path(times, values)
    assert path.shape == (2, 7, 3)
    torch.testing.assert_close(path[:, ::2, 0], times - times[:, :1])
    torch.testing.assert_close(path[:, ::2, 1:], values)
    moved = path.diff(dim=-2)
    assert (moved[:, ::2, 1:] == 0).all() and (moved[:, 1::2, 0] == 0).all()


def test_filling():
    times, values = grid(2, num=6)
    mask = torch.rand(values.shape) > 0.5
    mask[0, :, 0], mask[1, :, 0] = False, True
    forward, line = fill_forward(values, mask), fill_linear(times, values, mask)
    for b in range(2):
        for j in range(2):
            seen = mask[b, :, j].nonzero().squeeze(-1).tolist()
            for k in range(6):
                before, after = [i for i in seen if i <= k], [i for i in seen if i >= k]
                assert forward[b, k, j] == (values[b, before[-1], j] if before else 0.0)
                if before and after:
                    i, n = before[-1], after[0]
                    part = (times[b, k] - times[b, i]) / (times[b, n] - times[b, i]) if n > i else 0.0
                    wanted = values[b, i, j] + part * (values[b, n, j] - values[b, i, j])
                else:
                    wanted = values[b, (before or after)[-1 if before else 0], j] if seen else torch.zeros((), dtype=D)
                torch.testing.assert_close(line[b, k, j], torch.as_tensor(wanted))


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="`kind` must be one of 'held'"):
        interpolation_coefficients(*grid(), "quadratic")
