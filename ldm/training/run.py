"""A run from its settings to its end: data, model, callbacks, Lightning's Trainer, and what is said when it fails."""

from __future__ import annotations

import argparse
import inspect
import logging
import os
import re
import signal
import traceback
import warnings
from collections.abc import Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from ldm.data.cache import ensure_caches
from ldm.devices import choose_device
from ldm.limits import building
from ldm.training import folders
from ldm.training.callbacks import CUDACallback, ProgressBar, SetupCallback
from ldm.training.checkpoints import Checkpoints, WholeFiles, read_training_state, remove_partial_files
from ldm.training.configs import Settings, read_settings
from ldm.training.loggers import build_loggers, forget_after
from ldm.training.resume import ContinueExactly
from ldm.training.seeding import StepSeeds, seed_draws
from ldm.training.signals import Signals, Stopped
from ldm.training.strategies import choose_strategy
from ldm.trust import allowlist_only
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

MAX_EPOCHS = 1000  # as in the public script, where nothing else ends a run
IMAGE_LOGGER = {"target": "main.ImageLogger", "params": {"batch_frequency": 750, "max_images": 4, "clamp": True}}
RATE_LOGGER = {"target": "pytorch_lightning.callbacks.LearningRateMonitor", "params": {"logging_interval": "step"}}
TRAINSTEP = "metrics_over_trainsteps_checkpoint"
BY_HAND = {"accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"}
OURS = ("checkpoint_callback", "setup_callback", "cuda_callback", TRAINSTEP)


@allowlist_only()  # also while a callback or a hook builds something from the config later
def train(args: argparse.Namespace) -> None:
    """Do what the command line asks for (see `ldm.cli_train`). Raises what `ldm.cli.run` can show in one line."""
    _quiet()
    if not folders.is_first_process():
        logging.getLogger("ldm").setLevel(logging.WARNING)
    settings = read_settings(args)
    for note in settings.notes:
        logger.info(note)
    now = folders.timestamp()
    seed_draws(settings.seed)  # the model's first weights
    model = build_model(settings)
    device = "cpu" if settings.trainer.get("accelerator") == "cpu" else "auto"
    ensure_caches(model, settings.project["data"], choose_device(device))
    data = build_data(settings)
    folder = settings.run or _new_folder(args, now)
    try:
        trainer = build_trainer(settings, model, folder, now, anyway=args.resume_anyway)
        set_learning_rate(model, settings, data.batch_size, trainer.num_devices * trainer.num_nodes)
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


def _quiet() -> None:
    """Keep what Lightning says to what a person can act on."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        r".*does not have many workers",
        r".*is smaller than the logging interval",
        r".*your dataloader is not resumable",  # the position is in the checkpoint (see `continuing`)
        r".*module\(s\) in eval mode at the start of training",  # frozen stages
        r".*exists and is not empty",
        r".*no `val_dataloader`|.*defined a `validation_step` but have no",
        r".*GPU available but not used",
        r".*isinstance\(treespec, LeafSpec\)",
    ):
        warnings.filterwarnings("ignore", message=text)


# ------------------------------------------------------------------------------------------------------------ building


def build_data(settings: Settings) -> Any:
    """The data module, its data sets built. A config that names no seed gets the run's."""
    config = settings.project["data"]
    params = dict(config.get("params") or {})
    if str(config.get("target")).endswith("DataModuleFromConfig"):
        params.setdefault("seed", settings.seed)
    data = instantiate_from_config({**config, "params": params})
    data.prepare_data()
    data.setup("fit")
    return data


