"""The pattern of ControlNet (Zhang et al. 2023): a second encoder whose zero-initialised outputs join the skips."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from ldm.modules.diffusionmodules.util import conv_nd, noise_like, timestep_embedding, zero_module
from ldm.util import instantiate_from_config
from tests.clients.common import PROMPTS, SHAPE, assert_close, batch, ddim, noise, tiny_model
from tests.tiny import tiny_config


class ControlledUNet(UNetModel):
    """The UNet, with a list of tensors that are added to its middle and its skips."""

    def forward(self, x, timesteps=None, context=None, control=None, only_mid_control=False, **kwargs):
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))
        h, skips = x.type(self.dtype), []
        with torch.no_grad():
            for block in self.input_blocks:
                h = block(h, emb, context)
                skips.append(h)
            h = self.middle_block(h, emb, context)
        control = list(control or [])
        if control:
            h = h + control.pop()
        for block in self.output_blocks:
            skip = skips.pop()
            if control and not only_mid_control:
                skip = skip + control.pop()
            h = block(torch.cat([h, skip], dim=1), emb, context)
        return self.out(h.type(x.dtype))


class ControlNet(nn.Module):
    """The encoder of a UNet, a stem for the hint, and convolutions that are zero at first."""

    def __init__(self, hint_channels, **unet):
        super().__init__()
        self.unet = UNetModel(**unet)
        del self.unet.output_blocks, self.unet.out
        width = self.unet.model_channels
        stem = [conv_nd(2, hint_channels, 8, 3, padding=1), nn.SiLU(), conv_nd(2, 8, 8, 3, padding=1, stride=2)]
        self.stem = TimestepEmbedSequential(*stem, nn.SiLU(), zero_module(conv_nd(2, 8, width, 3, padding=1)))
        self.zero_convs = nn.ModuleList()
        levels = range(len(self.unet.channel_mult))
        widths = [width]
        for level in levels:
            widths += [self.unet.channel_mult[level] * width] * self.unet.num_res_blocks[level]
            widths += [widths[-1]] * (level != levels[-1])
        for size in (*widths, widths[-1]):
            self.zero_convs.append(TimestepEmbedSequential(zero_module(conv_nd(2, size, size, 1))))

    def forward(self, x, hint, timesteps, context):
        emb = self.unet.time_embed(timestep_embedding(timesteps, self.unet.model_channels))
        h, outs = x, []
        for k, block in enumerate(self.unet.input_blocks):
            h = block(h, emb, context)
            if k == 0:
                h = h + self.stem(hint, emb, context)
            outs.append(self.zero_convs[k](h, emb, context))
        h = self.unet.middle_block(h, emb, context)
        return [*outs, self.zero_convs[-1](h, emb, context)]


class ControlLDM(LatentDiffusion):
    def __init__(self, control_stage_config, control_key, only_mid_control, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key = control_key
        self.only_mid_control = only_mid_control
        self.control_scales = [1.0] * len(self.control_model.zero_convs)

    @torch.no_grad()
    def get_input(self, batch, k, bs=None, *args, **kwargs):
        x, c = super().get_input(batch, self.first_stage_key, *args, bs=bs, **kwargs)
        control = batch[self.control_key][:bs].to(self.device).movedim(-1, 1)
        return x, {"c_crossattn": [c], "c_concat": [control.float()]}

    def apply_model(self, x_noisy, t, cond, *args, **kwargs):
        assert isinstance(cond, dict)
        network = self.model.diffusion_model
        context = torch.cat(cond["c_crossattn"], 1)
        if cond["c_concat"] is None:
            return network(x=x_noisy, timesteps=t, context=context, control=None)
        hint = torch.cat(cond["c_concat"], 1)
        control = self.control_model(x=x_noisy, hint=hint, timesteps=t, context=context)
        control = [c * scale for c, scale in zip(control, self.control_scales)]
        return network(x=x_noisy, timesteps=t, context=context, control=control, only_mid_control=self.only_mid_control)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.control_model.parameters(), lr=self.learning_rate)


class TwoPassDDIM(DDIMSampler):
    """A DDIM step of a project's own, that asks for guidance one condition after the other."""

    @torch.no_grad()
    def p_sample_ddim(
        self,
        x,
        c,
        t,
        index,
        repeat_noise=False,
        use_original_steps=False,
        quantize_denoised=False,
        temperature=1.0,
        noise_dropout=0.0,
        score_corrector=None,
        corrector_kwargs=None,
        unconditional_guidance_scale=1.0,
        unconditional_conditioning=None,
        dynamic_threshold=None,
    ):
        e_t = self.model.apply_model(x, t, c)
        if unconditional_conditioning is not None and unconditional_guidance_scale != 1.0:
            uncond = self.model.apply_model(x, t, unconditional_conditioning)
            e_t = uncond + unconditional_guidance_scale * (e_t - uncond)
        size = (x.shape[0], 1, 1, 1)
        a_t = torch.full(size, float(self.ddim_alphas[index]))
        a_prev = torch.full(size, float(self.ddim_alphas_prev[index]))
        sigma_t = torch.full(size, float(self.ddim_sigmas[index]))
        sqrt_one_minus_at = torch.full(size, float(self.ddim_sqrt_one_minus_alphas[index]))
        pred_x0 = (x - sqrt_one_minus_at * e_t) / a_t.sqrt()
        direction = (1.0 - a_prev - sigma_t**2).sqrt() * e_t
        noise = sigma_t * noise_like(x.shape, x.device, repeat_noise) * temperature
        return a_prev.sqrt() * pred_x0 + direction + noise, pred_x0


