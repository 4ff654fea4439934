"""The public API of the models: what their methods take and return, and classes that only research code uses."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from pytorch_lightning import LightningModule

from ldm.checkpoint import save_checkpoint
from ldm.models.autoencoder import IdentityFirstStage
from ldm.models.diffusion import ddpm
from ldm.models.diffusion.classifier import NoisyLatentImageClassifier
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.util import instantiate_from_config
from tests.golden import filled, golden_configs
from tests.models.test_diffusion_training import Point, point
from tests.models.test_first_stage_training import build as build_first_stage
from tests.models.test_training import batch, build
from tests.models.test_upscaling import LOW_SCALE
from tests.tiny import tiny_config

POINT = {"target": f"{Point.__module__}.Point"}


def pixels(**changes) -> DDPM:
    params = {"unet_config": {**POINT, "params": {"channels": 3}}, "timesteps": 10, "image_size": 8, "log_every_t": 5}
    return DDPM(**params | changes)


# ---- batches ----


def test_inputs_come_as_a_list():
    model, images = build(), batch()
    torch.manual_seed(1)
    plain = model.get_input(images, "jpg")
    torch.manual_seed(1)
    z, c, x, xrec, xc = model.get_input(images, "jpg", return_first_stage_outputs=True, return_original_cond=True)
    assert isinstance(plain, list) and len(plain) == 2 and torch.equal(plain[0], z) and torch.equal(plain[1], c)
    assert torch.equal(x, images["jpg"].movedim(-1, 1)) and xc == images["txt"]
    assert torch.equal(xrec, model.decode_first_stage(z))
    assert torch.equal(model.get_input(images, "jpg", return_x=True, bs=1)[2], x[:1])
    other = model.get_input(images | {"caption": ["a", "a blue circle"]}, "jpg", cond_key="caption")[1]
    assert torch.equal(other, model.get_learned_conditioning(["a", "a blue circle"]))
    trained = build(cond_stage_trainable=True)
    assert trained.get_input(images, "jpg")[1] == images["txt"]
    assert isinstance(trained.get_input(images, "jpg", force_c_encode=True)[1], torch.Tensor)


def test_keywords_of_a_step_reach_the_batch_and_the_loss():
    model, images = build(), batch()
    torch.manual_seed(1)
    one = model.shared_step(images, bs=1)[0]
    torch.manual_seed(1)
    assert torch.equal(one, model.shared_step({"jpg": images["jpg"][:1], "txt": images["txt"][:1]})[0])
    x, noise = torch.randn(2, 4, 16, 16), torch.zeros(2, 4, 16, 16)
    c = torch.randn(2, 12, 24)
    torch.manual_seed(1)
    found, _ = model(x, c, noise=noise)
    torch.manual_seed(1)
    assert torch.equal(found, model.p_losses(x, c, torch.randint(0, model.num_timesteps, (2,)), noise)[0])


def test_no_condition_reaches_the_network_where_it_is_forced_to_none():
    model = point(cond_stage_config={"target": "torch.nn.Identity"}, force_null_conditioning=True, concat_mode=False)
    assert model.model.conditioning_key == "crossattn"
    assert model.get_input({"image": torch.rand(1, 8, 8, 4)}, "image")[1] is None


def test_positional_encodings_are_a_subclass_matter():
    class Shifted(LatentDiffusion):
        def compute_latent_shifts(self, batch):
            return 1, 2

    params = tiny_config(use_positional_encodings=True)["params"]
    c = Shifted(**params).get_input(batch(), "jpg")[1]
    assert (c["pos_x"], c["pos_y"]) == (1, 2) and c["c_crossattn"].shape == (2, 12, 24)
    with pytest.raises(NotImplementedError, match="LatentDiffusion has no compute_latent_shifts"):
        LatentDiffusion(**params).get_input(batch(), "jpg")


# ---- the pixel model ----


def test_pixel_methods_take_no_condition():
    model, x, t = pixels(), torch.randn(2, 3, 8, 8), torch.tensor([3, 0])
    noise = torch.randn_like(x)
    loss, _ = model.p_losses(x, t, noise=noise)
    x_noisy = model.q_sample(x, t, noise)
    torch.testing.assert_close(loss, (model.model(x_noisy, t) - noise).square().mean())
    mean, _, log_variance = model.p_mean_variance(x_noisy, t, True)
    assert mean.shape == x.shape and log_variance.shape == (2, 1, 1, 1)
    torch.manual_seed(0)
    x_prev = model.p_sample(x_noisy, t, clip_denoised=True)
    assert torch.equal(x_prev[1], mean[1])  # no noise at the last step
    samples, steps = model.p_sample_loop((2, 3, 8, 8), return_intermediates=True)
    assert samples.shape == x.shape and len(steps) == 4 and samples.abs().max() <= 1.001


# ---- formulas, decoding ----


def test_formulas():
    model, x, t = build(), torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    noise = torch.randn_like(x)
    x_t = model.q_sample(x, t, noise)
    torch.testing.assert_close(model._predict_eps_from_xstart(x_t, t, x), noise, rtol=1e-3, atol=1e-3)
    bits = model._prior_bpd(x)
    alpha_bar = model.alphas_cumprod[-1]
    exact = 0.5 * (-1 - torch.log(1 - alpha_bar) + (1 - alpha_bar) + alpha_bar * x.square()).flatten(1).mean(1)
    torch.testing.assert_close(bits, exact / torch.log(torch.tensor(2.0)), rtol=1e-3, atol=1e-7)
    numbers = ddpm.uniform_on_device(2.0, 3.0, (1000,), "cpu")
    assert 2 <= numbers.min() < 2.1 and 2.9 < numbers.max() <= 3
    colors = model.to_rgb(torch.randn(2, 7, 4, 4))
    assert colors.shape == (2, 3, 4, 4) and colors.min() == -1 and colors.max() == 1
    assert (model.num_downs, model.concat_mode, model.use_scheduler) == (1, True, False)
    assert (model.linear_start, model.linear_end) == (0.0015, 0.0195) or model.linear_start < model.linear_end


def test_codebook_indices_are_decoded():
    vq = {
        "target": "ldm.models.autoencoder.VQModelInterface",
        "params": {
            **{"ddconfig": golden_configs("diffusion")["vq"], "n_embed": 16, "embed_dim": 3},
            "lossconfig": {"target": "torch.nn.Identity"},
        },
    }
    model = filled(point(first_stage_config=vq, channels=3, unet_config={**POINT, "params": {"channels": 3}}))
    stage, indices = model.first_stage_model, torch.randint(0, 16, (2, 4, 4))
    wanted = stage.decode(stage.quantize.embedding(indices).movedim(-1, 1), force_not_quantize=True)
    torch.testing.assert_close(model.decode_first_stage(indices, predict_cids=True), wanted)
    logits = torch.nn.functional.one_hot(indices, 16).movedim(-1, 1).float()
    torch.testing.assert_close(model.decode_first_stage(logits, predict_cids=True), wanted)
    assert torch.equal(stage.decode_code(indices.flatten(), (2, 4, 4, 3)), stage.decode_code(indices))


class TwoOutputs(Point):
    def forward(self, x, t, context=None):
        return super().forward(x, t, context), "ids"


def test_networks_with_two_outputs():
    model = point(unet_config={"target": f"{__name__}.TwoOutputs"})
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([3])
    assert torch.equal(model.apply_model(x, t, None), model.apply_model(x, t, None, return_ids=True)[0])
    assert model.p_mean_variance(x, None, t, False, return_codebook_ids=True)[3] == "ids"
    with pytest.raises(ValueError, match="return_codebook_ids"):
        model.p_sample(x, None, t, return_codebook_ids=True)


def test_ancestral_sampling_corrects_scores_and_keeps_what_a_mask_says():
    model, x0 = point(timesteps=6), torch.randn(1, 4, 8, 8)
    zero = SimpleNamespace(modify_score=lambda model, eps, x, t, c, strength: strength * eps)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([3])
    options = {"score_corrector": zero, "corrector_kwargs": {"strength": 0.0}, "return_x0": True}
    mean, *_, x_recon = model.p_mean_variance(x, None, t, False, **options)
    torch.testing.assert_close(x_recon, x / model.alphas_cumprod[3].sqrt())
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    seen: list[int] = []
    sample, predictions = model.progressive_denoising(
        None, (4, 8, 8), batch_size=1, verbose=False, mask=mask, x0=x0, temperature=[0.0] * 6, log_every_t=1,
        img_callback=lambda x, i: seen.append(i), start_T=4,
    )  # fmt: skip
    assert seen == [3, 2, 1, 0] and len(predictions) == 4
    assert (sample - x0)[..., :4].abs().max() < 0.1 < (sample - x0)[..., 4:].abs().max()


def test_contexts_may_stay_apart():
    class Contexts(torch.nn.Module):
        def forward(self, x, t, context):
            return context

    globals()["Contexts"] = Contexts
    wrapper = ddpm.DiffusionWrapper({"target": f"{__name__}.Contexts", "sequential_crossattn": True}, "crossattn")
    parts = [torch.zeros(1, 2, 3), torch.ones(1, 4, 3)]
    assert wrapper(None, None, c_crossattn=parts) == parts and isinstance(wrapper, LightningModule)
    joined = ddpm.DiffusionWrapper({"target": f"{__name__}.Contexts"}, "crossattn")
    assert joined(None, None, c_crossattn=parts).shape == (1, 6, 3)


# ---- files ----


def test_files_with_a_logvar_load_strictly():
    """As ControlNet and others save it; without it, too."""
    model = point(logvar_init=0.5)
    state = model.state_dict()
    assert "logvar" not in state
    model.load_state_dict(state | {"logvar": torch.full((1000,), 0.25)})
    assert model.logvar.eq(0.25).all()
    model.load_state_dict(state)
    parent = torch.nn.ModuleDict({"inner": model})
    parent.load_state_dict(parent.state_dict() | {"inner.logvar": torch.full((1000,), 0.75)})
    assert model.logvar.eq(0.75).all()
    learned = point(learn_logvar=True)
    assert "logvar" in learned.state_dict()


def test_averages_are_reset_after_loading(tmp_path):
    model = point(use_ema=True)
    model.model_ema.num_updates.fill_(7)
    with torch.no_grad():
        model.model_ema.diffusion_modelweight.zero_()
    path = str(save_checkpoint(tmp_path / "a.ckpt", model.state_dict()))
    kept = point(use_ema=True, ckpt_path=path)
    assert kept.model_ema.num_updates == 7 and kept.model_ema.diffusion_modelweight.eq(0).all()
    reset = point(use_ema=True, ckpt_path=path, reset_ema=True, reset_num_ema_updates=True)
    assert reset.model_ema.num_updates == 0
    assert torch.equal(reset.model_ema.diffusion_modelweight, reset.model.diffusion_model.weight)
    with pytest.raises(ValueError, match="make_it_fit is not supported"):
        point(make_it_fit=True)


# ---- special models ----


@pytest.mark.parametrize("name", ddpm.SPECIAL_MODELS)
def test_special_models_have_their_public_names(name):
    kind = getattr(ddpm, name)
    assert issubclass(kind, LatentDiffusion) and pickle.loads(pickle.dumps(kind)) is kind
    assert pickle.loads(b"c" + f"ldm.models.diffusion.ddpm\n{name}\n.".encode()) is kind  # as the originals name it


def test_training_upscalers_by_concatenation():
    config = tiny_config(conditioning_key="hybrid-adm", low_scale_config=LOW_SCALE)
    config["params"]["unet_config"]["params"] |= {"in_channels": 7, "num_classes": 100}
    model = ddpm.LatentUpscaleFinetuneDiffusion(**config["params"])
    images = batch() | {"lr": torch.rand(2, 16, 16, 3) * 2 - 1}
    z, cond, x, xrec, xc = model.get_input(images, "jpg", return_first_stage_outputs=True)
    assert cond["c_concat"][0].shape == (2, 3, 16, 16) and cond["c_adm"].shape == (2,) and xc == images["txt"]
    assert torch.isfinite(model.shared_step(images)[0])
    log = model.log_images(images, ddim_steps=2, inpaint=False, plot_progressive_rows=False, plot_diffusion_rows=False)
    assert {"inputs", "reconstruction", "samples", "lr"} <= set(log)
    folded = ddpm.LatentUpscaleFinetuneDiffusion(
        reshuffle_patch_size=2, **tiny_config(conditioning_key="hybrid")["params"]
    )
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    patches = folded.concat_entry("lr", image, (2, 2))
    assert patches[0, 0].tolist() == [[0, 1], [4, 5]] and patches[0, 1].tolist() == [[2, 3], [6, 7]]
    with pytest.raises(ValueError, match="no multiple of patches of 2"):
        folded.concat_entry("lr", torch.zeros(1, 1, 3, 4), (2, 2))


def test_layouts_are_plotted_by_their_data():
    params = tiny_config()["params"]
    params["cond_stage_config"] = {"target": f"{__name__}.Boxes"}
    params.pop("cond_stage_key")
    model = ddpm.Layout2ImgDiffusion("coordinates_bbox", **params)
    images = {"jpg": batch()["jpg"], "coordinates_bbox": torch.zeros(2, 12, dtype=torch.long)}
    options = {"ddim_steps": 1, "inpaint": False, "plot_progressive_rows": False, "plot_diffusion_rows": False}
    assert "bbox_image" not in model.log_images(images, N=1, **options)
    plotted: list[tuple[int, ...]] = []
    builder = SimpleNamespace(plot=lambda box, label, size: plotted.append(size) or torch.zeros(3, *size))
    data = SimpleNamespace(conditional_builders={"coordinates_bbox": builder})
    model._trainer = SimpleNamespace(datamodule=SimpleNamespace(datasets={"train": data}), global_rank=0, world_size=1)
    log = model.log_images(images, N=1, **options)
    assert log["bbox_image"].shape == (1, 3, 256, 256) and plotted == [(256, 256)]
    with pytest.raises(ValueError, match="needs cond_stage_key coordinates_bbox, not 'txt'"):
        ddpm.Layout2ImgDiffusion("txt", **params)


class Boxes(torch.nn.Module):
    """An encoder of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(4, 24)

    def forward(self, tokens):
        return self.table(tokens)