def build_model(settings: Settings) -> pl.LightningModule:
    """The model of the config; one that optimises by hand is told the Trainer's settings that are its own business."""
    with building():
        model = instantiate_from_config(settings.project["model"])
    if not isinstance(model, pl.LightningModule):
        raise ValueError(f"{settings.project['model'].get('target')} is not a model that can be trained")
    if not model.automatic_optimization:
        for name in BY_HAND & set(settings.trainer):
            setattr(model, name, settings.trainer[name])
    weights = list(model.parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    total = sum(weight.numel() for weight in weights)
    logger.info("%s: %.1f million weights, %.1f of them trained", type(model).__name__, total / 1e6, trained / 1e6)
    return model


def set_learning_rate(model: pl.LightningModule, settings: Settings, batch_size: int, processes: int) -> None:
    """Give the model its `learning_rate`, and say how it came about."""
    base = settings.project["model"].get("base_learning_rate")
    if base is None:
        raise ValueError("the config's model section has no base_learning_rate: add model.base_learning_rate=1.0e-4")
    try:
        base = float(base)
    except (TypeError, ValueError):
        raise ValueError(f"model.base_learning_rate is a number, not {base!r}") from None
    accumulated = settings.trainer.get("accumulate_grad_batches", 1)
    if settings.lightning["scale_lr"]:
        model.learning_rate = accumulated * processes * batch_size * base
        logger.info(
            "Learning rate %.2e = %d accumulated batches * %d processes * %d items a batch * base_learning_rate %.2e",
            *(model.learning_rate, accumulated, processes, batch_size, base),
        )
    else:
        model.learning_rate = base  # type: ignore[assignment]  # what Lightning's modules expect to be told
        logger.info("Learning rate %.2e", model.learning_rate)


def build_trainer(
    settings: Settings, model: pl.LightningModule, folder: Path, now: str, anyway: bool = False
) -> pl.Trainer:
    """Lightning's Trainer with everything that a run has."""
    options = dict(settings.trainer)
    if not model.automatic_optimization:
        options = {name: value for name, value in options.items() if name not in BY_HAND}
    if not {"max_epochs", "max_steps", "max_time"} & set(options):
        options["max_epochs"] = MAX_EPOCHS
    if "strategy" in options or "find_unused_parameters" in settings.lightning:
        options["strategy"] = choose_strategy(
            options.get("strategy", "auto"), model, settings.lightning.get("find_unused_parameters", False)
        )
    options.setdefault("enable_model_summary", False)
    checkpoints = _checkpoints(settings, model, folder)
    try:
        return pl.Trainer(
            **options,
            default_root_dir=folder,
            logger=build_loggers(settings.lightning.get("logger"), folder),
            callbacks=[*_callbacks(settings, model, folder, now, checkpoints, anyway), *checkpoints],
            plugins=[WholeFiles()],
            use_distributed_sampler=False,  # the data module deals the shares
            **_without_hyperparameters(),
        )
    except (MisconfigurationException, TypeError) as error:  # TypeError: devices of another kind than the accelerator's
        raise ValueError(f"the Trainer's settings do not fit: {error}") from error


def _without_hyperparameters() -> dict[str, Any]:
    """What keeps Lightning from noting a model's arguments; its older releases note only what a model saves."""
    known = "enable_autolog_hparams" in inspect.signature(pl.Trainer).parameters
    return {"enable_autolog_hparams": False} if known else {}


def _checkpoints(settings: Settings, model: pl.LightningModule, folder: Path) -> list[Checkpoints]:
    """The run's checkpoints and, on request, those that are kept whatever comes."""
    section = settings.lightning.get("modelcheckpoint") or {}
    defaults = {"dirpath": folder / "checkpoints", "filename": "{epoch:06}"}
    if getattr(model, "monitor", None):
        defaults |= {"monitor": model.monitor, "save_top_k": 3}
    result = [_build(Checkpoints, "lightning.modelcheckpoint", defaults | _params(section))]
    callbacks = settings.lightning.get("callbacks") or {}
    if TRAINSTEP in callbacks:
        steps = {"dirpath": folder / "checkpoints" / "trainstep_checkpoints", "filename": "{epoch:06}-{step:09}"}
        steps |= {"save_top_k": -1, "every_n_train_steps": 10000, "save_weights_only": True, "save_last": False}
        name = f"lightning.callbacks.{TRAINSTEP}"
        result.append(_build(Checkpoints, name, steps | _params(callbacks[TRAINSTEP])))
    return result


def _callbacks(
    settings: Settings,
    model: pl.LightningModule,
    folder: Path,
    now: str,
    checkpoints: list[Checkpoints],
    anyway: bool,
) -> list[pl.Callback]:
    """Everything else that looks on, in the order of its turn: the seeds last, so that nothing draws between them."""
    from ldm.training.curves import RunPlot
    from ldm.training.nan_guard import NonFiniteGuard

    given = settings.lightning.get("callbacks") or {}
    configs: dict[str, Any] = {"learning_rate_logger": RATE_LOGGER}
    if hasattr(model, "log_images"):
        configs["image_logger"] = IMAGE_LOGGER
    for name, config in given.items():
        if name not in OURS and not (name == "image_logger" and name not in configs):
            known = configs.get(name, {})
            configs[name] = {**known, **config, "params": {**_params(known), **_params(config)}}
    setup: dict[str, Any] = {
        "resume": settings.run is not None,
        "now": now,
        "logdir": folder,
        "ckptdir": folder / "checkpoints",
    }
    setup |= {"cfgdir": folder / "configs", "config": settings.project, "lightning_config": settings.lightning}
    return [
        SetupCallback(**setup),
        CUDACallback(),
        *([ProgressBar()] if settings.trainer.get("enable_progress_bar", True) else []),
        *(instantiate_from_config(config) for config in configs.values()),
        NonFiniteGuard(),
        RunPlot(),
        ContinueExactly(anyway),
        Signals(checkpoints[0]),
        StepSeeds(settings.seed),
    ]


def _params(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return dict((config or {}).get("params") or {})


def _build(kind: type, name: str, params: Mapping[str, Any]) -> Any:
    try:
        return kind(**params)
    except TypeError as error:
        raise ValueError(f"{name}.params: {error}") from error


# ------------------------------------------------------------------------------------------------------------- running


def _fit(trainer: pl.Trainer, model: pl.LightningModule, data: Any, settings: Settings, now: str) -> None:
    if hasattr(data, "check_batch_size"):
        if "train" not in data.datasets:
            raise ValueError("the config has no data.params.train, so there is nothing to train with")
        data.check_batch_size(trainer.num_devices * trainer.num_nodes)
    checkpoints = next(callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
    steps_before = None
    if settings.run and folders.is_first_process():
        steps_before = _make_room(settings, checkpoints.dirpath, now)
    try:
        trainer.fit(model, datamodule=data, ckpt_path=settings.ckpt)
        if trainer.global_step == steps_before:
            logger.info("The run was at its end already: a larger --max_steps or --max_epochs lets it go on")
    except Stopped as stopped:
        if not folders.is_first_process():
            return
        raise KeyboardInterrupt(str(stopped)) from stopped
    except SystemExit as error:  # Lightning's answer to Ctrl-C before the training begins
        raise KeyboardInterrupt("interrupted before the first step; nothing written") from error
    except BaseException as error:
        _end_other_processes(trainer)
        if settings.ckpt and isinstance(error, _OF_STRANGE_STATES) and _in_restoring(error):
            raise ValueError(
                f"{settings.ckpt} is not the state of such a run, or damaged ({type(error).__name__}: {error}): resume "
                "from another checkpoint"
            ) from error
        readable = _readable(error, _kept(checkpoints))
        if readable is None:
            raise
        raise readable from error


def _make_room(settings: Settings, checkpoints: Path, now: str) -> int:
    """Before a run goes on: what is newer than the place where it does so is kept under other names.

    Returns Lightning's count of steps at that place.
    """
    assert settings.run is not None and settings.ckpt is not None
    remove_partial_files(checkpoints)
    try:
        state = read_training_state(settings.ckpt)
    except ValueError as error:
        others = sorted(str(path) for path in checkpoints.glob("*.ckpt") if not path.samefile(settings.ckpt))
        hint = f"; the run's other checkpoints are {', '.join(others)} (--resume takes one of them, too)"
        raise ValueError(f"{error}{hint if others else ''}") from error
    forget_after(settings.run, state["place"]["logged"], now)
    last = checkpoints / folders.LAST
    if last.is_file() and not settings.ckpt.samefile(last):
        kept = checkpoints / f"last-until-{now}.ckpt"
        os.replace(last, kept)
        logger.info("%s does not go on from %s, which is kept as %s", settings.ckpt, last, kept.name)
    return state["global_step"]


# What optimisers, schedules and callbacks raise when they are given a state that is not theirs.
_OF_STRANGE_STATES = (TypeError, LookupError, AttributeError, AssertionError, ArithmeticError)


def _in_restoring(error: BaseException) -> bool:
    """Whether an error comes from where Lightning hands out what a checkpoint holds."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_globals.get("__name__", "").endswith(".checkpoint_connector")
        and frame.f_code.co_name.lstrip("_").startswith("restore")
        for frame in frames
    )


def _end_other_processes(trainer: pl.Trainer) -> None:
    """Processes that Lightning started would wait for this one, which failed, forever."""
    for process in getattr(trainer.strategy.launcher, "procs", []):
        process.kill()


def _kept(checkpoints: Checkpoints) -> str:
    last = checkpoints.dirpath / folders.LAST
    return f"; the last good checkpoint is {last}" if last.is_file() else "; there is no checkpoint yet"


def _readable(error: BaseException, kept: str) -> Exception | None:
    """An error of training for the person who started it; None for one that only its traceback explains."""
    text = str(error)
    if "DataLoader worker process" in text:  # the traceback of another process, in one message
        text = re.sub(r"^\w+(Error|Exception): ", "", text.strip().splitlines()[-1])
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", text, re.IGNORECASE):
        size = re.search(r"tried to allocate ([\d.]+ ?\w*)", text, re.IGNORECASE)
        tried = f" (it takes another {size[1]})" if size else ""
        return RuntimeError(
            f"there is not enough of it{tried}: memory. Try a smaller data.params.batch_size with "
            "--accumulate_grad_batches to make up for it, model.params.unet_config.params.use_checkpoint=true, or "
            f"--precision bf16-mixed{kept}"
        )
    if death := _death_of_a_loader(error, text):
        bus = (", or /dev/shm is full, or a file of a cache was cut short", " and look after these")
        why, hint = bus if "bus error" in death.lower() else ("", "")
        return RuntimeError(
            f"a process that loads pictures {death}, as happens when memory runs out{why}: try a smaller "
            f"data.params.num_workers{hint}{kept}"
        )
    if isinstance(error, MisconfigurationException):
        return ValueError(f"the Trainer's settings do not fit: {' '.join(text.split())}")
    if isinstance(error, ArithmeticError):
        return ArithmeticError(f"{text}{kept}")
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.filename):
        return error
    if isinstance(error, OSError):
        return OSError(f"{text}{kept}")
    return type(error)(text) if isinstance(error, ValueError) else None


def _death_of_a_loader(error: BaseException, text: str) -> str:
    """How a process that loads pictures died, if that is what the error comes from; "" if not.

    torch may be told of it by the system, which names the signal. It may as well find the process gone, or only its
    end of a pipe.
    """
    said = re.search(r"DataLoader worker \(.*?\) (?:is killed by signal: (\w+(?: error)?)|exited unexpectedly)", text)
    if said and said[1]:
        return f"was killed by signal: {said[1]}"
    if not said and not isinstance(error, (ConnectionError, EOFError)):
        return ""
    codes: list[int | None] = []
    for frame, _ in traceback.walk_tb(error.__traceback__):
        loading = frame.f_locals.get("self")
        if isinstance(loading, _MultiProcessingDataLoaderIter):
            wait([worker.sentinel for worker in loading._workers], timeout=1)  # it may be about to end
            codes += [worker.exitcode for worker in loading._workers]
    for code in codes:
        if code and code < 0:
            return f"was killed by signal: {signal.strsignal(-code)}"
    return "exited unexpectedly" if said or any(codes) else ""


def _test(trainer: pl.Trainer, model: pl.LightningModule, data: pl.LightningDataModule) -> None:
    if "test" not in getattr(data, "datasets", {}):
        return
    if not is_overridden("test_step", model):
        logger.info("%s has no test_step, so data.params.test is not used", type(model).__name__)
        return
    trainer.test(model, datamodule=data)
