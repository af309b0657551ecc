"""A fit that can be killed: ``python -m tests.infer.resumable CHECKPOINT RESULT``; also imported by the tests."""

import sys
import time

import torch

from pyro_ssm.infer import fit, linear_annealing, warmup_cosine
from tests.infer.programs import Chain, LinearGuide, simulate


def run(checkpoint, slow=0.0, num_steps=40, **changes):
    torch.manual_seed(7)
    model, guide = Chain(), LinearGuide()

    def wait(step, bound):
        time.sleep(slow)

    settings = {
        "lr": 0.02,
        "num_steps": num_steps,
        "batch_size": 3,
        "schedule": warmup_cosine(40, 5),
        "annealing": linear_annealing(0.1, 20),
        "validation": simulate(3, 4, seed=2),
        "validate_every": 7,
        "patience": 50,
        "checkpoint": checkpoint,
        "checkpoint_every": 2,
        "progress": False,
        "callback": wait,
    }
    return fit(model, guide, simulate(8, 4, ragged=True), **{**settings, **changes})


def numbers(result):
    """All that a fit has to say, for bitwise comparison."""
    return {
        "model": dict(result.model.state_dict()),
        "guide": dict(result.guide.state_dict()),
        "losses": result.losses,
        "validation": result.validation,
        "next": torch.rand(3),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.save(numbers(run(sys.argv[1], slow=0.03)), sys.argv[2])
