import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from pyro_ssm.data import TimeSeries

NAN = float("nan")


def wide():
    index = pd.to_datetime(["2020-01-01T00:00", "2020-01-02T00:00", "2020-01-04T12:00"])
    return pd.DataFrame({"x": [1.0, NAN, 3.0], "y": [4, 5, 6], "u": [0.5, 0.6, 0.7]}, index=index)


def long(ragged=True):
    """Series b has a gap in its days; series a may be longer."""
    frame = pd.DataFrame(
        {
            "site": ["b", "b", "a", "a", "a"],
            "day": pd.to_datetime(["2020-01-02", "2020-01-04", "2020-01-01", "2020-01-02", "2020-01-03"]),
            "x": [1.0, NAN, 3.0, 4.0, 5.0],
            "u": [10, 20, 30, 40, 50],
        }
    )
    return frame if ragged else frame.iloc[:4]


def test_sequences():
    data = TimeSeries.from_sequences(
        [np.ones((2, 1)), np.full((3, 1), 2.0)],
        times=[[0, 1], [0, 1, 5]],
        inputs=[np.zeros((2, 2)), np.ones((3, 2))],
        coords={"series": ["a", "b"]},
    )
    assert data.times.tolist() == [0, 1, 5]  # the shorter grid is the beginning of the longer: it is shared
    assert data.lengths.tolist() == [2, 3]
    assert data.values[..., 0].tolist() == [[1, 1, 0], [2, 2, 2]]
    assert data.inputs.sum(-1).tolist() == [[0, 0, 0], [2, 2, 2]]
    assert data.dtype == torch.float64
    equal = TimeSeries.from_sequences([torch.ones(2, 1), torch.ones(2, 1)])
    assert equal.lengths is None and equal.times.tolist() == [0, 1]
    own = TimeSeries.from_sequences([torch.ones(2, 1), torch.ones(1, 1)], times=[[0.0, 2.0], [7.0]])
    assert own.times.tolist() == [[0, 2], [7, 8]]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "`values` must be a list of at least one", {"values": []}),
        (ValueError, "`values` must be a list", {"values": torch.ones(2, 3, 1)}),
        (ValueError, r"`values\[1\]` has shape \(2,\).*x\[:, None\]", {"values": [torch.ones(2, 1), torch.ones(2)]}),
        (ValueError, r"`values\[0\]` has shape \(0, 1\).*at least one step", {"values": [torch.ones(0, 1)]}),
        (ValueError, r"`sequences\[1\]` has shape \(2, 2\)", {"values": [torch.ones(2, 1), torch.ones(2, 2)]}),
        (TypeError, r"`values\[0\]` has dtype object", {"values": [[[None], [1.0]]]}),
        (ValueError, "`times` has 2 entries, but a list with one entry for each of the 1",
         {"values": [torch.ones(2, 1)], "times": [[0, 1], [0, 1]]}),
        (ValueError, "`times` has a Tensor", {"values": [torch.ones(2, 1)], "times": torch.zeros(1, 2)}),
        (ValueError, r"`times\[0\]` has shape \(1,\), but \(2,\)", {"values": [torch.ones(2, 1)], "times": [[0]]}),
        (ValueError, r"`inputs\[0\]` has shape \(3, 1\), but \(2, input\)",
         {"values": [torch.ones(2, 1)], "inputs": [torch.ones(3, 1)]}),
        (ValueError, "no observed entry in series 1",
         {"values": [torch.ones(2, 1), torch.full((2, 1), NAN)]}),
    ],
)  # fmt: skip
def test_wrong_sequences(error, message, arguments):
    with pytest.raises(error, match=message):
        TimeSeries.from_sequences(**arguments)


