"""What the machine has: accelerator, devices, threads and precision; and a quiet run on it."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy

from anneal.batching import BatchConfig, devices_that_divide
from anneal.params import UserError
from anneal.training.config import HardwareConfig

QUIET = (
    # The loader decides by measurement how many workers pay.
    ".*does not have many workers.*",
    # Every rank validates everything, so that there is nothing to bring together.
    ".*sync_dist=True.*",
    # Lightning 2.6 asks torch in a way that torch has since deprecated.
    ".*isinstance\\(treespec, LeafSpec\\).*",
    # The loader of a resumed run skips by index what the run has had.
    ".*your dataloader is not resumable.*",
)
"""Warnings of Lightning that ask nothing of the user."""


def resolve_devices(hardware: HardwareConfig, batch: BatchConfig) -> tuple[str, int]:
    """Return the accelerator and the number of processes on each node.

    ``auto`` takes one process on a CPU, and as many GPUs as divide the batch.

    Raises
    ------
    UserError
        The machine has no such accelerator, or fewer devices.
    """
    found = {"gpu": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    accelerator: str = hardware.accelerator
    if accelerator == "auto":
        accelerator = next((kind for kind, count in found.items() if count), "cpu")
    if accelerator == "cpu":
        return "cpu", hardware.devices if isinstance(hardware.devices, int) else 1
    available = found[accelerator]
    if not available:
        raise UserError(
            f"params.yaml: hardware.accelerator: found {accelerator}, but this machine has none; allowed: auto | cpu"
        )
    if isinstance(hardware.devices, int):
        if hardware.devices > available:
            raise UserError(
                f"params.yaml: hardware.devices: found {hardware.devices}, but this machine has {available}; "
                f"allowed: auto, or at most {available}"
            )
        return accelerator, hardware.devices
    return accelerator, devices_that_divide(
        available, size=batch.size, microbatch=batch.microbatch, num_nodes=hardware.num_nodes
    )


def check_precision(precision: str, accelerator: str) -> None:
    """Refuse a precision that this machine computes a hundred times slower than float32.

    Raises
    ------
    UserError
        16-bit floats on a CPU, or bfloat16 on a CPU without instructions for it.
    """
    if accelerator != "cpu" or precision == "32-true":
        return
    if precision == "16-mixed":
        raise UserError("params.yaml: trainer.precision: found 16-mixed on a CPU; allowed: 32-true, or a GPU")
    if not cpu_has_bfloat16():
        raise UserError(
            "params.yaml: trainer.precision: found bf16-mixed on a CPU without bfloat16 instructions, where it is about "
            "100 times slower than 32-true; allowed: 32-true"
        )


def cpu_has_bfloat16() -> bool:
    """Return whether this CPU multiplies bfloat16 in hardware (AVX512-BF16, AMX, or Arm's BF16)."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if any(capabilities.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16")):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def set_threads(threads: int | str, processes: int) -> int:
    """Set and return the number of CPU threads; ``auto`` shares the cores that this process may use."""
    if isinstance(threads, str):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, cores // processes)
    torch.set_num_threads(threads)
    return threads


def strategy_for(world_size: int) -> Any:
    """Return Lightning's strategy; BatchNorm's buffers are ours to bring together, once an optimizer step."""
    if world_size == 1:
        return "auto"
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's banners and the warnings that our own choices cause from the terminal."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            for message in QUIET:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def global_settings() -> Iterator[None]:
    """Put torch's process-wide switches back as they were."""
    mode = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # Deterministic mode would overwrite all new memory with NaN first; nothing here reads memory that it has not written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode[0], warn_only=mode[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
