"""What structured blocks learn: selective copying, induction heads, MNIST-1D; and dense, low-rank and diagonal A.

Selective copying and induction heads (Gu & Dao 2023, section 4.1) ask for a choice by content: a time-invariant block
must fail at them, a selective one should not. MNIST-1D (Greydanus 2020) is a classification of series of 40 steps, on
which LSSL, S4 and S4D are the dense, the low-rank and the diagonal form of one state matrix: accuracy and cost.

    python benchmarks/structured_blocks.py                   # some minutes on one core
    python benchmarks/structured_blocks.py --smoke           # seconds: whether it runs
    python benchmarks/structured_blocks.py --task mnist1d --steps 4000
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import mnist1d
from torch import Tensor, nn

from pyro_ssm import blocks
from pyro_ssm.infer import parameter_groups

RESULTS = Path(__file__).parent / "results"
BLOCKS: dict[str, Callable[[int], blocks.StructuredBlock]] = {
    "LSSL (dense)": lambda n: blocks.LSSL(n, 16),
    "S4 (low rank)": lambda n: blocks.S4(n, 16),
    "S4D (diagonal)": lambda n: blocks.S4D(n, 16),
    "S5": lambda n: blocks.S5(n, 64),
    "LinOSS": lambda n: blocks.LinOSS(n, 64),
    "LRU": lambda n: blocks.LRU(n, 64),
    "Mamba": lambda n: blocks.Mamba(n, 16, step_range=(1e-2, 1.0)),
    "Mamba2": lambda n: blocks.Mamba2(n, 16, step_range=(1e-2, 1.0)),
}
SELECTIVE = ("S4D (diagonal)", "S5", "Mamba", "Mamba2")
BATCH = 64


class Classifier(nn.Module):
    """Two blocks upon each other, and scores: of the last steps, or of the mean over time."""

    def __init__(self, block: Callable[[int], blocks.StructuredBlock], inputs: int, classes: int, answers: int) -> None:
        super().__init__()
        self.answers = answers
        stack = [block(64) for _ in range(2)]
        self.stack = blocks.ResidualStack(stack, in_features=inputs, out_features=classes)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, time, inputs)`` to ``(batch, answers, classes)``; 0 answers: one, of the mean over time."""
        y, _ = self.stack(x)
        return y[:, -self.answers :] if self.answers else y.mean(1, keepdim=True)


def selective_copying(length: int = 64, tokens: int = 4, vocabulary: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens scattered among blanks; the answers, at the end, are the tokens in their order."""
    x = torch.zeros(BATCH, length + tokens, dtype=torch.long)
    answers = torch.randint(1, vocabulary + 1, (BATCH, tokens))
    places = torch.rand(BATCH, length).argsort(-1)[:, :tokens].sort(-1).values
    x.scatter_(1, places, answers)
    x[:, length:] = vocabulary + 1  # now answer
    return F.one_hot(x, vocabulary + 2).float(), answers


def induction_heads(length: int = 64, vocabulary: int = 8) -> tuple[Tensor, Tensor]:
    """The answer is the token that followed the special one when it stood in the series before."""
    x = torch.randint(1, vocabulary + 1, (BATCH, length))
    place = torch.randint(0, length - 2, (BATCH, 1))
    x.scatter_(1, place, vocabulary + 1)
    x[:, -1] = vocabulary + 1
    return F.one_hot(x, vocabulary + 2).float(), x.gather(1, place + 1)


def train(
    net: Classifier, draw: Callable[[], tuple[Tensor, Tensor]], steps: int, lr: float, evaluate: Callable[[], float]
) -> dict[str, float]:
    optimizer = torch.optim.AdamW(parameter_groups(net, lr=lr))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps
    )
    start = time.process_time()
    for _ in range(steps):
        x, y = draw()
        optimizer.zero_grad()
        F.cross_entropy(net(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.process_time() - start
    net.eval()
    with torch.no_grad():
        return {"accuracy": evaluate(), "cpu_ms_per_step": 1000 * seconds / steps}


def accuracy(net: Classifier, x: Tensor, y: Tensor) -> float:
    return float((net(x).argmax(-1) == y).float().mean())


def run_drawn(make: Callable[[], tuple[Tensor, Tensor]], name: str, steps: int, lr: float) -> dict[str, float]:
    x, y = make()
    net = Classifier(BLOCKS[name], x.shape[-1], x.shape[-1], y.shape[-1])
    return train(net, make, steps, lr, lambda: sum(accuracy(net, *make()) for _ in range(10)) / 10)


def run_mnist1d(name: str, steps: int, lr: float) -> dict[str, float]:
    (x, y), (x_test, y_test) = mnist1d()
    net = Classifier(BLOCKS[name], 1, 10, 0)

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(x), (BATCH,))
        shift = int(torch.randint(-3, 4, ()))  # the same signal a little earlier or later
        return x[rows].roll(shift, 1), y[rows]

    return train(net, draw, steps, lr, lambda: accuracy(net, x_test, y_test))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("copying", "induction", "mnist1d", "all"), default="all")
    parser.add_argument("--blocks", nargs="*", choices=sorted(BLOCKS), help="default: those that the task is about")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=5e-3)
    parser.add_argument("--smoke", action="store_true", help="5 steps, nothing written")
    given = parser.parse_args()
    torch.set_num_threads(1)
    steps = 5 if given.smoke else given.steps
    tasks: dict[str, Callable[[str], dict[str, float]]] = {
        "copying": lambda name: run_drawn(selective_copying, name, steps, given.lr),
        "induction": lambda name: run_drawn(induction_heads, name, steps, given.lr),
        "mnist1d": lambda name: run_mnist1d(name, steps, given.lr),
    }
    rows = []
    for task in tasks if given.task == "all" else [given.task]:
        for name in given.blocks or (BLOCKS if task == "mnist1d" else SELECTIVE):
            torch.manual_seed(0)
            rows.append({"task": task, "block": name, "steps": steps, **tasks[task](name)})
            print("{task:10} {block:16} accuracy {accuracy:.3f}  {cpu_ms_per_step:7.1f} ms a step".format(**rows[-1]))
    if not given.smoke:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "structured_blocks.json").write_text(json.dumps(rows, indent=2) + "\n")
        table = ["| task | block | steps | accuracy | CPU ms a step |", "|---|---|---|---|---|"]
        table += [
            "| {task} | {block} | {steps} | {accuracy:.3f} | {cpu_ms_per_step:.1f} |".format(**row) for row in rows
        ]
        (RESULTS / "structured_blocks.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
