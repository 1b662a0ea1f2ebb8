"""docs/params.md: every key of params.yaml in one table, made of its schema, its comments and the tables below.

Written by ``python -m anneal.reference``; no stage imports this module.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anneal.params import read_yaml
from anneal.recipe import json_schema
from anneal.store import write_text


@dataclass(frozen=True)
class Key:
    """One row of the table.

    Parameters
    ----------
    key
        With dots.
    kind
        Type in the words of Python, ``block`` for a mapping of keys that have rows of their own.
    default
        What params.yaml ships; for a key that it leaves out, the value that then applies.
    allowed
        Range or choices, empty where the type says all.
    description
        What it does.
    source
        Paper or library that the method comes from, as Markdown; empty for plain settings.
    """

    key: str
    kind: str
    default: str
    allowed: str
    description: str
    source: str


# ---- comments of params.yaml ----------------------------------------------------------------------------------------


def comments(text: str) -> dict[str, str]:
    r"""Return the comment of each key that has one, by dotted key.

    That is the comment behind the key; without one, the whole lines of comment right above it. Keys inside a flow mapping
    have none: the comment there is the block's.

    >>> comments("a:  # one\n  # two\n  # lines\n  b: 1\n  c: {d: 2}  # three\n")
    {'a': 'one', 'a.b': 'two lines', 'a.c': 'three'}
    """
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    above: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("#"):
            above.append(bare.removeprefix("#").strip())
            continue
        match = re.match(r"^( *)([\w-]+):(?: [^#]*)?(?:#\s*(.*))?$", line)
        if match:
            indent, name, comment = len(match[1]), match[2], match[3]
            while parents and parents[-1][0] >= indent:
                parents.pop()
            parents.append((indent, name))
            if comment or above:
                found[".".join(part for _, part in parents)] = (comment or " ".join(above)).strip()
        above = []
    return found


# ---- keys of the schema ---------------------------------------------------------------------------------------------


def _resolved(node: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    while "$ref" in node:
        target: Any = root
        for part in node["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        node = {**target, **{key: value for key, value in node.items() if key != "$ref"}}
    return node


def _options(node: Mapping[str, Any], root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the alternatives of a node, those of nested ``anyOf`` too."""
    node = _resolved(node, root)
    if "anyOf" not in node:
        return [node]
    return [option for part in node["anyOf"] for option in _options(part, root)]


