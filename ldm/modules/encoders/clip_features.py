"""CLIP embeddings of texts and images through transformers (Radford et al. 2021, arXiv:2103.00020).

They are the conditions of retrieval-augmented diffusion (Blattmann et al. 2022, arXiv:2204.11824), computed outside the
model. Weights come from a folder or the Hugging Face cache; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.images import image_to_tensor
from ldm.modules.encoders.base import AbstractEncoder, check_length, check_vocabulary, token_ids
from ldm.modules.encoders.clip_image import prepare
from ldm.modules.encoders.tokenizer import CLIPTokenizer
from ldm.util import public_path

if TYPE_CHECKING:
    from transformers import CLIPModel

VIT_L_14 = "ViT-L/14"
HUB_NAME = "openai/clip-vit-large-patch14"
OWN_PLACE = "models/clip-vit-large-patch14"  # in the repository's layout


class FrozenCLIPTextEmbedder(AbstractEncoder):
    """CLIP text embeddings.

    Args:
        version: "ViT-L/14", or a folder with a CLIP in transformers' layout, see `load_clip`.
        device: Ignored: the encoder works on the device of its weights.
        max_length: Tokens that prompts are truncated or padded to.
        n_repeat: How often `encode` repeats each embedding.
        normalize: Scale embeddings to length 1.

    Raises:
        ValueError: If the tower does not fit CLIP's tokenizer.
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
        """Encode B prompts to (B, D). Prompts that are too long are truncated, with a warning."""
        tokens = token_ids(self.tokenizer, text, self.max_length).to(self.device)  # (B, L)
        z = self.model.text_projection(self.model.text_model(input_ids=tokens).pooler_output)
        return F.normalize(z, dim=-1) if self.normalize else z

    def encode(self, text: str | Sequence[str]) -> Tensor:
        """Encode B prompts to a context (B, n_repeat, D)."""
        return self(text)[:, None].repeat(1, self.n_repeat, 1)


class FrozenClipImageEmbedder(AbstractEncoder):
    """CLIP image embeddings, not normalised.

    Args:
        model: "ViT-L/14", or a folder with a CLIP in transformers' layout, see `load_clip`.
        jit: Ignored.
        device: Ignored: the encoder works on the device of its weights.
        antialias: Blur images before they are shrunk, see `clip_image.resize`.
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

    def preprocess(self, x: Tensor) -> Tensor:
        """Resize and normalise images (B, 3, H, W) in [-1, 1] to (B, 3, image_size, image_size)."""
        return prepare(x, self.image_size, self.antialias)

    def forward(self, x: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1] to (B, D). `crop_to_square` prepares images as CLIP was trained."""
        weight = self.model.visual_projection.weight
        x = self.preprocess(x.to(weight.device)).to(weight.dtype)
        return self.model.visual_projection(self.model.vision_model(pixel_values=x).pooler_output)


def crop_to_square(image: Image.Image, size: int) -> Tensor:
    """Resize an image's shorter side to `size` (bicubic) and crop the centre: (1, 3, size, size) in [-1, 1]."""
    shorter = min(image.size)
    width, height = (size * side // shorter for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return image_to_tensor(image.crop((left, top, left + size, top + size)))


def load_clip(version: str = VIT_L_14) -> CLIPModel:
    """Load both towers of a CLIP in float32 on the CPU.

    Args:
        version: A folder in transformers' layout. "ViT-L/14" is searched in models/clip-vit-large-patch14 and in the
            Hugging Face cache.

    Raises:
        FileNotFoundError: If the files are missing.
        ValueError: If the folder holds something else.
    """
    own = public_path(f"{OWN_PLACE}/config.json")
    is_folder = version != VIT_L_14
    place = Path(version).expanduser() if is_folder else own.parent if own else None
    if place is not None and not (place / "config.json").is_file():
        raise FileNotFoundError(_missing(f"at {place} (there is no {place / 'config.json'})"))

    from transformers import CLIPModel

    try:
        loaded: Any = CLIPModel.from_pretrained(str(place or HUB_NAME), local_files_only=True, output_loading_info=True)
    except Exception as error:  # transformers and safetensors raise a dozen kinds for broken files
        if place is None and isinstance(error, OSError):
            raise FileNotFoundError(_missing(f"at {OWN_PLACE} or in the Hugging Face cache")) from error
        raise ValueError(f"{place or HUB_NAME} holds no CLIP that transformers can load: {error}") from error
    model, report = loaded
    if absent := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
        raise ValueError(
            f"{place or HUB_NAME} holds an incomplete CLIP: {len(absent)} weights are missing, such as {absent[0]}"
        )
    return model.float().eval()


def _missing(where: str) -> str:
    return (
        f"CLIP's weights are not {where}: download config.json and model.safetensors of {HUB_NAME} from the Hugging "
        f"Face hub into {OWN_PLACE}, or pass another folder with --clip FOLDER"
    )
