#!/usr/bin/env python
"""Compute the latents, and on request the text embeddings, of a training config's data once and keep them on disk."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.devices import DEVICES
from ldm.files import write_text
from ldm.trust import allowlist_only

CACHED = "ldm.data.cache.CachedDataset"
SECTIONS = ("train", "validation")


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(
        description=__doc__, usage="%(prog)s --base CONFIG... --out FOLDER [key.sub=value ...]"
    )
    path, count = cli.user_path, cli.number(int, 1)
    options.add_argument("-b", "--base", nargs="+", required=True, type=path, metavar="CONFIG", help="training configs")
    options.add_argument("--ckpt", type=path, metavar="FILE", help="the model's weights, if the config names none")
    options.add_argument("--verify", action="store_true", help="compare the checkpoint with its checksums first")
    options.add_argument("--out", required=True, type=path, metavar="FOLDER", help="where the caches go")
    options.add_argument("--text", action="store_true", help="embed the captions too")
    options.add_argument("--variants", type=count, default=1, help="random crops and captions a picture (%(default)s)")
    options.add_argument("--flips", action="store_true", help="keep every picture mirrored as well")
    options.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="of the files (%(default)s)"
    )
    options.add_argument("--batch_size", type=count, default=8, help="pictures at once (%(default)s)")
    options.add_argument("--num_workers", type=cli.number(int, 0), default=0, help="processes that read (%(default)s)")
    options.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (%(default)s)")
    cli.add_trust(options)
    return options


def read_config(files: Sequence[str], overrides: Sequence[str]) -> Any:
    """The files merged from left to right, then the `key.sub=value` overrides, with all references resolved."""
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    from ldm.configs import merge_configs, parse_overrides, read_yaml

    strange = [text for text in overrides if "=" not in text or text.startswith("-")]
    if strange:
        raise ValueError(f"{strange[0]!r} is neither an option (see --help) nor of the form key.sub=value")
    try:
        config = merge_configs([*map(read_yaml, files), parse_overrides(overrides)], files[0])
        return OmegaConf.create(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    except MissingMandatoryValue as error:
        raise ValueError(f"the config leaves {error.full_key} to you: add {error.full_key}=... at the end") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"the config cannot be put together: {' '.join(str(error).split())}") from error


def load_model(config: Any, ckpt: str | None, verify: bool = False) -> Any:
    """The config's model, filled from `ckpt` or by the files that the config names."""
    from ldm.checkpoint import build_on_meta, fill_model, read_checkpoint
    from ldm.util import instantiate_from_config

    if ckpt is not None:
        model = build_on_meta(config.model)
        fill_model(model, read_checkpoint(ckpt, verify=verify))
        return model.eval()
    params = config.model.params
    first_stage = params.get("first_stage_config", {})
    if not params.get("ckpt_path") and not first_stage.get("params", {}).get("ckpt_path"):
        raise ValueError(
            "the first stage has no weights: give the whole model's by --ckpt or model.params.ckpt_path=..., or its "
            "own by model.params.first_stage_config.params.ckpt_path=..."
        )
    return instantiate_from_config(config.model).eval()


def cached_section(model: Any, section: Any, folder: Path, args: Any) -> dict[str, Any]:
    """Make the cache of a data section in `folder`, unless a finished one fits, and return the section that uses it."""
    from omegaconf import OmegaConf

    from ldm.data.cache import CachedDataset, build_cache, is_finished
    from ldm.devices import choose_device
    from ldm.util import instantiate_from_config

    section = section.params.dataset if section.target == CACHED else section  # a config that is cached already
    dataset = instantiate_from_config(section)
    if is_finished(folder):
        CachedDataset(folder, dataset).check(model)
        cli.say(f"{folder} is finished already and kept as it is", sys.stdout)
    else:
        options = ("batch_size", "text", "variants", "flips", "dtype", "num_workers")
        chosen = {name: getattr(args, name) for name in options}
        build_cache(model, dataset, folder, device=choose_device(args.device), **chosen)
    params = {"folder": str(folder), "dataset": OmegaConf.to_container(section)}
    return {"target": CACHED, "params": params}


@allowlist_only()
def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = parser().parse_known_args(argv)
    config = read_config(args.base, overrides)

    from omegaconf import OmegaConf

    found = {name: config.data.params[name] for name in SECTIONS if config.get("data", {}).get("params", {}).get(name)}
    if not found:
        raise ValueError(f"{' '.join(args.base)}: there is no data.params.train section to cache")
    model = load_model(config, args.ckpt, args.verify)
    out = Path(args.out)
    sections = {name: cached_section(model, section, out / name, args) for name, section in found.items()}
    config.data.params.update(sections)
    path = out / "config.yaml"
    if not path.exists():
        write_text(path, OmegaConf.to_yaml(config))
    cli.say("What to put into the config in place of the sections of the same name:\n", sys.stdout)
    cli.say(OmegaConf.to_yaml({"data": {"params": sections}}), sys.stdout)
    cli.say(f"{path} is the whole config with them: scripts/train.py --base {path} -t", sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
