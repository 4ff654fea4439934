"""Load a model, and generate images with it.

from ldm.inference import load_model, txt2img

model = load_model()
for image in txt2img(model, ["a red circle"], seed=42):
    image.save("circle.png")

`loading` loads models, `options` is the one record of options, `conditioning` what a model is conditioned on, and
`pipeline` the steps of every task. The other modules are the tasks.
"""

from ldm.acceleration import AccelerationOptions
from ldm.inference.animation import frames_between, interpolate, pair_keys
from ldm.inference.conditioning import Conditioning
from ldm.inference.inpainting import inpaint, takes_text
from ldm.inference.loading import BUNDLED_CKPT, SAMPLERS, load_first_stage, load_model, load_pipeline, read_config
from ldm.inference.options import SamplingOptions, SeedOptions, changed
from ldm.inference.pipeline import Pipeline, default_size, resolve_size, seed_everything
from ldm.inference.previews import Previews
from ldm.inference.reconstruction import reconstruct
from ldm.inference.retrieval import (
    EmbeddingDatabase,
    embed_folder,
    image_context,
    knn2img,
    load_database,
    save_database,
    text_context,
    with_neighbors,
)
from ldm.inference.text_to_image import (
    depth_map,
    encode_image,
    img2img,
    needs_depth,
    txt2img,
)
from ldm.inference.tiling import seamless, tile_first_stage
from ldm.inference.unprompted import (
    check_labels,
    class2img,
    layout2img,
    layout_tokens,
    noise2img,
    segmentation2img,
)
from ldm.inference.upscaling import NOISE_LEVEL, takes_prompt, upscale
from ldm.inference.variations import check_weights, image_embedding, variations
from ldm.modules.encoders.prompting import PromptOptions

__all__ = [
    "BUNDLED_CKPT",
    "NOISE_LEVEL",
    "SAMPLERS",
    "AccelerationOptions",
    "Conditioning",
    "EmbeddingDatabase",
    "Pipeline",
    "Previews",
    "PromptOptions",
    "SamplingOptions",
    "SeedOptions",
    "changed",
    "check_labels",
    "check_weights",
    "class2img",
    "default_size",
    "depth_map",
    "embed_folder",
    "encode_image",
    "frames_between",
    "image_context",
    "image_embedding",
    "img2img",
    "inpaint",
    "interpolate",
    "knn2img",
    "layout2img",
    "layout_tokens",
    "load_database",
    "load_first_stage",
    "load_model",
    "load_pipeline",
    "needs_depth",
    "noise2img",
    "pair_keys",
    "read_config",
    "reconstruct",
    "resolve_size",
    "save_database",
    "seamless",
    "seed_everything",
    "segmentation2img",
    "takes_prompt",
    "takes_text",
    "text_context",
    "tile_first_stage",
    "txt2img",
    "upscale",
    "variations",
    "with_neighbors",
]
