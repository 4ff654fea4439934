"""Read YAML configs: within limits of size, and with references to their own values only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ldm.limits import check_growth, check_yaml
from ldm.trust import check_references
from ldm.util import public_path


def read_yaml(path: str | Path) -> DictConfig:
    """Read a YAML file with named sections.

    Args:
        path: a path, or one of the public layout such as `configs/stable-diffusion/v1-inference.yaml`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not valid YAML, has no sections, is too large once its aliases are expanded, or
            contains `${...}` references beyond its own values (see `ldm.trust`).
    """
    place = Path(path) if Path(path).is_file() else public_path(str(path))
    if place is None:
        raise FileNotFoundError(f"config {path}: no such file")
    try:
        check_yaml(place)
        config = OmegaConf.load(place)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"config {path} is not valid YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ValueError(f"config {path} has no sections such as model: and data:")
    check_references(OmegaConf.to_container(config), path)
    return config


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """Parse settings of the form `section.key=value`. Raises ValueError if they are malformed."""
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"cannot read the settings {' '.join(overrides)}: {error}") from error


def merge_configs(configs: Sequence[DictConfig], name: str | Path) -> DictConfig:
    """Merge configs, later ones on top, and check their size with all references resolved.

    Args:
        configs: at least one config, from `read_yaml` or `parse_overrides`.
        name: what error messages call the result.

    Raises:
        ValueError: the configs do not fit together, or grow beyond the limits of `ldm.limits`.
    """
    try:
        merged = OmegaConf.merge(*configs)
    except OmegaConfBaseException as error:
        raise ValueError(f"cannot merge the settings of config {name}: {' '.join(str(error).split())}") from error
    assert isinstance(merged, DictConfig)
    check_growth(OmegaConf.to_container(merged), name)
    return merged
