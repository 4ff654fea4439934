"""Build models on the meta device and fill them with a checkpoint's tensors: every check first, then one assignment."""

from __future__ import annotations

import logging
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint.families import describe, detect_config, ema_name, family_of, not_a_model
from ldm.checkpoint.formats.storages import Stamp, stamp
from ldm.checkpoint.reading import Checkpoint, CheckpointError
from ldm.limits import building
from ldm.trust import allowlist_only
from ldm.util import instantiate_from_config

logger = logging.getLogger(__name__)

_MAPPED: weakref.WeakKeyDictionary[nn.Module, Stamp] = weakref.WeakKeyDictionary()  # for `check_unchanged`

# The noise schedule follows from the config; files carry it, pruned ones rounded to half precision.
SCHEDULE_BUFFERS = frozenset(
    (
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
        "lvlb_weights",
    )
)
# Prefixes of EMA weights, and of the modules that they average.
AVERAGES = {"model_ema.": "model.", "cond_stage_ema.": "cond_stage_model."}
EMA_COUNTERS = frozenset(prefix + name for prefix in AVERAGES for name in ("decay", "num_updates"))

# Keys in files that a model can do without. Others are reported.
HARMLESS_EXTRAS = (
    r"model_ema\.",  # EMA weights, of no use to a model without `use_ema`
    r"(first_stage_model\.)?(loss|model_ema)\.",  # a first stage's losses and averages
    r"(.*\.)?(" + "|".join(sorted(SCHEDULE_BUFFERS)) + ")$",
    r"logvar$",  # learnt loss weights, for training only
    r"denoiser\.",  # k-diffusion's schedule, saved by programs that wrap a model
    # the image tower and the heads of CLIP, where a complete CLIPModel was saved as the text tower
    r"cond_stage_model\.(transformer\.)?(vision_model|visual_projection|text_projection|logit_scale)\b",
    # the other tower of OpenCLIP, and what follows from a tower's sizes
    r"cond_stage_model\.model\.(attn_mask|visual)\b",
    r"embedder\.(mean$|std$|model\.(attn_mask|transformer|token_embedding|positional_embedding|ln_final)\b)",
    r"embedder\.model\.(text_projection|logit_scale)$",
    r"depth_model\.model\.pretrained\.model\.head\.",  # the class head of MiDaS's ViT is unused
)
_HARMLESS = re.compile("|".join(HARMLESS_EXTRAS))

_INITIALIZERS = frozenset((Tensor.normal_, Tensor.uniform_, Tensor.zero_, Tensor.fill_))


@dataclass(frozen=True)
class LoadReport:
    """What happened to a file's tensors."""

    filled: int  # tensors of the model that came from the file
    own: tuple[str, ...]  # not in the file and computed by the model: schedule, position_ids, counters
    ignored: tuple[str, ...]  # in the file, not needed, known to be harmless
    unexpected: tuple[str, ...]  # in the file, not in the model, unknown
    ema: str  # which of the two sets of UNet weights is used; "" if there is only one
    notes: tuple[str, ...] = ()  # everything else that was logged


def build_on_meta(model_config: Any) -> nn.Module:
    """Build the model of a `{target, params}` config on the meta device, without memory or initialisation.

    What a model computes from its config (schedules, position ids) is on the CPU already. The config may name
    allow-listed classes only (see `ldm.trust`).
    """
    with torch.device("meta"), _SkipInit(), building(), allowlist_only():
        model: nn.Module = instantiate_from_config(model_config)
    return model


