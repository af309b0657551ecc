import numpy as np
import pytest
import torch

from pyro_ssm.data import TimeSeries


def panel(number=7, own=True):
    """Ragged series whose values, inputs and times tell which series they are from."""
    lengths = [1 + i % 3 for i in range(number)]
    return TimeSeries.from_sequences(
        [torch.full((n, 2), float(i)) for i, n in enumerate(lengths)],
        [(10.0 * i if own else 0.0) + torch.arange(n) for i, n in enumerate(lengths)],
        [torch.full((n, 1), -float(i)) for i, n in enumerate(lengths)],
        coords={"series": [f"s{i}" for i in range(number)]},
    )


def test_minibatch_takes_everything_along():
    batch = panel().minibatch([4, 2])
    assert batch.values[:, 0, 0].tolist() == [4, 2]
    assert batch.times[:, 0].tolist() == [40, 20]
    assert batch.inputs[:, 0, 0].tolist() == [-4, -2]
    assert batch.lengths.tolist() == [2, 3]
    assert batch.coords["series"].tolist() == ["s4", "s2"]
    assert (batch.total, batch.index.tolist(), batch.batch_shape) == (7, [4, 2], (2,))
    assert repr(batch).endswith("of 7)")


def test_minibatch_of_a_minibatch_refers_to_the_full_data():
    once = panel().minibatch([1])
    twice = panel().minibatch(torch.tensor([5, 3, 1])).minibatch(np.array([2]))
    assert (twice.total, twice.index.tolist()) == (once.total, once.index.tolist()) == (7, [1])
    assert torch.equal(twice.values, once.values)


def test_minibatch_is_along_the_last_batch_dim():
    data = TimeSeries([0.0, 1.0], torch.arange(12.0).reshape(2, 3, 2, 1))
    batch = data.minibatch([2])
    assert batch.batch_shape == (2, 1) and batch.total == 3
    assert torch.equal(batch.values, data.values[:, 2:])
    assert batch.times.shape == (2,)


def test_minibatch_may_be_wholly_unobserved():
    assert not panel().hide(torch.tensor(True)).minibatch([0]).mask.any()


@pytest.mark.parametrize(
    ("error", "message", "index"),
    [
        (ValueError, r"`index` has shape \(0,\)", torch.zeros(0, dtype=torch.int64)),
        (ValueError, r"`index` has shape \(\)", 3),
        (ValueError, "`index` runs from 0 to 7, but must lie in 0 to 6", [0, 7]),
        (ValueError, "`index` runs from -1 to 2", [-1, 2]),
        (TypeError, "`index` has dtype torch.float64, but integers", [0.0]),
        (TypeError, "`index` has dtype torch.bool", [True] * 7),
    ],
)
def test_wrong_index(error, message, index):
    with pytest.raises(error, match=message):
        panel().minibatch(index)


def test_one_series_has_no_minibatch():
    with pytest.raises(TypeError, match="no number of series"):
        TimeSeries([0.0], [[1.0]]).minibatch([0])
    with pytest.raises(TypeError, match="no number of series"):
        TimeSeries([0.0], [[1.0]]).loader(1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_loader_covers_every_series_once(shuffle, workers):
    data = panel(11)
    loader = data.loader(4, shuffle=shuffle)
    loader = torch.utils.data.DataLoader(
        loader.dataset, batch_size=None, sampler=loader.sampler, collate_fn=loader.collate_fn, num_workers=workers
    )
    batches = list(loader)
    assert [len(batch) for batch in batches] == [4, 4, 3]
    index = torch.cat([batch.index for batch in batches])
    assert sorted(index.tolist()) == list(range(11))
    assert shuffle or index.tolist() == list(range(11))
    order = index.argsort()
    for name in ("times", "values", "mask", "inputs", "lengths"):
        assert torch.equal(torch.cat([getattr(batch, name) for batch in batches])[order], getattr(data, name))


def test_loader_order_is_the_generators():
    data = panel(11)

    def orders(seed):
        loader = data.loader(3, generator=torch.Generator().manual_seed(seed))
        return [[batch.index.tolist() for batch in loader] for _ in range(2)]

    assert orders(0) == orders(0) != orders(1)
    assert orders(0)[0] != orders(0)[1]


def test_loader_drops_the_last_and_counts():
    assert [len(b) for b in panel(7).loader(3, drop_last=True)] == [3, 3]
    assert len(panel(7).loader(3)) == 3
    with pytest.raises(ValueError, match="`batch_size` is 0"):
        panel().loader(0)
    with pytest.raises(ValueError, match="`batch_size` is 8 with drop_last, but there are 7 series"):
        panel().loader(8, drop_last=True)


def test_loader_of_a_minibatch_refers_to_the_full_data():
    batches = list(panel().minibatch([6, 0]).loader(1, shuffle=False))
    assert [batch.index.tolist() for batch in batches] == [[6], [0]]
    assert [batch.total for batch in batches] == [7, 7]


def test_loader_trims():
    sizes = [batch.num_times for batch in panel(3, own=False).loader(1, shuffle=False, trim=True)]
    assert sizes == [1, 2, 3]


def test_series_is_unpadded():
    data = panel().minibatch([4, 0])
    one = data.series(0)
    assert (one.batch_shape, one.num_times, one.lengths, one.total, one.index) == ((), 2, None, None, None)
    assert one.times.tolist() == [40, 41]
    assert one.values.tolist() == [[4, 4]] * 2 and one.mask.all()
    assert one.inputs.tolist() == [[-4]] * 2
    assert torch.equal(data.series("s4").values, one.values)
    fine = data.refine(3).series(0)
    assert fine.num_times == 4 and fine.observed_index.tolist() == [0, 3]
    assert torch.equal(fine.values, one.values)
    assert torch.equal(fine.times, one.refine(3).times)


def test_series_of_several_batch_dims():
    data = TimeSeries([0.0], torch.arange(6.0).reshape(2, 3, 1, 1))
    assert data.series((1, 2)).values.item() == 5
    with pytest.raises(ValueError, match=r"`i` is 1, but a position in the batch shape \(2, 3\)"):
        data.series(1)


def test_series_refuses():
    with pytest.raises(ValueError, match="`i` is 'x', which names 0 of the 7 series"):
        panel().series("x")
    with pytest.raises(ValueError, match=r"`i` is 7, but a position in the batch shape \(7,\)"):
        panel().series(7)
    with pytest.raises(ValueError, match="`i` is -1"):
        panel().series(-1)
