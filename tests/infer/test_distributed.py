"""A bound is a module: `DistributedDataParallel` over two processes gives the gradient of all data."""

import socket

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from pyro.infer import Trace_ELBO
from torch import nn

from pyro_ssm.infer import local_parameters

from .programs import Chain, PointGuide, simulate

PARTS = ([0, 2, 4], [1, 3, 5])


def worker(rank, port, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    with local_parameters():
        elbo = nn.parallel.DistributedDataParallel(Trace_ELBO()(Chain(), PointGuide()))
        elbo(simulate(6, 4, ragged=True).minibatch(PARTS[rank])).backward()
    if rank == 0:
        queue.put({name: p.grad.item() for name, p in elbo.module.named_parameters()})
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_full_gradient():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [context.Process(target=worker, args=(rank, port, queue)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    with local_parameters():
        elbo = Trace_ELBO()(Chain(), PointGuide())
        elbo(simulate(6, 4, ragged=True)).backward()
    expected = {name: p.grad.item() for name, p in elbo.named_parameters()}
    assert queue.get() == pytest.approx(expected)
