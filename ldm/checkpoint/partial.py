"""Starting from a checkpoint that need not fit whole: a model's `ckpt_path`, fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from ldm.checkpoint.reading import CheckpointError, read_checkpoint

logger = logging.getLogger(__name__)


def init_from_checkpoint(module: nn.Module, path: str, ignore_keys: Sequence[str] = (), prefix: str = "") -> None:
    """Copy into `module` what the file holds for it, and log what it lacks.

    ignore_keys: leave out keys that start with one of these. prefix: the module's own place in the file's keys.
    A module on the meta device is left alone: it is about to be filled from another file.

    Raises CheckpointError if a tensor has another shape than the module's, or nothing fits at all.
    """
    own = module.state_dict()
    if any(parameter.is_meta for parameter in module.parameters()):
        return
    state = {
        key.removeprefix(prefix): tensor
        for key, tensor in read_checkpoint(path).state.items()
        if key.startswith(prefix) and not key.startswith(tuple(ignore_keys))
    }
    fitting = {key: tensor for key, tensor in state.items() if key in own}
    if not fitting:
        raise CheckpointError(f"{path} holds nothing for a {type(module).__name__}")
    for key, tensor in fitting.items():
        if tensor.shape != own[key].shape:
            shapes = f"{tuple(tensor.shape)} in the file, {tuple(own[key].shape)} in the model"
            raise CheckpointError(f"{path}: {prefix}{key} is {shapes}; leave it out with ignore_keys")
    missing, unexpected = module.load_state_dict(fitting, strict=False)
    unused = [key for key in state if key not in own]
    logger.info("%s: %d tensors loaded, %d missing, %d not used", path, len(fitting), len(missing), len(unused))
    if missing:
        logger.warning("%s: not in the file: %s%s", path, ", ".join(missing[:5]), " ..." if len(missing) > 5 else "")
