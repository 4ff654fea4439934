"""Loaders: the options of public configs, and an order that depends on seed and epoch alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ldm.data.loading import DataModuleFromConfig, EpochBatches, SeededItems, WrappedDataset
from ldm.util import instantiate_from_config


class Numbers(torch.utils.data.Dataset):
    """Items with their index and numbers of every global random state."""

    def __init__(self, length: int = 11) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        return {"i": i, "numbers": torch.tensor([random.random(), np.random.rand(), float(torch.rand(1))])}


class WithGenerator(Numbers):
    """The same from a given generator."""

    def get(self, i: int, rng: np.random.Generator) -> dict:
        return {"i": i, "numbers": rng.random(3), "name": f"number {i}"}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(range(3))


def config(kind: str = "Numbers", **params) -> dict:
    return {"target": f"tests.data.test_loading.{kind}", "params": params}


def module(**params) -> DataModuleFromConfig:
    params = {"batch_size": 3, "num_workers": 0, "train": config()} | params
    data = instantiate_from_config({"target": "main.DataModuleFromConfig", "params": params})
    data.setup()
    return data


def indices(loader) -> list[list[int]]:
    return [batch["i"].tolist() for batch in loader]


def test_order_is_a_permutation_of_its_own_every_epoch():
    batches = EpochBatches(11, 3, seed=5)
    first = [index for batch in batches for _, index in batch]
    batches.set_epoch(1)
    second = [index for batch in batches for _, index in batch]
    assert sorted(first) == sorted(second) == list(range(11)) and first != second
    assert len(batches) == 4 and [len(batch) for batch in batches] == [3, 3, 3, 2]
    batches.set_epoch(0)
    assert [index for batch in batches for _, index in batch] == first
    other = EpochBatches(11, 3, seed=6)
    assert [index for batch in other for _, index in batch] != first


@pytest.mark.parametrize("length", [12, 11, 7])
def test_batches_of_processes_make_those_of_one(length):
    single = list(EpochBatches(length, 6, seed=5))
    per_process = [list(EpochBatches(length, 2, seed=5, rank=rank, world=3)) for rank in range(3)]
    assert len({len(batches) for batches in per_process}) == 1
    for number, parts in enumerate(zip(*per_process)):
        together = [pair for row in zip(*parts) for pair in row]
        assert together[: len(single[number])] == single[number]


def test_a_start_in_the_middle():
    batches = EpochBatches(11, 3, seed=5)
    batches.set_epoch(2)
    expected = list(batches)
    again = EpochBatches(11, 3, seed=5)
    again.start_at(2, 1)
    again.set_epoch(2)  # as Lightning does before the epoch
    assert list(again) == expected[1:] and len(again) == 4
    again.set_epoch(3)
    assert len(list(again)) == 4


@pytest.mark.parametrize("kind", ["Numbers", "WithGenerator"])
@pytest.mark.parametrize("workers", [0, 2])
def test_items_depend_on_seed_epoch_and_index_alone(kind, workers):
    def numbers(seed: int, epoch: int, workers: int = 0) -> dict[int, list[float]]:
        data = module(train=config(kind), seed=seed, num_workers=workers)
        data.start_at(epoch, 0)
        torch.rand(epoch), np.random.rand(epoch)  # other uses of the global states
        return {int(i): d.tolist() for b in data.train_dataloader() for i, d in zip(b["i"], b["numbers"])}

    found = numbers(1, 2, workers)
    assert found == numbers(1, 2) and len({tuple(value) for value in found.values()}) == 11
    assert all(found[i] != numbers(1, 3)[i] != numbers(2, 3)[i] for i in found)


def test_global_random_states_stay_as_they_are():
    items = SeededItems(Numbers(), 1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    items[0, 3]
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_validation_is_the_same_every_time_and_in_order():
    data = module(validation=config("WithGenerator"), test=config(), shuffle_test_loader=True)
    assert indices(data.val_dataloader()) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10]]
    first, second = ([b["numbers"] for b in data.val_dataloader()] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    mixed = indices(data.test_dataloader())
    assert mixed != indices(data.val_dataloader()) and mixed == indices(data.test_dataloader())
    for name in ("val", "test"):
        loader = getattr(data, f"{name}_dataloader")()
        before = list(loader)
        loader.batch_sampler.sampler.set_epoch(3)  # as Lightning does before every validation
        assert all(torch.equal(a["numbers"], b["numbers"]) for a, b in zip(before, loader))
    assert next(iter(data.val_dataloader()))["name"] == ["number 0", "number 1", "number 2"]


def test_only_the_sets_of_the_config():
    data = module(wrap=True, validation=config("WithGenerator"))
    assert isinstance(data.datasets["train"], WrappedDataset)
    assert isinstance(data.datasets["validation"], WithGenerator)  # still random in every epoch
    data = module(wrap=True)
    with pytest.raises(Exception, match="val_dataloader"):
        data.val_dataloader()
    assert module(num_workers=None, batch_size=1).num_workers in (1, 2)


def test_mistakes():
    with pytest.raises(ValueError, match=r"training set, which has 11 items: use data\.params\.batch_size=5"):
        module(batch_size=6).check_batch_size(2)
    module(batch_size=5).check_batch_size(2)
    with pytest.raises(ValueError, match=r"data\.params\.validation.*has no items"):
        module(validation=config(length=0))
    with pytest.raises(ValueError, match="IterableDataset"):
        module(train=config("Stream"))
    with pytest.raises(ValueError, match="batch_size must be .*at least 1"):
        module(batch_size=0)
    with pytest.raises(ValueError, match="unexpected keyword argument 'batchsize'"):
        module(batchsize=3)
