import torch
from torch.autograd import gradcheck

from pyro_ssm.ops import block_diagonal

D = torch.float64


def test_is_torchs_for_each_of_a_batch():
    blocks = [torch.randn(4, 1, 2, 3), torch.randn(5, 1, 1), torch.randn(1, 5, 2, 0), torch.randn(2, 2)]
    whole = block_diagonal(blocks)
    assert whole.shape == (4, 5, 7, 6)
    for i in range(4):
        for j in range(5):
            wanted = torch.block_diag(blocks[0][i, 0], blocks[1][j], blocks[2][0, j], blocks[3])
            assert torch.equal(whole[i, j], wanted)


def test_one_block_is_itself_and_gradients_flow():
    one = torch.randn(3, 2, 2, dtype=D, requires_grad=True)
    assert torch.equal(block_diagonal([one]), one)
    assert gradcheck(lambda a, b: block_diagonal([a, b]), (one, torch.randn(1, 3, dtype=D, requires_grad=True)))
