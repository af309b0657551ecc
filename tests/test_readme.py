"""The README's program runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_first_program_runs():
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    shorter = program.replace("num_steps=300", "num_steps=5").replace("num_samples=20", "num_samples=2")
    assert shorter != program
    names: dict = {}
    exec(compile(shorter.replace("warmup_steps=10", "warmup_steps=2"), str(README), "exec"), names)
    assert names["paths"].values.shape == (200, 8, 5, 3)
    assert names["smoothed"].mean.shape == (8, 40, 2)
    groups = names["idata"].groups() if callable(names["idata"].groups) else names["idata"].children
    assert {"posterior", "predictions", "observed_data"} <= set(groups)
