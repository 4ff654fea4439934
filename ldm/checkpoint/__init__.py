"""Read and write checkpoints (`.ckpt`, `.safetensors`).

formats        safe readers of containers, pickles and storages
reading        `read_checkpoint`: a file becomes a `Checkpoint`, tensors under their published names
checksums      checksums, NaN, fingerprints
families       which config a file needs, by its keys and shapes
load_weights   models built on the meta device and filled by assignment
init_from_ckpt training that starts from a file that fits in part
trainer_state  the state of a training run
save           published names, written atomically; pruned files
"""

from ldm.checkpoint.checksums import fingerprint
from ldm.checkpoint.families import config_for, describe, detect_config, ema_name
from ldm.checkpoint.init_from_ckpt import init_from_checkpoint
from ldm.checkpoint.load_weights import LoadReport, build_on_meta, check_unchanged, fill_model
from ldm.checkpoint.reading import Checkpoint, CheckpointError, read_checkpoint
from ldm.checkpoint.save import prune, save_checkpoint

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
