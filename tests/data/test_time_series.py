import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from pyro_ssm.data import TimeSeries

NAN = float("nan")


def ragged():
    """Two series of three and two steps on own grids, with everything a series can have."""
    return TimeSeries(
        torch.tensor([[0.0, 1.0, 3.0], [5.0, 7.0, 0.0]]),
        torch.tensor([[[1.0, 2.0], [NAN, 3.0], [4.0, NAN]], [[5.0, 6.0], [7.0, 8.0], [9.0, 9.0]]]),
        inputs=torch.tensor([[[1.0], [2.0], [3.0]], [[4.0], [5.0], [NAN]]]),
        lengths=[3, 2],
        coords={"series": ["a", "b"], "obs": ["x", "y"], "input": ["u"]},
    )


def test_nan_becomes_a_mask_once_and_padding_is_cleaned():
    data = ragged()
    assert data.values.tolist() == [[[1, 2], [0, 3], [4, 0]], [[5, 6], [7, 8], [0, 0]]]
    expected = [[[True, True], [False, True], [True, False]], [[True, True], [True, True], [False, False]]]
    assert data.mask.tolist() == expected
    assert data.observed is data.mask
    assert data.inputs[..., 0].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert data.times.tolist() == [[0, 1, 3], [5, 7, 9]]
    assert data.times.dtype == torch.float64
    assert data.step_mask.tolist() == [[True, True, True], [True, True, False]]
    again = TimeSeries(data.times, data.values, data.mask, data.inputs, data.lengths, coords=data.coords)
    for name in ("times", "values", "mask", "inputs", "lengths"):
        assert torch.equal(getattr(again, name), getattr(data, name))


def test_properties():
    data = ragged()
    assert (data.batch_shape, data.num_times, data.num_observed_times) == (torch.Size([2]), 3, 3)
    assert (data.obs_dim, data.input_dim, data.dtype, len(data)) == (2, 1, torch.float32, 2)
    assert data.is_ragged and data.has_own_times
    assert data.total is None and data.index is None and data.observed_index is None
    assert torch.equal(data.observed_times, data.times)
    assert torch.equal(data.observed_step_mask, data.step_mask)
    assert repr(data) == "TimeSeries(batch=(2,), times=3, obs=2, observed=80.0%, inputs=1, lengths=2..3, own grids)"


def test_a_given_mask_is_combined_with_nan():
    data = TimeSeries([0, 1, 2], [[1.0], [NAN], [3.0]], mask=torch.tensor([[True], [True], [False]]))
    assert data.mask[:, 0].tolist() == [True, False, False]
    assert data.values[:, 0].tolist() == [1, 0, 0]