class _SkipInit(TorchFunctionMode):
    """Skip initialisers of meta tensors, for which torch would import its compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INITIALIZERS or getattr(func, "__module__", None) == nn.init.__name__:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


@torch.no_grad()
def fill_model(model: nn.Module, checkpoint: Checkpoint, *, dtype: torch.dtype = torch.float32) -> LoadReport:
    """Assign a checkpoint's tensors to a model; those of the right dtype stay memory-mapped.

    A file with only one of weights and EMA weights serves a model that has both, or only the other. A part in the
    model's `optional_parts` becomes None if the file has nothing of it, unless it has weights already. Weights in a
    module's `spare_weights` are zero where the file lacks them. Everything is checked before the model is touched.

    Args:
        model: from `build_on_meta`, or any module. Its `checkpoint_path` becomes the checkpoint's.
        checkpoint: from `read_checkpoint`.
        dtype: of weights and their EMA; buffers keep the dtype that the model declares.

    Raises:
        CheckpointError: a weight is missing, or has another shape or kind.
        RuntimeError: the model has a meta tensor that no file can fill.
    """
    own = model.state_dict()
    absent = _absent_optional_parts(model, checkpoint.state)
    own = {key: tensor for key, tensor in own.items() if not (tensor.is_meta and key.startswith(absent))}
    _check_fillable(model, own)
    source, ema = match_ema(own, checkpoint.state)
    tied = {key: first for key, first in _tied_keys(model).items() if key in own}
    for key, first in tied.items():  # a file may have either name
        source[key] = source[first] = source[first] if source[first] in checkpoint.state else source[key]
    computed = {
        key for key in own if key.startswith(absent) or _keeps_own(key, own[key], checkpoint.state.get(source[key]))
    }
    spare = {key for key in _spare_weights(model) if key in own and source[key] not in checkpoint.state}
    computed |= spare
    _check_fit(own, source, computed, checkpoint)
    _check_kinds(own, source, checkpoint)
    notes = _check_schedule(own, computed, checkpoint)

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors: dict[str, Tensor] = {}
    taken: set[str] = set()
    for key, tensor in own.items():
        if key in computed:
            tensors[key] = torch.zeros(tensor.shape, dtype=dtype, device="cpu") if key in spare else tensor
            continue
        if key in tied:
            tensors[key] = tensors[tied[key]]
            continue
        given = checkpoint.state[source[key]]
        weight = tensor.is_floating_point() and (key in parameters or _is_ema_weight(key))
        value = given.to(dtype if weight else tensor.dtype)
        # training changes weights in place, so a weight and its average may not share memory
        tensors[key] = value.clone() if value is given and source[key] in taken else value
        taken.add(source[key])
    for part in absent:
        if not any(key.startswith(part) for key in own):
            setattr(model, part.rstrip("."), None)
    model.load_state_dict(tensors, strict=True, assign=True)
    if checkpoint.mapped is not None:
        _MAPPED[model] = checkpoint.mapped
    _check_none_on_meta(model)
    model.checkpoint_path = str(checkpoint.path)  # type: ignore[assignment]  # a plain attribute, on any module
    model.to("cpu")  # moves nothing, but a Lightning module has noted the meta device as its own

    extras = [key for key in checkpoint.state if key not in taken and key not in own]
    ignored = tuple(key for key in extras if _is_harmless(key, own))
    unexpected = tuple(key for key in extras if not _is_harmless(key, own))
    if unexpected:
        notes.append(f"{checkpoint.path}: {len(unexpected)} tensors have no place in the model: {few(unexpected)}")
    for note in notes:
        logger.warning(note)
    if spare:
        logger.info("%s lacks %d weights that are never used; they are zero now", checkpoint.path, len(spare))
    if ema:
        logger.info("%s: %s", checkpoint.path, ema)
    return LoadReport(len(own) - len(computed), tuple(sorted(computed)), ignored, unexpected, ema, tuple(notes))


# --- which tensor of the file goes where ----------------------------------------------------------


def _tied_keys(model: nn.Module) -> dict[str, str]:
    """Map further keys of a tensor to its first, for modules that are used twice."""
    first: dict[int, str] = {}
    listed = model.state_dict(keep_vars=True)
    return {key: first[id(value)] for key, value in listed.items() if first.setdefault(id(value), key) != key}


def _spare_weights(model: nn.Module) -> set[str]:
    """Return the keys of weights that modules declare as unused."""
    return {
        f"{name}.{key}" if name else key
        for name, module in model.named_modules()
        for key in getattr(module, "spare_weights", ())
    }


def _is_ema_weight(key: str) -> bool:
    return key.startswith(tuple(AVERAGES)) and key not in EMA_COUNTERS


def match_ema(own: Iterable[str], state: Iterable[str]) -> tuple[dict[str, str], str]:
    """Return for each key of the model the key of the file that fills it, and which set of UNet weights that is."""
    own, state = dict.fromkeys(own), frozenset(state)
    source = {key: key for key in own}
    ema_note = ""
    for ema, plain in AVERAGES.items():
        averaged = [k for k in own if k.startswith(plain) and (ema_name(k) in own or ema_name(k) in state)]
        model_has_ema = any(key.startswith(ema) and _is_ema_weight(key) for key in own)
        file_has_ema = any(ema_name(key) in state for key in averaged)
        file_has_plain = any(key in state for key in averaged)
        found = ""
        if file_has_ema and not file_has_plain:
            source |= {key: ema_name(key) for key in averaged}
            found = "holds only EMA weights, which are used"
        elif model_has_ema and file_has_plain and not file_has_ema:
            source |= {ema_name(key): key for key in averaged}
            found = "holds no EMA weights; the plain ones are used instead"
        elif model_has_ema and file_has_ema:
            found = "holds plain and EMA weights; sampling uses the EMA weights"
        elif file_has_ema:
            found = "holds plain and EMA weights; the plain ones are used (use_ema is off)"
        ema_note = ema_note or found
    return source, ema_note


def _absent_optional_parts(model: nn.Module, state: Iterable[str]) -> tuple[str, ...]:
    """Return prefixes of those `optional_parts` of the model that a file has nothing of."""
    parts = tuple(f"{part}." for part in getattr(model, "optional_parts", ()))
    return tuple(part for part in parts if not any(key.startswith(part) for key in state))


def _keeps_own(key: str, own: Tensor, given: Tensor | None) -> bool:
    """Return whether the model's computed value is used: the file has none, or only a rounded one."""
    if own.is_meta:
        return False
    name = key.rpartition(".")[2]
    if name in SCHEDULE_BUFFERS:
        return given is None or given.dtype not in (torch.float32, torch.float64)
    return given is None and (name == "position_ids" or key in EMA_COUNTERS)


