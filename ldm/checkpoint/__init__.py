"""The only reader and writer of checkpoints (`.ckpt`, `.safetensors`).

reading    a file becomes a `Checkpoint`: tensors under their published names, memory-mapped
containers the layouts of pickled files: zip archives, and what came before them
pickles    what a pickled file gets (nothing that can act), by the names that it may ask for (names)
storages   where the bytes of tensors come from: ranges of a file, mapped or read
verifying  checksums, and values that are no numbers
families   what a file looks like, by its keys and shapes: which config, or why none
filling    models on the meta device, filled by assignment
starting   training that starts from a file that fits in part
pruning    from a training's checkpoint to what sampling needs
saving     published names, written whole or not at all
hashing    the key of a set of weights
"""

from ldm.checkpoint.families import config_for, describe, detect_config, ema_name
from ldm.checkpoint.hashing import fingerprint
from ldm.checkpoint.init_from_ckpt import init_from_checkpoint
from ldm.checkpoint.load_weights import LoadReport, build_on_meta, check_unchanged, fill_model
from ldm.checkpoint.prune import prune
from ldm.checkpoint.reading import Checkpoint, CheckpointError, read_checkpoint
from ldm.checkpoint.save import save_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "build_on_meta",
    "check_unchanged",
    "config_for",
    "describe",
    "detect_config",
    "ema_name",
    "fill_model",
    "fingerprint",
    "init_from_checkpoint",
    "prune",
    "read_checkpoint",
    "save_checkpoint",
]
