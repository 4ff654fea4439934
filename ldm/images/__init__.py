"""Images: reading and writing files, conversion to and from tensors, masks, grids."""

from ldm.images.pixels import (
    blend,
    check_mask,
    feathered,
    fit_mask,
    fit_to_multiple,
    image_to_tensor,
    make_grid,
    tensor_to_images,
    text_to_tensor,
)
from ldm.images.reading import FORMATS, load_gray, load_image, opened
from ldm.images.writing import (
    next_free_index,
    parameters_text,
    png_metadata,
    replace_png,
    save_animation,
    save_png,
    save_png_named,
)

__all__ = [
    "FORMATS",
    "blend",
    "check_mask",
    "feathered",
    "fit_mask",
    "fit_to_multiple",
    "image_to_tensor",
    "load_gray",
    "load_image",
    "make_grid",
    "next_free_index",
    "opened",
    "parameters_text",
    "png_metadata",
    "replace_png",
    "save_animation",
    "save_png",
    "save_png_named",
    "tensor_to_images",
    "text_to_tensor",
]