def schema_keys(root: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Yield every key of a JSON schema: with dots, its node, and whether the schema names keys below it."""

    def below(node: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
        for name, child in node.get("properties", {}).items():
            key = f"{path}.{name}" if path else name
            child = _resolved(child, root)
            blocks = [option for option in _options(child, root) if "properties" in option]
            yield key, child, bool(blocks)
            for block in blocks:
                yield from below(block, key)

    yield from below(root, "")


KINDS = {
    "integer": "int",
    "number": "float",
    "string": "str",
    "boolean": "bool",
    "null": "null",
    "object": "mapping",
}
"""JSON's types in Python's words."""


def kind(node: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Return the type of a node, e.g. ``int or null``.

    >>> kind({"anyOf": [{"type": "array", "items": {"type": "number"}}, {"type": "null"}]}, {})
    'list[float] or null'
    """
    words = []
    for option in _options(node, root):
        word = KINDS.get(str(option.get("type")), "any")
        if option.get("type") == "array":
            word = f"list[{kind(option.get('items', {}), root)}]"
        words.append("block" if "properties" in option else word)
    return " or ".join(dict.fromkeys(words))


def allowed(node: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Return the range or the choices of a node as Markdown, empty where its type says all.

    >>> allowed({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "const": "auto"}]}, {})
    '> 0 or `auto`'
    >>> allowed({"type": "array", "minItems": 2, "maxItems": 2, "items": {"type": "number", "minimum": 0, "maximum": 1}}, {})
    '2 values, each >= 0, <= 1'
    """
    if "allowed" in node:
        *first, last = str(node["allowed"]).split(" | ")
        return f"{', '.join(first)} or {last}" if first else last
    if "enum" in node:
        return ", ".join(f"`{choice}`" for choice in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if "anyOf" in node:
        words = (
            "`true`, `false`" if o.get("type") == "boolean" else allowed(_resolved(o, root), root)
            for o in node["anyOf"]
        )
        return " or ".join(dict.fromkeys(filter(None, words)))
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {node[name]:g}" for name, sign in signs.items() if name in node]
    if "pattern" in node:
        limits.append(PATTERNS.get(node["pattern"], f"matching `{node['pattern']}`"))
    if node.get("minLength"):
        limits.append("not empty")
    if node.get("type") == "array":
        least, most = node.get("minItems", 0), node.get("maxItems")
        count = f"{least} values" if least == most else f"at least {least}" if least else ""
        count = f"{least} to {most} values" if most and least != most else count
        each = allowed(_resolved(node.get("items", {}), root), root)
        limits += filter(None, [count, each and f"each {each}"])
    return ", ".join(limits)


PATTERNS = {
    "^[0-9a-f]{64}$": "64 hexadecimal digits",
    "^[A-Za-z0-9_-]{1,60}$": "letters, digits, `_` and `-`, at most 60",
}
"""Regular expressions of the schema in words."""


def shown(value: Any) -> str:
    """Return a value as params.yaml writes it.

    >>> shown({"lr": 5e-7, "at": [0.5, None], "sync": False})
    '{lr: 5.0e-7, at: [0.5, null], sync: false}'
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {shown(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, float):
        mantissa, _, exponent = repr(value).partition("e")
        point = "" if "." in mantissa else ".0"
        return f"{mantissa}{point}e{int(exponent)}" if exponent else mantissa
    return str(value)


# ---- what the comments of params.yaml do not say ----------------------------------------------------------------------

WORDS: dict[str, str] = {
    # Whole keys, which win over the comment in params.yaml: there the comment lists choices, or leans on its neighbours.
    "data.format": "layout of the source; auto: found by looking",
    "split": "fractions of each class that are held out, where the source brings no split of its own",
    "split.val": "validation: early stopping, best epoch and calibration are chosen on it",
    "split.test": "test: touched once, by evaluate",
    "preprocess.fit": "how an image becomes square: crop keeps the aspect and the centre, pad keeps the whole image, "
    "stretch loses the aspect",
    "preprocess.interpolation": "resampling filter; antialiased when shrinking",
    "preprocess.normalize": "what the network's first layer does to pixels, with statistics of the training split",
    "augment.policy": "a preset, or a list of albumentations transforms in their own names and arguments",
    "model.activation": "a module of torch.nn by its name; auto: GELU for convnext and airbench, else ReLU",
    "model.norm.name": "normalisation layer; auto: layer for convnext, else batch",
    "model.norm.position": "of the norm layer, before or after the activation",
    "model.norm.layer.eps": "added to the variance",
    "model.norm.batch.recalibrate.when": "averaging: of averaged weights alone; always: of the newest too, after each epoch; never",
    "model.norm.batch.recalibrate.images": "training images behind the new statistics",
    "model.norm.group.groups": "groups of channels; divides all widths",
    "model.resnet.stem": "first layers: small is a 3x3 convolution, large 7x7 with stride 2 and max-pooling for images of "
    "64 px and up",
    "model.resnet.block": "residual block: basic and bottleneck of 2015, preactivation of 2016",
    "model.wide_resnet": "a wide residual network of three stages",
    "model.wide_resnet.depth": "6 n + 4: n blocks in each of three stages",
    "model.wide_resnet.width": "factor of the stages' 16, 32 and 64 channels",
    "model.wide_resnet.block_dropout": "chance that a feature between a block's convolutions is dropped; 0: off",
    "model.airbench": "small fast network for quick high accuracy on small images",
    "model.airbench.widths": "channels of each stage; each stage halves the resolution",
    "model.convnet": "VGG-like: stages of 3x3 convolutions, each ending in 2x2 max-pooling",
    "model.convnet.depth": "3x3 convolutions in each stage",
    "model.mlp": "fully connected layers",
    "model.start_from.unfreeze": "all at once, or from the head down, one layer group each so long",
    "init.xavier_normal": "normal, variance 2 gain^2 / (fan_in + fan_out); for tanh",
    "init.xavier_uniform": "uniform, variance 2 gain^2 / (fan_in + fan_out)",
    "init.kaiming_normal": "normal, variance gain^2 / fan, gain by the activation",
    "init.kaiming_uniform": "uniform, variance gain^2 / fan, gain by the activation",
    "init.orthogonal.gain": "factor of the matrix; auto: by the activation",
    "init.orthogonal": "a random orthogonal matrix times the gain",
    "init.normal": "normal, the same for every layer, whatever its size",
    "init.uniform": "uniform, the same for every layer",
    "init.whitening": "of the patches that whiten_first takes",
    "optimizer.name": "a class of torch.optim, or of pytorch_optimizer, by its name",
    "optimizer.lr_factors": "factors of the rate by place in the network",
    "optimizer.lr_factors.head": "factor of the rate of the classifier",
    "optimizer.lr_factors.first": "factor of the rate of the first layer",
    "optimizer.lr_factors.layer_decay": "factor of the rate for each layer away from the head; 1: none",
    "optimizer.sam.rho": "radius of the neighbourhood; 0: off, 0.05 is usual",
    "optimizer.sam.adaptive": "radius relative to the size of each weight (ASAM)",
    "optimizer.RMSprop": "rates shrink with a running mean of squared gradients",
    "optimizer.Adadelta": "like RMSprop, with steps in the unit of the weights: lr 1 is the paper's",
    "optimizer.ASGD.alpha": "power by which its rate falls",
    "optimizer.ASGD.lambd": "decay of the weights, and of the rate",
    "optimizer.ASGD.t0": "step at which torch begins its own mean of the weights, which is not used",
    "optimizer.Adafactor.eps": "added to squared gradients (null: the type's own), and least scale of the weights",
    "optimizer.Adafactor.d": "largest root mean square of an update",
    "optimizer.Muon.rest": "arguments of torch.optim.AdamW for all but hidden weights",
    "optimizer.Muon.adjust_lr_fn": "factor of the rate by a matrix's shape: null is original, match_rms_adamw takes AdamW's rates",
    "optimizer.Muon.eps": "added to norms that are divided by",
    "optimizer.LAMB": "large batches: LARS's idea for Adam",
    "optimizer.ADOPT": "Adam, normalised by the second moment before this step",
    "optimizer.AdaBelief": "Adam by the variance of gradients about their mean",
    "optimizer.AdaBound": "Adam whose rates are cut to bounds that close in",
    "optimizer.Adan": "Adam with Nesterov's momentum from differences of gradients",
    "optimizer.AdEMAMix": "Adam with a second, slow mean of gradients",
    "optimizer.LaProp": "Adam whose momentum follows its normalisation",
    "optimizer.MADGRAD": "dual averaging with Adagrad's rates",
    "optimizer.NovoGrad": "Adam with one second moment a layer",
    "optimizer.Prodigy": "Adam that estimates its rate",
    "optimizer.QHAdam": "Adam whose step mixes momentum with the gradient",
    "optimizer.Ranger": "RAdam with Lookahead",
    "optimizer.SGDW": "SGD with decoupled weight decay",
    "optimizer.SignSGD": "sign of the gradient",
    "optimizer.StableAdamW": "AdamW whose updates are clipped",
    "optimizer.Tiger": "sign of the momentum, with one mean alone",
    "optimizer.Yogi": "Adam whose second moment grows slowly",
    "schedule.name": "curve of the rate after the warm-up",
    "schedule.warmup": "a rise at the start of the run",
    "schedule.warmup.length": "how long",
    "schedule.warmup.start": "factor of the curve's first value to start from",
    "schedule.one_cycle": "a rise, then a fall, with the momentum running against the rate",
    "schedule.one_cycle.rise": "share of the run that rises",
    "schedule.one_cycle.start": "factor of the peak rate at the start",
    "schedule.one_cycle.end": "factor of the peak rate at the end",
    "schedule.one_cycle.momentum": "at the low and at the peak rate; null: as it is",
    "schedule.cosine_restarts": "a cosine in each cycle",
    "schedule.cosine_restarts.multiplier": "each cycle so many times as long as the one before",
    "schedule.cosine_restarts.decay": "each cycle so many times as high as the one before",
    "schedule.cyclic": "triangles from low to the peak and back",
    "schedule.cyclic.low": "factor of the peak rate between the triangles",
    "schedule.cyclic.decay": "each triangle so many times as high; 0.5: triangular2",
    "schedule.trapezoid": "stay at the peak, then fall to 0",
    "schedule.trapezoid.decay": "how long the fall at the end is",
    "schedule.polynomial": "(1 - t) to a power",
    "schedule.multistep.milestones": "points of the run, counted from its start",
    "schedule.plateau.patience": "epochs without a lower validation loss before the rate falls",
    "schedule.plateau.cooldown": "epochs after a fall that do not count",
    "schedule.plateau.min_delta": "least fall of the loss that counts",
    "batch.growth": "enlarge the batch as training goes on",
    "batch.growth.at": "points of the run at which size is multiplied; []: off",
    "batch.growth.factor": "what size is multiplied by",
    "batch.sampling": "each image once an epoch, or each class as often (not with loss.class_weights)",
    "batch.noise_microbatches": "microbatches behind the gradient noise scale of each epoch; 0: off",
    "loss.name": "what is minimised; binary_cross_entropy: one sigmoid a class",
    "loss.focal.gamma": "how much; 0 is cross entropy",
    "regularization.label_smoothing": "share of the target that is spread over all classes; 0: off",
    "regularization.dropout": "chance that a feature before the classifier is dropped; 0: off",
    "regularization.spatial_dropout": "chance that a whole channel is dropped, after each stage of a convolutional network; 0: off",
    "regularization.mixup": "blends pairs of images and their targets",
    "regularization.mixup.alpha": "of Beta(alpha, alpha), the law of the blend; 0: off",
    "regularization.mixup.probability": "chance that a microbatch is mixed",
    "regularization.cutmix": "pastes a rectangle of another image, targets by its area",
    "regularization.cutmix.alpha": "of Beta(alpha, alpha), the law of the pasted area; 0: off",
    "regularization.cutmix.probability": "chance that a microbatch is mixed",
    "regularization.gradient_noise": "Gaussian noise on gradients, of variance std^2 / (1 + step)^decay",
    "regularization.gradient_noise.std": "standard deviation at the first step; 0: off",
    "regularization.gradient_noise.decay": "power by which the variance falls",
    "averaging.name": "mean of the weights along the run",
    "averaging.export": "the newest weights, their mean, or the better of both on validation",
    "averaging.ema": "exponential moving average over optimizer steps",
    "averaging.ema.decay": "share of the old mean that each step keeps",
    "averaging.ema.warmup": "a smaller decay at first, (1 + t) / (10 + t)",
    "averaging.swa.lr": "factor of the peak rate from start on; null: as scheduled",
    "averaging.swa.cycle": "epochs from one model of the mean to the next",
    "averaging.swa.low": "factor of that rate at the end of each cycle; 1: constant",
    "trainer.early_stopping": "stop when the validation loss no longer falls; null: off",
    "trainer.early_stopping.patience": "epochs without a lower validation loss",
    "trainer.early_stopping.min_delta": "least fall that counts",
    "trainer.precision": "of the arithmetic; 16-mixed needs a GPU",
    "trainer.deterministic": "refuse operations whose result varies, warn of them, or allow them",
    "trainer.on_nan": "what becomes of a run whose loss or gradient is no longer finite",
    "trainer.stop_on": "of diverging and dead_at_start: a run stops, with an error, once such a finding is certain",
    "ensemble.members": "who trains: a name to null or {} for no overrides, or to the seed and keys of any section from model to "
    "trainer",
    "ensemble.combine": "how the members' predictions become one; weighted and greedy fit weights on val",
    "evaluate.splits": "what gets figures; keep test out of experiment grids",
    "evaluate.tta": "test-time augmentation: views of an image whose predictions are averaged",
    "evaluate.tta.views": "of identity, hflip, vflip, shifts, five_crop, ten_crop, scales, rotations, dense, augment, some with "
    "arguments",
    "evaluate.tta.average": "what is averaged over the views; logit and log_probability give the same",
    "evaluate.tta.select": "none: all views; greedy: identity and those that lower the loss on val",
    "evaluate.calibration": "temperature: one factor of the logits, vector: a factor and a bias a class; fitted on val, and left out "
    "where cross-validation says that it does not help",
    "trainer.snapshots": "epochs at whose end the weights are kept, which evaluate combines as an ensemble of one run",
    "evaluate.grid": "further views that grid.csv compares; a view stands for itself averaged with the image, a list of views for itself",
    "evaluate.soups": "means of the members' weights, in the tables to compare with: of all members, or of those that help on val",
    "search.storage": "database of the trials: a file, or a server's address (postgresql://..., mysql+pymysql://...); all that name the "
    "same one share a study",
    "search.sampler": "how the values of a trial are drawn; TPE learns from the trials so far",
    "search.pruner": "which trials end early: those below the median of the others, or those that hyperband's brackets drop",
    "search.metric": "of the validation split, for accuracy the higher the better, for the loss the lower",
    "hardware.accelerator": "what computes; auto: a GPU where there is one",
    "hardware.devices": "auto takes one CPU process, or all GPUs that divide the batch",
    "hardware.checkpoint_every": "most work that a kill can cost, as time or optimizer steps; docs/reproducibility.md",
    "hardware.num_workers": "loader processes a device; auto: where images are large enough for them to pay",
    "tracking.uri": "MLflow's store or server: sqlite:///..., http://host:5000, postgresql://...",
    # The ends of keys, where params.yaml has no comment at the key itself.
    "lr": "peak learning rate; auto: found by a range test before training",
    "rest.lr": "peak learning rate",
    "momentum": "share of the old velocity that is kept",
    "dampening": "share of the gradient that the velocity leaves out",
    "nesterov": "take the gradient of the point that the velocity leads to",
    "weight_decay": "L2 penalty, in the gradient",
    "AdamW.weight_decay": "decoupled weight decay, times the rate",
    "Muon.weight_decay": "decoupled weight decay, times the rate",
    "rest.weight_decay": "decoupled weight decay, times the rate",
    "Adafactor.weight_decay": "decoupled weight decay, times the rate",
    "decoupled_weight_decay": "decay apart from the gradient, as in AdamW",
    "betas": "decay of the means of the gradient and of its square",
    "Adamax.betas": "decay of the mean of the gradient and of its largest size",
    "amsgrad": "take the largest second moment so far",
    "eps": "added to what is divided by",
    "norm.batch.eps": "added to the variance",
    "norm.group.eps": "added to the variance",
    "norm.instance.eps": "added to the variance",
    "whitening.eps": "added to each component's variance, as a fraction of their mean",
    "affine": "a learned scale and shift for each channel",
    "lr_decay": "of the rate, by 1 / (1 + t lr_decay), beside the schedule",
    "initial_accumulator_value": "what the sum of squares starts from",
    "alpha": "decay of the mean of squared gradients",
    "centered": "divide by the standard deviation, not the root mean square",
    "Adadelta.rho": "decay of the means of squared gradients and steps",
    "momentum_decay": "of the momentum's own schedule",
    "etas": "factors of a step where the gradient's sign turns, and where it stays",
    "step_sizes": "least and largest step",
    "beta2_decay": "power by which the decay of the second moment goes to 1",
    "max_iter": "iterations in an optimizer step",
    "max_eval": "evaluations of the batch in an optimizer step; null: 1.25 max_iter",
    "tolerance_grad": "largest gradient entry at which a step ends early",
    "tolerance_change": "least change at which a step ends early",
    "history_size": "differences of gradients that are kept",
    "line_search_fn": "how a step's length is found; null: lr",
    "ns_coefficients": "of the Newton-Schulz iteration's polynomial",
    "ns_steps": "Newton-Schulz iterations",
    "widths": "channels of each stage; each stage after the first halves the resolution",
    "convnet.widths": "channels of each stage; each stage halves the resolution",
    "depths": "residual blocks in each stage",
    "preact_resnet.stem": "as resnet.stem",
    "scale": "factor of the logits",
    "hidden": "widths of the hidden layers; []: a linear classifier",
    "constant.value": "of every weight",
    "std": "standard deviation",
    "limit": "largest absolute value",
    "gain": "factor of the standard deviation; auto: by the activation",
    "mode": "fan that keeps the variance: of the forward pass (fan_in) or of the backward pass (fan_out)",
    "tolerance": "how far from 1 a layer's variance may stay",
    "max_iterations": "attempts a layer",
    "every": "length of a stretch",
    "gamma": "what the rate is multiplied by",
    "shape": "of the curve",
    "timescale": "time after which the curve has fallen to a half, or to 1 / sqrt 2 with inverse_sqrt",
    "power": "1 is linear",
    "cycle": "length; a fraction is one of the run after the warm-up",
    "start": "when the mean begins",
}
"""Descriptions: by whole key, in place of the comment in params.yaml, and by the end of a key, where it has none."""


def _paper(label: str, arxiv: str) -> str:
    return f"[{label}](https://arxiv.org/abs/{arxiv})"


def _torch(name: str) -> str:
    return f"[torch.{name}](https://docs.pytorch.org/docs/stable/generated/torch.{name}.html)"


def _extra(label: str, arxiv: str) -> str:
    return f"[pytorch_optimizer](https://pytorch-optimizers.readthedocs.io); {_paper(label, arxiv)}"


BLOCKS = "at each block"
ALBUMENTATIONS = "[albumentations](https://albumentations.ai/docs/)"
ADAM = _paper("Kingma & Ba 2015", "1412.6980")
DECOUPLED = _paper("Loshchilov & Hutter 2019", "1711.05101")
SGDR = _paper("Loshchilov & Hutter 2017", "1608.03983")
LARGE_BATCHES = _paper("Goyal et al. 2017", "1706.02677")
CYCLES = _paper("Smith 2017", "1506.01186")
RESNET = _paper("He et al. 2016a", "1512.03385")
PREACTIVATION = _paper("He et al. 2016b", "1603.05027")
CONVNEXT = _paper("Liu et al. 2022", "2201.03545")
RECTIFIERS = _paper("He et al. 2015", "1502.01852")
AIRBENCH = _paper("Jordan 2024", "2404.00498")
GLOROT = "[Glorot & Bengio 2010](https://proceedings.mlr.press/v9/glorot10a.html)"
POLYAK_1992 = "[Polyak & Juditsky 1992](https://doi.org/10.1137/0330046)"
ALEXNET = "[Krizhevsky et al. 2012](https://papers.nips.cc/paper/4824-imagenet-classification-with-deep-convolutional-neural-networks)"
ROBBINS = "[Robbins & Monro 1951](https://doi.org/10.1214/aoms/1177729586)"
GROUPS = "[torch.optim, parameter groups](https://docs.pytorch.org/docs/stable/optim.html#per-parameter-options)"
BISHOP = "[Bishop 1995](https://doi.org/10.1162/neco.1995.7.1.108)"
BOTTOU = "[Bottou 2012](https://doi.org/10.1007/978-3-642-35289-8_25)"
PRECHELT = "[Prechelt 1998](https://doi.org/10.1007/3-540-49430-8_3)"
KROGH = "[Krogh & Hertz 1991](https://papers.nips.cc/paper/563-a-simple-weight-decay-can-improve-generalization)"
LECUN = "[LeCun et al. 1998](https://doi.org/10.1007/3-540-49430-8_2)"
KING = "[King & Zeng 2001](https://doi.org/10.1093/oxfordjournals.pan.a004868)"
SUTSKEVER = "[Sutskever et al. 2013](https://proceedings.mlr.press/v28/sutskever13.html)"

SOURCES: dict[str, str] = {
    "preprocess.normalize": f"{LECUN}; center_image: {ALEXNET}; zca: [Bell & Sejnowski 1997](https://doi.org/10.1016/S0042-6989%2897%2900121-1)",
    "preprocess.epsilon": "[Coates & Ng 2012](https://doi.org/10.1007/978-3-642-35289-8_30)",
    "augment.policy": f"{ALBUMENTATIONS}; {RESNET} (pad and crop), {_paper('DeVries & Taylor 2017', '1708.04552')} (cutout), {_paper('Zhong et al. 2020', '1708.04896')} (erasing)",
    "augment.copies": "[Chawla et al. 2002](https://doi.org/10.1613/jair.953), with transforms in place of interpolation",
    "model.name": BLOCKS,
    "model.activation": "[torch.nn](https://docs.pytorch.org/docs/stable/nn.html#non-linear-activations-weighted-sum-nonlinearity)",
    "model.norm.name": BLOCKS,
    "model.norm.position": _paper("Mishkin et al. 2017", "1606.02228"),
    "model.norm.batch": f"{_paper('Ioffe & Szegedy 2015', '1502.03167')}; {_torch('nn.BatchNorm2d')}",
    "model.norm.batch.ghost": _paper("Hoffer et al. 2017", "1705.08741"),
    "model.norm.batch.sync": _paper("Peng et al. 2018", "1711.07240"),
    "model.norm.batch.frozen": f"{RESNET}; [torchvision.ops.FrozenBatchNorm2d](https://docs.pytorch.org/vision/stable/generated/torchvision.ops.FrozenBatchNorm2d.html)",
    "model.norm.batch.recalibrate": _paper("Wu & Johnson 2021", "2105.07576"),
    "model.norm.group": f"{_paper('Wu & He 2018', '1803.08494')}; {_torch('nn.GroupNorm')}",
    "model.norm.layer": f"{_paper('Ba et al. 2016', '1607.06450')}; {CONVNEXT}; {_torch('nn.LayerNorm')}",
    "model.norm.instance": f"{_paper('Ulyanov et al. 2016', '1607.08022')}; {_torch('nn.InstanceNorm2d')}",
    "model.resnet": RESNET,
    "model.resnet.block": f"{RESNET}; preactivation: {PREACTIVATION}",
    "model.preact_resnet": PREACTIVATION,
    "model.wide_resnet": _paper("Zagoruyko & Komodakis 2016", "1605.07146"),
    "model.convnext": CONVNEXT,
    "model.convnext.layer_scale": _paper("Touvron et al. 2021", "2103.17239"),
    "model.airbench": AIRBENCH,
    "model.convnet": _paper("Simonyan & Zisserman 2015", "1409.1556"),
    "model.mlp": "[Rumelhart et al. 1986](https://doi.org/10.1038/323533a0)",
    "model.custom": "for instance [timm](https://huggingface.co/docs/timm)",
    "model.start_from": _paper("Yosinski et al. 2014", "1411.1792"),
    "model.start_from.unfreeze": _paper("Howard & Ruder 2018", "1801.06146"),
    "init.name": f"{BLOCKS}; zeros: [Goodfellow et al. 2016](https://www.deeplearningbook.org), section 8.4",
    "init.zero_last": LARGE_BATCHES,
    "init.whiten_first": AIRBENCH,
    "init.whitening": AIRBENCH,
    "init.constant": "[torch.nn.init.constant_](https://docs.pytorch.org/docs/stable/nn.init.html)",
    "init.normal": ALEXNET,
    "init.truncated_normal": CONVNEXT,
    "init.uniform": LECUN,
    "init.xavier_normal": GLOROT,
    "init.xavier_uniform": GLOROT,
    "init.kaiming_normal": RECTIFIERS,
    "init.kaiming_uniform": RECTIFIERS,
    "init.orthogonal": _paper("Saxe et al. 2014", "1312.6120"),
    "init.lsuv": _paper("Mishkin & Matas 2016", "1511.06422"),
    "optimizer.name": BLOCKS,
    "optimizer.decay_exempt": _paper("He et al. 2019", "1812.01187"),
    "optimizer.lr_factors.first": GROUPS,
    "optimizer.lr_factors.head": GROUPS,
    "optimizer.lr_factors": f"{_paper('Clark et al. 2020', '2003.10555')}; {_paper('Bao et al. 2022', '2106.08254')}",
    "optimizer.sam": _paper("Foret et al. 2021", "2010.01412"),
    "optimizer.sam.adaptive": _paper("Kwon et al. 2021", "2102.11600"),
    "optimizer.SGD": f"{_torch('optim.SGD')}; {SUTSKEVER}",
    "optimizer.Adagrad": f"{_torch('optim.Adagrad')}; [Duchi et al. 2011](https://jmlr.org/papers/v12/duchi11a.html)",
    "optimizer.RMSprop": f"{_torch('optim.RMSprop')}; {_paper('Graves 2013', '1308.0850')}",
    "optimizer.Adadelta": f"{_torch('optim.Adadelta')}; {_paper('Zeiler 2012', '1212.5701')}",
    "optimizer.Adam": f"{_torch('optim.Adam')}; {ADAM}",
    "optimizer.Adam.amsgrad": _paper("Reddi et al. 2018", "1904.09237"),
    "optimizer.Adam.decoupled_weight_decay": DECOUPLED,
    "optimizer.AdamW": f"{_torch('optim.AdamW')}; {DECOUPLED}",
    "optimizer.AdamW.amsgrad": _paper("Reddi et al. 2018", "1904.09237"),
    "optimizer.Adamax": f"{_torch('optim.Adamax')}; {ADAM}",
    "optimizer.NAdam": f"{_torch('optim.NAdam')}; [Dozat 2016](https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ)",
    "optimizer.RAdam": f"{_torch('optim.RAdam')}; {_paper('Liu et al. 2020', '1908.03265')}",
    "optimizer.ASGD": f"{_torch('optim.ASGD')}; {POLYAK_1992}",
    "optimizer.Rprop": f"{_torch('optim.Rprop')}; [Riedmiller & Braun 1993](https://doi.org/10.1109/ICNN.1993.298623)",
    "optimizer.Adafactor": f"{_torch('optim.Adafactor')}; {_paper('Shazeer & Stern 2018', '1804.04235')}",
    "optimizer.LBFGS": f"{_torch('optim.LBFGS')}; [Liu & Nocedal 1989](https://doi.org/10.1007/BF01589116)",
    "optimizer.Muon": f"{_torch('optim.Muon')}; [Jordan et al. 2024](https://kellerjordan.github.io/posts/muon/)",
    "optimizer.Muon.adjust_lr_fn": _paper("Liu et al. 2025", "2502.16982"),
    "optimizer.Muon.rest": f"{_torch('optim.AdamW')}; {DECOUPLED}",
    "optimizer.LARS": _extra("You et al. 2017", "1708.03888"),
    "optimizer.LAMB": _extra("You et al. 2020", "1904.00962"),
    "optimizer.Lion": _extra("Chen et al. 2023", "2302.06675"),
    "optimizer.ADOPT": _extra("Taniguchi et al. 2024", "2411.02853"),
    "optimizer.AdaBelief": _extra("Zhuang et al. 2020", "2010.07468"),
    "optimizer.AdaBound": _extra("Luo et al. 2019", "1902.09843"),
    "optimizer.Adan": _extra("Xie et al. 2022", "2208.06677"),
    "optimizer.AdEMAMix": _extra("Pagliardini et al. 2024", "2409.03137"),
    "optimizer.LaProp": _extra("Ziyin et al. 2020", "2002.04839"),
    "optimizer.MADGRAD": _extra("Defazio & Jelassi 2021", "2101.11075"),
    "optimizer.NovoGrad": _extra("Ginsburg et al. 2019", "1905.11286"),
    "optimizer.Prodigy": _extra("Mishchenko & Defazio 2023", "2306.06101"),
    "optimizer.QHAdam": _extra("Ma & Yarats 2019", "1810.06801"),
    "optimizer.Ranger": _extra("Zhang et al. 2019", "1907.08610"),
    "optimizer.SGDW": _extra("Loshchilov & Hutter 2019", "1711.05101"),
    "optimizer.SignSGD": _extra("Bernstein et al. 2018", "1802.04434"),
    "optimizer.StableAdamW": _extra("Wortsman et al. 2023", "2304.13013"),
    "optimizer.Tiger": "[pytorch_optimizer](https://pytorch-optimizers.readthedocs.io); [Su 2023](https://github.com/bojone/tiger)",
    "optimizer.Yogi": "[pytorch_optimizer](https://pytorch-optimizers.readthedocs.io); "
    "[Zaheer et al. 2018](https://papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization)",
    "schedule.name": f"{BLOCKS}; linear: {_paper('Defazio et al. 2023', '2310.07831')}; cosine: {SGDR}",
    "schedule.warmup": LARGE_BATCHES,
    "schedule.floor": SGDR,
    "schedule.step": ALEXNET,
    "schedule.multistep": RESNET,
    "schedule.exponential": _torch("optim.lr_scheduler.ExponentialLR"),
    "schedule.inverse_time": f"{ROBBINS}; {BOTTOU}",
    "schedule.inverse_sqrt": f"{_paper('Vaswani et al. 2017', '1706.03762')}; {_paper('Zhai et al. 2022', '2106.04560')}",
    "schedule.polynomial": _paper("Chen et al. 2017", "1606.00915"),
    "schedule.cosine_restarts": SGDR,
    "schedule.one_cycle": f"{_paper('Smith & Topin 2018', '1708.07120')}; {_paper('Howard & Gugger 2020', '2002.04688')}",
    "schedule.cyclic": CYCLES,
    "schedule.trapezoid": f"{_paper('Zhai et al. 2022', '2106.04560')}; {_paper('Hu et al. 2024', '2404.06395')}; {_paper('Haegele et al. 2024', '2405.18392')}",
    "schedule.plateau": _torch("optim.lr_scheduler.ReduceLROnPlateau"),
    "batch.lr_scaling": f"linear: {LARGE_BATCHES}; sqrt: {_paper('Krizhevsky 2014', '1404.5997')}, {_paper('Malladi et al. 2022', '2205.10287')}",
    "batch.growth": _paper("Smith et al. 2018", "1711.00489"),
    "batch.noise_microbatches": _paper("McCandlish et al. 2018", "1812.06162"),
    "batch.sampling": _paper("Buda et al. 2018", "1710.05381"),
    "loss.name": f"{_torch('nn.CrossEntropyLoss')}; {_torch('nn.BCEWithLogitsLoss')}, {_paper('Wightman et al. 2021', '2110.00476')}",
    "loss.class_weights": KING,
    "loss.focal": _paper("Lin et al. 2017", "1708.02002"),
    "regularization.label_smoothing": _paper("Szegedy et al. 2016", "1512.00567"),
    "regularization.dropout": "[Srivastava et al. 2014](https://jmlr.org/papers/v15/srivastava14a.html)",
    "regularization.spatial_dropout": _paper("Tompson et al. 2015", "1411.4280"),
    "regularization.stochastic_depth": _paper("Huang et al. 2016", "1603.09382"),
    "regularization.l1": "[Tibshirani 1996](https://doi.org/10.1111/j.2517-6161.1996.tb02080.x)",
    "regularization.l2": KROGH,
    "regularization.max_norm": "[Srebro & Shraibman 2005](https://doi.org/10.1007/11503415_37); "
    "[Srivastava et al. 2014](https://jmlr.org/papers/v15/srivastava14a.html)",
    "regularization.mixup": _paper("Zhang et al. 2018", "1710.09412"),
    "regularization.cutmix": _paper("Yun et al. 2019", "1905.04899"),
    "regularization.cutmix_share": "[timm](https://huggingface.co/docs/timm)",
    "regularization.input_noise": BISHOP,
    "regularization.gradient_noise": _paper("Neelakantan et al. 2015", "1511.06807"),
    "regularization.gradient_clip": _paper("Pascanu et al. 2013", "1211.5063"),
    "regularization.gradient_clip_value": "[Mikolov 2012](https://www.fit.vut.cz/study/phd-thesis/283/)",
    "regularization.gradient_clip_adaptive": _paper("Brock et al. 2021", "2102.06171"),
    "averaging.name": BLOCKS,
    "averaging.export": _paper("Izmailov et al. 2018", "1803.05407"),
    "averaging.ema": f"{POLYAK_1992}; {ADAM}, 7.2; {_paper('Tarvainen & Valpola 2017', '1703.01780')}",
    "averaging.ema.warmup": "[TensorFlow, ExponentialMovingAverage]"
    "(https://www.tensorflow.org/api_docs/python/tf/train/ExponentialMovingAverage)",
    "averaging.swa": _paper("Izmailov et al. 2018", "1803.05407"),
    "averaging.polyak": f"{POLYAK_1992}; [Ruppert 1988](https://hdl.handle.net/1813/8664)",
    "trainer.early_stopping": PRECHELT,
    "trainer.restore_best": PRECHELT,
    "trainer.precision": _paper("Micikevicius et al. 2018", "1710.03740"),
    "ensemble.members": _paper("Lakshminarayanan et al. 2017", "1612.01474"),
    "ensemble.combine": f"{_paper('Lakshminarayanan et al. 2017', '1612.01474')}; "
    "[Caruana et al. 2004](https://doi.org/10.1145/1015330.1015432)",
    "search.sampler": "[Bergstra et al. 2011](https://papers.nips.cc/paper/4443-algorithms-for-hyper-parameter-optimization)",
    "search.pruner": _paper("Li et al. 2018", "1603.06560"),
    "evaluate.tta": ALEXNET,
    "evaluate.tta.select": _paper("Molchanov et al. 2020", "2002.09103"),
    "evaluate.calibration": _paper("Guo et al. 2017", "1706.04599"),
    "trainer.snapshots": _paper("Huang et al. 2017", "1704.00109"),
    "evaluate.soups": _paper("Wortsman et al. 2022", "2203.05482"),
    "evaluate.bootstrap": "[Efron 1979](https://doi.org/10.1214/aos/1176344552)",
    "evaluate.mistakes": f"{_paper('Sundararajan et al. 2017', '1703.01365')} (saliency)",
    "evaluate.label_errors": f"{_paper('Northcutt et al. 2021', '1911.00068')}; {_paper('Bahri et al. 2020', '2004.12289')}",
    "evaluate.robustness": _paper("Hendrycks & Dietterich 2019", "1903.12261"),
}
"""Where methods come from, by the start of a key, the longest that fits; plain settings have none."""

PAGES: dict[str, tuple[str, ...]] = {
    "seed": ("training",),
    "data": ("data",),
    "split": ("data",),
    "preprocess": ("preprocessing",),
    "augment": ("augmentation",),
    "model": ("models", "normalization", "transfer-learning"),
    "init": ("initialization",),
    "optimizer": ("optimizers", "learning-rate"),
    "schedule": ("schedules", "learning-rate"),
    "batch": ("batch-size",),
    "loss": ("losses",),
    "regularization": ("regularization",),
    "averaging": ("averaging",),
    "trainer": ("training",),
    "ensemble": ("ensembles",),
    "evaluate": ("evaluation", "tta", "mistakes", "robustness"),
    "registry": ("mlflow",),
    "hardware": ("training", "performance"),
    "tracking": ("mlflow",),
    "search": ("search",),
}
"""Pages of docs/ for each section."""


# ---- the table --------------------------------------------------------------------------------------------------------


def description(key: str, node: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """Return what a key does: `WORDS` of the whole key, its comment, `WORDS` of its end, or its class's docstring."""
    parts = key.split(".")
    ends = [".".join(parts[i:]) for i in range(1, len(parts))]
    of_end = next((WORDS[end] for end in ends if end in WORDS), "")
    of_class = str(node.get("description", "")).split("\n")[0].rstrip(".")
    of_class = of_class.partition("``: ")[2] or of_class
    return WORDS.get(key) or notes.get(key) or of_end or of_class.replace("``", "`")


def source(key: str) -> str:
    """Return where a key's method comes from: `SOURCES` of the longest start of the key, never of its section alone."""
    parts = key.split(".")
    starts = [".".join(parts[:n]) for n in range(len(parts), 1, -1)]
    return next((SOURCES[start] for start in starts if start in SOURCES), "")


def keys(text: str, values: Mapping[str, Any], schema: Mapping[str, Any]) -> list[Key]:
    """Return the rows of the table, one for each key of the schema below the sections.

    Parameters
    ----------
    text, values
        params.yaml: its text, for the comments, and its values.
    schema
        Its JSON schema.
    """
    notes = comments(text)
    rows = []
    for key, node, is_block in schema_keys(schema):
        if is_block and "." not in key:
            continue
        value: Any = values
        given = True
        for part in key.split("."):
            given = given and isinstance(value, Mapping) and part in value
            value = value[part] if given else None
        if is_block and isinstance(value, Mapping):
            default = ""
        elif given:
            default = shown(value)
        elif "default" in node:
            default = f"left out: {shown(node['default'])}"
        else:
            default = "left out"
        rows.append(
            Key(
                key=key,
                kind=kind(node, schema),
                default=default,
                allowed="" if is_block else allowed(node, schema),
                description=description(key, node, notes),
                source=source(key),
            )
        )
    return rows


HEAD = """# Every key of params.yaml

Written by `python -m anneal.reference` (`make schema`) from params.schema.json, params.yaml and its comments; a test fails where
this page is not what it would write. A **default** is what params.yaml ships: every section is there in full, and only
the block of the `name` that a section chooses applies. A key that params.yaml leaves out may be added to its block, and has the
library's default until then (`left out: ...`). `anneal check` refuses anything that this table does not allow.

"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_cell(text)}`" if text else ""


def markdown(rows: list[Key]) -> str:
    """Return docs/params.md."""
    sections: dict[str, list[Key]] = {}
    for row in rows:
        sections.setdefault(row.key.split(".")[0], []).append(row)
    parts = [HEAD]
    for name, members in sections.items():
        pages = ", ".join(f"[{page}.md]({page}.md)" for page in PAGES[name])
        parts.append(f"## {name}\n\nSee {pages}.\n\n")
        parts.append("| key | type | default | range, choices | what it does | source |\n|---|---|---|---|---|---|\n")
        for row in members:
            left_out, _, value = row.default.partition("left out: ")
            default = (
                f"left out: {_code(value)}" if value else left_out if left_out == "left out" else _code(row.default)
            )
            cells = (
                _code(row.key),
                _cell(row.kind),
                default,
                _cell(row.allowed),
                _cell(row.description),
                _cell(row.source),
            )
            parts.append("| " + " | ".join(cells) + " |\n")
        parts.append("\n")
    return "".join(parts).rstrip("\n") + "\n"


def page(root: Path | str = ".") -> str:
    """Return docs/params.md as it should be, byte for byte, from params.yaml in ``root`` and the section classes."""
    path = Path(root) / "params.yaml"
    return markdown(keys(path.read_text(encoding="utf-8"), read_yaml(path), json_schema()))


if __name__ == "__main__":
    write_text("docs/params.md", page())
