#!/usr/bin/env python
"""Cache the latents, and on request the text embeddings, of a training config's data."""

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
OPTIONS = ("batch_size", "text", "variants", "flips", "dtype", "num_workers")


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(
        description=__doc__, usage="%(prog)s --base CONFIG... --out FOLDER [key.sub=value ...]"
    )
    path, count = cli.user_path, cli.number(int, 1)
    options.add_argument("-b", "--base", nargs="+", required=True, type=path, metavar="CONFIG", help="training configs")
    options.add_argument("--ckpt", type=path, metavar="FILE", help="weights of the model, if the config has none")
    options.add_argument("--verify", action="store_true", help="compare the checkpoint with its checksums first")
    options.add_argument("--out", required=True, type=path, metavar="FOLDER", help="folder of the caches")
    options.add_argument("--text", action="store_true", help="embed the captions too")
    options.add_argument(
        "--variants", type=count, default=1, help="random crops and captions an image (default: %(default)s)"
    )
    options.add_argument("--flips", action="store_true", help="cache every image mirrored as well")
    options.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="on disk (default: %(default)s)"
    )
    options.add_argument("--batch_size", type=count, default=8, help="images to encode at once (default: %(default)s)")
    options.add_argument(
        "--num_workers", type=cli.number(int, 0), default=0, help="reading processes (default: %(default)s)"
    )
    options.add_argument("--device", choices=DEVICES, default="auto", help="where to compute (default: %(default)s)")
    cli.add_trust(options)
    return options


def read_config(files: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Merge config files and `key.sub=value` overrides, with all references resolved."""
    from ldm.configs import parse_overrides, read_yaml
    from ldm.training.settings import merge

    if unknown := [text for text in overrides if "=" not in text or text.startswith("-")]:
        raise ValueError(f"{unknown[0]!r} is neither an option (see --help) nor of the form key.sub=value")
    return merge([*map(read_yaml, files), parse_overrides(overrides)])


def load_model(config: dict[str, Any], ckpt: str | None, verify: bool = False) -> Any:
    """Build the config's model with weights from `ckpt`, or from the files that the config names."""
    from ldm.checkpoint import build_on_meta, fill_model, read_checkpoint
    from ldm.util import instantiate_from_config

    if ckpt is not None:
        model = build_on_meta(config["model"])
        fill_model(model, read_checkpoint(ckpt, verify=verify))
        return model.eval()
    params = config["model"]["params"]
    first_stage = params.get("first_stage_config", {})
    if not params.get("ckpt_path") and not first_stage.get("params", {}).get("ckpt_path"):
        raise ValueError(
            "the first stage has no weights: give the model's by --ckpt or model.params.ckpt_path=..., or its own by "
            "model.params.first_stage_config.params.ckpt_path=..."
        )
    return instantiate_from_config(config["model"]).eval()


def cache_section(model: Any, section: dict[str, Any], folder: Path, args: Any) -> dict[str, Any]:
    """Cache a data section in `folder`, unless that was done before, and return the section that reads the cache."""
    from ldm.data.cache import CachedDataset, build_cache, is_finished
    from ldm.devices import choose_device
    from ldm.util import instantiate_from_config

    section = section["params"]["dataset"] if section["target"] == CACHED else section
    dataset = instantiate_from_config(section)
    if is_finished(folder):
        CachedDataset(folder, dataset).check(model)
        cli.say(f"{folder} is finished already", sys.stdout)
    else:
        options = {name: getattr(args, name) for name in OPTIONS}
        build_cache(model, dataset, folder, device=choose_device(args.device), **options)
    return {"target": CACHED, "params": {"folder": str(folder), "dataset": section}}


@allowlist_only()
def main(argv: Sequence[str] | None = None) -> None:
    args, overrides = parser().parse_known_args(argv)
    config = read_config(args.base, overrides)

    from omegaconf import OmegaConf

    params = config.get("data", {}).get("params", {})
    found = {name: params[name] for name in ("train", "validation") if params.get(name)}
    if not found:
        raise ValueError(f"{' '.join(args.base)}: there is no data.params.train section to cache")
    model = load_model(config, args.ckpt, args.verify)
    out = Path(args.out)
    sections = {name: cache_section(model, section, out / name, args) for name, section in found.items()}
    params |= sections
    path = out / "config.yaml"
    if not path.exists():
        write_text(path, OmegaConf.to_yaml(config))
    cli.say("Replace these sections of the config:\n", sys.stdout)
    cli.say(OmegaConf.to_yaml({"data": {"params": sections}}), sys.stdout)
    cli.say(f"{path} is the complete config: scripts/train.py --base {path} -t", sys.stdout)


if __name__ == "__main__":
    sys.exit(cli.run(main))