def test_infinity_in_a_hidden_or_padded_entry_does_no_harm():
    data = TimeSeries([0, 1], [[1.0], [float("inf")]], mask=torch.tensor([[True], [False]]))
    assert data.values[:, 0].tolist() == [1, 0]
    data = TimeSeries([0, 1], [[[1.0], [float("inf")]]], lengths=[1])
    assert data.values[0, :, 0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.ones((3, 1)), torch.float64),
        (np.ones((3, 1), dtype=np.float32), torch.float32),
        (np.ones((3, 1), dtype=">f8"), torch.float64),
        (np.ones((3, 1), dtype=int), torch.float32),
        (np.ones((3, 1), dtype=bool), torch.float32),
        ([[1], [1], [1]], torch.float32),
        ([[1.0], [1.0], [1.0]], torch.float32),
        (torch.ones(3, 1, dtype=torch.float64), torch.float64),
        (torch.ones(3, 1, dtype=torch.int32), torch.float32),
        (torch.ones(3, 1, dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_dtype_follows_the_values(values, dtype):
    data = TimeSeries([0, 1, 2], values, inputs=np.ones((3, 2)))
    assert data.values.dtype == data.inputs.dtype == data.dtype == dtype
    assert data.times.dtype == torch.float64
    assert (data.values == 1).all()


def test_times_given_as_a_list_keep_double_precision():
    assert TimeSeries([0.1, 1e9 + 0.1], [[1.0], [1.0]]).times.tolist() == [0.1, 1e9 + 0.1]


def test_a_masked_array_stays_masked():
    values = np.ma.array([[1.0], [2.0]], mask=[[False], [True]])
    assert TimeSeries([0, 1], values).mask[:, 0].tolist() == [True, False]


def test_batches_broadcast():
    values = torch.ones(4, 2, 3, 1)
    data = TimeSeries([0, 1, 2], values, inputs=torch.arange(6.0).reshape(3, 2), lengths=torch.tensor([3, 2]))
    assert data.batch_shape == (4, 2) and len(data) == 2
    assert data.times.shape == (3,)
    assert data.inputs.shape == (4, 2, 3, 2)
    assert data.lengths.tolist() == [[3, 2]] * 4
    own = TimeSeries(torch.tensor([[0.0, 1, 2], [0, 2, 4]]), values)
    assert own.times.shape == (4, 2, 3)


def test_series_without_values_take_their_batch_from_the_rest():
    data = TimeSeries([0, 1], inputs=torch.ones(3, 2, 1), lengths=[2, 1, 2])
    assert (data.values, data.mask, data.batch_shape, data.obs_dim) == (None, None, (3,), 0)
    assert repr(data) == "TimeSeries(batch=(3,), times=2, no values, inputs=1, lengths=1..2)"
    assert TimeSeries([0, 1]).batch_shape == ()
    assert TimeSeries([0, 1]).dtype == torch.get_default_dtype()
    assert TimeSeries(torch.tensor([[0.0, 1], [0, 2]])).batch_shape == (2,)


def test_without_values_keeps_the_batch():
    data = TimeSeries([0, 1], torch.ones(3, 2, 1), coords={"obs": ["x"]})
    prior = data.without_values()
    assert (prior.batch_shape, prior.values, prior.mask) == ((3,), None, None)
    assert prior.replace(times=[0, 2]).batch_shape == (3,)
    assert prior.step_mask.shape == (3, 2)
    assert prior.coords["obs"].tolist() == ["x"]


def test_it_is_immutable_and_shares_no_memory():
    times, values, inputs = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.ones(2, 1), torch.ones(2, 1)
    data = TimeSeries(times, values, inputs=inputs)
    for x in (times, values, inputs):
        x.mul_(7.0)
    assert (data.times.tolist(), data.values.sum(), data.inputs.sum()) == ([0, 1], 2, 2)
    with pytest.raises(FrozenInstanceError):
        data.values = values


def test_pickle_gives_back():
    data = ragged().minibatch([1])
    back = pickle.loads(pickle.dumps(data))
    assert torch.equal(back.values, data.values)
    assert back.total == 2 and back.coords["series"].tolist() == ["b"]


def test_values_pass_gradients():
    values = torch.tensor([[1.0], [NAN], [2.0]], requires_grad=True)
    (TimeSeries([0, 1, 2], values).values ** 2).sum().backward()
    assert values.grad[:, 0].tolist() == [2, 0, 4]


ONES = torch.ones(3, 1)
T3 = [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "`values` has dtype object.*dtype=float", {"values": [[1.0], [None], [2.0]]}),
        (TypeError, "`values` has dtype <U1", {"values": [["a"], ["b"], ["c"]]}),
        (TypeError, "`values` has dtype torch.complex64", {"values": ONES + 0j}),
        (ValueError, "`values` is not rectangular.*from_sequences", {"values": [[1.0], [1.0, 2.0], [1.0]]}),
        (ValueError, r"`values` has shape \(3,\).*values\[:, None\]", {"values": torch.ones(3)}),
        (ValueError, r"`values` has shape \(\), but", {"values": torch.tensor(1.0)}),
        (ValueError, r"`values` has shape \(3, 0\).*at least one coordinate", {"values": torch.ones(3, 0)}),
        (ValueError, r"\(4, 1\), so 4 steps.*there are 3 observed times", {"values": torch.ones(4, 1)}),
        (ValueError, "must be finite or NaN.*the series has inf at step 1, coordinate 0",
         {"values": [[1.0], [float("inf")], [1.0]]}),
        (ValueError, "no observed entry in the series .*Drop the series", {"values": ONES * NAN}),
        (ValueError, r"no observed entry in series 1 \('b'\) \(1 such",
         {"values": torch.stack([ONES, ONES * NAN]), "coords": {"series": ["a", "b"]}}),
        (ValueError, r"no observed entry in series \(0, 1\)", {"values": torch.stack([ONES, ONES * NAN])[None]}),
        (ValueError, "no observed entry in series 0",
         {"values": torch.tensor([[[NAN], [1.0], [1.0]]]), "lengths": [1]}),
        (ValueError, r"batch shape \(0,\): there is no series", {"values": torch.ones(0, 3, 1)}),
        (TypeError, "`mask` has dtype torch.float32.*`!= 0`", {"values": ONES, "mask": ONES}),
        (ValueError, r"`mask` has shape \(3,\), but that of `values`, \(3, 1\)",
         {"values": ONES, "mask": torch.ones(3).bool()}),
        (ValueError, "`mask` was given without `values`", {"mask": ONES.bool()}),
        (ValueError, r"`inputs` has shape \(3,\).*inputs\[:, None\]", {"inputs": torch.ones(3)}),
        (ValueError, r"`inputs` has shape \(2, 1\).*with 3 times", {"inputs": torch.ones(2, 1)}),
        (ValueError, "`inputs` must be finite, but the series has nan at step 2, input 0.*Inputs cannot be missing",
         {"inputs": [[1.0], [1.0], [NAN]]}),
        (ValueError, "`inputs` must be finite, but series 1 has inf",
         {"inputs": torch.stack([ONES, ONES * float("inf")])}),
        (TypeError, "`inputs` has dtype object", {"inputs": np.array([["a"], [1], [2]], dtype=object)}),
        (ValueError, r"`inputs` has shape \(2, 3, 1\), whose batch part \(2,\) does not fit",
         {"values": torch.ones(4, 3, 1), "inputs": torch.ones(2, 3, 1)}),
        (ValueError, "`lengths` runs from 0 to 3, but must lie in 1 to 3",
         {"values": torch.ones(2, 3, 1), "lengths": [0, 3]}),
        (ValueError, "`lengths` runs from 1 to 4", {"values": torch.ones(2, 3, 1), "lengths": [1, 4]}),
        (TypeError, "`lengths` has dtype torch.float64, but integers", {"values": ONES, "lengths": 3.0}),
        (ValueError, r"`lengths` has shape \(3,\)", {"values": torch.ones(2, 3, 1), "lengths": [1, 1, 1]}),
        (ValueError, r"batch shapes of `times`, `inputs` and `lengths`.*\(\), \(2,\), \(3,\)",
         {"inputs": torch.ones(2, 3, 1), "lengths": [1, 1, 1]}),
        (TypeError, "`coords` is a list", {"coords": ["a"]}),
        (ValueError, "`coords` has the unknown entry 'state'", {"coords": {"state": ["a"]}}),
        (ValueError, r"`coords\['obs'\]` has shape \(2,\), but \(1,\)",
         {"values": ONES, "coords": {"obs": ["a", "b"]}}),
        (ValueError, "the data has no batch dim", {"values": ONES, "coords": {"series": ["a"]}}),
        (ValueError, r"`coords\['time'\]` has shape \(2,\), but \(3,\)", {"coords": {"time": [1, 2]}}),
        (ValueError, "give both or neither", {"values": torch.ones(2, 3, 1), "total": 5}),
        (ValueError, "but the data has no batch dim", {"values": ONES, "total": 5, "index": [0]}),
        (ValueError, r"`index` has shape \(1,\), but \(2,\)",
         {"values": torch.ones(2, 3, 1), "total": 5, "index": [0]}),
        (ValueError, "does not lie in 0 to `total` - 1 with total = 5",
         {"values": torch.ones(2, 3, 1), "total": 5, "index": [0, 5]}),
        (ValueError, r"`observed_index` is \[0, 3\], but increasing positions in `times` \(0 to 2\)",
         {"values": torch.ones(2, 1), "observed_index": [0, 3]}),
        (ValueError, r"`observed_index` is \[1, 0\]", {"values": torch.ones(2, 1), "observed_index": [1, 0]}),
    ],
)  # fmt: skip
def test_wrong_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        TimeSeries(T3, **arguments)


