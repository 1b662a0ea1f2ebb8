"""Draw every schedule as params.yaml has it: the picture of docs/schedules.md.

    python bench/schedules.py [FILE]

It is drawn by the functions that train, over a run of 20 epochs of 50 steps; plateau gets a validation loss that falls
for six epochs and then stalls.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

from anneal import params
from anneal.reporting.lines import Line, Panel, draw_panels
from anneal.schedules import ScheduleConfig, factor, factor_arguments, momentum_at

ROOT = Path(__file__).parents[1]
EPOCHS, STEPS = 20, 50
LOSSES = [2.0 / (epoch + 1) if epoch < 6 else 0.4 for epoch in range(EPOCHS)]


def panel(schedule: dict, name: str) -> Panel:
    arguments = factor_arguments({**schedule, "name": name}, total_steps=EPOCHS * STEPS, steps_per_epoch=STEPS)
    steps = range(EPOCHS * STEPS)
    epochs = [step / STEPS for step in steps]
    lines = [Line("", epochs, [factor(step, LOSSES[: step // STEPS], **arguments) for step in steps])]
    if momentum_at(0, **arguments) is not None:
        lines[0] = Line("rate", lines[0].x, lines[0].y)
        lines.append(Line("momentum", epochs, [momentum_at(step, **arguments) or 0.0 for step in steps], style="--"))
    return Panel(lines, title=name, y_limits=(-0.03, 1.05))


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/pictures/schedules.png"
    schedule = params.read_yaml(ROOT / "params.yaml")["schedule"]
    names = get_args(ScheduleConfig.model_fields["name"].annotation)
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"rate / peak rate against epoch, a run of {EPOCHS}, with the arguments of params.yaml"
    draw_panels([panel(schedule, name) for name in names], path, title, columns=5, size=(2.7, 1.9), dpi=80)
    print(f"drew {path}")


if __name__ == "__main__":
    main()
