"""What others do to layers takes effect with acceleration as without: hooks, forwards, children, subclasses, weights.

Every kind of layer in a UNet, a first stage and a text encoder is changed in every way, with acceleration; the result
must be that of the same change without acceleration, and differ from that of no change.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ldm.acceleration import accelerate, cache_contexts, cache_features, chunked, int8, merge_tokens, onednn
from ldm.acceleration import attention as accelerated_attention
from ldm.attach import Handle
from ldm.modules.attention import GEGLU, BasicTransformerBlock, CrossAttention, FeedForward, SpatialTransformer
from ldm.modules.diffusionmodules.model import AttnBlock, Decoder, Encoder, ResnetBlock
from ldm.modules.diffusionmodules.openaimodel import AttentionBlock, ResBlock, UNetModel
from ldm.util import instantiate_from_config
from tests.golden import filled, golden_configs, tensor
from tests.tiny import TEXT

pytestmark = pytest.mark.skipif(not onednn.has_kernels(), reason="this build of torch has no oneDNN")
CONTEXT = tensor("context", 1, 7, 24)
STAGE = {"ch": 32, "out_ch": 3, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "in_channels": 3}
STAGE |= {"resolution": 16, "z_channels": 4}


FEW_BLOCKS = {"num_res_blocks": 1, "channel_mult": [1, 2], "attention_resolutions": [2]}  # of every kind


def unet(name: str = "v1_tiny") -> UNetModel:
    return filled(UNetModel(**golden_configs("unet_pub")[name]["config"] | FEW_BLOCKS))


def run_unet(network: nn.Module) -> Tensor:
    x = tensor("x", 1, 4, 16, 16)
    return torch.stack([network(x, torch.tensor([t]), context=CONTEXT) for t in (9, 8)])


def run_plain_unet(network: nn.Module) -> Tensor:
    return network(tensor("x", 1, network.in_channels, 16, 16), torch.tensor([5]))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Tensor]]] = {
    "unet": (unet, run_unet),
    "unet without context": (lambda: unet("uncond_tiny"), run_plain_unet),
    "encoder": (lambda: filled(Encoder(**STAGE)), lambda network: network(tensor("image", 1, 3, 16, 16))),
    "decoder": (lambda: filled(Decoder(**STAGE)), lambda network: network(tensor("z", 1, 4, 8, 8))),
    "text": (lambda: filled(instantiate_from_config(TEXT)), lambda network: network.encode(["a red circle"])),
}


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Kernels for large maps, many keys and many tokens are used for small ones, too."""
    monkeypatch.setattr(chunked, "LARGE", 1)
    monkeypatch.setattr(chunked, "CHUNK", 32 * 16 * 5)
    monkeypatch.setattr(accelerated_attention, "LONG", 8)
    monkeypatch.setattr(onednn, "CHUNK", 64)
    monkeypatch.setattr(onednn, "MIN_TOKENS", 16)


# ---- changes: each is made to one module, and gives back what undoes it ----


def scaled(output: Any) -> Any:
    return output * 1.5 if isinstance(output, Tensor) and output.is_floating_point() else output


