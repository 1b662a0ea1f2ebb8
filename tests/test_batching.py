import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anneal.batching import BatchConfig, MicrobatchSampler, devices_that_divide, epoch_order, plan, plan_run
from anneal.params import ParamsError, parse


def run_plan(size, microbatch, world_size, num_samples):
    return plan_run(
        size=size, microbatch=microbatch, devices=world_size, num_nodes=1, num_samples=num_samples, epochs=1
    )


def test_plan_counts():
    p = plan(size=64, microbatch=16, devices=2, num_nodes=2, num_samples=64 * 3 + 20)
    assert (p.accumulation, p.steps_per_epoch, p.microbatches_per_epoch, p.rounds_per_epoch) == (1, 4, 14, 4)
    assert p.samples_per_epoch == 212
    assert [p.window_samples(i) for i in range(4)] == [64, 64, 64, 20]
    assert p.bounds(3) == [(192, 202), (202, 212)]
    assert [p.window_of(i) for i in (0, 3, 4, 11, 12, 13)] == [0, 0, 1, 2, 3, 3]


def test_batch_larger_than_the_training_split_names_both():
    with pytest.raises(ParamsError, match=r"batch\.size: found 128, but the training split has 100 images"):
        plan(size=128, microbatch=128, devices=1, num_nodes=1, num_samples=100)


def test_indivisible_accumulation_names_the_nearest_valid_values():
    with pytest.raises(ParamsError, match=r"found 96, .* 32 x 2 devices x 1 nodes = 64 .* batch\.size 64 or 128"):
        plan(size=96, microbatch=32, devices=2, num_nodes=1, num_samples=1000)


def test_microbatch_must_divide_size():
    values = {"batch": {"size": 96, "microbatch": 36, "lr_scaling": "none", "reference_size": 96}}
    with pytest.raises(ParamsError, match=r"batch.*found 36.*divisor of size, nearest 32"):
        parse(values, {"batch": BatchConfig})


@pytest.mark.parametrize(
    ("available", "size", "microbatch", "expected"), [(8, 64, 16, 4), (3, 64, 16, 2), (1, 5, 5, 1)]
)
def test_devices_that_divide(available, size, microbatch, expected):
    assert devices_that_divide(available, size=size, microbatch=microbatch) == expected


@pytest.mark.parametrize(("size", "microbatch", "num_samples"), [(4, 2, 11), (16, 2, 21), (16, 8, 39), (64, 16, 131)])
def test_no_microbatch_is_too_small_for_batchnorm(size, microbatch, num_samples):
    p = plan(size=size, microbatch=microbatch, devices=1, num_nodes=1, num_samples=num_samples)
    bounds = [b for window in range(p.steps_per_epoch) for b in p.bounds(window)]
    assert len(bounds) == p.microbatches_per_epoch
    assert min(end - start for start, end in bounds) >= 2
    assert bounds[-1][1] == p.samples_per_epoch


def test_order_is_keyed_by_seed_and_epoch():
    assert (epoch_order(50, 0, 1) == epoch_order(50, 0, 1)).all()
    assert (epoch_order(50, 0, 1) != epoch_order(50, 0, 2)).any()
    assert (epoch_order(50, 0, 1) != epoch_order(50, 1, 1)).any()


@settings(max_examples=150, deadline=None)
@given(
    microbatch=st.integers(1, 9),
    accumulation=st.integers(1, 4),
    world_size=st.integers(1, 4),
    windows=st.integers(1, 4),
    rest=st.integers(0, 200),
    epoch=st.integers(0, 3),
)
def test_every_sample_once_whatever_the_processes(microbatch, accumulation, world_size, windows, rest, epoch):
    size = microbatch * accumulation * world_size
    num_samples = size * windows + rest % size
    p = plan(size=size, microbatch=microbatch, devices=world_size, num_nodes=1, num_samples=num_samples)
    by_rank = []
    for rank in range(world_size):
        sampler = MicrobatchSampler(run_plan(size, microbatch, world_size, num_samples), 7, rank)
        sampler.set_epoch(epoch)
        by_rank.append(list(sampler))
        assert len(by_rank[-1]) == len(sampler) == p.rounds_per_epoch
    alone = MicrobatchSampler(run_plan(size, microbatch, 1, num_samples), 7)
    alone.set_epoch(epoch)
    expected = {key: indices for key, *indices in alone}
    rounds = [keyed for of_round in zip(*by_rank, strict=True) for keyed in of_round]
    real = {key: indices for key, *indices in rounds if key[1] < p.microbatches_per_epoch}
    assert real == expected
    assert list(real) == [(epoch, i) for i in range(p.microbatches_per_epoch)]
    seen = [i for indices in real.values() for i in indices]
    assert seen == epoch_order(num_samples, 7, epoch)[: p.samples_per_epoch].tolist()
    assert num_samples - len(seen) == (1 if num_samples % size == 1 else 0)
    # A part of three, where cutting it at two would leave one sample alone.
    assert all(len(indices) <= (3 if microbatch == 2 else microbatch) for indices in real.values())
    if microbatch >= 2:
        assert all(len(indices) >= 2 for indices in real.values())
    for i in range(p.microbatches_per_epoch):
        window = p.window_of(i)
        assert any(stop - start == len(real[(epoch, i)]) for start, stop in p.bounds(window))
        assert sum(len(real[(epoch, j)]) for j in range(p.microbatches_per_epoch) if p.window_of(j) == window) == (
            p.window_samples(window)
        )


def test_padding_keeps_processes_in_step_in_the_last_window():
    sampler = MicrobatchSampler(run_plan(64, 16, 4, 70), 0, rank=3)
    (epoch, microbatch), *indices = list(sampler)[-1]
    assert microbatch >= sampler.run[0].microbatches_per_epoch
    assert indices == np.array(epoch_order(70, 0, epoch)[64:]).tolist()
