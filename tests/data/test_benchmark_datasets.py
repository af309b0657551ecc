"""`benchmarks/datasets.py`, where its files are at hand."""

import math

import pytest

from benchmarks import datasets


@pytest.mark.parametrize(("split", "number", "steps"), [("train", 229, 13807), ("valid", 76, 4602), ("test", 77, 4725)])
def test_polyphonic(shared_data, split, number, steps):
    shared_data("polyphonic_npz/jsb.npz")
    data = datasets.polyphonic("jsb", split)
    assert len(data) == number and int(data.lengths.sum()) == steps and data.obs_dim == 88
    assert set(data.values.unique().tolist()) == {0.0, 1.0}
    assert int(data.mask.sum()) == steps * 88
    notes = float(data.values.sum()) / steps  # four voices, which may meet
    assert 3.0 < notes < 4.5


def test_dmm_synthetic9(shared_data):
    pytest.importorskip("h5py")
    shared_data("dmm_synthetic9/synthetic9.h5")
    for split, shape in (("train", (5000, 25, 1)), ("valid", (500, 25, 1)), ("test", (500, 50, 1))):
        data, states = datasets.dmm_synthetic9(split)
        assert data.values.shape == states.shape == shape
        number = states.numel()
        residual = data.values - 0.5 * states
        assert abs(float(residual.square().mean()) / 20 - 1) < 4 * math.sqrt(2 / number)
        step = states[:, 1:] - states[:, :-1] - 0.05
        assert abs(float(step.square().mean()) / 10 - 1) < 4 * math.sqrt(2 / step.numel())


def test_unknown_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="`name` is 'bach', but one of jsb"):
        datasets.polyphonic("bach", "train")
    with pytest.raises(ValueError, match="`split` is 'all', but one of train"):
        datasets.dmm_synthetic9("all")
    monkeypatch.setenv("PYRO_SSM_DATA", str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="Set the environment variable PYRO_SSM_DATA"):
        datasets.polyphonic("jsb", "train")


def test_mnist1d(shared_data):
    shared_data("mnist1d/mnist1d.npz")
    (x, y), (x_test, y_test) = datasets.mnist1d()
    assert x.shape == (4000, 40, 1) and y.shape == (4000, 1) and x_test.shape == (1000, 40, 1)
    assert set(y.unique().tolist()) == set(y_test.unique().tolist()) == set(range(10))
