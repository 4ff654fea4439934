"""Adapters of others: tomesd, LyCORIS, and LoRA in kohya's way, by class names and instance forwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.models.diffusion.ddim import DDIMSampler
from tests.clients.common import PROMPTS, SHAPE, assert_close, import_or_skip, noise, tiny_model


@pytest.fixture
def model():
    return tiny_model()


@torch.no_grad()
def answer(model):
    c = model.get_learned_conditioning(PROMPTS)
    return model.apply_model(noise(2, *SHAPE), torch.tensor([10, 900]), c)


# ---- tomesd ----


def test_tomesd(model):
    tomesd = import_or_skip("tomesd")
    plain = answer(model)
    tokens = []
    feed_forwards = [part.ff for part in model.modules() if type(part).__name__ == "BasicTransformerBlock"]
    for part in feed_forwards:
        part.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    tomesd.apply_patch(model, ratio=0.5, merge_mlp=True)
    merged = answer(model)
    assert min(tokens) < 256 and max(tokens) < 256  # of 16 x 16 and fewer
    assert 1e-4 < (merged - plain).abs().max() < 10
    tomesd.remove_patch(model)
    assert torch.equal(answer(model), plain)


def test_tomesd_without_merging_changes_nothing(model):
    tomesd = import_or_skip("tomesd")
    plain = answer(model)
    tomesd.apply_patch(model, ratio=0.0)
    assert_close(answer(model), plain)


def test_tomesd_while_sampling(model):
    tomesd = import_or_skip("tomesd")
    c = model.get_learned_conditioning(PROMPTS)
    options = {"conditioning": c, "x_T": noise(2, *SHAPE), "verbose": False}
    plain, _ = DDIMSampler(model).sample(4, 2, SHAPE, **options)
    tomesd.apply_patch(model, ratio=0.5)
    merged, _ = DDIMSampler(model).sample(4, 2, SHAPE, **options)
    assert (merged - plain).abs().max() > 1e-4


# ---- LoRA ----


class LoRAModule(nn.Module):
    """The low-rank change of one layer, whose forward it replaces."""

    def __init__(self, name, layer, rank=2, scale=1.0):
        super().__init__()
        self.name, self.scale = name, scale
        if isinstance(layer, nn.Conv2d):
            self.down = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
            self.up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        else:
            self.down = nn.Linear(layer.in_features, rank, bias=False)
            self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.layer = [layer]  # not a child

    def apply_to(self):
        self.published = self.layer[0].forward
        self.layer[0].forward = self.forward

    def forward(self, x):
        return self.published(x) + self.scale * self.up(self.down(x))


def inject(root, prefix):
    """LoRA for every linear layer and convolution inside of SpatialTransformer, found by names of classes."""
    found = []
    for name, part in root.named_modules():
        if type(part).__name__ == "SpatialTransformer":
            for inner, layer in part.named_modules():
                if type(layer).__name__ in ("Linear", "Conv2d"):
                    found.append(LoRAModule(f"{prefix}_{name}_{inner}".replace(".", "_"), layer))
    for lora in found:
        lora.apply_to()
    return nn.ModuleList(found)


def test_lora_in_kohyas_way(model):
    plain = answer(model)
    keys = set(model.state_dict())
    loras = inject(model.model.diffusion_model, "lora_unet")
    assert len(loras) == 7 * 12 and set(model.state_dict()) == keys
    assert_close(answer(model), plain)
    for lora in loras:
        nn.init.constant_(lora.up.weight, 0.05)
    changed = answer(model)
    assert (changed - plain).abs().max() > 1e-3
    merged = tiny_model()
    layers = dict(merged.model.diffusion_model.named_modules())
    names = {f"lora_unet_{name}".replace(".", "_"): name for name in layers}
    for lora in loras:  # the same as weights of its own
        weight = layers[names[lora.name]].weight
        delta = lora.up.weight.flatten(1) @ lora.down.weight.flatten(1)
        weight.data += delta.reshape(weight.shape)
    assert_close(answer(merged), changed)


def test_text_layers_have_the_class_names_that_lora_code_looks_for(model):
    """LoRA code for text encoders finds layers by the class names of transformers."""
    clip = pytest.importorskip("transformers").CLIPTextModel
    config = pytest.importorskip("transformers").CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1
    )
    theirs = {name.removeprefix("text_model."): type(part).__name__ for name, part in clip(config).named_modules()}
    tower = model.cond_stage_model.transformer.text_model
    for name in ("embeddings", "encoder", "encoder.layers.0", "encoder.layers.0.self_attn", "encoder.layers.0.mlp"):
        assert type(tower.get_submodule(name)).__name__ == theirs[name], name


def test_every_layer_is_reached(model):
    """A change of any one layer's forward counts."""
    network = model.model.diffusion_model
    plain = answer(model)
    transformer = next(part for part in network.modules() if type(part).__name__ == "SpatialTransformer")
    layers = [layer for layer in transformer.modules() if type(layer).__name__ in ("Linear", "Conv2d")]
    for layer in layers:
        published = layer.forward
        layer.forward = lambda x, published=published: published(x) * 1.5
        assert (answer(model) - plain).abs().max() > 1e-6, layer
        del layer.forward
    assert torch.equal(answer(model), plain)


def test_training_of_a_lora(model):
    loras = inject(model.model.diffusion_model, "lora_unet")
    model.requires_grad_(False)
    c = model.get_learned_conditioning(PROMPTS)
    model.apply_model(noise(2, *SHAPE), torch.tensor([10, 900]), c).square().sum().backward()
    assert all(lora.up.weight.grad.abs().max() > 0 for lora in loras)


# ---- LyCORIS ----


@pytest.mark.parametrize("algo", ["lora", "loha", "lokr"])
def test_lycoris(model, algo):
    lycoris = import_or_skip("lycoris")
    network = model.model.diffusion_model
    plain = answer(model)
    lycoris.LycorisNetwork.apply_preset({"target_module": ["SpatialTransformer", "ResBlock"], "enable_conv": True})
    adapter = lycoris.create_lycoris(network, 1.0, linear_dim=4, linear_alpha=2.0, algo=algo)
    adapter.apply_to()
    assert len(adapter.loras) > 80
    assert_close(answer(model), plain)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.05)
    changed = answer(model)
    assert (changed - plain).abs().max() > 1e-3
    adapter.restore()
    assert_close(answer(model), plain)
    adapter.merge_to(1.0)
    merged = answer(model)
    assert (merged - plain).abs().max() > 1e-3
    if algo == "lora":  # LyCORIS' merge of the others is not its own forward, with plain layers of torch either
        assert_close(merged, changed, 1e-4)
