"""A run from its settings to its end: model, data, callbacks, Lightning's Trainer, and messages for failures."""

from __future__ import annotations

import argparse
import functools
import inspect
import logging
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden

from ldm.data.cache import ensure_caches
from ldm.data.loading import WorkerDied, killing_signal
from ldm.devices import choose_device
from ldm.limits import building
from ldm.training import folders
from ldm.training.callbacks import CUDACallback, NonFiniteGuard, ProgressBar, SetupCallback, StepSeeds, seed_all
from ldm.training.checkpoints import (
    AtomicCheckpointIO,
    Checkpoints,
    ExactResume,
    read_training_state,
    remove_partial_files,
)
from ldm.training.compat import adapt_hooks, support_lightning_1
from ldm.training.metrics import RunPlot, build_loggers, discard_after
from ldm.training.settings import Settings, read_settings
from ldm.training.signals import Signals, Stopped
from ldm.training.strategies import choose_strategy
from ldm.trust import allowlist_only
from ldm.util import instantiate_from_config, warn_about_other_distributions

logger = logging.getLogger(__name__)

MAX_EPOCHS = 1000  # as in the public script, where nothing else ends a run
IMAGE_LOGGER = {"target": "main.ImageLogger", "params": {"batch_frequency": 750, "max_images": 4, "clamp": True}}
RATE_LOGGER = {"target": "pytorch_lightning.callbacks.LearningRateMonitor", "params": {"logging_interval": "step"}}
TRAINSTEP = "metrics_over_trainsteps_checkpoint"
OURS = ("checkpoint_callback", "setup_callback", "cuda_callback", TRAINSTEP)
MANUAL = {"accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"}  # with manual optimization


@allowlist_only()  # also while a callback or a hook builds something from the config later
def train(args: argparse.Namespace) -> None:
    """Run a parsed command line (see `ldm.cli.train`). Raises what `ldm.cli.run` prints as one line."""
    support_lightning_1()
    _silence_lightning()
    if not folders.is_first_process():
        logging.getLogger("ldm").setLevel(logging.WARNING)
    warn_about_other_distributions()
    settings = read_settings(args)
    for note in settings.notes:
        logger.info(note)
    now = folders.timestamp()
    seed_all(settings.seed)  # for the initial weights
    model = build_model(settings)
    device = "cpu" if settings.trainer.get("accelerator") == "cpu" else "auto"
    ensure_caches(model, settings.project["data"], choose_device(device))
    data = build_data(settings)
    folder = settings.run or _new_folder(args, now)
    try:
        trainer = build_trainer(settings, model, folder, now, anyway=args.resume_anyway)
        processes = trainer.num_devices * trainer.num_nodes
        set_learning_rate(model, settings, data.batch_size, processes, _batches_per_epoch(trainer, data, processes))
        if args.train:
            _fit(trainer, model, data, settings, now)
        if not args.no_test:
            _test(trainer, model, data)
    finally:
        if folders.is_first_process() and not settings.run:
            folders.discard_if_empty(folder)


def _new_folder(args: argparse.Namespace, now: str) -> Path:
    logdir = Path(args.logdir) / "debug_runs" if args.debug else Path(args.logdir)
    return folders.new_run(logdir, now, folders.run_name(args.name, args.base, args.postfix))


def _silence_lightning() -> None:
    """Hide messages and warnings of Lightning that call for no action."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        r".*does not have many workers",
        r".*is smaller than the logging interval",
        r".*your dataloader is not resumable",  # the position is in the checkpoint (see `ExactResume`)
        r".*module\(s\) in eval mode at the start of training",  # frozen stages
        r".*exists and is not empty",
        r".*no `val_dataloader`|.*defined a `validation_step` but have no",
        r".*GPU available but not used",
        r".*isinstance\(treespec, LeafSpec\)",
    ):
        warnings.filterwarnings("ignore", message=text)


# ------------------------------------------------------------------------------------------------------------ building


def build_data(settings: Settings) -> Any:
    """The data module with its data sets. A config without a seed gets the run's."""
    config = settings.project["data"]
    params = dict(config.get("params") or {})
    if str(config.get("target")).endswith("DataModuleFromConfig"):
        params.setdefault("seed", settings.seed)
    data = instantiate_from_config({**config, "params": params})
    data.prepare_data()
    data.setup("fit")
    return data


