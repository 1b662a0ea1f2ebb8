"""Study of the values that a network gets: `preprocessing`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from anneal.reporting.lines import Panel
from anneal.statistics import MAX_DIMENSIONS, WHITENING
from anneal.studies.base import dense, rate_of
from anneal.studies.study import (
    Point,
    Result,
    Results,
    Study,
    against,
    best_rate,
    by_seed,
    compared,
    differs,
    edge,
    grouped,
    mean_of,
    over_epochs,
    over_steps,
    rate_text,
    stated,
    where,
    without_band,
)

SCHEMES = ("none", "scale", "center", "center_image", "standardize", "standardize_pixel", "pca", "zca")

BASELINE = "scale"
"""What the others are compared with: values from 0 to 1, and nothing else done to them."""

MULTIPLES = tuple(10 ** (i / 2) for i in range(-2, 3))
"""Of the recipe's rate: a decade down and up, by half decades."""

RAW = 0.01
"""Multiplies the rates of ``none``: its values, up to 255, bring larger gradients."""

HIDDEN = (64, 64)
"""Units of the network of dense layers."""

COLOURED = 7
"""Lines that the palette tells apart; those beyond them are dashed."""


def preprocessing_grid(recipe: Mapping[str, Any], _num_train: int) -> list[Point]:
    """Return each scheme at five rates, for a network of dense layers and for the recipe's own.

    Left out are ``pca`` for a network that needs images, and whitening where three channels would be too much for it.
    """
    optimizer, rate, own = recipe["optimizer"]["name"], rate_of(recipe), recipe["model"]["name"]
    networks: dict[str, dict[str, Any]] = {"mlp": dense(recipe, HIDDEN)}
    if own != "mlp":
        networks[own] = {}
    small = 3 * recipe["preprocess"]["size"] ** 2 <= MAX_DIMENSIONS
    points = []
    for network, overrides in networks.items():
        for scheme in SCHEMES:
            if (scheme == "pca" and network != "mlp") or (scheme in WHITENING and not small):
                continue
            for multiple in MULTIPLES:
                lr = float(f"{rate * multiple * (RAW if scheme == 'none' else 1.0):.6g}")
                points.append(
                    Point(
                        f"{network} {scheme} lr {rate_text(lr)}",
                        {**overrides, "preprocess": {"normalize": scheme}, "optimizer": {optimizer: {"lr": lr}}},
                        {"network": network, "scheme": scheme, "lr": lr},
                    )
                )
    return points


def steps_to_learn(result: Result, share: float = 0.5) -> float:
    """Return the steps until the training loss first stood at ``share`` of a guess's; NaN where it never did.

    >>> steps_to_learn(Result(Point("", {}), 0, [], [(1, 0.1, 2.3), (3, 0.1, 1.2), (5, 0.1, 1.1)], 10))
    5.0
    """
    limit = share * math.log(result.num_classes)
    return float(next((step for step, _, loss in result.steps if loss <= limit), math.nan))


def draw_preprocessing(results: Results) -> list[Panel]:
    """Draw for each network the loss against the rate, and the curves of each scheme at its best rate."""
    ceiling = 1.5 * math.log(results[0].num_classes)
    panels = []
    for network, group in grouped(results, "network").items():
        schemes = grouped(group, "scheme")
        styles = {scheme: "-" if SCHEMES.index(scheme) < COLOURED else "--" for scheme in schemes}
        colours = {scheme: SCHEMES.index(scheme) for scheme in schemes}
        best = {scheme: where(some, lr=best_rate(some)) for scheme, some in schemes.items()}
        panels += [
            Panel(
                [
                    without_band(
                        against(
                            some,
                            "lr",
                            lambda r: r.final("val/loss"),
                            scheme,
                            style="." + styles[scheme],
                            colour=colours[scheme],
                            ceiling=ceiling,
                        )
                    )
                    for scheme, some in schemes.items()
                ],
                f"{network}: validation loss of the last epoch, mean",
                "learning rate",
                "loss",
                log_x=True,
                log_y=True,
            ),
            Panel(
                [
                    without_band(
                        over_steps(
                            some,
                            f"{scheme}, rate {rate_text(some[0].at['lr'])}",
                            style=styles[scheme],
                            colour=colours[scheme],
                            ceiling=ceiling,
                        )
                    )
                    for scheme, some in best.items()
                ],
                f"{network}: training loss at the best rate, mean (cut off)",
                "optimizer steps",
                "loss",
                log_y=True,
            ),
            Panel(
                [
                    over_epochs(some, "val/accuracy", scheme, style=styles[scheme], colour=colours[scheme])
                    for scheme, some in best.items()
                ],
                f"{network}: validation accuracy at the best rate",
                "epoch",
                "accuracy",
            ),
        ]
    return panels


def conclude_preprocessing(results: Results) -> list[str]:
    """Say what each scheme reached at its own best rate, and how soon, beside scaled values and beside the lowest loss."""
    limit = 0.5 * math.log(results[0].num_classes)
    lines = []
    for network, group in grouped(results, "network").items():
        schemes = grouped(group, "scheme")
        best = {scheme: where(some, lr=best_rate(some)) for scheme, some in schemes.items()}
        for scheme, runs in best.items():
            lines.append(
                f"{network}, {scheme}: best rate {rate_text(best_rate(schemes[scheme]))}{edge(schemes[scheme])}, training "
                f"loss {limit:.2f} (half a guess's) after {stated([steps_to_learn(r) for r in runs], 0)} steps; last "
                f"epoch: training loss {stated([r.final('train/loss') for r in runs])}, validation loss "
                f"{stated([r.final('val/loss') for r in runs])}, accuracy "
                f"{stated([r.final('val/accuracy') for r in runs])}"
            )
        steps = {scheme: {r.seed: steps_to_learn(r) for r in runs} for scheme, runs in best.items()}
        order = sorted(best, key=lambda scheme: mean_of(best[scheme]))
        for scheme in best:
            if scheme != BASELINE:
                figures = {
                    f"steps to {limit:.2f}": differs(steps[scheme], steps[BASELINE], 0),
                    **{
                        words: differs(by_seed(best[scheme], name), by_seed(best[BASELINE], name))
                        for words, name in (("training loss", "train/loss"), ("validation loss", "val/loss"))
                    },
                }
                text = "; ".join(f"{words} {said}" for words, said in figures.items())
                lines.append(f"{network}, {scheme} against {BASELINE}, each at its best rate: {text}")
        for scheme in order[1:]:
            text = compared(best[scheme], best[order[0]])
            lines.append(f"{network}, {scheme} against the lowest validation loss, {order[0]}: {text}")
        rates = [best_rate(some) for scheme, some in schemes.items() if scheme != "none"]
        lines.append(
            f"{network}: best rates from {rate_text(min(rates))} to {rate_text(max(rates))}, that of none apart"
        )
    return lines


PREPROCESSING = Study(
    "preprocessing",
    "How fast and how well does a network train on centred, standardised and whitened values?",
    preprocessing_grid,
    draw_preprocessing,
    conclude_preprocessing,
    base={"trainer": {"epochs": 5}},
)
