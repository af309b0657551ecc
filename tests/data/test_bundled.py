import numpy as np
import pytest
import torch

from pyro_ssm.data import available, load


@pytest.mark.parametrize(
    ("name", "shape", "missing", "first", "last", "first_value"),
    [
        ("co2", (2284, 1), 59, "1958-03-29", "2001-12-29", 316.1),
        ("elnino", (732, 1), 0, "1950-01-01", "2010-12-01", 23.11),
        ("lynx_hare", (21, 2), 0, "1900-01-01", "1920-01-01", 30.0),
        ("macrodata", (203, 12), 0, "1959-01-01", "2009-07-01", 2710.349),
        ("nile", (100, 1), 0, "1871-01-01", "1970-01-01", 1120.0),
        ("sunspots", (309, 1), 0, "1700-01-01", "2008-01-01", 5.0),
    ],
)
def test_bundled_series(name, shape, missing, first, last, first_value):
    data = load(name, dtype=torch.float64)
    assert data.values.shape == shape
    assert int((~data.mask).sum()) == missing
    assert data.coords["time"][[0, -1]].tolist() == np.array([first, last], dtype="M8[ns]").tolist()
    assert torch.equal(data.times, torch.arange(shape[0], dtype=torch.float64))
    assert data.values[0, 0] == first_value
    assert load(name).dtype == torch.float32


@pytest.mark.parametrize("name", ["co2", "elnino", "macrodata", "nile", "sunspots"])
def test_bundled_series_are_those_of_statsmodels(name):
    datasets = pytest.importorskip("statsmodels.api").datasets
    frame = getattr(datasets, name).load_pandas().data
    if name == "elnino":
        numbers = frame.to_numpy(dtype=float)[:, 1:].reshape(-1, 1)
    else:
        numbers = frame[[c for c in frame if str(c).lower() not in ("year", "quarter")]].to_numpy(dtype=float)
    data = load(name, dtype=torch.float64)
    np.testing.assert_array_equal(np.where(data.mask, data.values, np.nan), numbers)


def test_dates_go_on():
    longer = load("macrodata").extend([203, 204])
    assert longer.coords["time"][-2:].astype("M8[D]").astype(str).tolist() == ["2009-10-01", "2010-01-01"]
    before, after = load("co2").split("1995-01-01")
    assert after.coords["time"][0] == np.datetime64("1995-01-07")
    assert before.num_times + after.num_times == 2284


def test_flow_of_the_nile():
    assert float(load("nile", dtype=torch.float64).values.mean()) == pytest.approx(919.35, abs=1e-9)


def test_pelts_of_hares_and_lynx():
    """Sums, and sums weighted by the year, of the published table: a wrong digit or a swap of two years would show."""
    pelts = load("lynx_hare", dtype=torch.float64)
    assert pelts.coords["obs"].tolist() == ["hare", "lynx"]
    assert pelts.values.sum(0).tolist() == pytest.approx([715.7, 423.5], abs=1e-9)
    assert (pelts.times @ pelts.values).tolist() == pytest.approx([6122.8, 4182.4], abs=1e-9)
    assert pelts.values.argmax(0).tolist() == [3, 4]  # the lynx follow the hares


def test_unknown_name():
    assert available() == ["co2", "elnino", "lynx_hare", "macrodata", "nile", "sunspots"]
    with pytest.raises(ValueError, match="`name` is 'airline', but the bundled series are co2, elnino"):
        load("airline")
