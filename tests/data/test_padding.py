import pytest
import torch

from pyro_ssm.data import continue_times, pad_sequences, step_mask, unpad_sequences


def test_pad_then_unpad_gives_back():
    sequences = [torch.randn(n, 3) for n in (2, 5, 1)]
    padded, lengths = pad_sequences(sequences, fill=-1.0)
    assert padded.shape == (3, 5, 3)
    assert lengths.tolist() == [2, 5, 1]
    assert all(torch.equal(a, b) for a, b in zip(unpad_sequences(padded, lengths), sequences, strict=True))
    assert (padded[~step_mask(lengths, 5)] == -1.0).all()


def test_pad_sequences_refuses():
    with pytest.raises(ValueError, match="`sequences` is empty"):
        pad_sequences([])
    with pytest.raises(ValueError, match=r"`sequences\[1\]` has shape \(2, 4\)"):
        pad_sequences([torch.ones(2, 3), torch.ones(2, 4)])


def test_step_mask_of_any_batch():
    assert step_mask(torch.tensor(2), 3).tolist() == [True, True, False]
    assert step_mask(torch.tensor([[1], [3]]), 3).tolist() == [[[True, False, False]], [[True, True, True]]]


def test_continued_times_repeat_the_last_gap():
    times = torch.tensor([[0.0, 0.5, float("nan"), -1.0], [3.0, 0.0, 0.0, 0.0], [0.0, 1.0, 3.0, 7.0]])
    expected = [[0.0, 0.5, 1.0, 1.5], [3.0, 4.0, 5.0, 6.0], [0.0, 1.0, 3.0, 7.0]]
    assert continue_times(times, torch.tensor([2, 1, 4])).tolist() == expected


def test_a_shared_grid_is_continued_after_the_longest():
    assert continue_times(torch.tensor([0.0, 1.0, 3.0, 3.0]), torch.tensor([1, 3])).tolist() == [0.0, 1.0, 3.0, 5.0]
