"""Build objects from configs, find public files, and the small helpers of the published `ldm.util`."""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.trust import check_found, check_path, trust

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

__all__ = [
    "ALIASES",
    "FIRST_STAGE",
    "MARKERS",
    "UNCONDITIONAL",
    "autocast",
    "count_params",
    "default",
    "exists",
    "get_obj_from_str",
    "instantiate_from_config",
    "isimage",
    "ismap",
    "log_txt_as_img",
    "mean_flat",
    "parallel_data_prefetch",
    "public_path",
    "trust",
    "warn_about_other_distributions",
]

# Where the files of the public layout (configs/..., models/...) may be, besides the working directory.
REPOSITORY = Path(__file__).resolve().parent.parent
INSTALLED = Path(sys.prefix) / "share" / "latent-diffusion"
BESIDE = REPOSITORY / "share" / "latent-diffusion"  # `pip install --target`

UNCONDITIONAL = "__is_unconditional__"
FIRST_STAGE = "__is_first_stage__"
MARKERS = (UNCONDITIONAL, FIRST_STAGE)

_FACES, _PARTS = ("CelebAHQ", "FFHQ", "FacesHQ"), ("Train", "Validation")
_TRANSFORMS = ("Compose", "Resize", "CenterCrop", "RandomCrop", "RandomHorizontalFlip", "ToTensor", "Normalize")

# Public `target:` paths whose code lives elsewhere here: configs and old checkpoints keep working.
ALIASES: dict[str, str] = {
    "taming.modules.vqvae.quantize.VectorQuantizer2": "ldm.modules.quantize.VectorQuantizer",
    "taming.modules.vqvae.quantize.VectorQuantizer": "ldm.modules.quantize.VectorQuantizer",
    "taming.modules.losses.DummyLoss": "ldm.modules.losses.vqperceptual.DummyLoss",
    "taming.modules.losses.vqperceptual.DummyLoss": "ldm.modules.losses.vqperceptual.DummyLoss",
    "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator": (
        "ldm.modules.losses.vqperceptual.VQLPIPSWithDiscriminator"
    ),
    "taming.modules.losses.lpips.LPIPS": "ldm.modules.losses.lpips.LPIPS",
    "taming.modules.discriminator.model.NLayerDiscriminator": "ldm.modules.losses.adversarial.NLayerDiscriminator",
    "main.DataModuleFromConfig": "ldm.data.loading.DataModuleFromConfig",
    "main.WrappedDataset": "ldm.data.loading.WrappedDataset",
    "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
    "main.SetupCallback": "ldm.training.callbacks.SetupCallback",
    "main.CUDACallback": "ldm.training.callbacks.CUDACallback",
    **{f"taming.data.faceshq.{name}{part}": f"ldm.data.faceshq.{name}{part}" for name in _FACES for part in _PARTS},
    "taming.data.custom.CustomTrain": "ldm.data.base.CustomTrain",
    "taming.data.custom.CustomTest": "ldm.data.base.CustomTest",
    "ldm.data.previews.pytorch_dataset.PreviewsTrain": "ldm.data.simple.PreviewsTrain",
    "ldm.data.previews.pytorch_dataset.PreviewsValidation": "ldm.data.simple.PreviewsValidation",
    **{f"torchvision.transforms.{name}": f"ldm.data.image_transforms.{name}" for name in _TRANSFORMS},
    "ldm.modules.attention.MemoryEfficientCrossAttention": "ldm.modules.attention.CrossAttention",
    "ldm.modules.diffusionmodules.model.MemoryEfficientAttnBlock": "ldm.modules.diffusionmodules.model.AttnBlock",
}


def public_path(path: str) -> Path | None:
    """Return where a file of the public layout such as `configs/x.yaml` is, or None."""
    return next((place / path for place in (Path(), REPOSITORY, INSTALLED, BESIDE) if (place / path).is_file()), None)


OTHER_DISTRIBUTIONS = ("stable-diffusion-sdkit",)  # which install a package `ldm`, too


