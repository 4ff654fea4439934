"""Support for code and settings written for Lightning 1: Trainer settings, hooks, names that moved.

`scripts/train.py` applies all of it. A project's own script for Lightning 1 works with one more line, before it imports
the rest: `from ldm.training.compat import support_lightning_1; support_lightning_1()`.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import importlib
import inspect
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

# Settings of a config's lightning.trainer section; the Trainer's other arguments are set by the script.
TRAINER_KEYS = (
    "max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "accumulate_grad_batches", "precision",
    "accelerator", "devices", "num_nodes", "strategy", "limit_train_batches", "limit_val_batches",
    "limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval",
    "check_val_every_n_epoch", "num_sanity_val_steps", "gradient_clip_val", "gradient_clip_algorithm",
    "log_every_n_steps", "fast_dev_run", "benchmark", "deterministic", "enable_progress_bar",
    "enable_model_summary", "inference_mode", "profiler", "detect_anomaly", "sync_batchnorm",
    "reload_dataloaders_every_n_epochs",
)  # fmt: skip

# Settings of Lightning 1 that have no effect any more.
_DROPPED_KEYS = (
    "amp_backend", "amp_level", "auto_lr_find", "auto_scale_batch_size", "auto_select_gpus",
    "checkpoint_callback", "flush_logs_every_n_steps", "ipus", "log_gpu_memory", "move_metrics_to_cpu",
    "multiple_trainloader_mode", "prepare_data_per_node", "process_position", "replace_sampler_ddp",
    "stochastic_weight_avg", "terminate_on_nan", "tpu_cores", "track_grad_norm", "truncated_bptt_steps",
    "weights_save_path", "weights_summary", "increase_log_steps", "logger", "callbacks", "plugins",
    "default_root_dir", "resume_from_checkpoint", "enable_checkpointing", "use_distributed_sampler",
)  # fmt: skip
_OLD_STRATEGIES = {
    "ddp": "ddp",
    "ddp2": "ddp",
    "ddp_cpu": "ddp",
    "ddp_spawn": "ddp",
    "ddp_sharded": "fsdp",
    "dp": "ddp",
    "horovod": "ddp",
}


def translate_trainer(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Translate Trainer settings of any Lightning version to this one.

    Returns the settings, and a note on each that changed. Raises ValueError for a setting that no version had.
    """
    current: dict[str, Any] = {}
    older: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        modern = _modern(name, value)
        if modern is not None:
            spelling = " ".join(f"{key}={new}" for key, new in modern.items()) or "the default"
            notes.append(f"{name}={value} is an older spelling of {spelling}")
            older |= modern
        elif name in _DROPPED_KEYS:
            notes.append(f"lightning.trainer.{name} has no effect any more")
        elif name in TRAINER_KEYS:
            current[name] = value
        else:
            near = difflib.get_close_matches(name, TRAINER_KEYS, n=1)
            hint = f": did you mean {near[0]}?" if near else ""
            raise ValueError(f"lightning.trainer has no setting {name!r}{hint}")
    return older | current, notes


def _modern(name: str, value: Any) -> dict[str, Any] | None:
    """Translate one setting; None if it is not an old one."""
    if name == "progress_bar_refresh_rate":
        return {} if int(value) else {"enable_progress_bar": False}
    if name == "num_processes":
        return {"devices": int(value)}
    if name == "distributed_backend" or (name == "accelerator" and value in _OLD_STRATEGIES):
        strategy = _OLD_STRATEGIES.get(value)
        if strategy is None:
            raise ValueError(f"{name}={value} is not one of {', '.join(_OLD_STRATEGIES)}")
        return {"strategy": strategy} | ({"accelerator": "cpu"} if value == "ddp_cpu" else {})
    if name == "gpus":
        if value in (0, "0", "", []):
            return {"accelerator": "cpu"}
        return {"accelerator": "gpu", "devices": value if not isinstance(value, str) or "," in value else int(value)}
    return None


# -------------------------------------------------------------------------------------------------------------- hooks

