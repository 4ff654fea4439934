"""CLIP (Radford et al. 2021, arXiv:2103.00020) through transformers: texts and pictures as points of one space.

These are the conditions of retrieval-augmented diffusion (Blattmann et al. 2022, arXiv:2204.11824), made outside of
the model. Weights come from a folder or the Hugging Face cache; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.images import image_to_tensor
from ldm.modules.encoders.base import AbstractEncoder, check_length, check_vocabulary
from ldm.modules.encoders.clip_image import prepare
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.util import public_path

if TYPE_CHECKING:
    from transformers import CLIPModel

VIT_L_14 = "ViT-L/14"
HUB_NAME = "openai/clip-vit-large-patch14"
OWN_PLACE = "models/clip-vit-large-patch14"  # in the repository's layout


class FrozenCLIPTextEmbedder(AbstractEncoder):
    """Prompts to CLIP's embeddings of them.

    version: "ViT-L/14", or a folder with a CLIP in transformers' layout. device: accepted for public configs and
    ignored: the work is done where the weights are. max_length: tokens a prompt is cut or padded to. n_repeat: how
    often `encode` gives each embedding. normalize: to length 1.

    Raises what `load_clip` raises, and ValueError for a tower that does not know CLIP's tokens.
    """

    def __init__(
        self,
        version: str = VIT_L_14,
        device: object = None,
        max_length: int = 77,
        n_repeat: int = 1,
        normalize: bool = True,
    ) -> None:
        super().__init__()
        self.model = load_clip(version)
        self.tokenizer = CLIPTokenizer()
        tower: Any = self.model.config.text_config
        check_vocabulary(self.tokenizer, tower.vocab_size)
        check_length(max_length, tower.max_position_embeddings)
        self.max_length = max_length
        self.n_repeat = n_repeat
        self.normalize = normalize
        self.freeze()

    def forward(self, text: str | Sequence[str]) -> Tensor:
        """B prompts to (B, D). Prompts too long are cut, with a warning."""
        projection = self.model.text_projection
        tokens = self.tokenizer(text, self.max_length).to(projection.weight.device)  # (B, L)
        z = projection(self.model.text_model(input_ids=tokens).pooler_output)
        return F.normalize(z, dim=-1) if self.normalize else z

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """B prompts to a context (B, n_repeat, D)."""
        return self(text)[:, None].repeat(1, self.n_repeat, 1)


class FrozenClipImageEmbedder(AbstractEncoder):
    """Pictures to CLIP's embeddings of them, which are not normalised.

    model: "ViT-L/14", or a folder with a CLIP in transformers' layout. jit, device: accepted for public configs and
    ignored. antialias: smooth pictures before they are made smaller (see `clip_image.resize`).

    Raises what `load_clip` raises.
    """

    def __init__(
        self, model: str = VIT_L_14, jit: bool = False, device: object = None, antialias: bool = False
    ) -> None:
        super().__init__()
        self.model = load_clip(model)
        tower: Any = self.model.config.vision_config
        self.image_size: int = tower.image_size
        self.antialias = antialias
        self.freeze()

    def forward(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] to (B, D). Those of `square_picture` are taken as they are."""
        weight = self.model.visual_projection.weight
        x = prepare(x.to(weight.device), self.image_size, self.antialias).to(weight.dtype)
        return self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)


def square_picture(image: Image.Image, size: int) -> Tensor:
    """A picture as CLIP was trained to see it, (1, 3, size, size) in [-1, 1]: the middle of it, not squeezed.

    The shorter side becomes `size` pixels by Pillow's bicubic interpolation, and the rest is cut off on both sides.
    """
    shorter = min(image.size)
    width, height = (size * side // shorter for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image_to_tensor(image.crop((left, top, left + size, top + size)))


def load_clip(version: str = VIT_L_14) -> CLIPModel:
    """Both towers of a CLIP in float32 on the CPU.

    version: a folder in transformers' layout; "ViT-L/14" is looked for in models/clip-vit-large-patch14 and in the
    Hugging Face cache. Raises FileNotFoundError, saying what belongs there, ValueError for a folder of something else.
    """
    own = public_path(f"{OWN_PLACE}/config.json")
    is_folder = version != VIT_L_14
    place = Path(version).expanduser() if is_folder else own.parent if own else None
    if place is not None and not (place / "config.json").is_file():
        raise FileNotFoundError(_missing(f"at {place} (there is no {place / 'config.json'})"))

    from transformers import CLIPModel

    try:
        loaded: Any = CLIPModel.from_pretrained(str(place or HUB_NAME), local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers and safetensors raise a dozen kinds for files that are broken or absent
        if place is None and isinstance(error, OSError):
            raise FileNotFoundError(_missing(f"at {OWN_PLACE} or in the Hugging Face cache")) from error
        raise ValueError(f"{place or HUB_NAME} holds no CLIP that transformers can load: {error}") from error
    model, report = loaded
    if absent := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
        raise ValueError(
            f"{place or HUB_NAME} holds no whole CLIP: it lacks {len(absent)} weights, such as {absent[0]}"
        )
    return model.float().eval()


def _missing(where: str) -> str:
    return (
        f"CLIP's weights are not {where}: download config.json and model.safetensors of {HUB_NAME} from the Hugging "
        f"Face hub into {OWN_PLACE}, or name another folder that holds them with --clip FOLDER"
    )