def control_ldm():
    unet = tiny_config()["params"]["unet_config"]["params"]
    control = {"target": "tests.clients.test_controlnet.ControlNet", "params": {"hint_channels": 3, **unet}}
    return tiny_model(
        "tests.clients.test_controlnet.ControlLDM",
        unet="tests.clients.test_controlnet.ControlledUNet",
        control_stage_config=control,
        control_key="hint",
        only_mid_control=False,
    )


@pytest.fixture(scope="module")
def model():
    return control_ldm()


def conditions(model, prompts=PROMPTS):
    text = model.get_learned_conditioning(list(prompts))
    return {"c_crossattn": [text], "c_concat": [noise(2, 3, 32, 32, seed=3)]}


def test_zero_convolutions_change_nothing(model):
    plain = tiny_model()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("control_model.")})
    x, t, c = noise(2, *SHAPE), torch.tensor([10, 900]), conditions(model)
    zeroed = control_ldm()
    zeroed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for conv in zeroed.control_model.zero_convs:
            for weight in conv.parameters():
                weight.zero_()
        expected = plain.apply_model(x, t, c["c_crossattn"][0])
        assert_close(zeroed.apply_model(x, t, c), expected)
        assert_close(model.apply_model(x, t, {**c, "c_concat": None}), expected)
        assert (model.apply_model(x, t, c) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", [DDIMSampler, TwoPassDDIM])
@torch.no_grad()
def test_sampling(model, sampler):
    c, u = conditions(model), conditions(model, [""] * 2)
    x = noise(2, *SHAPE, seed=5)
    options = {"conditioning": c, "unconditional_conditioning": u, "unconditional_guidance_scale": 3.0}
    sampled, _ = sampler(model).sample(6, 2, SHAPE, x_T=x, verbose=False, **options)

    def eps(x, t):
        conditional, unconditional = model.apply_model(x, t, c), model.apply_model(x, t, u)
        return unconditional + 3.0 * (conditional - unconditional)

    assert_close(sampled, ddim(eps, model.alphas_cumprod, x, 6))


def test_own_step_is_called(model):
    calls = []

    class Counting(TwoPassDDIM):
        def p_sample_ddim(self, x, c, t, index, **kwargs):
            calls.append(index)
            return super().p_sample_ddim(x, c, t, index, **kwargs)

    Counting(model).sample(5, 2, SHAPE, conditioning=conditions(model), verbose=False, eta=0.5)
    assert calls == [4, 3, 2, 1, 0]


def test_training_step():
    model = control_ldm().train()
    model.learning_rate = 1e-2
    optimizer = model.configure_optimizers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, _ = model.shared_step({**batch(), "hint": noise(2, 32, 32, 3)})
    loss.backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("control_model.") for name in changed)


def test_keys(model):
    keys = model.state_dict().keys()
    assert set(tiny_model().state_dict()) <= keys
    assert {k.partition(".")[0] for k in keys - tiny_model().state_dict().keys()} == {"control_model"}
