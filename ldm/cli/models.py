"""The model that a script's options name."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ldm.cli.speed import take

if TYPE_CHECKING:
    from ldm.inference.conditioning import Task
    from ldm.models.diffusion.ddpm import LatentDiffusion


def load_model(args: Namespace, *tasks: Task) -> LatentDiffusion:
    """The model that the options of `add_model` name; settles the steps, sampler, scale, schedule they leave to it.

    It takes the shortcuts of `add_speed` and the tiles of `add_size`, where a script has those. tasks: what the script
    has for a model to draw from. Raises ValueError if the model draws from nothing of that, if --C or --f contradict
    it, if --tile is impossible, and what loading raises.
    """
    from ldm import inference

    tile = getattr(args, "first_stage_tile", 0)
    if tile and getattr(args, "tiling", None):
        raise ValueError("--tile cuts pictures where --tiling joins them: leave one of the two out")
    model = inference.load_model(
        args.config,
        args.ckpt,
        device=args.device,
        precision=args.precision,
        overrides=args.settings,
        tasks=tasks,
        lowvram=getattr(args, "lowvram", False),
        verify=args.verify,
    )
    size = inference.default_size(model)
    factor = size // model.latent_size(size, size)[0]
    for flag, actual in (("--C", model.channels), ("--f", factor)):
        given = getattr(args, flag.lstrip("-"), None)
        if given not in (None, actual):
            raise ValueError(f"{flag} {given} does not fit this model, which has {actual}: leave {flag} out")
    args.ddim_steps, args.sampler, args.scale = inference.sampling_settings(
        model,
        args.public_scale,
        args.ddim_steps,
        args.sampler,
        args.scale,
        args.ddim_eta,
        args.public_steps,
        args.cfg_pp,
    )
    args.schedule = args.schedule or model.info.sampling.schedule
    if tile:
        inference.tile_first_stage(model.first_stage_model, tile)
    take(args, model)
    return model


def model_name(model: LatentDiffusion) -> str:
    """What to call a loaded model: its file, or the folder of a file with the public name model.ckpt or last.ckpt."""
    path = Path(model.info.checkpoint_path).resolve()
    return path.parent.name if path.stem in ("model", "last") else path.stem


class Resumed(NamedTuple):
    """checkpoint, config: files; None is a config that the checkpoint itself tells. home: the folder they are in."""

    checkpoint: Path
    config: Path | None
    home: Path


def resumed(path: str | Path) -> Resumed:
    """What `path` stands for: a checkpoint, a folder that holds model.ckpt, or a run folder of scripts/train.py.

    The config is the run's, or a config.yaml beside the checkpoint. Raises FileNotFoundError if there is no checkpoint.
    """
    from ldm.training.folders import find_run, stored_configs

    path = Path(path)
    public = [path / name for name in ("model.ckpt", "model.safetensors")] if path.is_dir() else [path]
    checkpoint = next((place for place in public if place.is_file()), None)
    if checkpoint is None and not stored_configs(path):
        if not path.exists():
            raise FileNotFoundError(f"--resume {path}: there is no such checkpoint or folder")
        raise FileNotFoundError(f"--resume {path} is a folder without model.ckpt, and no run folder: name a checkpoint")
    run = path if checkpoint is None else checkpoint.parent.parent
    if configs := [place for place in stored_configs(run) if place.name.endswith("-project.yaml")]:
        return Resumed(checkpoint or find_run(run)[1], configs[-1], run)
    if checkpoint is None:
        raise FileNotFoundError(f"--resume {path} holds no configs/*-project.yaml: name a checkpoint in it")
    config = checkpoint.with_name("config.yaml")
    return Resumed(checkpoint, config if config.is_file() else None, checkpoint.parent)