@functools.cache
def warn_about_other_distributions() -> None:
    """Log a warning, once, if another distribution has installed its `ldm` over or under this one."""
    from importlib import metadata  # which `import ldm.util` must not wait for

    for name in OTHER_DISTRIBUTIONS:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        logger.warning(
            "%s %s is installed, which has a package ldm too, so that files of both may be mixed: run "
            "`pip uninstall %s`, then install latent-diffusion again (docs/migrating.md)",
            *(name, version, name),
        )


def exists(x: object) -> bool:
    """Return whether `x` is not None."""
    return x is not None


def default(val: Any, d: Any) -> Any:
    """Return `val`, or if it is None the default `d`, called if it is a function."""
    if val is not None:
        return val
    return d() if callable(d) else d


def get_obj_from_str(string: str, reload: bool = False) -> Any:
    """Import the class that a dotted path such as `ldm.models.autoencoder.AutoencoderKL` names.

    Args:
        string: the path; published paths whose code moved (`ALIASES`) resolve too.
        reload: reload its module first.

    Raises:
        ImportError: the path is not trusted (see `ldm.trust`), or leads to nothing that can be called.
    """
    if not isinstance(string, str) or "." not in string:
        raise ImportError(f"target {string!r} is not a dotted path such as 'package.module.Class'")
    path = ALIASES.get(string, string)
    module_name, _, name = path.rpartition(".")
    check_path(string, path)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ImportError(f"target {string!r}: there is no module {error.name!r}") from error
    if reload:
        module = importlib.reload(module)
    try:
        found = getattr(module, name)
    except AttributeError as error:
        raise ImportError(f"target {string!r}: module {module_name!r} has no {name!r}") from error
    check_found(string, found)
    return found


def instantiate_from_config(config: Any, **extra: Any) -> Any:
    """Build the object that a `{target: dotted.path, params: {...}}` config describes.

    Args:
        config: the config, or one of `MARKERS`, which stand for "nothing to build" and give None.
        **extra: keyword arguments added to `params`, which they override.

    Raises:
        ValueError: `config` has no `target`, or its params do not fit it.
        ImportError: the target does not resolve or is not trusted (see `ldm.trust`). In a program of your own, its
            own classes are trusted; in configs that scripts and `load_model` read, they are not.
    """
    if config in MARKERS:
        return None
    if not isinstance(config, Mapping) and not hasattr(config, "get"):
        raise ValueError(f"a config must be a mapping with a 'target' key, not {config!r}")
    target = config.get("target")
    if target is None:
        raise ValueError(f"a config needs a 'target' key; this one has {sorted(map(str, config))}")
    params = config.get("params") or {}
    if not isinstance(params, Mapping) and not hasattr(params, "get"):
        raise ValueError(f"the params of {target} must be a mapping, not {params!r}")
    call = get_obj_from_str(target)
    try:
        return call(**{**params, **extra})
    except TypeError as error:
        # A misspelt or missing key; any other TypeError is a fault of the code and stays one.
        if re.search(r"unexpected keyword argument|missing \d+ required", str(error)):
            raise ValueError(f"the config of {target} does not fit: {error}") from error
        raise


def count_params(model: nn.Module, verbose: bool = False) -> int:
    """Return the number of a model's parameters; print it in millions if `verbose`."""
    total = sum(parameter.numel() for parameter in model.parameters())
    if verbose:
        print(f"{type(model).__name__} has {total * 1e-6:.2f} M params.")
    return total


def ismap(x: Any) -> bool:
    """Return whether `x` is a batch of feature maps: a tensor (B, C, H, W) with more than 3 channels."""
    return _is_batch(x) and x.shape[1] > 3


def isimage(x: Any) -> bool:
    """Return whether `x` is a batch of images: a tensor (B, C, H, W) with 1 or 3 channels."""
    return _is_batch(x) and x.shape[1] in (1, 3)


def _is_batch(x: Any) -> bool:
    import torch

    return isinstance(x, torch.Tensor) and x.ndim == 4


def mean_flat(tensor: Tensor) -> Tensor:
    """Average over all axes but the first: (B, ...) to (B,)."""
    return tensor.mean(dim=list(range(1, tensor.ndim)))