def test_wide_frame():
    data = TimeSeries.from_pandas(wide(), inputs="u")
    assert data.times.tolist() == [0, 1, 3.5]
    assert data.values.tolist() == [[1, 4], [0, 5], [3, 6]]
    assert data.mask.tolist() == [[True, True], [False, True], [True, True]]
    assert data.inputs[:, 0].tolist() == pytest.approx([0.5, 0.6, 0.7])
    assert data.dtype == torch.float32
    assert (data.coords["obs"].tolist(), data.coords["input"].tolist()) == (["x", "y"], ["u"])
    np.testing.assert_array_equal(data.coords["time"], wide().index.to_numpy().astype("M8[ns]"))


def test_options_of_a_frame():
    data = TimeSeries.from_pandas(wide(), values=["y"], unit="h", origin="2019-12-31", dtype=torch.float64)
    assert data.times.tolist() == [24, 48, 108]
    assert data.obs_dim == 1 and data.dtype == torch.float64 and data.input_dim == 0
    by_column = TimeSeries.from_pandas(wide().rename_axis("when").reset_index(), values=["y"], time="when")
    assert by_column.times.tolist() == [0, 1, 3.5]
    numbers = TimeSeries.from_pandas(pd.Series([1.0, 2.0], index=[0.5, 2.0], name="z"))
    assert numbers.times.tolist() == [0.5, 2] and numbers.coords["obs"].tolist() == ["z"]
    assert "time" not in numbers.coords
    periods = pd.DataFrame({"x": [1.0, 2.0, 3.0]}, index=pd.period_range("2020-01", periods=3, freq="M"))
    assert TimeSeries.from_pandas(periods, unit="M").times.tolist() == [0, 1, 2]
    nullable = pd.DataFrame({"x": pd.array([1, None, 3], dtype="Int64")})
    assert TimeSeries.from_pandas(nullable).mask[:, 0].tolist() == [True, False, True]


def test_long_frame_with_own_grids():
    data = TimeSeries.from_pandas(long(), inputs=["u"], time="day", series="site")
    assert data.coords["series"].tolist() == ["b", "a"]
    assert data.lengths.tolist() == [2, 3]
    assert data.times.tolist() == [[1, 3, 5], [0, 1, 2]]
    assert data.values[..., 0].tolist() == [[1, 0, 0], [3, 4, 5]]
    assert data.mask[..., 0].tolist() == [[True, False, False], [True, True, True]]
    assert data.inputs[..., 0].tolist() == [[10, 20, 0], [30, 40, 50]]
    assert np.isnat(data.coords["time"]).tolist() == [[False, False, True], [False] * 3]
    one = data.series("b")
    np.testing.assert_array_equal(one.coords["time"], np.array(["2020-01-02", "2020-01-04"], dtype="M8[ns]"))


def test_long_frame_with_a_shared_grid():
    frame = long()
    frame.loc[:1, "day"] = pd.to_datetime(["2020-01-01", "2020-01-02"]).to_numpy()
    data = TimeSeries.from_pandas(frame, values="x", time="day", series="site")
    assert data.times.tolist() == [0, 1, 2] and data.lengths.tolist() == [2, 3]
    assert data.coords["time"].shape == (3,)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "`frame` is a list", {"frame": [1]}),
        (ValueError, "`frame` has no rows", {"frame": wide().iloc[:0]}),
        (ValueError, "repeated column names: .'x'.", {"frame": pd.concat([wide()[["x"]]] * 2, axis=1)}),
        (ValueError, "`time` is 'when', but the frame has", {"frame": wide(), "time": "when"}),
        (ValueError, "`series` is 'who', but", {"frame": wide(), "series": "who"}),
        (ValueError, r"`values` names \['z'\], but the frame has", {"frame": wide(), "values": ["z"]}),
        (ValueError, r"`inputs` names \['z'\]", {"frame": wide(), "inputs": "z"}),
        (ValueError, "`values` names no column", {"frame": wide()[["u"]], "inputs": "u"}),
        (ValueError, "`unit` is 'fortnight', but one of M, Q, Y, W", {"frame": wide(), "unit": "fortnight"}),
        (TypeError, "`values` includes the column 'site' of dtype", {"frame": long(), "time": "day"}),
        (TypeError, "The time index has dtype .*pandas.to_datetime",
         {"frame": pd.DataFrame({"x": [1.0]}, index=["2020"])}),
        (ValueError, "`origin` is '2020-01-01', but the time index holds numbers",
         {"frame": pd.DataFrame({"x": [1.0]}), "origin": "2020-01-01"}),
        (ValueError, "NaT", {"frame": pd.DataFrame({"x": [1.0]}, index=pd.DatetimeIndex(["NaT"]))}),
        (ValueError, "holds missing names",
         {"frame": pd.DataFrame({"x": [1.0, 2.0], "s": ["a", None]}), "series": "s"}),
        (ValueError, "strictly increasing", {"frame": wide().iloc[::-1]}),
        (ValueError, "`inputs` must be finite", {"frame": wide(), "inputs": "x"}),
    ],
)  # fmt: skip
def test_wrong_frames(error, message, arguments):
    with pytest.raises(error, match=message):
        TimeSeries.from_pandas(**arguments)


