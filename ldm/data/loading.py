"""The data module of public configs, with an order of items that depends only on seed, epoch and position."""

from __future__ import annotations

import functools
import logging
import math
import os
import random
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

SETS = ("train", "validation", "test", "predict")


class WrappedDataset(Dataset):
    """A map-style data set of anything with a length and items (`wrap: true` in public configs)."""

    def __init__(self, dataset: Any) -> None:
        self.data = dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


class SeededItems(Dataset):
    """A data set, indexed by pairs (epoch, index), whose items depend only on (seed, epoch, index).

    A data set with a method `get(index, rng)` gets a generator seeded by the triple. For any other the global states of
    Python, numpy and torch are seeded by it, and restored afterwards.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.data = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        triple = (self.seed, epoch, index)
        if has_generator_access(self.data):
            return self.data.get(index, np.random.default_rng(triple))
        with seeded_globals(triple):
            return self.data[index]


def has_generator_access(dataset: Any) -> bool:
    """Whether a data set has a method `get(index, rng)`, unlike the `get` of a mapping."""
    return hasattr(dataset, "get") and not isinstance(dataset, Mapping)


@contextmanager
def seeded_globals(key: Sequence[int]) -> Iterator[None]:
    """Seed the global random states by `key`, non-negative numbers, and restore them afterwards."""
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
    """Batches of (epoch, index) for one process of `world`: every `world`-th item of the epoch's order, from `rank`.

    The k-th batches of all processes together are the k-th batch of one process with `world` times the batch size. The
    order is a permutation seeded by (seed, epoch), or that of the data set. Items of its beginning are repeated at its
    end until all processes have as many, as torch's DistributedSampler does. The length is that of a complete epoch,
    also where `start_at` begins within one.

    Args:
        length: Number of items.
        batch_size: Items of a batch, in each process.
        seed: Seed of the order.
        shuffle: Permute the items.
        rank: Number of this process.
        world: Number of processes.
        alike: Repeat the same epoch.
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
        """Itself: Lightning calls `set_epoch` of this attribute."""
        return self

    def start_at(self, epoch: int, batch: int) -> None:
        """Begin the next pass at `batch` of `epoch`."""
        self.epoch, self.start = epoch, batch

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch. Lightning calls this, also before every validation."""
        if epoch != self.epoch and not self.alike:
            self.epoch, self.start = epoch, 0

    def __len__(self) -> int:
        return math.ceil(math.ceil(self.length / self.world) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.length)
        if self.shuffle:
            # the third number separates this stream from those of the items, (seed, epoch, index)
            order = np.random.default_rng((self.seed, self.epoch, self.length)).permutation(self.length)
        own = np.resize(order, math.ceil(self.length / self.world) * self.world)[self.rank :: self.world]
        for batch in range(self.start, len(self)):
            indices = own[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, int(index)) for index in indices]


class WorkerDied(RuntimeError):
    """A worker process of a loader ended, by `signal` ("" if that is not known)."""

    def __init__(self, message: str, signal: str) -> None:
        super().__init__(message)
        self.signal = signal


class WorkerCheckingLoader(DataLoader):
    """A DataLoader that raises `WorkerDied` if a worker is killed.

    torch itself raises RuntimeError, or an error of the broken pipe to the worker.
    """

    def __iter__(self) -> Any:
        """Iterate over batches."""
        batches: Any = super().__iter__()
        try:
            yield from batches
        except (RuntimeError, ConnectionError, EOFError) as error:
            name = killing_signal(error, getattr(batches, "_workers", ()))
            if name is None:
                raise
            raise WorkerDied("a worker process that loads data died", name) from error


def killing_signal(error: BaseException, workers: Sequence[Any] = ()) -> str | None:
    """The signal that killed a worker, "" for a worker that died otherwise, None if none died.

    torch's own handler may raise the error of a killed worker anywhere in the main thread.
    """
    found = re.search(
        r"DataLoader worker \(.*?\) (?:is killed by signal: (\w+(?: error)?)|exited unexpectedly)", str(error)
    )
    if found and found[1]:
        return found[1]
    if found is None and not isinstance(error, (ConnectionError, EOFError)):
        return None
    ended = wait([worker.sentinel for worker in workers], timeout=5)  # it may be about to end
    for worker in workers:
        if worker.sentinel in ended:
            worker.join()  # the sentinel is ready a moment before the exit code
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    killed = [signal.strsignal(-code) or "" for code in codes if code < 0]
    return killed[0] if killed else "" if found or codes else None


class DataModuleFromConfig(pl.LightningDataModule):
    """Data sets of configs, and their loaders.

    Args:
        batch_size: Items of a batch, in each process.
        train, validation, test, predict: Configs of map-style data sets.
        wrap: Wrap them in `WrappedDataset`, unless they have `get(index, rng)`.
        num_workers: Worker processes of each loader; by default twice the batch size, at most one per processor.
        shuffle_test_loader, shuffle_val_dataloader: Shuffle those sets too, always alike.
        use_worker_init_fn: Accepted for public configs.
        seed: See `EpochBatches`.
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
            raise ValueError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
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
            if name in self.dataset_configs:  # without a set there must be no such method
                setattr(self, loader, self._loader_of(name))
        if train is not None:
            self.train_dataloader = self._train_loader  # type: ignore[method-assign]  # as for the other loaders

    def setup(self, stage: str | None = None) -> None:
        """Build the data sets, once. Raises ValueError for one that is empty or iterable only."""
        for name, config in self.dataset_configs.items():
            if name in self.datasets:
                continue
            dataset = instantiate_from_config(config)
            if isinstance(dataset, IterableDataset) and not isinstance(dataset, Txt2ImgIterableBaseDataset):
                raise ValueError(
                    f"data.params.{name}: {config['target']} is an IterableDataset, with which no run can resume: use "
                    "a data set with __len__ and __getitem__, or a Txt2ImgIterableBaseDataset"
                )
            if len(dataset) == 0:
                raise ValueError(f"data.params.{name}: {config['target']} has no items")
            # wrapped, a data set with `get(index, rng)` would lose it
            wrap = self.wrap and not has_generator_access(dataset)
            self.datasets[name] = WrappedDataset(dataset) if wrap else dataset

    def start_at(self, epoch: int, batch: int) -> None:
        """Begin training at `batch` of `epoch`."""
        self._start = (epoch, batch)

    def check_batch_size(self, world: int) -> None:
        """Raise ValueError if `world` processes cannot have a full batch each."""
        length = len(self.datasets["train"])
        if self.batch_size * world > length:
            processes = f" x {world} processes" if world > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size}{processes} is larger than the training set, which has {length} items: "
                f"use data.params.batch_size={max(length // world, 1)} or less"
            )

    def _train_loader(self) -> DataLoader:
        loader = self._loader("train", shuffle=True)
        if isinstance(loader.batch_sampler, EpochBatches):
            loader.batch_sampler.start_at(*self._start)
        elif self._start[1]:
            logger.warning("an iterable data set starts its epoch again: %d batches of it are repeated", self._start[1])
        return loader

    def _loader_of(self, name: str) -> Callable[[], DataLoader]:
        return lambda: self._loader(name, shuffle=self._shuffled.get(name, False))

    def _loader(self, name: str, *, shuffle: bool) -> DataLoader:
        dataset, trainer = self.datasets[name], self.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        if isinstance(dataset, Txt2ImgIterableBaseDataset):
            if self.num_workers == 0:
                dataset.select_part(rank, world)
            init = functools.partial(_init_iterable, self.seed, rank, world)
            return WorkerCheckingLoader(dataset, self.batch_size, num_workers=self.num_workers, worker_init_fn=init)
        alike = name != "train"  # so that the results of two validations can be compared
        return WorkerCheckingLoader(
            SeededItems(dataset, self.seed),
            batch_sampler=EpochBatches(len(dataset), self.batch_size, self.seed, shuffle, rank, world, alike),
            num_workers=self.num_workers,
            worker_init_fn=_ignore_signals,
            persistent_workers=self.num_workers > 0 and name == "train",
            pin_memory=trainer is not None and trainer.strategy.root_device.type == "cuda",
        )


def _ignore_signals(worker: int) -> None:
    """Ctrl-C reaches the workers too: ignore it, so that the training process can finish its step and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    torch.set_num_threads(1)


def _init_iterable(seed: int, rank: int, world: int, worker: int) -> None:
    """Give a worker its part of the ids, and random numbers of its own."""
    _ignore_signals(worker)
    info = torch.utils.data.get_worker_info()
    assert info is not None
    dataset: Any = info.dataset
    part = rank * info.num_workers + worker
    dataset.select_part(part, world * info.num_workers)
    random.seed(seed + part)
    np.random.seed(seed + part)
