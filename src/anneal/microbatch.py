"""Find the microbatch that suits a machine: the largest that fits a GPU, the fastest on a CPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anneal.batching import BatchConfig, devices_that_divide
from anneal.models.config import InitConfig, ModelConfig
from anneal.optimizers.config import OptimizerConfig
from anneal.params import UserError
from anneal.schedules import ScheduleConfig
from anneal.training.config import AveragingConfig, HardwareConfig, LossConfig, RegularizationConfig, TrainerConfig
from anneal.training.data import Batch
from anneal.training.machine import global_settings, quiet, resolve_devices
from anneal.training.noise_scale import NoiseScale
from anneal.training.setup import Setup, set_up

NOISE = 1.15
"""Two rates on a CPU within this ratio are the same."""

REPEATS = 5
"""Steps timed of each microbatch, by turns, so that a busy moment of the machine does not fall on one of them alone."""

SECONDS = 60.0
"""After this long no further round of repeats is begun."""

TINY_RATE = 1e-8
"""Learning rate of the trials: real steps that lead nowhere."""


@dataclass(frozen=True)
class Trial:
    """What was measured of one microbatch.

    Parameters
    ----------
    microbatch
        Samples of a forward pass.
    fits
        Whether memory was enough.
    images_per_second
        Of whole optimizer steps, without loading; None where it did not fit.
    peak_bytes
        Most memory of the device in use; None on a CPU, or where it did not fit.
    """

    microbatch: int
    fits: bool = True
    images_per_second: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Finding:
    """A proposal and what it rests on.

    Parameters
    ----------
    trials
        By ascending microbatch.
    current, proposal
        ``batch.microbatch`` as it is and as it should be.
    accelerator
        ``cpu``, ``gpu`` or ``mps``.
    processes
        That share a batch.
    batch_norm
        Whether the network normalises over the microbatch.
    """

    trials: list[Trial]
    current: int
    proposal: int
    accelerator: str
    processes: int
    batch_norm: bool

    def lines(self) -> list[str]:
        """Return the table, the proposal and what it changes, for a terminal."""
        rows: list[tuple[str, ...]] = [("microbatch", "images/s", "peak memory")]
        for trial in self.trials:
            rate = f"{trial.images_per_second:,.0f}" if trial.images_per_second is not None else "-"
            peak = f"{trial.peak_bytes / 2**20:,.0f} MiB" if trial.peak_bytes is not None else ""
            rows.append((str(trial.microbatch), *((rate, peak) if trial.fits else ("does not fit", ""))))
        if all(trial.peak_bytes is None for trial in self.trials):
            rows = [row[:2] for row in rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        why = (
            f"the fastest; within {NOISE - 1:.0%} counts as equal, and of equals the nearest to the present one"
            if self.accelerator == "cpu"
            else "the largest that fits"
        )
        lines = [*("  " + row for row in table), "", f"proposed: batch.microbatch {self.proposal} ({why})"]
        if self.proposal == self.current:
            return [*lines, "params.yaml says so already"]
        seen = "batch normalisation sees it, and " if self.batch_norm else ""
        return [
            *lines,
            f"now: {self.current}. The microbatch is part of the recipe: {seen}augmentation, mixing and dropout are drawn by "
            f"it. Results change, and train runs again",
        ]


# ---- which ----------------------------------------------------------------------------------------------------------


def candidates(size: int, *, processes: int = 1, smallest: int = 1, multiple_of: int = 1) -> list[int]:
    """Return the microbatches of at least ``smallest`` samples that divide a batch over processes, ascending.

    ``multiple_of`` is what they must be a multiple of, such as the ghost batches of a norm.

    >>> candidates(48, processes=2, smallest=2)
    [2, 3, 4, 6, 8, 12, 24]
    """
    share = size // processes
    return [m for m in range(smallest, share + 1) if share % m == 0 and m % multiple_of == 0]


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """Return the largest of ascending ``sizes`` that fits, or None; where one fits, all smaller ones do.

    Doubles while it fits, then halves what is between the last that fitted and the first that did not, so that a GPU is
    not filled to the brim more often than it must be.

    >>> largest_that_fits([1, 2, 3, 4, 6, 8, 12, 24], lambda m: m <= 7)
    6
    """
    best, failed, i = -1, len(sizes), 0
    while i < failed:
        if not fits(sizes[i]):
            failed = i
            break
        best = i
        if i == len(sizes) - 1:
            break
        i = max(i + 1, max(k for k, size in enumerate(sizes) if size <= 2 * sizes[i]))
    while failed - best > 1:
        middle = (best + failed) // 2
        if fits(sizes[middle]):
            best = middle
        else:
            failed = middle
    return sizes[best] if best >= 0 else None


def fastest(rates: Mapping[int, float], current: int) -> int:
    """Return the microbatch to propose from images a second: of those that are not slower by more than noise the nearest to ``current``.

    >>> fastest({8: 500.0, 16: 900.0, 32: 1000.0, 64: 960.0}, current=64), fastest({8: 500.0, 32: 1000.0}, current=8)
    (64, 32)
    """
    best = max(rates.values())
    near = [m for m, rate in rates.items() if rate * NOISE >= best]
    return min(near, key=lambda m: (abs(m - current), -m))


# ---- trials ---------------------------------------------------------------------------------------------------------


class Steps:
    """Real optimizer steps of one microbatch: forward, backward and update, accumulated over a window.

    Parameters
    ----------
    setup
        Of the run; its weights hardly move.
    context
        Mixed precision, as a function that returns a context.
    microbatch
        Samples of a forward pass.
    passes
        Forward passes of a step.
    device
        Of the network.
    """

    def __init__(
        self, setup: Setup, context: Callable[[], Any], microbatch: int, passes: int, device: torch.device
    ) -> None:
        self.module, self.context, self.microbatch, self.passes = setup.module, context, microbatch, passes
        self.optimizer = self.module.configure_optimizers()
        index = [i % len(setup.train) for i in range(passes * microbatch)]
        self.batches: list[Batch] = [
            setup.train.__getitems__([(0, k), *index[k * microbatch : (k + 1) * microbatch]]).to(device)
            for k in range(passes)
        ]

    def __call__(self) -> None:
        """Make one step."""

        def closure() -> torch.Tensor:
            self.optimizer.zero_grad()
            for batch in self.batches:
                with self.context():
                    loss, _, _ = self.module.microbatch_loss(batch)
                loss = loss / (self.passes * self.microbatch)
                loss.backward()
            return loss

        self.optimizer.step(closure)  # type: ignore[arg-type]

    def timed(self, steps: int = 1) -> float:
        """Return images a second of some steps."""
        synchronize(self.batches[0].images.device)
        start = time.perf_counter()
        for _ in range(steps):
            self()
        synchronize(self.batches[0].images.device)
        return steps * self.passes * self.microbatch / (time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error says that memory was not enough: torch's own class, or its words where it has none."""
    words = (
        "out of memory",
        "can't allocate memory",
        "not enough memory",
        "alloc_failed",
        "cudnn_status_not_supported",
    )
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def try_out(
    setup: Setup, microbatch: int, *, context: Callable[[], Any], passes: int, noise: NoiseScale | None = None
) -> Trial:
    """Do what an epoch does with a microbatch, and say whether memory was enough.

    Two optimizer steps, whose second has the optimizer's state beside it; the measurement of the noise scale; a batch of
    the validation split.

    Parameters
    ----------
    setup
        Its module on the device.
    microbatch
        To try.
    context
        Mixed precision, as a function that returns a context.
    passes
        Forward passes of a step: with more than one there are gradients beside the activations.
    noise
        What the recipe measures after each epoch.
    """
    module, device = setup.module, setup.module.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        module.train()
        steps = Steps(setup, context, microbatch, passes, device)
        steps()
        rate = steps.timed()
        if noise is not None:
            noise.measure(module, context=context)
        module.eval()
        with torch.no_grad(), context():
            module.classifier(next(iter(setup.data_module().val_dataloader())).images.to(device))
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        return Trial(microbatch, images_per_second=rate, peak_bytes=peak)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return Trial(microbatch, fits=False)
    finally:
        steps = None  # type: ignore[assignment]
        module.zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure_rates(
    steps: Mapping[int, Callable[[], float]],
    *,
    repeats: int = REPEATS,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.monotonic,
) -> dict[int, float]:
    """Return the best images a second of each microbatch, measured by turns; one half as fast as another is left at that.

    Parameters
    ----------
    steps
        Microbatch to a function that makes a step and returns its images a second; the first call is a warm-up.
    repeats
        Rounds after the warm-up.
    seconds
        No round but the first is begun after so long.
    clock
        Seconds of a monotonic clock.
    """
    started = clock()
    for step in steps.values():
        step()
    rates: dict[int, float] = {}
    for number in range(repeats):
        if number and clock() - started > seconds:
            break
        best = max(rates.values(), default=0.0)
        for microbatch, step in steps.items():
            if rates.get(microbatch, best) * 2 >= best:
                rates[microbatch] = max(step(), rates.get(microbatch, 0.0))
    return rates