def array():
    return xr.DataArray(
        np.arange(12.0).reshape(3, 2, 2),
        dims=("time", "site", "what"),
        coords={
            "time": pd.date_range("2020-01-01", periods=3, freq="2D"),
            "site": ["a", "b"],
            "what": ["x", "y"],
        },
        name="level",
    )


def test_data_array():
    data = TimeSeries.from_xarray(array(), series="site", obs="what")
    assert data.batch_shape == (2,) and data.times.tolist() == [0, 2, 4]
    assert data.values.tolist() == array().transpose("site", "time", "what").to_numpy().tolist()
    assert data.coords["series"].tolist() == ["a", "b"] and data.coords["obs"].tolist() == ["x", "y"]
    np.testing.assert_array_equal(data.coords["time"], array().time.to_numpy().astype("M8[ns]"))
    one = TimeSeries.from_xarray(array().isel(site=0, what=1), unit="h")
    assert one.values.shape == (3, 1) and one.coords["obs"].tolist() == ["level"] and one.times.tolist() == [0, 48, 96]
    bare = TimeSeries.from_xarray(xr.DataArray(np.ones(3), dims="t"), time="t")
    assert bare.times.tolist() == [0, 1, 2] and bare.coords["obs"].tolist() == ["value"]


def test_data_set():
    level = array().sel(what="x", drop=True)
    dataset = xr.Dataset({"level": level, "flow": -level, "rain": level.isel(site=0, drop=True)})
    data = TimeSeries.from_xarray(dataset, series="site", inputs="rain")
    assert data.coords["obs"].tolist() == ["level", "flow"] and data.coords["input"].tolist() == ["rain"]
    assert torch.equal(data.values[..., 0], -data.values[..., 1])
    assert data.inputs.shape == (2, 3, 1) and data.inputs[1, :, 0].tolist() == [0, 4, 8]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "`data` is a ndarray", {"data": np.ones(3)}),
        (ValueError, r"dims \('time', 'site', 'what'\), but time = 'time', series = None, obs = None were named",
         {"data": array()}),
        (ValueError, "Name each dim", {"data": array(), "time": "t", "series": "site", "obs": "what"}),
        (ValueError, "`obs` is 'what', but in a Dataset", {"data": array().to_dataset(), "obs": "what"}),
        (ValueError, "`inputs` names variables of a Dataset", {"data": array(), "inputs": "x"}),
        (ValueError, r"`inputs` names \['rain'\]", {"data": array().to_dataset(), "inputs": "rain"}),
        (ValueError, "no variable to observe", {"data": xr.Dataset()}),
    ],
)  # fmt: skip
def test_wrong_arrays(error, message, arguments):
    with pytest.raises(error, match=message):
        TimeSeries.from_xarray(**arguments)