def build_model(settings: Settings) -> pl.LightningModule:
    """The model of the config. With manual optimization it gets the Trainer settings that it must apply itself."""
    with building():
        model = instantiate_from_config(settings.project["model"])
    if not isinstance(model, pl.LightningModule):
        raise ValueError(f"{settings.project['model'].get('target')} is not a model that can be trained")
    if not model.automatic_optimization:
        for name in MANUAL & set(settings.trainer):
            setattr(model, name, settings.trainer[name])
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    logger.info("%s: %.1f M parameters, %.1f M of them trained", type(model).__name__, total / 1e6, trained / 1e6)
    return model


def set_learning_rate(
    model: pl.LightningModule,
    settings: Settings,
    batch_size: int,
    processes: int,
    batches_per_epoch: float = math.inf,
) -> None:
    """Set `model.learning_rate` from `base_learning_rate`, and log its factors.

    With `scale_lr` it is base_learning_rate * accumulated batches * processes * batch size. No more batches accumulate
    than an epoch has, since its last batch always ends a step.
    """
    base = settings.project["model"].get("base_learning_rate")
    if base is None:
        raise ValueError("the config's model section has no base_learning_rate: add model.base_learning_rate=1.0e-4")
    try:
        base = float(base)
    except (TypeError, ValueError):
        raise ValueError(f"model.base_learning_rate must be a number, not {base!r}") from None
    if not settings.lightning["scale_lr"]:
        model.learning_rate = base  # type: ignore[assignment]  # nn.Module declares attributes as tensors
        logger.info("Learning rate %.2e", base)
        return
    wanted = settings.trainer.get("accumulate_grad_batches", 1)
    accumulated = int(min(wanted, batches_per_epoch))
    if accumulated < wanted:
        logger.warning("accumulate_grad_batches=%d, but an epoch has only %d batches", wanted, accumulated)
    rate = accumulated * processes * batch_size * base
    model.learning_rate = rate  # type: ignore[assignment]  # nn.Module declares attributes as tensors
    logger.info(
        "Learning rate %.2e = %d accumulated batches * %d processes * %d items a batch * base_learning_rate %.2e",
        *(rate, accumulated, processes, batch_size, base),
    )


def _batches_per_epoch(trainer: pl.Trainer, data: Any, processes: int) -> float:
    """The number of training batches of an epoch in each process; infinite if the data module does not tell."""
    dataset = getattr(data, "datasets", {}).get("train")
    if dataset is None or not hasattr(dataset, "__len__"):
        return math.inf
    batches = math.ceil(math.ceil(len(dataset) / processes) / data.batch_size)
    limit = trainer.limit_train_batches
    return max(1, int(batches * limit) if isinstance(limit, float) else min(batches, limit))


def build_trainer(
    settings: Settings, model: pl.LightningModule, folder: Path, now: str, anyway: bool = False
) -> pl.Trainer:
    """Lightning's Trainer with the loggers, callbacks and plugins of a run."""
    options = dict(settings.trainer)
    if not model.automatic_optimization:
        options = {name: value for name, value in options.items() if name not in MANUAL}
    if not {"max_epochs", "max_steps", "max_time"} & set(options):
        options["max_epochs"] = MAX_EPOCHS
    if "strategy" in options or "find_unused_parameters" in settings.lightning:
        options["strategy"] = choose_strategy(
            options.get("strategy", "auto"), model, settings.lightning.get("find_unused_parameters", False)
        )
    options.setdefault("enable_model_summary", False)
    if "enable_autolog_hparams" in inspect.signature(pl.Trainer).parameters:  # not in older releases
        options["enable_autolog_hparams"] = False
    checkpoints = _checkpoints(settings, model, folder)
    callbacks = [*_callbacks(settings, model, folder, now, checkpoints, anyway), *checkpoints]
    for owner in (model, *callbacks):
        adapt_hooks(owner)
    try:
        return pl.Trainer(
            **options,
            default_root_dir=folder,
            logger=build_loggers(settings.lightning.get("logger"), folder),
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,  # the data module distributes the batches
        )
    except (MisconfigurationException, TypeError) as error:  # TypeError: devices that the accelerator has not
        raise _invalid_trainer(error) from error