def find_microbatch(
    *,
    store: Path,
    augmented: Path,
    seed: int,
    model: ModelConfig,
    init: InitConfig,
    optimizer: OptimizerConfig,
    schedule: ScheduleConfig,
    batch: BatchConfig,
    loss: LossConfig,
    regularization: RegularizationConfig,
    averaging: AveragingConfig,
    trainer: TrainerConfig,
    hardware: HardwareConfig,
    report: Callable[[str], None] = lambda _: None,
) -> Finding:
    """Try the divisors of ``batch.size`` on this machine, with the real network, loss and optimizer on training images.

    On a GPU the largest that fits, on a CPU the fastest. Writes nothing.

    Parameters
    ----------
    store
        Folder of the processed data set; only its training and validation images are read.
    augmented
        Folder of policy.json and, optionally, ``extra/``.
    seed
        Of everything random.
    model, init, optimizer, schedule, batch, loss, regularization, averaging, trainer
        Sections of the member.
    hardware
        What the machine has.
    report
        Called with a line before each trial.

    Raises
    ------
    UserError
        The settings do not fit the data or the machine; LBFGS, which leaves no choice; or not even the smallest fits.
    """
    if optimizer.name == "LBFGS":
        raise UserError("optimizer.name: LBFGS needs batch.microbatch = batch.size, so there is no microbatch to find")
    accelerator, devices = resolve_devices(hardware, batch)
    if hardware.devices == "auto" and accelerator == "gpu":
        devices = devices_that_divide(
            torch.cuda.device_count(), size=batch.size, microbatch=1, num_nodes=hardware.num_nodes
        )
    processes = devices * hardware.num_nodes
    batch_norm = model.norm.name == "batch"
    ghost = (model.norm.batch.ghost or 1) if batch_norm else 1
    sizes = candidates(batch.size, processes=processes, smallest=1 + batch_norm, multiple_of=ghost)
    if batch.size % processes or not sizes:
        raise UserError(
            f"params.yaml: batch.size: found {batch.size}, which leaves no microbatch for {processes} processes"
            f"{f' and ghost batches of {ghost}' if ghost > 1 else ''}; allowed: a multiple of hardware.devices {devices} x "
            f"hardware.num_nodes {hardware.num_nodes}{f' x model.norm.batch.ghost {ghost}' if ghost > 1 else ''}"
        )
    with quiet(), global_settings():
        setup = set_up(
            store=store,
            augmented=augmented,
            seed=seed,
            model=model,
            init=init,
            optimizer=optimizer,
            schedule=schedule,
            batch=batch.model_copy(update={"microbatch": sizes[-1]}),
            loss=loss,
            regularization=regularization,
            averaging=averaging,
            trainer=trainer,
            hardware=hardware.model_copy(update={"devices": devices}),
        )
        module = setup.module
        module.auto_rate, module.peak_rate = False, TINY_RATE
        # A Trainer sets torch's switches as for a run, and knows its precision and device; this one never runs.
        runner = setup.trainer([], devices=1, num_nodes=1, strategy="auto", logger=False)
        context = runner.precision_plugin.forward_context
        module.to(runner.strategy.root_device)
        if accelerator == "cpu":
            trials, proposal = _on_cpu(setup, sizes, context, batch, processes, report)
        else:
            trials, proposal = _on_gpu(setup, sizes, context, batch, processes, report)
    return Finding(trials, batch.microbatch, proposal, accelerator, processes, batch_norm)