def forward_hook(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    return part.register_forward_hook(lambda module, args, output: scaled(output)).remove


def forward_pre_hook(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    return part.register_forward_pre_hook(lambda module, args: tuple(map(scaled, args))).remove


def instance_forward(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    before, old = vars(part).get("forward"), part.forward
    part.forward = lambda *args, **kwargs: scaled(old(*args, **kwargs))

    def undo() -> None:
        del part.forward
        if before is not None:
            part.forward = before

    return undo


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:  # weight, bias ...
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return scaled(self.inner(*args, **kwargs))


def replaced_child(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    parent._modules[name] = Wrapped(part)
    return lambda: parent._modules.update({name: part})


def subclass(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    kind = type(part)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return scaled(kind.forward(self, *args, **kwargs))

    part.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return lambda: setattr(part, "__class__", kind)


def class_forward(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    kind, old = type(part), type(part).forward
    kind.forward = lambda self, *args, **kwargs: scaled(old(self, *args, **kwargs))
    return lambda: setattr(kind, "forward", old)


def global_hook(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    return nn.modules.module.register_module_forward_hook(
        lambda module, args, output: scaled(output) if module is part else None
    ).remove


def weight_data(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    before = part.weight.detach().clone()
    part.weight.data.mul_(1.5)
    return lambda: part.weight.data.copy_(before)


def weight_row(part: nn.Module, parent: nn.Module, name: str) -> Callable[[], object]:
    before = part.weight.detach().clone()
    part.weight.data[: len(before) // 2] += 0.1
    return lambda: part.weight.data.copy_(before)


CHANGES = [forward_hook, forward_pre_hook, instance_forward, replaced_child, class_forward, global_hook, subclass]
CHANGES += [weight_data, weight_row]


def kinds_of(network: nn.Module) -> dict[str, str]:
    """Name of one module of every kind in a network: by its class, its parent's class, and its place there."""
    found: dict[str, str] = {}
    modules = dict(network.named_modules())
    for path, part in modules.items():
        parent = modules[path.rpartition(".")[0]] if path else None
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)) or not path or type(part) is nn.Module:
            continue
        place = path.rpartition(".")[2]
        if isinstance(parent, CrossAttention):  # of x itself, or of a context
            place = ".".join(path.split(".")[-2:])
        found.setdefault(f"{type(parent).__name__}.{'' if isinstance(parent, nn.ModuleList) else place}", path)
    return found


def test_few_blocks_have_all_kinds():
    for name in ("v1_tiny", "uncond_tiny"):
        published = UNetModel(**golden_configs("unet_pub")[name]["config"])
        assert kinds_of(unet(name)).keys() == kinds_of(published).keys()


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-4 * max(1.0, float(wanted.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_of_module(name, change):
    build, run = NETWORKS[name]
    plain, fast = build(), build()
    base = run(plain)
    effective = 0
    with accelerate(fast), cache_contexts(fast):
        assert close(run(fast), base)
        for path in kinds_of(plain).values():
            results = []
            for network in (plain, fast):
                parent, _, place = path.rpartition(".")
                part, owner = network.get_submodule(path), network.get_submodule(parent)
                if change in (weight_data, weight_row) and not isinstance(getattr(part, "weight", None), Tensor):
                    break
                if change is class_forward and network is fast:  # it is the same class
                    continue
                if change is replaced_child and isinstance(part, (nn.Embedding, SpatialTransformer, ResBlock)):
                    break  # chosen by their type, or read by their parents
                undo = change(part, owner, place)
                try:
                    results.append(run(network))
                    if change is class_forward:
                        results.append(run(fast))
                finally:
                    undo()
            if not results:
                continue
            wanted, found = results
            assert close(found, wanted), f"{path}: off by {(found - wanted).abs().max():.1e}"
            effective += not close(wanted, base)
        assert close(run(fast), base)  # nothing stays
    assert effective >= 3
    assert not any("forward" in vars(part) or "attend" in vars(part) for part in fast.modules())


KINDS = (nn.Linear, nn.Conv2d, GEGLU, FeedForward, CrossAttention, BasicTransformerBlock, AttentionBlock, ResBlock)
KINDS += (ResnetBlock, AttnBlock)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_set_before_or_after(kind, when):
    """A user's forward is called either way, and removal of ours leaves it in place."""
    network, run = (filled(Decoder(**STAGE)), NETWORKS["decoder"][1])
    if kind not in (nn.Conv2d, ResnetBlock, AttnBlock):
        network, run = unet("uncond_tiny" if kind is AttentionBlock else "v1_tiny"), run_unet
        run = run_plain_unet if kind is AttentionBlock else run
    parts = [part for part in network.modules() if type(part) is kind]
    calls: list[nn.Module] = []

    def patch() -> None:
        for part in parts:
            old = part.forward
            part.forward = lambda *a, part=part, old=old, **k: calls.append(part) or scaled(old(*a, **k))

    plain = run(network)
    patch()
    wanted, expected = run(network), len(calls)
    for part in parts:
        del part.forward
    if when == "before":
        patch()
    handle = accelerate(network)
    if when == "after":
        patch()
    calls.clear()
    assert close(run(network), wanted) and len(calls) == expected
    handle.remove()
    calls.clear()
    assert close(run(network), wanted) and len(calls) == expected and not close(wanted, plain)


@torch.no_grad()
@pytest.mark.parametrize("attach", [lambda u: cache_features(u, 2), lambda u: merge_tokens(u, 0.5)])
@pytest.mark.parametrize("change", [forward_hook, instance_forward, replaced_child, weight_data])
def test_what_changes_the_image(attach, change):
    """Feature caching and token merging give with kernels and a change what they give without kernels."""
    for kind in (nn.Linear, nn.Conv2d, GEGLU, CrossAttention):
        plain, fast = unet(), unet()
        for network in (plain, fast):
            path = [path for path, part in network.named_modules() if type(part) is kind][-1]
            parent, _, place = path.rpartition(".")
            part = network.get_submodule(path)
            if change is not weight_data or hasattr(part, "weight"):
                change(part, network.get_submodule(parent), place)
        with attach(plain), accelerate(fast), attach(fast):
            assert close(run_unet(fast), run_unet(plain))


@torch.no_grad()
@pytest.mark.skipif(not int8.has_int8(), reason="this CPU has no fast int8")
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_int8_layers(monkeypatch, change):
    """A changed layer in int8 differs from the unchanged one as it should, up to int8's steps."""
    monkeypatch.setattr(int8, "MIN_ROWS", 1)
    for build, x in (
        (lambda: nn.Sequential(nn.Linear(64, 64)), torch.randn(300, 64)),
        (lambda: nn.Sequential(nn.Conv2d(64, 64, 3)), torch.randn(1, 64, 9, 9)),
        (lambda: GEGLU(64, 64), torch.randn(300, 64)),
    ):
        torch.manual_seed(0)
        network = build()
        child = next(iter(network._modules))
        with accelerate(network), int8.quantize_int8(network):
            base = network(x)
            undo = change(network._modules[child], network, child)
            found = network(x)
            undo()
            again = network(x)
        undo = change(network._modules[child], network, child)
        wanted = network(x)
        undo()
        assert (found - wanted).norm() < 0.03 * wanted.norm() < (found - base).norm()
        assert torch.equal(again, base)


@torch.no_grad()
def test_copies_and_names():
    """Copies have kernels of their own; classes, parameters and state dicts stay; quantize_dynamic finds the layers."""
    network = unet()
    kinds, keys, base = [type(part) for part in network.modules()], list(network.state_dict()), run_unet(network)
    with accelerate(network).list_on(network):
        assert [type(part) for part in network.modules()] == kinds and list(network.state_dict()) == keys
        twin = copy.deepcopy(network)
        for part in network.modules():
            if isinstance(part, nn.Linear):
                part.weight.data.zero_()
        assert close(run_unet(twin), base) and not close(run_unet(network), base)
        (handle,) = twin.acceleration
        assert isinstance(handle, Handle)
        handle.remove()
        assert not any("forward" in vars(part) for part in twin.modules()) and twin.acceleration == []
        dynamic = torch.ao.quantization.quantize_dynamic(twin, {nn.Linear})
        linears = sum(type(part) is nn.Linear for part in twin.modules())
        replaced = sum(isinstance(part, torch.ao.nn.quantized.dynamic.Linear) for part in dynamic.modules())
        assert replaced == linears > 20 and torch.isfinite(run_unet(dynamic)).all()
