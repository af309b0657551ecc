"""Data sets of the benchmarks, read from outside the package (their licences do not let us bundle them).

They lie in the folder named by the environment variable `PYRO_SSM_DATA`, or in `../shared/data` beside the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from pyro_ssm.data import TimeSeries

POLYPHONIC = ("jsb", "musedata", "nottingham", "piano_midi")
SPLITS = ("train", "valid", "test")


def data_folder() -> Path:
    """The folder of the data sets."""
    named = os.environ.get("PYRO_SSM_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The benchmark data folder {folder} does not exist. Set the environment variable PYRO_SSM_DATA to the "
            "folder that holds polyphonic_npz/, dmm_synthetic9/, ..."
        )
    return folder


def one_of(name: str, got: str, known: tuple[str, ...]) -> None:
    if got not in known:
        raise ValueError(f"`{name}` is {got!r}, but one of {', '.join(known)} is wanted.")


def polyphonic(name: str, split: str) -> TimeSeries:
    """Piano rolls of Boulanger-Lewandowski et al. (2012): `(series, time, 88)` of zeros and ones, ragged.

    Args:
        name: jsb, musedata, nottingham or piano_midi.
        split: train, valid or test.
    """
    one_of("name", name, POLYPHONIC)
    one_of("split", split, SPLITS)
    with np.load(data_folder() / "polyphonic_npz" / f"{name}.npz") as file:
        rolls = np.unpackbits(file[f"{split}_bits"], axis=1)[:, :88].astype(np.float32)
        lengths = file[f"{split}_len"]
    sequences = torch.from_numpy(rolls).split(lengths.tolist())
    return TimeSeries.from_sequences(sequences)


def dmm_synthetic9(split: str) -> tuple[TimeSeries, torch.Tensor]:
    """The linear series of Krishnan et al. (2017), Fig. 4, with their states, both `(series, time, 1)`.

    Args:
        split: train (5000 x 25), valid (500 x 25) or test (500 x 50).
    """
    import h5py

    one_of("split", split, SPLITS)
    with h5py.File(data_folder() / "dmm_synthetic9" / "synthetic9.h5") as file:
        values, states = (
            torch.from_numpy(file[key][...]).to(torch.get_default_dtype()) for key in (split, f"{split}_z")
        )
    return TimeSeries(torch.arange(values.shape[1]), values), states


def mnist1d() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Training (4000) and test set (1000) of Greydanus (2020): series `(n, 40, 1)` and classes `(n, 1)`."""
    with np.load(data_folder() / "mnist1d" / "mnist1d.npz") as file:
        parts = {name: torch.from_numpy(file[name]).unsqueeze(-1) for name in ("x", "y", "x_test", "y_test")}
    return (parts["x"], parts["y"]), (parts["x_test"], parts["y_test"])


def mocap35(split: str) -> TimeSeries:
    """A walking person, 50 joint angles (CMU subject 35, as ODE2VAE prepared it): `(series, 300, 50)`, one frame 0.1.

    Args:
        split: train (16 series), valid (3) or test (4).
    """
    one_of("split", split, SPLITS)
    key = {"train": "Xtr", "valid": "Xval", "test": "Xtest"}[split]
    with np.load(data_folder() / "mocap35" / "mocap35_f32.npz") as file:
        values = torch.from_numpy(file[key])
    return TimeSeries(0.1 * torch.arange(values.shape[1]), values)


def physionet2012() -> TimeSeries:
    """Intensive care, 4000 stays of set A (Silva et al. 2012), as Rubanova et al. (2019) prepared it: 41 columns.

    37 measured columns and 4 of admission at time 0; times in parts of 48 hours, to the minute; each column scaled to
    [0, 1] by its extremes over all stays. Several values of a minute are averaged; -1 of admission columns and of the
    weight stands for missing.
    """
    with np.load(data_folder() / "physionet2012_set_a" / "set_a_long.npz") as file:
        minutes, column, value = (file[name] for name in ("time_min", "param", "value"))
        static, offsets, names = file["static"], file["offsets"], file["param_names"].tolist()
    value = np.where((column == names.index("Weight")) & (value <= 0), np.nan, value.astype(np.float64))
    records, times = [], []
    for i, (start, stop) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        keep = start + np.flatnonzero(np.isfinite(value[start:stop]))
        grid, row = np.unique(np.concatenate([[0], minutes[keep]]), return_inverse=True)
        total, count = np.zeros((2, len(grid), 41))
        np.add.at(total, (row[1:], column[keep]), value[keep])
        np.add.at(count, (row[1:], column[keep]), 1.0)
        record = np.where(count > 0, total / np.maximum(count, 1.0), np.nan)
        record[0, 37:] = np.where(static[i] < 0, np.nan, static[i])
        records.append(record)
        times.append(torch.from_numpy(grid / 2880.0))
    everything = np.concatenate(records)
    low, high = np.nanmin(everything, 0), np.nanmax(everything, 0)
    scaled = [torch.from_numpy(((x - low) / np.maximum(high - low, 1e-12)).astype(np.float32)) for x in records]
    return TimeSeries.from_sequences(scaled, times)