def _invalid_trainer(error: Exception) -> ValueError:
    text = " ".join(str(error).split())
    hint = ". Train on the CPU with --accelerator cpu" if "No supported gpu backend" in text else ""
    return ValueError(f"invalid Trainer settings: {text}{hint}")


def _checkpoints(settings: Settings, model: pl.LightningModule, folder: Path) -> list[Checkpoints]:
    """The run's checkpoints and, on request, those that are retained in any case."""
    defaults: dict[str, Any] = {"dirpath": folder / "checkpoints", "filename": "{epoch:06}"}
    if getattr(model, "monitor", None):
        defaults |= {"monitor": model.monitor, "save_top_k": 3}
    sections = {"lightning.modelcheckpoint": (defaults, settings.lightning.get("modelcheckpoint"))}
    callbacks = settings.lightning.get("callbacks") or {}
    if TRAINSTEP in callbacks:
        steps: dict[str, Any] = {
            "dirpath": folder / "checkpoints" / "trainstep_checkpoints",
            "filename": "{epoch:06}-{step:09}",
        }
        steps |= {"save_top_k": -1, "every_n_train_steps": 10000, "save_weights_only": True, "save_last": False}
        sections[f"lightning.callbacks.{TRAINSTEP}"] = (steps, callbacks[TRAINSTEP])
    result = []
    for name, (params, section) in sections.items():
        try:
            result.append(Checkpoints(**(params | _params(section))))
        except TypeError as error:
            raise ValueError(f"{name}.params: {error}") from error
    return result


def _callbacks(
    settings: Settings,
    model: pl.LightningModule,
    folder: Path,
    now: str,
    checkpoints: list[Checkpoints],
    anyway: bool,
) -> list[pl.Callback]:
    """All other callbacks, in the order of their calls: the seeds last, so that no other callback uses them up."""
    configs: dict[str, Any] = {"learning_rate_logger": RATE_LOGGER}
    if hasattr(model, "log_images"):
        configs["image_logger"] = IMAGE_LOGGER
    for name, config in (settings.lightning.get("callbacks") or {}).items():
        if name not in OURS and not (name == "image_logger" and name not in configs):
            known = configs.get(name, {})
            configs[name] = {**known, **config, "params": {**_params(known), **_params(config)}}
    setup = SetupCallback(
        resume=settings.run is not None,
        now=now,
        logdir=folder,
        ckptdir=folder / "checkpoints",
        cfgdir=folder / "configs",
        config=settings.project,
        lightning_config=settings.lightning,
    )
    return [
        setup,
        CUDACallback(),
        *([ProgressBar()] if settings.trainer.get("enable_progress_bar", True) else []),
        *(instantiate_from_config(config) for config in configs.values()),
        NonFiniteGuard(),
        RunPlot(),
        ExactResume(anyway),
        Signals(checkpoints[0]),
        StepSeeds(settings.seed),
    ]


def _params(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return dict((config or {}).get("params") or {})


# ------------------------------------------------------------------------------------------------------------- running


def _fit(trainer: pl.Trainer, model: pl.LightningModule, data: Any, settings: Settings, now: str) -> None:
    if hasattr(data, "check_batch_size"):
        if "train" not in data.datasets:
            raise ValueError("the config has no data.params.train")
        data.check_batch_size(trainer.num_devices * trainer.num_nodes)
    checkpoints = next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
    steps_before = None
    if settings.run and folders.is_first_process():
        steps_before = _prepare_resume(settings, checkpoints.dirpath, now)
    if settings.ckpt:
        _explain_invalid_states(trainer, settings.ckpt)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=settings.ckpt)
        if trainer.global_step == steps_before:
            logger.info("The run had ended already: continue it with a larger --max_steps or --max_epochs")
    except Stopped as stopped:
        if folders.is_first_process():
            raise KeyboardInterrupt(str(stopped)) from stopped
    except SystemExit as error:  # Lightning's answer to Ctrl-C before the training begins
        raise KeyboardInterrupt("interrupted before the first step; nothing written") from error
    except BaseException as error:
        for process in getattr(trainer.strategy.launcher, "procs", []):  # they would wait for this one forever
            process.kill()
        last = checkpoints.dirpath / folders.LAST
        hint = f"; the last good checkpoint is {last}" if last.is_file() else "; there is no checkpoint yet"
        readable = _readable(error, hint)
        if readable is None:
            raise
        raise readable from error


