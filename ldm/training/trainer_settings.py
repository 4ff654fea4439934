"""Trainer settings of any Lightning version in terms of this one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

# What a config may set under lightning.trainer; the rest of the Trainer's arguments is the script's business.
TRAINER_KEYS = (
    "max_steps", "max_epochs", "max_time", "min_steps", "min_epochs", "accumulate_grad_batches", "precision",
    "accelerator", "devices", "num_nodes", "strategy", "limit_train_batches", "limit_val_batches",
    "limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval",
    "check_val_every_n_epoch", "num_sanity_val_steps", "gradient_clip_val", "gradient_clip_algorithm",
    "log_every_n_steps", "fast_dev_run", "benchmark", "deterministic", "enable_progress_bar",
    "enable_model_summary", "inference_mode", "profiler", "detect_anomaly", "sync_batchnorm",
    "reload_dataloaders_every_n_epochs",
)  # fmt: skip

# Settings of older versions that nothing depends on any more.
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
    """`settings` of a Trainer as this Lightning takes them, and a sentence for each that had to change.

    Raises ValueError for a setting that no version had.
    """
    current: dict[str, Any] = {}
    older: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        modern = _modern(name, value)
        if modern is not None:
            spelled = " ".join(f"{key}={new}" for key, new in modern.items()) or "the default"
            notes.append(f"{name}={value} is an older spelling of {spelled}")
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
    """One setting of an older version in terms of this one; None if it is none."""
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