def _on_cpu(
    setup: Setup,
    sizes: Sequence[int],
    context: Callable[[], Any],
    batch: BatchConfig,
    processes: int,
    report: Callable[[str], None],
) -> tuple[list[Trial], int]:
    setup.module.train()
    report(f"timing microbatches of {', '.join(map(str, sizes))} by turns")
    share = batch.size // processes
    steps = {m: Steps(setup, context, m, share // m, torch.device("cpu")).timed for m in sizes}
    rates = measure_rates(steps)
    return [Trial(m, images_per_second=rate) for m, rate in rates.items()], fastest(rates, batch.microbatch)


def _on_gpu(
    setup: Setup,
    sizes: Sequence[int],
    context: Callable[[], Any],
    batch: BatchConfig,
    processes: int,
    report: Callable[[str], None],
) -> tuple[list[Trial], int]:
    trials: dict[int, Trial] = {}
    share = batch.size // processes

    def fits(microbatch: int) -> bool:
        report(f"trying a microbatch of {microbatch}")
        noise = NoiseScale(
            setup.train, num_microbatches=max(2, batch.noise_microbatches), microbatch=microbatch, seed=setup.seed
        )
        trials[microbatch] = try_out(
            setup,
            microbatch,
            context=context,
            # A batch that grows accumulates later, where it does not at first.
            passes=2 if batch.growth.at else min(2, share // microbatch),
            noise=noise if batch.noise_microbatches and len(noise.index) else None,
        )
        return trials[microbatch].fits

    best = largest_that_fits(sizes, fits)
    if best is None:
        raise UserError(
            f"out of memory with a microbatch of {sizes[0]}; choose a smaller model.{setup.architecture['name']} or "
            f"preprocess.size, or trainer.precision bf16-mixed"
        )
    return [trials[m] for m in sorted(trials)], best
