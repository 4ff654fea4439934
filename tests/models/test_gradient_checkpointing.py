"""`use_checkpoint` trades time for memory and changes nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from ldm.modules.diffusionmodules.openaimodel import UNetModel

SIZES = {
    "image_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 4,
    "dropout": 0.1,
}
KINDS = {
    "transformer": {"use_spatial_transformer": True, "context_dim": 24},
    "attention": {"resblock_updown": True, "use_scale_shift_norm": True},
}


def unet(kind: str, use_checkpoint: bool) -> UNetModel:
    torch.manual_seed(0)
    model = UNetModel(**SIZES, **KINDS[kind], use_checkpoint=use_checkpoint)
    with torch.no_grad():  # its last layers start at zero, which would hide differences
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model.train()


def gradients(model: torch.nn.Module, kind: str, amp: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24) if kind == "transformer" else None
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        loss = model(x, torch.tensor([3, 700]), context).float().square().mean()
    loss.backward()
    return {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same(kind, amp):
    """Dropout included, so the second forward pass draws what the first one drew."""
    plain, saving = (gradients(unet(kind, flag), kind, amp) for flag in (False, True))
    assert plain.keys() == saving.keys()
    torch.testing.assert_close(saving, plain, rtol=0, atol=0)


def test_frozen_parameters_stay_without_gradients():
    plain, saving = unet("transformer", False), unet("transformer", True)
    for model in (plain, saving):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("attn2" in name)
    expected, found = gradients(plain, "transformer"), gradients(saving, "transformer")
    assert expected and all("attn2" in name for name in found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_less_is_kept_for_the_backward_pass():
    def kept(use_checkpoint: bool) -> int:
        sizes: dict[int, int] = {}

        def note(x: torch.Tensor) -> torch.Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        model = unet("transformer", use_checkpoint)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            model(torch.randn(2, 4, 32, 32), torch.tensor([3, 700]), torch.randn(2, 5, 24))
        return sum(size for place, size in sizes.items() if place not in weights)

    assert kept(True) < 0.5 * kept(False)


def test_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        found = gradients(DistributedDataParallel(unet("transformer", True)), "transformer")
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, gradients(unet("transformer", False), "transformer"))