@pytest.mark.parametrize(
    ("error", "message", "times"),
    [
        (ValueError, r"the series has times\[1\] = 1 and times\[2\] = 1\. Sort by time", [0.0, 1.0, 1.0]),
        (ValueError, "strictly increasing", [2.0, 1.0, 3.0]),
        (ValueError, "`times` must be finite, but the series has nan at step 1", [0.0, NAN, 1.0]),
        (ValueError, r"`times` has shape \(\)", 1.0),
        (ValueError, r"`times` has shape \(0,\)", []),
        (TypeError, "`times` has dtype datetime64.*from_pandas", np.array(["2020-01-01"] * 3, dtype="M8[D]")),
        (TypeError, "`times` has dtype torch.bool", [True, False, True]),
    ],
)
def test_wrong_times(error, message, times):
    with pytest.raises(error, match=message):
        TimeSeries(times, ONES)


def test_wrong_own_times():
    values = torch.ones(2, 3, 1)
    with pytest.raises(ValueError, match=r"series 1 \('b'\) has times\[0\] = 3 and times\[1\] = 2"):
        TimeSeries([[0.0, 1, 2], [3.0, 2, 4]], values, coords={"series": ["a", "b"]})
    with pytest.raises(ValueError, match=r"`times` has shape \(3, 3\), whose batch part"):
        TimeSeries(torch.arange(9.0).reshape(3, 3), values)
    padded = TimeSeries([[0.0, 1, 2], [3.0, 2, 4]], values, lengths=[3, 1])
    assert padded.times.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match=r"times\[1\] = 1 and times\[2\] = 0"):
        TimeSeries([0.0, 1, 0], values, lengths=[3, 1])


