"""Checkpoints: exact resume, also after SIGKILL, and refusal of what does not fit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_ssm.infer import IWAE, fit
from pyro_ssm.infer import checkpoint as files

from .programs import Chain, LinearGuide, PointGuide, simulate
from .resumable import numbers, run

ROOT = Path(__file__).parents[2]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("stop", [1, 6, 7, 13])
def test_resumed_is_uninterrupted(stop, tmp_path, one_thread):
    whole = numbers(run(None))
    path = tmp_path / "fit.pt"

    def interrupt(step, bound):
        if step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, callback=interrupt)
    torch.rand(5)  # whatever happened in between
    random.random()
    assert path.exists() == (stop > 2)  # the step at which it was interrupted was not saved
    assert same(numbers(run(path)), whole)
    assert same(numbers(run(path)), whole)  # finished: nothing is left to do


def test_resume_with_a_loss_that_looks_at_the_plates(tmp_path, one_thread):
    """Held-out data of another kind (one series, no plate) must not shift the random numbers."""
    changes = {"loss": IWAE(3), "validation": simulate(1, 4, seed=3), "num_steps": 20, "patience": None}
    whole = numbers(run(None, **changes))
    path = tmp_path / "fit.pt"

    def interrupt(step, bound):
        if step == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(path, **{**changes, "callback": interrupt})
    assert same(numbers(run(path, **changes)), whole)


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(tmp_path, one_thread):
    whole = numbers(run(None))
    path, result = tmp_path / "fit.pt", tmp_path / "result.pt"
    command = [sys.executable, "-m", "tests.infer.resumable", str(path), str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    kills = 0
    while not result.exists():
        assert kills < 20
        process = subprocess.Popen(command, cwd=ROOT, env=environment)
        seen = path.stat().st_mtime_ns if path.exists() else 0
        if kills < 2:
            while process.poll() is None and (path.stat().st_mtime_ns if path.exists() else 0) == seen:
                time.sleep(0.01)
            time.sleep(random.uniform(0.0, 0.4))  # at any point between or in the middle of writing
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait(120)
    assert kills == 2
    assert same(torch.load(result, weights_only=True), whole)


def test_checkpoint_is_plain_data(tmp_path):
    path = tmp_path / "fit.pt"
    run(path, num_steps=3)
    state = torch.load(path, weights_only=True)
    assert state["step"] == 3 and state["losses"].shape == (3,)
    assert os.listdir(tmp_path) == ["fit.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "fit.pt"
    files.save_checkpoint(path, {"step": 1})

    def fail(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        files.save_checkpoint(path, {"step": 2})
    assert files.load_checkpoint(path) == {"step": 1}


def test_random_state_is_that_of_all_generators():
    state = files.random_state()
    drawn = torch.rand(2), random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002
    files.set_random_state(state)
    again = torch.rand(2), random.gauss(0, 1), np.random.standard_normal()  # noqa: NPY002
    assert torch.equal(drawn[0], again[0]) and drawn[1:] == again[1:]


def test_more_steps_continue_a_finished_fit(tmp_path, one_thread):
    path = tmp_path / "fit.pt"
    run(path, num_steps=14, patience=None)
    longer = run(path, num_steps=28, patience=None)
    assert longer.num_steps == 28
    assert same(numbers(longer)["losses"], run(None, num_steps=28, patience=None).losses)


def test_resume_false_starts_afresh(tmp_path, one_thread):
    path = tmp_path / "fit.pt"
    first = run(path, num_steps=4)
    assert torch.equal(run(path, num_steps=4, resume=False, lr=0.02).losses, first.losses)
    assert not torch.equal(run(path, num_steps=4, resume=False, lr=0.1).losses, first.losses)


def test_another_fit_is_refused_by_name(tmp_path):
    path = tmp_path / "fit.pt"
    run(path, num_steps=2)
    with pytest.raises(ValueError, match=r"lr was 0\.02 and is 0\.5.*resume=False"):
        run(path, lr=0.5)
    with pytest.raises(ValueError, match="batch_size was 3 and is 4"):
        run(path, batch_size=4)
    data = simulate(8, 4, ragged=True)
    quiet = {"num_steps": 3, "progress": False, "checkpoint": path}
    with pytest.raises(ValueError, match=r"parameters was .*guide\.net\.weight.* and is .*guide\.gain"):
        fit(Chain(), PointGuide(), data, **quiet)


def test_other_shapes_are_refused_and_change_nothing(tmp_path):
    path = tmp_path / "fit.pt"
    data, quiet = simulate(3, 2), {"num_steps": 3, "progress": False}
    fit(Chain(), LinearGuide(), data, checkpoint=path, **quiet)
    state = files.load_checkpoint(path)
    state["programs"]["guide"]["net.bias"] = torch.zeros(3)
    del state["programs"]["model"]["transition.rate"]
    files.save_checkpoint(path, state)
    model, guide = Chain(rate=0.1), LinearGuide()
    before = {name: x.clone() for name, x in guide.state_dict().items()}
    with pytest.raises(ValueError, match=r"does not fit the model: `transition\.rate` is missing"):
        fit(model, guide, data, checkpoint=path, **quiet)
    state["programs"]["model"]["transition.rate"] = torch.zeros((), dtype=torch.float64)
    files.save_checkpoint(path, state)
    with pytest.raises(
        ValueError, match=r"the guide: `net\.bias` was torch\.float32 \(3,\) and is torch\.float64 \(2,\)"
    ):
        fit(model, guide, data, checkpoint=path, **quiet)
    assert same(dict(guide.state_dict()), before) and model.transition.rate.item() == pytest.approx(0.1)
