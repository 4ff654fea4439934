"""Data modules by the public configs' means, with an order that depends on nothing but seed, epoch and position."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ldm.util import instantiate_from_config

SETS = ("train", "validation", "test", "predict")


class WrappedDataset(Dataset):
    """Anything with a length and items as a map-style data set (the public configs' `wrap: true`)."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class SeededItems(Dataset):
    """A data set whose items depend on nothing but (seed, epoch, index): indexed by pairs (epoch, index).

    A data set with a method `get(index, rng)` draws from the generator that it is given; any other finds Python's,
    numpy's and torch's random state made from the triple, and theirs is put back after it.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.data = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        triple = (self.seed, epoch, index)
        if draws_by_generator(self.data):
            return self.data.get(index, np.random.default_rng(triple))
        with own_draws(triple):
            return self.data[index]


def draws_by_generator(dataset: Any) -> bool:
    """Whether a data set has a method `get(index, rng)`; that of a mapping is another."""
    return hasattr(dataset, "get") and not isinstance(dataset, Mapping)


@contextmanager
def own_draws(key: Sequence[int]) -> Iterator[None]:
    """Within it the global random states are made from `key`, numbers from 0; after it they are as they were before."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    start = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(start)
    np.random.seed(start)
    torch.default_generator.manual_seed(start)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) of one of `world` processes: every `world`-th of the epoch's order, from `rank` on.

    Together the processes' k-th batches are the k-th batch of one process with `world` times the batch size. The order
    is drawn from (seed, epoch), or is that of the data set. Its beginning is repeated at its end where the processes
    would not get equal shares, as torch's DistributedSampler does.

    `start_at` lets the first pass begin in the middle of an epoch. The length is always that of a whole epoch. With
    `alike` every pass is through the same epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        alike: bool = False,
    ) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world, self.alike = rank, world, alike
        self.epoch, self.start = 0, 0

    @property
    def sampler(self) -> EpochBatches:
        """Itself: where Lightning looks for `set_epoch`."""
        return self

    def start_at(self, epoch: int, batch: int) -> None:
        """Let the next pass be through `epoch`, from `batch` on."""
        self.epoch, self.start = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Lightning's hook at the start of every epoch, and of every validation."""
        if epoch != self.epoch and not self.alike:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.length / self.world) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.length)
        if self.shuffle:
            # a third number keeps this stream apart from those of the items, (seed, epoch, index)
            order = np.random.default_rng((self.seed, self.epoch, self.length)).permutation(self.length)
        share = np.resize(order, math.ceil(self.length / self.world) * self.world)[self.rank :: self.world]
        for batch in range(self.start, len(self)):
            indices = share[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in indices]


class DataModuleFromConfig(pl.LightningDataModule):
    """Data sets as configs, and their loaders.

    batch_size: of each process. train, validation, test, predict: configs of map-style data sets. wrap: wrap them in
    `WrappedDataset`, unless they have `get(index, rng)`. num_workers: processes that load for each loader; by default
    twice the batch size, but no more than there are processors. shuffle_test_loader, shuffle_val_dataloader: mix those
    sets too, always in the same way. use_worker_init_fn: accepted, and not needed, since no data set is split over its
    workers. seed: see `EpochBatches`.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        seed: int = 23,
    ) -> None:
        super().__init__()
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 and whole, not {batch_size!r}")
        self.batch_size = batch_size
        self.seed = seed
        self.wrap = wrap
        self.num_workers = min(2 * batch_size, os.cpu_count() or 1) if num_workers is None else num_workers
        self.dataset_configs = {
            name: config for name, config in zip(SETS, (train, validation, test, predict)) if config is not None
        }
        self.datasets: dict[str, Any] = {}  # Datasets that have a length
        self._shuffled = {"validation": shuffle_val_dataloader, "test": shuffle_test_loader}
        self._start = (0, 0)
        for name, loader in zip(SETS[1:], ("val_dataloader", "test_dataloader", "predict_dataloader")):
            if name in self.dataset_configs:  # Lightning asks a data module without the method for none
                setattr(self, loader, self._loader_of(name))
        if train is not None:
            self.train_dataloader = self._train_loader  # type: ignore[method-assign]  # as for the other loaders

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets, once. Raises ValueError for one that is empty or has no items by number."""
        for name, config in self.dataset_configs.items():
            if name in self.datasets:
                continue
            dataset = instantiate_from_config(config)
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"data.params.{name}: {config['target']} is an IterableDataset, in which no run can find its place "
                    "again: use a data set with __len__ and __getitem__"
                )
            if len(dataset) == 0:
                raise ValueError(f"data.params.{name}: {config['target']} has no items")
            # what draws by a generator is a data set in full: wrapped it would draw the same in every epoch
            self.datasets[name] = WrappedDataset(dataset) if self.wrap and not draws_by_generator(dataset) else dataset

    def start_at(self, epoch: int, batch: int) -> None:
        """Let training begin with this batch of this epoch."""
        self._start = (epoch, batch)

    def check_batch_size(self, world: int) -> None:
        """Raise ValueError if `world` processes cannot have a whole batch each."""
        length = len(self.datasets["train"])
        if self.batch_size * world > length:
            processes = f" x {world} processes" if world > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size}{processes} is larger than the training set, which has {length} items: "
                f"use data.params.batch_size={max(length // world, 1)} or less"
            )

    def _train_loader(self) -> DataLoader:
        loader = self._loader("train", shuffle=True)
        batches: Any = loader.batch_sampler  # `EpochBatches`
        batches.start_at(*self._start)
        return loader

    def _loader_of(self, name: str) -> Callable[[], DataLoader]:
        return lambda: self._loader(name, shuffle=self._shuffled.get(name, False))

    def _loader(self, name: str, *, shuffle: bool) -> DataLoader:
        dataset, trainer = self.datasets[name], self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        alike = name != "train"  # so that the results of two validations can be compared
        return DataLoader(
            SeededItems(dataset, self.seed),
            batch_sampler=EpochBatches(len(dataset), self.batch_size, self.seed, shuffle, rank, world, alike),
            num_workers=self.num_workers,
            worker_init_fn=_leave_signals_to_the_parent,
            persistent_workers=self.num_workers > 0 and name == "train",
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C reaches the workers too; they go on until the training has come to a good end, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)