def _is_harmless(key: str, own: Mapping[str, Tensor]) -> bool:
    if key.startswith("model_ema.") and any(_is_ema_weight(name) for name in own):
        return False  # the model has EMA weights, but not this one
    return _HARMLESS.match(key) is not None


# --- checks ---------------------------------------------------------------------------------------


def _check_fillable(model: nn.Module, own: Mapping[str, Tensor]) -> None:
    lost = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in own]
    if lost:
        raise RuntimeError(
            f"{len(lost)} non-persistent buffers are on the meta device and in no checkpoint ({few(lost)}): "
            "the model must create them on the CPU"
        )


def _check_none_on_meta(model: nn.Module) -> None:
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise RuntimeError(f"{len(left)} tensors of the model are still on the meta device: {few(left)}")


def _check_fit(
    own: Mapping[str, Tensor], source: Mapping[str, str], computed: set[str], checkpoint: Checkpoint
) -> None:
    """Raise CheckpointError for missing weights and other shapes, with what the file looks like."""
    needed = [key for key in own if key not in computed]
    missing = [key for key in needed if source[key] not in checkpoint.state]
    shapes = checkpoint.shapes
    unlike = [key for key in own if source[key] in shapes and shapes[source[key]] != tuple(own[key].shape)]
    if not missing and not unlike:
        return
    family = family_of(shapes)
    if len(missing) == len(needed) and not (family and family.complete):
        raise CheckpointError(not_a_model(checkpoint))
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(own)} weights are missing, e.g. {few(missing)}")
        absent = _absent_parts(own, missing, shapes)
        faults += [f"there is nothing of {', '.join(absent)}"] if absent else []
    if unlike:
        key = unlike[0]
        faults.append(
            f"{len(unlike)} weights have another shape, e.g. {key} is {shape_text(shapes[source[key]])} in the file "
            f"and {shape_text(own[key].shape)} in the config"
        )
    hint = ": use its config, or leave out --config" if unlike and detect_config(shapes) else ""
    raise CheckpointError(
        f"{checkpoint.path} does not fit the config: {'; '.join(faults)}; the file looks like {describe(shapes)}{hint}"
    )


def _absent_parts(own: Iterable[str], missing: Iterable[str], shapes: Iterable[str]) -> list[str]:
    """Return top-level parts of the model (`cond_stage_model`, ...) of which the file has no weight."""
    absent = {key.partition(".")[0] for key in missing} - {key.partition(".")[0] for key in shapes}
    return sorted(absent & {key.partition(".")[0] for key in own if "." in key})


def _check_schedule(own: Mapping[str, Tensor], computed: set[str], checkpoint: Checkpoint) -> list[str]:
    """Return a note if the file has another noise schedule than the config."""
    key = "alphas_cumprod"
    if key not in own or key not in checkpoint.state or own[key].is_meta:
        return []
    ours, theirs = own[key].float(), checkpoint.state[key].float()
    if torch.allclose(ours, theirs, rtol=1e-2, atol=1e-4):
        return []
    used = "the config's is used, because the file's is rounded" if key in computed else "the file's is used"
    return [
        f"{checkpoint.path} was made with another noise schedule than the config's (alphas_cumprod ends at "
        f"{theirs[-1]:.3g}, in the config at {ours[-1]:.3g}); {used}"
    ]


def _check_kinds(own: Mapping[str, Tensor], source: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for dtypes whose conversion would change values: integers, booleans, complex numbers."""
    for key, tensor in own.items():
        given = checkpoint.state.get(source[key])
        if given is None or given.dtype == tensor.dtype:
            continue
        if given.is_complex() or (tensor.is_floating_point() and not given.is_floating_point()):
            theirs, ours = (str(value.dtype).removeprefix("torch.") for value in (given, tensor))
            raise CheckpointError(
                f"{checkpoint.path} cannot be used: its weight {source[key]} is of type {theirs}, and in the model "
                f"of type {ours}"
            )


def check_unchanged(model: nn.Module) -> None:
    """Raise CheckpointError if the file that a model's weights are mapped from was changed in place.

    Replacing or removing the file does no harm: what is mapped stays. But if it is truncated, pages are gone, and
    touching one kills the process without a message. Copy a file to a new name and rename it, instead of writing over
    it.
    """
    before = _MAPPED.get(model) or getattr(getattr(model, "info", None), "mapped_file", None)
    if before is None or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return
    try:
        now = stamp(before.path)
    except OSError:
        return
    if now.place == before.place and now != before:
        raise CheckpointError(f"{before.path} was changed while its weights were in use: load it again")


def few(names: Iterable[str], limit: int = 3) -> str:
    """Join the first `limit` names for a message."""
    names = list(names)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def shape_text(shape: Iterable[int]) -> str:
    """Format a shape for a message, as 320x4x3x3."""
    return "x".join(str(size) for size in shape) or "a scalar"
