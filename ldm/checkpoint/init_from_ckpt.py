"""Start training from a file that may hold more or less than the model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from ldm.checkpoint.families import describe
from ldm.checkpoint.load_weights import AVERAGES, SCHEDULE_BUFFERS, few, match_ema, shape_text
from ldm.checkpoint.reading import CheckpointError, read_checkpoint

logger = logging.getLogger(__name__)

COMPUTED = SCHEDULE_BUFFERS | {"position_ids"}  # follow from the config


def init_from_checkpoint(
    module: nn.Module,
    path: str | os.PathLike[str],
    ignore_keys: Sequence[str] = (),
    prefix: str = "",
    widen: Mapping[str, int] | None = None,
) -> list[str]:
    """Copy the weights of a file that fit a module, and log which do not.

    The module keeps its own noise schedule. A file with only EMA weights gives those. A module on the meta device is
    left alone, for `fill_model` will bring all of its weights.

    Args:
        module: the module; its `checkpoint_path` becomes `path`.
        path: the file.
        ignore_keys: prefixes of keys (with `prefix`) that are not copied.
        prefix: only keys that start with it are copied, without it.
        widen: weights (with `prefix`) that may have fewer input channels in the file, and how many of these to copy
            at most; the module's other input channels become zero.

    Returns:
        The module's keys for which nothing was found.

    Raises:
        CheckpointError: less than half of the network's weights fit (of a latent diffusion model's UNet, otherwise of
            the whole module). A start that is nearly random should be a random one.
    """
    own = module.state_dict()
    if any(parameter.is_meta for parameter in module.parameters()):
        logger.debug("%s is not read: the model is filled later", path)
        return []
    checkpoint = read_checkpoint(path)
    ignored = tuple(ignore_keys)
    given = {k.removeprefix(prefix): v for k, v in checkpoint.state.items() if k.startswith(prefix)}
    source, _ = match_ema(own, given)
    wanted = [k for k in own if not f"{prefix}{k}".startswith(ignored) and k.rpartition(".")[2] not in COMPUTED]
    found = {k: given[source[k]] for k in wanted if source[k] in given}
    widened = _widen(found, own, {k.removeprefix(prefix): keep for k, keep in (widen or {}).items()})
    found |= widened
    fitting = {k: value for k, value in found.items() if value.shape == own[k].shape}
    _check_enough(wanted, fitting, f"{path} looks like {describe(checkpoint.shapes)}")
    module.load_state_dict(fitting, strict=False)
    module.checkpoint_path = str(path)  # type: ignore[assignment]  # a plain attribute, on any module

    missing = sorted(own.keys() - fitting.keys())
    # averages that the file lacks start from the weights
    initial = [k for k in missing if not k.startswith(tuple(AVERAGES)) and k.rpartition(".")[2] not in COMPUTED]
    used = {source[k] for k in found}
    unused = [k for k in given if k not in used and k.rpartition(".")[2] not in COMPUTED]
    unlike = [
        f"{k} ({shape_text(value.shape)} in the file, {shape_text(own[k].shape)} here)"
        for k, value in found.items()
        if k not in fitting
    ]
    zero = [f"{k} ({given[source[k]].shape[1]} of {own[k].shape[1]} are in the file)" for k in sorted(widened)]
    report = [f"{len(fitting)} of {len(own)} weights taken"]
    report += [f"new input channels start at zero: {', '.join(zero)}"] if zero else []
    report += [f"{len(unlike)} have another shape: {few(unlike, 5)}"] if unlike else []
    report += [f"{len(initial)} stay at their initial values: {_by_module(initial)}"] if initial else []
    report += [f"{len(unused)} of the file are left out: {_by_module(unused)}"] if unused else []
    logger.log(logging.WARNING if unlike or initial else logging.INFO, "%s: %s", path, "; ".join(report))
    return missing


def _widen(found: Mapping[str, Tensor], own: Mapping[str, Tensor], keep: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the weights (O, C, k, k) in `keep` with zeros for the input channels that the file lacks."""
    result: dict[str, Tensor] = {}
    for key in keep.keys() & found.keys():
        given, shape = found[key], own[key].shape
        alike = given.ndim == len(shape) == 4 and (given.shape[0], *given.shape[2:]) == (shape[0], *shape[2:])
        if alike and given.shape[1] < shape[1]:
            result[key] = given.new_zeros(shape)
            taken = min(keep[key], given.shape[1])
            result[key][:, :taken] = given[:, :taken]
    return result


def _check_enough(wanted: Iterable[str], fitting: Mapping[str, Tensor], looks: str) -> None:
    network = [k for k in wanted if k.startswith("model.")] or [
        k for k in wanted if not k.startswith(("loss.", *AVERAGES))
    ]
    count = sum(k in fitting for k in network)
    if not fitting:
        raise CheckpointError(f"nothing in the file fits: {looks}")
    if 2 * count < len(network):
        raise CheckpointError(f"only {count} of the network's {len(network)} weights fit the file: {looks}")


def _by_module(keys: Iterable[str]) -> str:
    """Group keys by the first two parts of their names: how many, and which few."""
    groups: dict[str, list[str]] = {}
    for key in keys:
        parts = key.split(".")
        groups.setdefault(".".join(parts[:2]) if len(parts) > 2 else parts[0], []).append(key)
    texts = [
        names[0] if len(names) == 1 else f"{group} ({len(names)}: {few(names, 2)})" for group, names in groups.items()
    ]
    return few(texts, 8)