# ---- first stages ----


@pytest.mark.parametrize("kind", ["kl", "vq"])
def test_a_training_step_of_one_optimizer(kind):
    """As Lightning 1 called it, and as subclasses still do."""
    model, logged = build_first_stage(kind).train(), {}
    model.log_dict = lambda values, **_: logged.update(values)
    images = {"image": torch.rand(2, 16, 16, 3) * 2 - 1}
    for optimizer_idx, (name, part) in enumerate((("aeloss", "encoder"), ("discloss", "loss.discriminator"))):
        model.zero_grad()
        model.training_step(images, 0, optimizer_idx).backward()
        assert name in logged
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any(name.startswith(part) for name in reached)
    assert torch.isfinite(model.training_step(images, 0, optimizer_idx=0))


def test_averages_of_a_first_stage_are_shown():
    model = build_first_stage("kl", ema_decay=0.9)
    images = {"image": torch.rand(2, 16, 16, 3) * 2 - 1}
    log = model.log_images(images, False, True)
    assert {"samples_ema", "reconstructions_ema"} <= set(log)
    assert set(model.log_images(images, True)) == {"inputs"}


def test_the_identity_takes_what_others_take():
    stage, x = IdentityFirstStage(1, 2, ddconfig=3), torch.randn(1, 4, 8, 8)
    assert stage.encode(x, 1) is stage.decode(x, 1, force_not_quantize=True) is stage.quantize(x, 1) is stage(x, 2)


