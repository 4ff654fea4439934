"""The settings of a run, from YAML files and a dotlist, and which of them a resumed run may change."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ldm.configs import merge_configs, parse_overrides, read_yaml
from ldm.training.compat import translate_trainer
from ldm.training.folders import find_run, stored_configs

DEFAULT_SEED = 23

# The entries of each section. Other names at the top of a config are variables for ${name}.
SECTIONS = {
    "model": ("base_learning_rate", "params", "target"),
    "data": ("params", "target"),
    "lightning": (
        "callbacks", "find_unused_parameters", "logger", "modelcheckpoint", "scale_lr", "seed", "trainer",
    ),
}  # fmt: skip

# Settings that a resumed run may change: they affect neither its weights nor its data.
_CHANGEABLE_TRAINER_KEYS = (
    "benchmark", "check_val_every_n_epoch", "detect_anomaly", "enable_model_summary", "enable_progress_bar",
    "inference_mode", "limit_predict_batches", "limit_test_batches", "limit_val_batches", "log_every_n_steps",
    "max_epochs", "max_steps", "max_time", "min_epochs", "min_steps", "num_sanity_val_steps", "profiler",
    "val_check_interval",
)  # fmt: skip
CHANGEABLE = (
    "data.params.num_workers",
    "data.params.predict",
    "data.params.shuffle_test_loader",
    "data.params.shuffle_val_dataloader",
    "data.params.test",
    "data.params.use_worker_init_fn",
    "data.params.validation",
    "lightning.callbacks",
    "lightning.logger",
    "lightning.modelcheckpoint",
    "model.params.monitor",
    *(f"lightning.trainer.{name}" for name in _CHANGEABLE_TRAINER_KEYS),
)


@dataclass(frozen=True)
class Settings:
    """All settings of a run, as plain values.

    Attributes:
        project: The sections beside `lightning`: `model` and `data`.
        lightning: Trainer settings (of this Lightning version), callbacks, logger, modelcheckpoint, seed, scale_lr.
        notes: Remarks for the log.
        run: Folder of the run to resume, if any.
        ckpt: Checkpoint to resume from, if any.
    """

    project: dict[str, Any]
    lightning: dict[str, Any]
    notes: tuple[str, ...] = ()
    run: Path | None = None
    ckpt: Path | None = None

    @property
    def trainer(self) -> dict[str, Any]:
        """Arguments of Lightning's Trainer."""
        return self.lightning["trainer"]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.lightning["seed"]


def read_settings(args: argparse.Namespace) -> Settings:
    """Read the settings of a command line (see `ldm.cli.train`).

    A resumed run starts from its own settings, with --base and dotlist on top, as in the public script. Raises
    FileNotFoundError or ValueError for invalid files and settings, and for changes with which a run cannot resume
    exactly, unless `args.resume_anyway`.
    """
    run, ckpt = find_run(args.resume) if args.resume else (None, None)
    stored = [read_yaml(path) for path in stored_configs(run)] if run else []
    given = [read_yaml(path) for path in args.base]
    dotlist = parse_overrides(args.dotlist)
    lightning = {name: value for name, value in (("seed", args.seed), ("scale_lr", args.scale_lr)) if value is not None}
    lightning["trainer"] = translate_trainer(args.trainer)[0]
    _check_names([*stored, *given], dotlist)
    before = merge(stored)
    merged, notes = _complete_lightning(merge([*stored, *given, dotlist]), lightning)
    notes += translate_trainer(args.trainer)[1]
    if run and not args.resume_anyway:
        _check_unchanged(_complete_lightning(before, {})[0], merged, run)
    for name in ("model", "data"):
        if not isinstance(merged.get(name), dict):
            raise ValueError(f"the config has no `{name}:` section")
    project = {name: value for name, value in merged.items() if name != "lightning"}
    return Settings(project, merged["lightning"], tuple(notes), run, ckpt)


def _check_names(files: Sequence[DictConfig], dotlist: DictConfig) -> None:
    """Raise ValueError for a name at the top of the configs, or of their sections, that is not used."""
    plain: list[Any] = [OmegaConf.to_container(config, resolve=False) for config in (*files, dotlist)]
    texts = "".join(OmegaConf.to_yaml(config) for config in files)
    for config in plain:
        for name, value in config.items():
            known = SECTIONS.get(name)
            for key in value if known and isinstance(value, Mapping) else ():
                if known and key not in known:
                    raise ValueError(f"the {name} section has no setting {key!r}{_near(key, known)}")
            near = _near(name, SECTIONS)
            if known is None and isinstance(value, Mapping) and near and not _is_variable(name, texts):
                raise ValueError(f"there is no section {name!r}{near}")
    declared = {name for config in plain[:-1] for name in config}
    for name in plain[-1]:
        if name not in SECTIONS and name not in declared and not _is_variable(name, texts):
            raise ValueError(
                f"the config does not use the setting {name}=...{_near(name, [*SECTIONS, *sorted(declared)])} "
                "(use full names, such as data.params.batch_size=8)"
            )


def _is_variable(name: str, texts: str) -> bool:
    return bool(re.search(r"\$\{\s*" + re.escape(name) + r"\s*[.}\[]", texts))


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""


def merge(configs: Sequence[DictConfig]) -> dict[str, Any]:
    """Merge configs, later ones on top, to plain values, with all references resolved. Raises ValueError."""
    if not configs:
        return {}
    try:
        together = merge_configs(configs, "of this run")
        merged: Any = OmegaConf.to_container(together, resolve=True, throw_on_missing=True)
        return merged
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ValueError(f"the config needs a value for {key}: add {key}=... at the end of the line") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"cannot merge the configs: {' '.join(str(error).split())}") from error


def _complete_lightning(config: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Complete the `lightning` section of `config`: with `given` on top, and defaults."""
    lightning = dict(config.get("lightning") or {})
    trainer, notes = translate_trainer(lightning.get("trainer") or {})
    lightning = {"seed": DEFAULT_SEED, "scale_lr": True} | lightning | dict(given)
    lightning["trainer"] = trainer | given.get("trainer", {})
    return {**config, "lightning": lightning}, notes


def _check_unchanged(before: Mapping[str, Any], after: Mapping[str, Any], run: Path) -> None:
    old, new = dict(_flat(before)), dict(_flat(after))
    changed = [
        f"{key}: {old.get(key, 'nothing')} -> {new.get(key, 'nothing')}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key) and not any(key == name or key.startswith(name + ".") for name in CHANGEABLE)
    ]
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise ValueError(
            f"{run} was started with other settings ({'; '.join(changed[:5])}{more}), so it cannot resume exactly: "
            "undo the changes, add --resume_anyway, or start a new run from its weights with model.params.ckpt_path="
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf and its dotted name."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
