"""The optimizer step of one member as a LightningModule; the network itself knows nothing of Lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from anneal.batching import RunPlan
from anneal.mixing import mix, mixed_share
from anneal.models.build import Classifier, key_randomness
from anneal.models.layers import KeyedRandom
from anneal.optimizers.build import build_optimizer
from anneal.params import UserError
from anneal.schedules import factor, momentum_at
from anneal.training.data import Batch
from anneal.training.gradients import (
    add_noise_,
    clip_adaptive_,
    clip_value_,
    head_parameters,
    limit_norms_,
    noise_std,
    share_at_bound,
    unit_weights,
)
from anneal.training.losses import LOSSES
from anneal.training.nonfinite import Skipped, culprit, first_bad
from anneal.training.transfer import Freezing

Figures = dict[str, float]

SUMS = (
    "loss_sum",
    "norm_sum",
    "correct",
    "num_seen",
    "num_steps",
    "clipped",
    "clipped_units",
    "num_skipped",
    "skipped_in_a_row",
)
"""Attributes of `TrainingModule` that add up over an epoch, and that a run which goes on within one needs again."""

MOST_SKIPPED = 10
"""Optimizer steps in a row that may be skipped before the run has diverged."""


class Diverged(UserError):
    """A loss or a gradient is not finite."""


class TrainingModule(pl.LightningModule):
    """A loss on microbatches whose gradients add up to the mean over the samples of a whole window.

    Parameters
    ----------
    classifier
        uint8 NHWC to logits.
    plan
        How each epoch falls into windows and microbatches.
    seed
        Of dropout, stochastic depth and mixing, each drawn from (seed, technique, epoch, microbatch), and of gradient noise.
    num_classes
        Width of the logits.
    optimizer
        Arguments of `anneal.optimizers.build_optimizer` but for the network.
    schedule
        Arguments of `anneal.schedules.factor` and `momentum_at` but for the step.
    loss, loss_arguments
        A name of `anneal.training.losses.LOSSES`, and its arguments beside targets, weights and smoothing.
    label_smoothing
        Of the targets; 0 is off.
    class_weights
        float (num_classes,) weights of the loss by class, or None.
    l1, l2
        Weights in the loss of the sum of the absolute values, and of half the sum of the squares, of all weights but
        vectors (biases, scales); 0 is off.
    mixing
        Arguments of `anneal.mixing.mix` but for batch and key; None is off.
    max_norm
        Largest norm of a unit's incoming weights after each optimizer step, or None.
    gradient_clip, gradient_clip_value, gradient_clip_adaptive
        Largest norm of the gradient of an optimizer step, largest absolute value of its entries, largest ratio of a
        unit's gradient to its weights; at most one of the three, the others None.
    gradient_noise
        ``std`` and ``decay`` of `anneal.training.gradients.add_noise_`; None, or an ``std`` of 0, is off.
    constants
        Figures that are the same in every epoch, to be logged with it.
    freezing
        Which layers learn at each step; None: all at all.
    on_nan
        What becomes of an optimizer step with a loss or a gradient that is not finite: ``stop`` the run before it is made,
        or ``skip`` it.
    """

    def __init__(
        self,
        classifier: Classifier,
        plan: RunPlan,
        *,
        seed: int,
        num_classes: int,
        optimizer: Mapping[str, Any],
        schedule: Mapping[str, Any],
        loss: str = "cross_entropy",
        loss_arguments: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
        class_weights: torch.Tensor | None = None,
        l1: float = 0.0,
        l2: float = 0.0,
        mixing: Mapping[str, float] | None = None,
        max_norm: float | None = None,
        gradient_clip: float | None = None,
        gradient_clip_value: float | None = None,
        gradient_clip_adaptive: float | None = None,
        gradient_noise: Mapping[str, float] | None = None,
        constants: Mapping[str, float] | None = None,
        freezing: Freezing | None = None,
        on_nan: str = "stop",
    ) -> None:
        super().__init__()
        self.classifier = classifier
        self.plan = plan
        self.seed = seed
        self.num_classes = num_classes
        self.optimizer_arguments = dict(optimizer)
        self.auto_rate = self.optimizer_arguments["arguments"]["lr"] == "auto"
        self.schedule_arguments = dict(schedule)
        self.factor_at: Callable[[int, Sequence[float]], float] = partial(factor, **schedule)
        self.momentum_at: Callable[[int], float | None] = partial(momentum_at, **schedule)
        self.loss = partial(LOSSES[loss], label_smoothing=label_smoothing, **(loss_arguments or {}))
        self.l1 = l1
        self.l2 = l2
        self.mixing = dict(mixing or {})
        self.mixes = any(self.mixing.get(name, 0.0) > 0 for name in ("mixup_alpha", "cutmix_alpha"))
        self.class_weights: torch.Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.gradient_clip = gradient_clip
        self.gradient_clip_value = gradient_clip_value
        self.gradient_clip_adaptive = gradient_clip_adaptive
        clips = (gradient_clip, gradient_clip_value, gradient_clip_adaptive)
        self.clips = any(most is not None for most in clips)
        self.gradient_noise = dict(gradient_noise) if gradient_noise and gradient_noise["std"] else None
        self.max_norm = max_norm
        self.units = unit_weights(classifier) if max_norm is not None else []
        self.constants = dict(constants or {})
        self.freezing = freezing
        self.trainable_share = 1.0
        self.figures: Figures = {}
        self.extras: Figures = {}
        self.val_losses: list[float] = []
        self.window = WindowNorms(classifier)
        self.draws = any(isinstance(module, KeyedRandom) and module.rate > 0 for module in classifier.modules())
        self.splits_windows = any(epoch.size > epoch.microbatch for epoch in plan.epochs)
        self.weights: list[nn.Parameter] = [p for p in classifier.parameters() if p.requires_grad]
        self.decayed = [p for p in self.weights if p.ndim > 1]
        head = head_parameters(classifier) if gradient_clip_adaptive is not None else set()
        self.adaptive = [p for p in self.weights if p not in head]
        self.is_sam = bool((self.optimizer_arguments.get("sam") or {}).get("rho"))
        self.rate = 0.0
        self.momentum: float | None = None
        self.norm = torch.zeros(())
        self.again = False
        self._evaluated: tuple[int, int] | None = None
        self._resumed: dict[str, Any] | None = None
        self._unchecked: list[tuple[Batch, torch.Tensor]] = []
        self.skips = on_nan == "skip"
        self.skipped = False
        self.skipped_in_a_row = 0
        self.notice: str | None = None
        self._noticed = False
        self._places = [(m._buffers, name) for m in classifier.network.modules() for name in m._buffers]
        self._before_window: list[torch.Tensor] = []
        self._counts_before = (0, 0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer; its groups remember their peak rate as ``initial_lr``."""
        if self.auto_rate:
            # The range test ran in the first process alone.
            self.peak_rate = self.trainer.strategy.broadcast(self.optimizer_arguments["arguments"]["lr"])
        staged = self.freezing is not None and self.freezing.wakes
        optimizer = build_optimizer(self.classifier, **self.optimizer_arguments, staged=staged)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def set_rates(self) -> None:
        """Set the rate of every parameter group for the optimizer step to come, and the momentum where it cycles.

        No scheduler object: a rate is a function of the step (and of the validation losses so far), so there is no state
        to save but those losses, and a resumed run takes the same rates.
        """
        step = self.trainer.global_step
        factor = self.factor_at(step, self.val_losses)
        momentum = self.momentum_at(step)
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
                if momentum is not None and has_momentum(group):
                    set_momentum(group, momentum)
                    self.momentum = momentum
        self.rate = self.peak_rate * factor

    def set_learning(self) -> None:
        """Freeze and wake layers for the optimizer step to come."""
        if self.freezing is None:
            return
        # DDP waits for the gradient of every parameter that had one when it began.
        if self.freezing.set(self.trainer.global_step, skip_gradients=self.plan.world_size == 1):
            self.weights = self.freezing.awake()
            awake = set(self.weights)
            self.units = [w for w in unit_weights(self.classifier) if w in awake] if self.max_norm is not None else []
            self.trainable_share = self.freezing.share()
        self.extras["trainable_share"] = self.trainable_share

    @property
    def peak_rate(self) -> float:
        """Rate at factor 1, of the groups that no factor of their own applies to."""
        return float(self.optimizer_arguments["arguments"]["lr"])

    @peak_rate.setter
    def peak_rate(self, rate: float) -> None:
        self.optimizer_arguments["arguments"]["lr"] = rate

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a resumed run needs beside the weights: the validation losses, which plateau reads, and the epoch's sums.

        Plain numbers; of the sums those of each process.
        """
        checkpoint["val_losses"] = list(self.val_losses)
        names = [name for name in SUMS if hasattr(self, name)]
        sums = torch.tensor([float(getattr(self, name)) for name in names], dtype=self.loss_sum.dtype)
        by_process = self.trainer.strategy.all_gather(sums.to(self.device)).reshape(-1, len(names)).T.tolist()
        checkpoint["epoch_sums"] = dict(zip(names, by_process, strict=True))
        checkpoint["epoch_extras"] = dict(self.extras)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what `on_save_checkpoint` added; the sums once the run begins."""
        self.val_losses = list(checkpoint["val_losses"])
        self._resumed = checkpoint

    def on_train_start(self) -> None:
        """Go on within an epoch, where the run was resumed there: an epoch's start would have made these anew."""
        checkpoint, self._resumed = self._resumed, None
        if checkpoint is None:
            return
        self._start_sums()
        self.extras = dict(checkpoint["epoch_extras"])
        for name, by_process in checkpoint["epoch_sums"].items():
            new, old = by_process[self.global_rank % len(by_process)], getattr(self, name)
            setattr(self, name, torch.full_like(old, new) if torch.is_tensor(old) else type(old)(new))

    # ---- training ---------------------------------------------------------------------------------------------------

    def on_train_epoch_start(self) -> None:
        """Start the epoch's sums."""
        self._start_sums()
        self.extras = dict(self.constants)

    def _start_sums(self) -> None:
        """Set the epoch's sums to 0: plain tensors, since Lightning's own logging costs more than a small network."""
        self.trainer.accumulate_grad_batches = self.plan[self.current_epoch].accumulation
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self.loss_sum = torch.zeros((), dtype=wide, device=self.device)
        self.norm_sum = torch.zeros((), dtype=wide, device=self.device)
        self.correct = torch.zeros((), dtype=torch.int64, device=self.device)
        self.num_seen = 0
        self.num_steps = 0
        self.num_skipped = 0
        if self.clips:
            self.clipped = torch.zeros((), dtype=wide, device=self.device)
            self.clipped_units = torch.zeros((), dtype=wide, device=self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return a microbatch's share of the window's mean loss, times what Lightning and DDP divide by."""
        epoch, microbatch = batch.epoch, batch.microbatch
        plan = self.plan[epoch]
        window_samples = plan.window_samples(plan.window_of(microbatch))
        padding = microbatch >= plan.microbatches_per_epoch
        num = 0 if padding else len(batch)
        # LBFGS and SAM evaluate a batch more than once before they step: only the first counts.
        self.again = self._evaluated == (epoch, microbatch)
        self._evaluated = (epoch, microbatch)
        first = batch_idx % plan.accumulation == 0
        if first and not self.again:
            self.set_rates()
            self.set_learning()
            if self.skips:
                self._keep()
        if self.splits_windows and not self.again:
            self.window.before(num, first=first)
        with frozen_statistics(self.classifier, when=self.again):
            loss, logits, labels = self.microbatch_loss(batch)
        if padding:
            loss = loss * 0.0
        elif not self.again:
            self.loss_sum += loss.detach()
            self.correct += (logits.detach().argmax(1) == labels).sum()
            self.num_seen += num
        if self.l1:
            loss = loss + (self.l1 * num) * self.absolute_sum()
        if self.l2:
            loss = loss + (self.l2 * num) * self.half_square_sum()
        loss = loss * (plan.accumulation * plan.world_size / window_samples)
        self._unchecked.append((batch, loss.detach()))
        return loss

    def microbatch_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the sum over a microbatch of what is trained on: mixed, smoothed, under the microbatch's own draws.

        Without the penalties on weights. Needs no trainer.

        Returns
        -------
        tuple
            The loss, a scalar; logits (N, num_classes); labels (N,), of mixed samples that with the larger part.
        """
        epoch, microbatch = batch.epoch, batch.microbatch
        if self.draws:
            key_randomness(self.classifier, self.seed, epoch, microbatch)
        images, labels = batch.images, batch.labels
        targets = labels
        if self.mixes:
            targets = F.one_hot(labels, self.num_classes).to(torch.float32)
            images, targets = mix(images, targets, seed=self.seed, epoch=epoch, microbatch=microbatch, **self.mixing)
            labels = targets.argmax(1)
        logits = self.classifier(images)
        return self.summed_loss(logits, targets), logits, labels

    def summed_loss(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the sum over samples of the loss that is trained on, smoothed and weighted by class.

        Each sample's loss is multiplied by the weight of its class, and the mean is over the number of samples, not over
        the sum of their weights: so that a sample counts the same in every window.
        """
        return self.loss(logits, targets, self.class_weights)

    def absolute_sum(self) -> torch.Tensor:
        """Return the sum of the absolute values of the weights that penalties are on."""
        return torch.stack([p.abs().sum() for p in self.decayed]).sum()

    def half_square_sum(self) -> torch.Tensor:
        """Return half the sum of the squares of the weights that penalties are on."""
        return 0.5 * torch.stack([p.square().sum() for p in self.decayed]).sum()

    def on_after_backward(self) -> None:
        """Leave frozen layers without a gradient, before anything measures or uses it."""
        if self.freezing is not None:
            self.freezing.drop_gradients()

    def on_fit_end(self) -> None:
        """Leave a network that is trainable in all its layers, as it came."""
        if self.freezing is not None:
            self.freezing.end()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: ARG002
        """Measure the gradient's norm, clip it, add noise, and bring BatchNorm's running statistics up to date.

        Raises
        ------
        Diverged, Skipped
            The window's loss or its gradient is not finite; nothing but gradients, sums and running statistics has changed.
        """
        gradients = [p.grad for p in self.weights if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        self._check_finite(norm)
        if self.gradient_clip is not None:
            nn.utils.clip_grads_with_norm_(self.weights, self.gradient_clip, norm)
        # Of SAM's two gradients the first only says where to look.
        if (self.clips or self.gradient_noise is not None) and (self.again or not self.is_sam):
            self._clip_and_disturb(gradients, norm)
        if self.again:
            return
        self.norm = norm
        # A step that mixed precision skips has an infinite norm.
        self.norm_sum += norm.nan_to_num(0.0, 0.0, 0.0)
        self.num_steps += 1
        if self.splits_windows:
            self.window.close(self.trainer.strategy if self.plan.world_size > 1 else None)

    def _clip_and_disturb(self, gradients: list[torch.Tensor], norm: torch.Tensor) -> None:
        """Count a step that was clipped by norm, or clip it another way; then add noise, which no clip shall cut."""
        if self.gradient_clip is not None:
            # An infinite norm is that of a step which mixed precision skips.
            self.clipped += (norm > self.gradient_clip) & norm.isfinite()
        elif self.gradient_clip_value is not None:
            self.clipped += clip_value_(gradients, self.gradient_clip_value)
        elif self.gradient_clip_adaptive is not None:
            pairs = [(p, p.grad) for p in self.adaptive if p.grad is not None]
            share = clip_adaptive_([p for p, _ in pairs], [g for _, g in pairs], self.gradient_clip_adaptive)
            self.clipped += share > 0
            self.clipped_units += share
        if self.gradient_noise is not None:
            named = self.classifier.named_parameters()
            add_noise_(named, seed=self.seed, step=self.trainer.global_step, **self.gradient_noise)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Make the step, and keep each unit's incoming weights within their norm; or skip it."""
        try:
            super().optimizer_step(*arguments, **options)
        except Skipped as skipped:
            self._skip(str(skipped))
            return
        self.skipped, self.skipped_in_a_row = False, 0
        if self.max_norm is not None:
            limit_norms_(self.units, self.max_norm)

    # ---- what is not finite -----------------------------------------------------------------------------------------

    def _check_finite(self, norm: torch.Tensor) -> None:
        """Raise what ``on_nan`` asks for where a loss of the window, or the norm of its gradient, is not finite.

        The one place in a window that waits for the device; of several processes all learn the same, and decide alike. Of
        mixed precision with a scaler an infinite gradient is the scaler's business, which then skips the step by itself.
        """
        checked, self._unchecked = self._unchecked, []
        losses = [loss.float() for _, loss in checked]
        values = torch.stack(losses if self._scaler is not None else [*losses, norm.float()])
        if self.plan.world_size > 1:
            values = self.trainer.strategy.all_gather(values)
        rows = values.reshape(-1, values.shape[-1]).tolist()
        if (bad := first_bad(rows)) is None:
            return
        process, number = bad
        what = "the loss" if number < len(checked) else "the norm of the gradient"
        batch, _ = checked[min(number, len(checked) - 1)]
        # Layers that synchronise need all processes for this.
        with self.trainer.precision_plugin.forward_context(), frozen_statistics(self.classifier):
            source = culprit(self.classifier, lambda: self.microbatch_loss(batch)[0])
        if self.plan.world_size > 1:
            source = self.trainer.strategy.broadcast(source, src=process)
        what = f"{what} is {rows[process][number]} (not finite first: {source})"
        if self.skips:
            raise Skipped(what)
        raise self._diverged(what, self.trainer.global_step + 1)

    @property
    def _scaler(self) -> Any:
        return getattr(self.trainer.precision_plugin, "scaler", None)

    def _kept(self) -> list[torch.Tensor]:
        """Return what a forward pass or the measuring of a step changes, in place."""
        buffers = [of[name] for of, name in self._places]
        sums = [getattr(self, name, None) for name in SUMS]
        return [tensor for tensor in (*buffers, *sums) if isinstance(tensor, torch.Tensor)]

    def _keep(self) -> None:
        """Note how things stand before a window."""
        kept = self._kept()
        if not self._before_window:
            self._before_window = [torch.empty_like(tensor) for tensor in kept]
        torch._foreach_copy_(self._before_window, kept)
        self._counts_before = self.num_seen, self.num_steps

    @torch.no_grad()
    def _skip(self, what: str) -> None:
        """Leave everything but the count of steps as it was before the window."""
        step = self.trainer.global_step + 1
        if self._scaler is not None:
            self._scaler.update()  # it would refuse the next step otherwise
        self.window.give_up()
        for tensor, before in zip(self._kept(), self._before_window, strict=True):
            tensor.copy_(before)
        self.num_seen, self.num_steps = self._counts_before
        self.skipped = True
        self.num_skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MOST_SKIPPED:
            raise self._diverged(f"{MOST_SKIPPED} steps in a row were skipped, of the last {what}", step)
        if not self._noticed:
            self._noticed = True
            self.notice = (
                f"warning: epoch {self.current_epoch + 1}, step {step} is skipped at learning rate {self.rate:.3g}: {what}; "
                f"nan/skipped counts all that are"
            )

    def _diverged(self, what: str, step: int) -> Diverged:
        return Diverged(
            f"training diverged: {what} in epoch {self.current_epoch + 1}, step {step}, at learning rate {self.rate:.3g}; lower optimizer.{self.optimizer_arguments['name']}.lr, lengthen "
            f"schedule.warmup.length, or set regularization.gradient_clip: 1.0"
        )

    # ---- validation -------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        if self.num_skipped and not self.num_steps:
            raise self._diverged("all steps of the epoch were skipped", self.trainer.global_step)
        self.val_loss = torch.zeros_like(self.loss_sum)
        self.val_correct = torch.zeros_like(self.correct)
        self.val_seen = 0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        """Add up plain cross entropy and right answers."""
        logits = self.classifier(batch.images).float()
        self.val_loss += F.cross_entropy(logits, batch.labels, reduction="sum")
        self.val_correct += (logits.argmax(1) == batch.labels).sum()
        self.val_seen += len(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the epoch's figures, once, as means over samples (losses, accuracies) and over steps (gradient norm)."""
        sums = torch.stack(
            [self.loss_sum, self.correct.to(self.loss_sum.dtype), self.loss_sum.new_tensor(self.num_seen)]
        )
        if self.plan.world_size > 1:
            sums = self.trainer.strategy.reduce(sums, reduce_op="sum")
        loss_sum, correct, seen = sums.tolist()
        self.extras |= self._measured()
        val_loss = float(self.val_loss) / self.val_seen
        if not math.isfinite(val_loss):
            raise self._diverged(f"the validation loss is {val_loss}", self.trainer.global_step)
        self.figures = {
            "train/loss": loss_sum / seen,
            "train/accuracy": correct / seen,
            "val/loss": val_loss,
            "val/accuracy": float(self.val_correct) / self.val_seen,
            "lr": self.rate,
            "grad_norm": float(self.norm_sum) / self.num_steps,
            "batch_size": self.plan[self.current_epoch].size,
            **({"momentum": self.momentum} if self.momentum is not None else {}),
            **self.extras,
        }
        self.val_losses.append(val_loss)
        # For callbacks such as early stopping, and not the extras: Lightning takes half a millisecond for each. The logger
        # gets them directly, for Lightning rounds what it passes on to float32.
        self.log_dict({name: v for name, v in self.figures.items() if name not in self.extras}, logger=False)
        if self.trainer.logger is not None:
            self.trainer.logger.log_metrics({**self.figures, "epoch": self.current_epoch + 1}, self.trainer.global_step)

    @torch.no_grad()
    def _measured(self) -> Figures:
        """Return what the techniques that are on did in the epoch, or to the weights by its end."""
        found: Figures = {}
        if self.skips:
            found["nan/skipped"] = self.num_skipped
        if self.l1:
            found["penalty/l1"] = self.l1 * float(self.absolute_sum())
        if self.l2:
            found["penalty/l2"] = self.l2 * float(self.half_square_sum())
        if self.clips:
            found["clip/share"] = float(self.clipped) / self.num_steps
        if self.gradient_clip_adaptive is not None:
            found["clip/units"] = float(self.clipped_units) / self.num_steps
        if self.gradient_noise is not None:
            size = noise_std(self.trainer.global_step - 1, **self.gradient_noise)
            found["gradient_noise/norm"] = size * math.sqrt(sum(p.numel() for p in self.weights))
        if self.max_norm is not None:
            found["max_norm/share"] = share_at_bound(self.units, self.max_norm)
        if self.mixes:
            epoch = self.current_epoch
            number = self.plan[epoch].microbatches_per_epoch
            found["mixed/share"] = mixed_share(number, seed=self.seed, epoch=epoch, **self.mixing)
        return found


def has_momentum(group: Mapping[str, Any]) -> bool:
    """Say whether a parameter group has a momentum, ``momentum`` or the first of ``betas``; one that is 0 is none."""
    return bool(group.get("momentum") or (group.get("betas") and group["betas"][0]))


def set_momentum(group: dict[str, Any], momentum: float) -> None:
    """Set the momentum of a parameter group that has one."""
    if group.get("momentum"):
        group["momentum"] = momentum
    else:
        group["betas"] = (momentum, *group["betas"][1:])


@contextmanager
def frozen_statistics(network: nn.Module, *, when: bool = True) -> Iterator[None]:
    """Keep running statistics as they are within the block, while norm layers normalise by the batch's own.

    Parameters
    ----------
    network
        Whose batch and instance norm layers are meant.
    when
        False does nothing.
    """
    layers = [m for m in network.modules() if isinstance(m, _NormBase) and m.track_running_stats] if when else []
    before = [(layer, layer.momentum) for layer in layers]
    for layer in layers:
        if isinstance(layer, _BatchNorm):
            layer.track_running_stats = False
        else:  # instance norm updates whatever the flag says
            layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in before:
            layer.track_running_stats, layer.momentum = True, momentum


class WindowNorms:
    """BatchNorm's running statistics where a window is more than one forward pass.

    They are updated once an optimizer step from the mean over all the window's microbatches on all devices, each by its
    number of samples, so they depend neither on accumulation (updating at every microbatch makes them noisier) nor on
    which device saw which. With momentum 1 a layer's running buffers hold the statistics of the microbatch it has just
    seen; their sums are the same to the bit whoever adds them up, as long as there are two of them.

    Parameters
    ----------
    network
        Whose BatchNorm layers are meant; those with ``momentum=None`` average over the whole run and are left alone.
    """

    def __init__(self, network: nn.Module) -> None:
        found = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        self.tracking = [(m, float(m.momentum)) for m in found if m.momentum is not None]
        self.layers = self.tracking
        self.buffers: list[torch.Tensor] = []
        self.before_window = self.total = torch.zeros(0)
        self.seen = 0
        self.newest = 0

    def before(self, num: int, *, first: bool) -> None:
        """Prepare the forward pass of a microbatch of ``num`` samples; ``first`` opens a window."""
        if first:
            # Those of layers that are frozen for this step stay as they are, to the bit.
            self.layers = [(m, momentum) for m, momentum in self.tracking if m.track_running_stats]
            self.buffers = [b for m, _ in self.layers for b in (m.running_mean, m.running_var) if b is not None]
            self.counts = [None if m.num_batches_tracked is None else m.num_batches_tracked + 1 for m, _ in self.layers]
            if self.layers:
                # All in one vector: a call for each layer takes longer than the arithmetic.
                self.before_window = torch.cat(self.buffers)
                self.total = torch.zeros_like(self.before_window)
            self.seen = 0
        else:
            self._add()
        self.newest = num
        self._set_momenta([1.0 if num else 0.0] * len(self.layers))

    def _add(self) -> None:
        """Add the statistics of the newest microbatch up."""
        self.seen += self.newest
        if self.newest and self.layers:
            # Not add with alpha, which may round once where product and sum round twice.
            self.total += torch.cat(self.buffers) * self.newest
        self.newest = 0

    def close(self, strategy: Any = None) -> None:
        """Mix the window's mean into the running statistics; ``strategy`` reduces over processes."""
        self._add()
        if not self.layers:
            return
        total = torch.cat([self.total, self.total.new_tensor([self.seen])])
        if strategy is not None:
            total = strategy.reduce(total, reduce_op="sum")
        mean, start = total[:-1] / total[-1], 0
        for buffer, momentum in zip(self.buffers, [m for _, m in self.layers for _ in range(2)], strict=True):
            part = slice(start, start := start + buffer.numel())
            torch.lerp(self.before_window[part], mean[part], momentum, out=buffer)
        self.give_up()
        for (layer, _), count in zip(self.layers, self.counts, strict=True):
            if layer.num_batches_tracked is not None and count is not None:
                layer.num_batches_tracked.copy_(count)

    def give_up(self) -> None:
        """Give the layers their momenta back, where the window makes no step."""
        self._set_momenta([momentum for _, momentum in self.layers])

    def _set_momenta(self, momenta: Sequence[float]) -> None:
        for (layer, _), momentum in zip(self.layers, momenta, strict=True):
            if layer.momentum != momentum:
                layer.momentum = momentum