def test_hide():
    data = ragged().hide(torch.tensor([[True], [False], [False]]))
    assert data.mask.sum() == 4
    assert data.values[:, 0].abs().sum() == 0
    wholly = ragged().hide(torch.tensor(True))
    assert not wholly.mask.any()
    with pytest.raises(TypeError, match="`where` has dtype"):
        data.hide(torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match=r"`where` has shape \(5,\), but that of `values`, \(2, 3, 2\)"):
        data.hide(torch.ones(5).bool())
    with pytest.raises(ValueError, match="`hide` needs a series with values"):
        data.without_values().hide(torch.tensor(True))


def test_replace():
    data = ragged()
    same = data.replace(values=torch.full((2, 3, 2), NAN))
    assert not same.mask.any()
    assert same.coords["series"].tolist() == ["a", "b"]
    more = data.replace(values=torch.ones(7, 2, 3, 2))
    assert more.batch_shape == (7, 2) and more.times.shape == (7, 2, 3) and more.lengths.shape == (7, 2)
    assert more.mask.sum() == 7 * 10
    kept = data.replace(times=data.times * 2)
    assert torch.equal(kept.mask, data.mask)
    with pytest.raises(TypeError, match=r"`replace` got \['value'\]"):
        data.replace(value=1)
    with pytest.raises(ValueError, match="strictly increasing"):
        data.replace(times=-data.times)


def test_to_keeps_times_in_float64():
    data = ragged().to(dtype=torch.float64)
    assert (data.times.dtype, data.values.dtype, data.inputs.dtype) == (torch.float64,) * 3
    assert data.mask.dtype == torch.bool and data.lengths.dtype == torch.int64
    half = data.to(torch.float16)
    assert (half.times.dtype, half.dtype) == (torch.float64, torch.float16)
    assert data.to("cpu").values is data.values
    with pytest.raises(TypeError, match="`dtype` is torch.int64, but a floating one"):
        data.to(dtype=torch.int64)


def test_one_series_has_no_length_but_is_true():
    data = TimeSeries([0.0], [[1.0]])
    assert data
    with pytest.raises(TypeError, match="no number of series"):
        len(data)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices():
    data = TimeSeries([0.0, 1.0], torch.ones(2, 2, 1, device="cuda"), inputs=torch.ones(2, 1), lengths=[2, 1])
    assert {x.device.type for x in (data.times, data.values, data.mask, data.inputs, data.lengths)} == {"cuda"}
    batch = ragged().pin_memory().to("cuda").minibatch([1]).refine(3)
    assert batch.index.device.type == batch.observed_index.device.type == "cuda"
    assert torch.equal(batch.to("cpu").values, ragged().minibatch([1]).values)