def _prepare_resume(settings: Settings, checkpoints: Path, now: str) -> int:
    """Rename what is newer than the position that a run resumes at. Returns Lightning's count of steps there."""
    assert settings.run is not None and settings.ckpt is not None
    remove_partial_files(checkpoints)
    try:
        state = read_training_state(settings.ckpt)
    except ValueError as error:
        others = sorted(str(path) for path in checkpoints.glob("*.ckpt") if not path.samefile(settings.ckpt))
        hint = f"; other checkpoints of the run, which --resume accepts too: {', '.join(others)}"
        raise ValueError(f"{error}{hint if others else ''}") from error
    discard_after(settings.run, state["place"]["logged"], now)
    last = checkpoints / folders.LAST
    if last.is_file() and not settings.ckpt.samefile(last):
        renamed = checkpoints / f"last-until-{now}.ckpt"
        os.replace(last, renamed)
        logger.info("Resuming from %s; the later %s is renamed to %s", settings.ckpt, last, renamed.name)
    return state["global_step"]


def _explain_invalid_states(trainer: pl.Trainer, path: Path) -> None:
    """Turn what Lightning raises while it restores an incompatible checkpoint into a sentence."""

    def explained(restore: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(restore)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return restore(*args, **kwargs)
            except (TypeError, LookupError, AttributeError, AssertionError, ArithmeticError) as error:
                raise ValueError(
                    f"{path} is damaged, or not a checkpoint of such a run ({type(error).__name__}: {error}): resume "
                    "from another checkpoint"
                ) from error

        return call

    connector = trainer._checkpoint_connector
    for name in ("_restore_modules_and_callbacks", "restore_training_state"):
        setattr(connector, name, explained(getattr(connector, name)))


def _readable(error: BaseException, hint: str) -> Exception | None:
    """An error of training in one sentence; None for one that only its traceback explains."""
    text = str(error)
    if "DataLoader worker process" in text:  # the traceback of another process, in one message
        text = re.sub(r"^\w+(Error|Exception): ", "", text.strip().splitlines()[-1])
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", text, re.IGNORECASE):
        size = re.search(r"tried to allocate ([\d.]+ ?\w*)", text, re.IGNORECASE)
        needed = f" (needs another {size[1]})" if size else ""
        return RuntimeError(
            f"out of memory{needed}. Try a smaller data.params.batch_size with --accumulate_grad_batches, "
            f"model.params.unet_config.params.use_checkpoint=true, or --precision bf16-mixed{hint}"
        )
    death = error.signal if isinstance(error, WorkerDied) else killing_signal(error)
    if death is not None:
        how = f"was killed by signal: {death}" if death else "exited unexpectedly"
        bus = "bus error" in death.lower()
        causes = ", or /dev/shm is full, or a file of a cache was cut short" if bus else ""
        return RuntimeError(
            f"a worker process that loads data {how}, as happens when memory runs out{causes}: try a smaller "
            f"data.params.num_workers{', and check these' if bus else ''}{hint}"
        )
    if isinstance(error, MisconfigurationException):
        return _invalid_trainer(error)
    if isinstance(error, ArithmeticError):
        return ArithmeticError(f"{text}{hint}")
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.filename):
        return error
    if isinstance(error, OSError):
        return OSError(f"{text}{hint}")
    return type(error)(text) if isinstance(error, ValueError) else None


def _test(trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    if "test" not in getattr(data, "datasets", {}):
        return
    if not is_overridden("test_step", model):
        logger.info("%s has no test_step, so data.params.test is not used", type(model).__name__)
        return
    trainer.test(model, datamodule=data)
