#!/usr/bin/env python
"""Generate images from a text or an image and its nearest neighbors in a database of CLIP embeddings.

For retrieval-augmented diffusion models. scripts/embed_images.py makes a database of your own images.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from ldm.util import public_path

logger = logging.getLogger("ldm.knn2img")

CKPT = "models/rdm/rdm768x768/model.ckpt"
DATABASE = "artbench-surrealism"


def parser() -> cli.ArgumentParser:
    options = cli.ArgumentParser(description=__doc__)
    cli.add_prompt(options, negative=False)
    options.add_argument(
        "--image",
        type=cli.user_path,
        metavar="FILE",
        help="condition on the CLIP embedding of an image instead of a prompt",
    )
    group = options.add_argument_group("neighbors")
    count = cli.number(int, 1)
    group.add_argument(
        "--use_neighbors", action="store_true", help="condition on the nearest neighbors in --database, too"
    )
    group.add_argument(
        "--database",
        type=cli.user_path,
        default=DATABASE,
        metavar="FILE",
        help="an .npz or .npy file of embeddings, a folder of them, or a public one's name (default: %(default)s)",
    )
    group.add_argument("--knn", type=count, default=10, help="how many neighbors (default: %(default)s)")
    group.add_argument(
        "--n_repeat", type=count, default=1, help="how often to repeat the prompt's embedding (default: %(default)s)"
    )
    cli.add_amount(options, n_samples=3, n_iter=1)
    cli.add_size(options)
    cli.add_sampler(options, scale=5.0)
    cli.add_model(options, CKPT)
    cli.add_speed(options)
    cli.add_clip(options)
    cli.add_output(options, "outputs/txt2img-samples")
    return options


def check(args) -> None:
    """ValueError for options that contradict one another; a warning for one without effect."""
    if args.image and (args.from_file or args.prompt != parser().get_default("prompt")):
        raise ValueError("--image replaces the prompt: leave out --image, or --prompt and --from-file")
    if args.database != DATABASE and not args.use_neighbors:
        logger.warning("--database %s has no effect without --use_neighbors", args.database)


def main(argv: Sequence[str] | None = None) -> None:
    args = cli.parse(parser(), argv)
    check(args)
    batches = [[""] * args.n_samples] if args.image else cli.prompt_batches(args)
    args.ckpt = args.ckpt or public_path(CKPT) or CKPT

    from ldm import inference
    from ldm.images import load_image
    from ldm.inference.conditioning import NEIGHBORS

    database = inference.load_database(args.database) if args.use_neighbors else None
    if args.image:
        load_image(args.image)  # fail before the model is loaded

    pipe = cli.load_pipeline(args, NEIGHBORS)
    options, device = cli.resolve_options(args, pipe, sized=True), pipe.model.device
    if args.image:
        contexts = inference.image_context(args.clip, args.image, args.n_samples, args.n_repeat, device)
    else:
        contexts = inference.text_context(args.clip, batches, args.n_repeat, device)
    if database is not None:
        contexts = inference.with_neighbors(contexts, database, args.knn)

    settings = {"image": Path(args.image).name} if args.image else {}
    if args.use_neighbors:
        settings |= {"database": Path(args.database).name, "knn": args.knn, "n_repeat": args.n_repeat}
    with cli.SampleWriter(args, options, model=cli.model_name(pipe.model), **settings) as writer:
        noise = options.shared_noise()
        for prompts, context in list(zip(batches, contexts.split(args.n_samples))) * args.n_iter:
            writer.write(inference.knn2img(pipe.model, context, options=options, noise=noise), prompts)


if __name__ == "__main__":
    sys.exit(cli.run(main))
