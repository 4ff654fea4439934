"""The model that a script's options name."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion


def load_model(args: Namespace) -> LatentDiffusion:
    """The model that the options of `add_model` name; settles the steps, sampler and scale that they leave to it.

    Raises ValueError if --C or --f contradict the model, and what loading raises.
    """
    from ldm import inference

    model = inference.load_model(args.config, args.ckpt, device=args.device, precision=args.precision)
    size = inference.default_size(model)
    factor = size // model.latent_size(size, size)[0]
    for flag, actual in (("--C", model.channels), ("--f", factor)):
        given = getattr(args, flag.lstrip("-"), None)
        if given not in (None, actual):
            raise ValueError(f"{flag} {given} does not fit this model, which has {actual}: leave {flag} out")
    args.ddim_steps, args.sampler, args.scale = inference.sampling_settings(
        model, args.public_scale, args.ddim_steps, args.sampler, args.scale, args.ddim_eta, args.public_steps
    )
    return model


def model_name(model: LatentDiffusion) -> str:
    """What to call a loaded model: its file, or the folder of a file with the public name model.ckpt or last.ckpt."""
    path = Path(model.checkpoint_path).resolve()
    return path.parent.name if path.stem in ("model", "last") else path.stem