def autocast(f: Callable[..., Any]) -> Callable[..., Any]:
    """Run `f` under CUDA autocast, in the dtype that autocast has been set to. A decorator."""

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        import torch

        dtype, cache = torch.get_autocast_dtype("cuda"), torch.is_autocast_cache_enabled()
        with torch.autocast("cuda", dtype=dtype, cache_enabled=cache, enabled=torch.cuda.is_available()):
            return f(*args, **kwargs)

    return run


def log_txt_as_img(wh: tuple[int, int], xc: Sequence[Any], size: int = 10) -> Tensor:
    """Render captions as images, black on white, in Pillow's own font.

    Args:
        wh: width and height in pixels.
        xc: B captions; of a list of captions the first is used. Lines wrap at the width; what is below the image
            is cut off.
        size: font size in pixels.

    Returns:
        (B, 3, H, W) in [-1, 1].
    """
    import numpy as np
    import torch
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size)
    columns = max(1, int(wh[0] / font.getlength("abcdefgh ") * 9))
    pages = []
    for caption in xc:
        text = str(caption[0] if isinstance(caption, (list, tuple)) else caption)
        page = Image.new("RGB", (int(wh[0]), int(wh[1])), "white")
        lines = "\n".join(textwrap.fill(line, columns) for line in text.splitlines())
        ImageDraw.Draw(page).text((0, 0), lines, fill="black", font=font)
        pages.append(np.asarray(page, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1.0)
    return torch.from_numpy(np.stack(pages))


def parallel_data_prefetch(
    func: Callable[..., Any],
    data: Iterable[Any],
    n_proc: int,
    target_data_type: str = "ndarray",
    cpu_intensive: bool = True,
    use_worker_id: bool = False,
) -> Any:
    """Apply `func` to parts of `data` in parallel and join the results in order.

    Args:
        func: takes a part of the data (and `worker_id` with `use_worker_id`) and returns an array or a list.
        data: an array, a list or another iterable; of a dict, its values.
        n_proc: the number of parts and workers.
        target_data_type: "ndarray" to join arrays along their first axis, "list" to join lists.
        cpu_intensive: use processes, otherwise threads.
        use_worker_id: pass the number of the part to `func`.

    Raises:
        ValueError: `n_proc` or `target_data_type` is not usable for `data`. What `func` raises is raised here.
    """
    import multiprocessing
    from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor

    import numpy as np

    if target_data_type not in ("ndarray", "list") or n_proc < 1:
        raise ValueError(f"cannot split data into {n_proc} parts as {target_data_type!r}: use 'ndarray' or 'list'")
    if isinstance(data, np.ndarray) and target_data_type == "list":
        raise ValueError("data is an array, so target_data_type must be 'ndarray', not 'list'")
    values = data if isinstance(data, np.ndarray) else list(data.values() if isinstance(data, Mapping) else data)
    parts: Any = np.array_split(np.asarray(values), n_proc) if target_data_type == "ndarray" else []
    if target_data_type == "list":
        step = -(-len(values) // n_proc) or 1
        parts = [values[start : start + step] for start in range(0, len(values), step)]
    extras = [{"worker_id": number} if use_worker_id else {} for number in range(len(parts))]
    workers: Executor
    if cpu_intensive:
        workers = ProcessPoolExecutor(n_proc, multiprocessing.get_context())
    else:
        workers = ThreadPoolExecutor(n_proc)
    with workers:
        results = [job.result() for job in [workers.submit(func, part, **extra) for part, extra in zip(parts, extras)]]
    return np.concatenate(results) if target_data_type == "ndarray" else [entry for part in results for entry in part]


FOREIGN_NAMES = {  # names of options in other projects
    "num_inference_steps": "steps",
    "guidance_scale": "scale",
    "cfg_scale": "scale",
    "cfg": "scale",
    "sampler_name": "sampler",
    "scheduler": "sampler",
    "num_images_per_prompt": "n_samples",
    "generator": "seed",
    "W": "width",
    "H": "height",
}


def suggestion(name: str, known: Iterable[str]) -> str | None:
    """The option that an unknown `name` probably means: its equivalent or a similar one in `known`."""
    known = list(known)
    if FOREIGN_NAMES.get(name) in known:
        return FOREIGN_NAMES[name]
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)
