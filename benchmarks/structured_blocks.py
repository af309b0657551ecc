"""What structured blocks learn: selective copying, induction heads, MNIST-1D, small ListOps; and dense A or diagonal.

Selective copying and induction heads (Gu & Dao 2023, section 4.1) ask for a choice by content, of which a
time-invariant block alone is not capable. MNIST-1D (Greydanus 2020) is a classification of series of 40 steps: LSSL, S4
and S4D are the dense, the low-rank and the diagonal form of one state matrix, and task "ablation" trains the three on
it in the same way. ListOps is a small one, of at most 40 tokens. One block, one seed, one row.

    python benchmarks/structured_blocks.py                   # everything: about 40 minutes of one free core
    python benchmarks/structured_blocks.py --smoke           # seconds: whether it runs
    python benchmarks/structured_blocks.py --task mnist1d --blocks S4D --steps 4000
    python benchmarks/structured_blocks.py --task listops --validate --lr 8e-3 --steps 1000   # to choose a rate
    python benchmarks/structured_blocks.py --task cost       # a training step of LSSL, S4, S4D and S5 by themselves

Each row is written as soon as it is known; rows of the same task, block and seed take each other's place.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness import RESULTS, machine, pin_threads

pin_threads(1)

import torch  # noqa: E402  (threads are pinned before torch is imported)
import torch.nn.functional as F  # noqa: E402
from structured_tasks import Task, induction_heads, listops, moved_mnist1d, selective_copying  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from pyro_ssm import blocks  # noqa: E402
from pyro_ssm.infer import parameter_groups  # noqa: E402

Block = Callable[[int, tuple[float, float]], blocks.StructuredBlock]
BLOCKS: dict[str, Block] = {  # of so many channels, with first steps in a range that suits the length of the task
    "LSSL": lambda n, steps: blocks.LSSL(n, 16, step_range=steps),
    "S4": lambda n, steps: blocks.S4(n, 16, step_range=steps),
    "S4D": lambda n, steps: blocks.S4D(n, 16, step_range=steps),
    "S5": lambda n, steps: blocks.S5(n, 32, num_blocks=4, step_range=steps),
    "LinOSS": lambda n, steps: blocks.LinOSS(n, 32),
    "LRU": lambda n, steps: blocks.LRU(n, 32),
    "Mamba": lambda n, steps: blocks.Mamba(n, 8, step_range=(1e-2, 1.0)),
    "Mamba2": lambda n, steps: blocks.Mamba2(n, 8, step_range=(1e-2, 1.0)),
}


@dataclass(frozen=True)
class Recipe:
    """How a task is learnt: AdamW on ``parameter_groups``, a rate that rises for a tenth of the steps and falls."""

    make: Callable[[], Task]
    names: tuple[str, ...]  # of the blocks that the task is about
    steps: int
    channels: int = 32
    layers: int = 2
    batch: int = 64
    lr: float = 5e-3
    weight_decay: float = 0.01
    dropout: float = 0.0
    smoothing: float = 0.0
    first_steps: tuple[float, float] = (0.003, 0.3)

    def settings(self) -> dict[str, Any]:
        """What a row tells of it."""
        return {key: value for key, value in asdict(self).items() if key not in ("make", "names", "steps")}


# about series of 40 steps, of which all are read before the answer: long steps, both directions
WHOLE = {"channels": 48, "batch": 128, "lr": 8e-3, "weight_decay": 0.05, "dropout": 0.1, "first_steps": (0.02, 0.5)}
RECIPES = {
    "copying": Recipe(selective_copying, ("Mamba", "Mamba2", "S4D", "S5"), 1500),
    "induction": Recipe(induction_heads, ("Mamba", "Mamba2", "S4D", "S5"), 3000),
    "mnist1d": Recipe(moved_mnist1d, ("S4D", "S5", "Mamba", "LinOSS", "LRU"), 1000, smoothing=0.05, **WHOLE),
    "ablation": Recipe(moved_mnist1d, ("LSSL", "S4", "S4D"), 600, smoothing=0.05, **WHOLE),
    "listops": Recipe(listops, ("S4", "S4D", "S5"), 2000, **WHOLE),
}


class Causal(nn.Module):
    """A residual stack, and scores of the last steps."""

    def __init__(self, block: Callable[[int], blocks.StructuredBlock], task: Task, recipe: Recipe) -> None:
        super().__init__()
        self.answers = task.answers
        stack = [block(recipe.channels) for _ in range(recipe.layers)]
        self.stack = blocks.ResidualStack(stack, task.features, task.classes, dropout=recipe.dropout)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """``(batch, time, features)`` to ``(batch, answers, classes)``."""
        return self.stack(x)[0][:, -self.answers :]


class BothWays(nn.Module):
    """Layers that read from the past and from the future, and scores of the mean and the largest over time."""

    def __init__(self, block: Callable[[int], blocks.StructuredBlock], task: Task, recipe: Recipe) -> None:
        super().__init__()
        size = recipe.channels
        widths = [task.features] + [2 * size] * (recipe.layers - 1)
        self.layers = nn.ModuleList(
            blocks.Bidirectional.of(block, width, size, dropout=recipe.dropout) for width in widths
        )
        self.leave = nn.Linear(4 * size, task.classes)

    def forward(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """``(batch, time, features)`` to ``(batch, 1, classes)``."""
        for layer in self.layers:
            x = torch.cat(layer(x, lengths), -1)
        if lengths is None:
            pooled = torch.cat([x.mean(1), x.amax(1)], -1)
        else:  # outputs are 0 where a series has ended
            ended = (torch.arange(x.shape[1]) >= lengths.unsqueeze(-1)).unsqueeze(-1)
            pooled = torch.cat([x.sum(1) / lengths.unsqueeze(-1), x.masked_fill(ended, -torch.inf).amax(1)], -1)
        return self.leave(pooled).unsqueeze(1)


def learn(name: str, task: Task, recipe: Recipe, steps: int, seed: int) -> dict[str, Any]:
    """Train one net and judge it once, at the end."""
    torch.manual_seed(seed)
    net = (Causal if task.answers else BothWays)(lambda n: BLOCKS[name](n, recipe.first_steps), task, recipe)
    optimizer = torch.optim.AdamW(parameter_groups(net, lr=recipe.lr, weight_decay=recipe.weight_decay))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps, pct_start=0.1
    )
    start, began = time.process_time(), time.perf_counter()
    for _ in range(steps):
        x, lengths, y = task.draw(recipe.batch)
        optimizer.zero_grad()
        scores = net(x, lengths).flatten(0, 1)
        F.cross_entropy(scores, y.flatten(), label_smoothing=recipe.smoothing).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    cpu, wall = time.process_time() - start, time.perf_counter() - began
    net.eval()
    with torch.no_grad():
        right = [(net(x, lengths).argmax(-1) == y).flatten() for x, lengths, y in task.held_out()]
    return {
        "accuracy": float(torch.cat(right).float().mean()),
        "answers": sum(map(len, right)),
        "chance": task.chance,
        "parameters": sum(p.numel() for p in net.parameters()),
        "cpu_seconds": round(cpu, 1),
        "wall_seconds": round(wall, 1),
        "cpu_ms_per_step": 1000 * cpu / steps,
    }


def cost(name: str, state_size: int, length: int, repeats: int = 5) -> dict[str, Any]:
    """CPU time of a forward and a backward pass of 8 series of 16 channels: the least of some repeats."""
    make = {"LSSL": blocks.LSSL, "S4": blocks.S4, "S4D": blocks.S4D, "S5": blocks.S5}[name]
    block, u, times = make(16, state_size), torch.randn(8, length, 16), []
    for _ in range(repeats):
        start = time.process_time()
        block(u)[0].square().mean().backward()
        times.append(time.process_time() - start)
    return {"block": name, "state_size": state_size, "length": length, "cpu_ms": 1000 * min(times)}


# ------------------------------------------------------------------------------------------------ tables


def known() -> dict[str, Any]:
    """What earlier runs have found, and this machine."""
    file = RESULTS / "structured_blocks.json"
    return (json.loads(file.read_text()) if file.exists() else {"rows": [], "cost": []}) | {"machine": machine()}


def with_row(found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """The row in the place of one of the same task, block and seed."""
    key = ("task", "block", "seed")
    others = [r for r in found["rows"] if any(r[k] != row[k] for k in key)]
    return {**found, "rows": [*others, row]}


def write(found: dict[str, Any]) -> None:
    """The file and the table, with everything that is known so far."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "structured_blocks.json").write_text(json.dumps(found, indent=2) + "\n")
    lines = ["# structured_blocks", ""]
    for task, recipe in RECIPES.items():
        rows = [row for row in found["rows"] if row["task"] == task]
        if not rows:
            continue
        first = (recipe.make.__doc__ or "").splitlines()[0]
        told = ", ".join(f"{key} {value}" for key, value in rows[0]["settings"].items())
        lines += [
            f"## {task}",
            "",
            f"{first} The recipe takes {recipe.steps} steps; rows of fewer are shorter runs.",
            "",
        ]
        lines += [f"Settings: {told}.", ""]
        lines += ["| block | seed | steps | accuracy | chance | parameters | CPU ms a step | CPU s | wall s |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        lines += [
            "| {block} | {seed} | {steps} | {accuracy:.3f} | {chance:.3f} | {parameters} | {cpu_ms_per_step:.1f} "
            "| {cpu_seconds:.0f} | {wall_seconds:.0f} |".format(**row)
            for row in rows
        ]
        lines += [""]
    if found["cost"]:
        lines += ["## cost", "", (cost.__doc__ or "").splitlines()[0], ""]
        lines += ["| block | N | length | CPU ms |", "|---|---|---|---|"]
        lines += ["| {block} | {state_size} | {length} | {cpu_ms:.1f} |".format(**row) for row in found["cost"]]
        lines += [""]
    facts = found["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in facts["versions"].items())
    lines += [
        f"{facts['cpu']}, {facts['threads']} thread, shared with other work. Python {facts['python']}; {versions}."
    ]
    (RESULTS / "structured_blocks.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=(*RECIPES, "cost", "all"), default="all")
    parser.add_argument("--blocks", nargs="*", choices=sorted(BLOCKS), help="default: those that the task is about")
    parser.add_argument("--steps", type=int, help="default: the task's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, help="default: the recipe's own")
    parser.add_argument(
        "--validate", action="store_true", help="listops: judged by examples held out of the training set, not written"
    )
    parser.add_argument("--smoke", action="store_true", help="2 steps each, nothing written")
    given = parser.parse_args()
    for name, recipe in RECIPES.items():
        if given.task not in (name, "all"):
            continue
        recipe = recipe if given.lr is None else replace(recipe, lr=given.lr)
        task = listops(validate=True) if given.validate and name == "listops" else recipe.make()
        for block in given.blocks or recipe.names:
            steps = 2 if given.smoke else given.steps or recipe.steps
            row = {"task": name, "block": block, "seed": given.seed, "steps": steps}
            row |= learn(block, task, recipe, steps, given.seed) | {"settings": recipe.settings()}
            print(
                "{task:10} {block:8} accuracy {accuracy:.3f}  {cpu_ms_per_step:7.1f} ms a step".format(**row),
                flush=True,
            )
            if not (given.smoke or given.validate):
                write(with_row(known(), row))
    if given.task in ("cost", "all"):
        lengths = (64,) if given.smoke else (64, 1024)
        rows = [cost(name, n, t) for name in ("LSSL", "S4", "S4D", "S5") for n in (16, 64) for t in lengths]
        if given.smoke:
            print(rows)
        else:
            write({**known(), "cost": rows})


if __name__ == "__main__":
    main()