# Hooks that had another last argument in Lightning 1, with the number of arguments that a LightningModule's get now.
_HOOKS = {"on_train_batch_start": 2, "on_train_batch_end": 3, "validation_step": 2, "test_step": 2}
_FORMER_ARGUMENTS = {"dataloader_idx", "unused"}


def adapt_hooks(owner: Any) -> None:
    """Make the hooks of a model or callback work without Lightning 1's `dataloader_idx`, which becomes 0.

    Raises ValueError, naming the line, for a `training_step` with `optimizer_idx`: it must be rewritten.
    """
    is_callback = not hasattr(owner, "training_step")
    for name, given in _HOOKS.items():
        hook = getattr(owner, name, None)
        if hook is None:
            continue
        missing = _required_arguments(hook)[given + 2 * is_callback :]  # a callback also gets trainer and module
        if len(missing) == 1 and missing[0] in _FORMER_ARGUMENTS:
            setattr(owner, name, functools.partial(hook, **{missing[0]: 0}))
    step = getattr(owner, "training_step", None)
    if step is not None and "optimizer_idx" in _required_arguments(step):
        code = inspect.unwrap(step).__code__
        raise ValueError(
            f"{code.co_filename}, line {code.co_firstlineno}: training_step of {type(owner).__name__} takes "
            "optimizer_idx, which Lightning 2 does not pass. Remove it; with several optimizers, set "
            "self.automatic_optimization = False in __init__, and step each of self.optimizers() in training_step"
        )


def _required_arguments(function: Any) -> list[str]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.kind in positional and one.default is inspect.Parameter.empty]


# -------------------------------------------------------------------------------------------------------------- names

_MOVED_MODULES = {
    "pytorch_lightning.utilities.distributed": "pytorch_lightning.utilities.rank_zero",
    "pytorch_lightning.utilities.rank_zero_only": "pytorch_lightning.utilities.rank_zero",
}


def support_lightning_1() -> None:
    """Provide names of Lightning 1: `pytorch_lightning.utilities.distributed`, `Trainer.from_argparse_args`, hooks.

    It changes Lightning for the whole process, so it is for scripts to call.
    """
    import pytorch_lightning as pl

    for old, new in _MOVED_MODULES.items():
        if old not in sys.modules and _is_missing(old):
            alias = ModuleType(old)
            alias.__dict__.update({k: v for k, v in vars(importlib.import_module(new)).items() if k[:2] != "__"})
            sys.modules[old] = alias
    if not hasattr(pl.Trainer, "from_argparse_args"):
        trainer: Any = pl.Trainer
        trainer.add_argparse_args = staticmethod(add_argparse_args)
        trainer.from_argparse_args = classmethod(from_argparse_args)
        fit = trainer.fit

        @functools.wraps(fit)
        def fit_adapted(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            for owner in (model, *self.callbacks):
                adapt_hooks(owner)
            return fit(self, model, *args, **kwargs)

        trainer.fit = fit_adapted


def _is_missing(module: str) -> bool:
    from importlib.util import find_spec

    return find_spec(module) is None


def add_argparse_args(parser: argparse.ArgumentParser, **_: Any) -> argparse.ArgumentParser:
    """Add the Trainer's settings, in Lightning 1's spelling too, to a parser. Returns the parser."""
    for name in (*TRAINER_KEYS, "gpus", "num_processes", "distributed_backend"):
        parser.add_argument(f"--{name}", type=_literal, default=None)
    return parser


def from_argparse_args(cls: Any, args: argparse.Namespace | Mapping[str, Any], **kwargs: Any) -> Any:
    """Make a Trainer of the settings in `args` that are set; `kwargs` win over them."""
    given = args if isinstance(args, Mapping) else vars(args)
    known = {*TRAINER_KEYS, *_DROPPED_KEYS, "gpus", "num_processes", "distributed_backend", "progress_bar_refresh_rate"}
    settings, _ = translate_trainer({name: value for name, value in given.items() if name in known})
    return cls(**{**settings, **kwargs})


def _literal(text: str) -> Any:
    """A Python literal such as 2, 0.5 or True; anything else is text."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return value if isinstance(value, (int, float, bool)) else text