# ---- the classifier of noisy latents ----


@pytest.fixture
def classified(tmp_path):
    """The run of a small class-conditional diffusion model."""
    embedder = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"n_classes": 10, "embed_dim": 24, "key": "class_label"},
    }
    config = tiny_config(cond_stage_config=embedder, cond_stage_key="class_label", timesteps=20)
    (tmp_path / "configs").mkdir()
    OmegaConf.save({"model": config}, tmp_path / "configs" / "2022-project.yaml")
    return tmp_path


def test_a_classifier_learns_from_noisy_latents(classified):
    config = OmegaConf.load(classified / "configs" / "2022-project.yaml").model
    path = str(save_checkpoint(classified / "d.ckpt", filled(instantiate_from_config(config)).state_dict()))
    torch.manual_seed(0)
    options = {"num_classes": 10, "pool": "adaptive", "log_steps": 4, "diffusion_ckpt_path": path}
    model = NoisyLatentImageClassifier(str(classified), **options)
    model.learning_rate = 3e-3
    images = {"jpg": torch.rand(2, 32, 32, 3) * 2 - 1, "class_label": torch.tensor([1, 7])}
    images["human_label"] = ["cat", "dog"]
    loss, logits, x_noisy, targets = model.shared_step(images, t=3)
    assert logits.shape == (2, 10) and x_noisy.shape == (2, 4, 16, 16) and targets.tolist() == [1, 7]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, targets))
    optimizer = model.configure_optimizers()
    first = None
    for step in range(15):
        loss = model.training_step(images, step)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.7 * first and not model.train().diffusion_model.training
    assert all(p.grad is None for p in model.diffusion_model.parameters())
    model.eval()
    model.on_validation_start()
    model.validation_step(images, 0)
    assert list(model.noisy_acc) == [0, 5, 10, 15] and len(model.noisy_acc[5]["acc@1"]) == 1
    log = model.log_images(images, N=1)
    assert set(log) == {"inputs", "labels", *(f"inputs@t{t}" for t in (0, 5, 10, 15))}
    assert log["inputs"].shape == (1, 3, 32, 32)
    path = str(save_checkpoint(classified / "c.ckpt", model.state_dict()))
    again = NoisyLatentImageClassifier(str(classified), **options, ckpt_path=path)
    assert torch.equal(again(x_noisy, torch.tensor([3, 3])), model(x_noisy, torch.tensor([3, 3])))


def test_accuracies_of_a_classifier():
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.1, 0.3]])
    top_k = NoisyLatentImageClassifier.compute_top_k
    assert top_k(None, logits, torch.tensor([1, 2]), 1) == 0.5
    assert top_k(None, logits, torch.tensor([2, 1]), 2, "none").tolist() == [1, 0]
    with pytest.raises(ValueError, match="reduction 'sum'"):
        top_k(None, logits, torch.tensor([1, 2]), 1, "sum")
    with pytest.raises(FileNotFoundError, match=r"has no configs/\*-project.yaml"):
        NoisyLatentImageClassifier("nowhere", 10)
