"""From prompts to pictures: load a model, then draw with it.

from ldm.inference import load_model, txt2img

model = load_model()
for image in txt2img(model, ["a red circle"], seed=42):
    image.save("circle.png")

loading   files to models    tasks   what a model draws from    drawing   text to picture, picture to picture
reconstruction   what a first stage keeps of a picture    tiling   large pictures in pieces
inpainting   picture with a hole to picture    upscaling   small picture to larger
prompts   texts to conditions    seeds   the random numbers of each picture    animation   from one picture to another
previews   pictures on their way    seamless   pictures that repeat    shortcuts   quicker, at the price of quality
unprompted   classes, layouts, segmentation maps or nothing to picture
retrieval   text and its neighbours to picture    variations   picture to others like it
"""

from ldm.inference.animation import as_many, frames_between, interpolate
from ldm.inference.inpainting import inpaint, takes_text
from ldm.inference.loading import BUNDLED_CKPT, SAMPLERS, load_first_stage, load_model, read_config, sampling_settings
from ldm.inference.pipeline import (
    Guided,
    decode,
    default_size,
    draw,
    redraw,
    resolve_size,
    seed_everything,
    text_condition,
)
from ldm.inference.previews import Previews
from ldm.inference.prompts import PromptOptions
from ldm.inference.reconstruction import reconstruct
from ldm.inference.retrieval import (
    EmbeddingDatabase,
    embed_folder,
    knn2img,
    load_database,
    picture_context,
    save_database,
    text_context,
    with_neighbours,
)
from ldm.inference.seamless import seamless
from ldm.inference.seeds import Seeding
from ldm.inference.shortcuts import Shortcuts, quantize_network
from ldm.inference.text_to_image import (
    depth_map,
    encode_image,
    img2img,
    needs_depth,
    skip_img2img,
    skip_txt2img,
    start_latent,
    txt2img,
)
from ldm.inference.tiling import tile_first_stage
from ldm.inference.unprompted import (
    check_labels,
    class2img,
    layout2img,
    layout_tokens,
    noise2img,
    segmentation2img,
)
from ldm.inference.upscaling import NOISE_LEVEL, takes_prompt, upscale
from ldm.inference.variations import check_weights, picture_embedding, variations

__all__ = [
    "BUNDLED_CKPT",
    "EmbeddingDatabase",
    "Guided",
    "NOISE_LEVEL",
    "Previews",
    "PromptOptions",
    "SAMPLERS",
    "Seeding",
    "Shortcuts",
    "as_many",
    "check_labels",
    "check_weights",
    "class2img",
    "decode",
    "default_size",
    "depth_map",
    "draw",
    "embed_folder",
    "encode_image",
    "img2img",
    "frames_between",
    "inpaint",
    "interpolate",
    "knn2img",
    "load_database",
    "layout2img",
    "layout_tokens",
    "load_first_stage",
    "load_model",
    "needs_depth",
    "noise2img",
    "picture_context",
    "picture_embedding",
    "quantize_network",
    "read_config",
    "reconstruct",
    "redraw",
    "resolve_size",
    "sampling_settings",
    "save_database",
    "seamless",
    "seed_everything",
    "segmentation2img",
    "skip_img2img",
    "skip_txt2img",
    "start_latent",
    "takes_prompt",
    "takes_text",
    "text_condition",
    "text_context",
    "tile_first_stage",
    "txt2img",
    "upscale",
    "variations",
    "with_neighbours",
]
