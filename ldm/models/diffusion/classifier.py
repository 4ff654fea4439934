"""A classifier of noisy latents, for classifier guidance (Dhariwal and Nichol 2021, section 4)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from ldm.checkpoint import init_from_checkpoint
from ldm.configs import read_yaml
from ldm.images import text_to_tensor
from ldm.models.diffusion.batches import entry_of, images_of
from ldm.models.training import disabled_train, freeze, lr_schedules
from ldm.util import instantiate_from_config

__all__ = ["NoisyLatentImageClassifier", "disabled_train"]

NETWORKS = "ldm.modules.diffusionmodules.openaimodel."
__models__ = {"class_label": f"{NETWORKS}EncoderUNetModel", "segmentation": f"{NETWORKS}UNetModel"}


class NoisyLatentImageClassifier(pl.LightningModule):
    """A classifier of the latents of a diffusion model at any noise level: of images, or of their pixels.

    Args:
        diffusion_path: the run of the diffusion model; its newest `configs/*-project.yaml` is read.
        num_classes: number of classes.
        ckpt_path: a checkpoint of the classifier to start from.
        pool: pooling of `EncoderUNetModel`.
        label_key: "class_label" or "segmentation", the batch's entry; the diffusion model's `cond_stage_key` wins.
        diffusion_ckpt_path: the checkpoint of the diffusion model.
        scheduler_config: learning-rate schedule.
        weight_decay: of AdamW.
        log_steps: number of noise levels to validate and log at.
    """

    learning_rate: float  # set by the training script

    def __init__(
        self,
        diffusion_path: str,
        num_classes: int,
        ckpt_path: str | None = None,
        pool: str = "attention",
        label_key: str | None = None,
        diffusion_ckpt_path: str | None = None,
        scheduler_config: Mapping[str, Any] | None = None,
        weight_decay: float = 1e-2,
        log_steps: int = 10,
        monitor: str = "val/loss",
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.num_classes = num_classes
        configs = sorted(Path(diffusion_path).glob("configs/*-project.yaml"))
        if not configs:
            raise FileNotFoundError(f"diffusion_path {diffusion_path} has no configs/*-project.yaml")
        config: Any = OmegaConf.to_container(read_yaml(configs[-1]), resolve=True)
        self.diffusion_config = config["model"]
        self.diffusion_config["params"]["ckpt_path"] = diffusion_ckpt_path
        self.load_diffusion()

        self.monitor = monitor
        self.log_time_interval = max(self.diffusion_model.num_timesteps // log_steps, 1)
        self.log_steps = log_steps
        self.label_key: str = getattr(self.diffusion_model, "cond_stage_key", label_key) or ""
        if self.label_key not in __models__:
            raise ValueError(f"label_key {self.label_key!r} is not one of {', '.join(__models__)}")
        self.load_classifier(ckpt_path, pool)
        self.scheduler_config = scheduler_config
        self.use_scheduler = scheduler_config is not None
        self.weight_decay = weight_decay
        self.numd = getattr(self.diffusion_model, "num_downs", 0)

    def load_diffusion(self) -> None:
        """Build `diffusion_model`, frozen."""
        self.diffusion_model: Any = freeze(instantiate_from_config(self.diffusion_config))

    def load_classifier(self, ckpt_path: str | None, pool: str) -> None:
        """Build `model`: a network like the diffusion model's that gives logits."""
        config = copy.deepcopy(dict(self.diffusion_config["params"]["unet_config"]["params"]))
        config |= {"in_channels": config["out_channels"], "out_channels": self.num_classes}
        if self.label_key == "class_label":
            config["pool"] = pool
        self.model: Any = instantiate_from_config({"target": __models__[self.label_key], "params": config})
        if ckpt_path is not None:
            self.init_from_ckpt(ckpt_path)

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = (), only_model: bool = False) -> list[str]:
        """Load the weights of a checkpoint that fit; return the keys it has none for."""
        module, prefix = (self.model, "model.") if only_model else (self, "")
        return init_from_checkpoint(module, path, ignore_keys, prefix=prefix)

    def train(self, mode: bool = True) -> NoisyLatentImageClassifier:
        """As `nn.Module.train`, but the diffusion model stays in evaluation mode."""
        super().train(mode)
        self.diffusion_model.eval()
        return self

    def forward(self, x_noisy: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, classes), or (B, classes, h, w) of pixels, of noisy latents (B, C, h, w) at timesteps t (B,)."""
        return self.model(x_noisy, t)

    # ---- batches ----

    @torch.no_grad()
    def get_x_noisy(self, x: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents x noised to timesteps t."""
        return self.diffusion_model.q_sample(x_start=x, t=t, noise=torch.randn_like(x) if noise is None else noise)

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str) -> Tensor:
        """Images `batch[k]` (B, H, W, C) as (B, C, H, W) float32."""
        return images_of(batch, k, self.device)

    @torch.no_grad()
    def get_conditioning(self, batch: Mapping[str, Any], k: str | None = None) -> Tensor:
        """Labels (B,), or one-hot maps (B, classes, h, w) at the latent's size."""
        key = k or self.label_key
        if self.label_key != "segmentation":
            return entry_of(batch, key).to(self.device)
        targets = images_of(batch, key, self.device)
        for _ in range(self.numd):
            targets = F.interpolate(targets, size=(targets.shape[2] // 2, targets.shape[3] // 2), mode="nearest")
        return targets

    def compute_top_k(self, logits: Tensor, labels: Tensor, k: int, reduction: str = "mean") -> Any:
        """Whether the label is among the k best classes: the fraction ("mean"), or 0 and 1 for each item ("none")."""
        best = torch.topk(logits, min(k, logits.shape[1]), dim=1).indices
        hits = (best == labels[:, None]).float().sum(dim=1)
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction {reduction!r} is not one of mean, none")
        return hits.mean().item() if reduction == "mean" else hits

    # ---- training ----

    def shared_step(
        self, batch: Mapping[str, Any], t: int | Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Loss, logits, noisy latents and targets of a batch, at timestep t or at random ones."""
        x = self.diffusion_model.get_input(batch, k=self.diffusion_model.first_stage_key)
        x = x[0] if isinstance(x, (list, tuple)) else x
        targets = self.get_conditioning(batch)
        if targets.ndim == 4:
            targets = targets.argmax(dim=1)
        steps = self.diffusion_model.num_timesteps
        t = torch.randint(0, steps, (x.shape[0],), device=self.device) if t is None else t
        t = torch.as_tensor(t, device=self.device).long().expand(x.shape[0])
        x_noisy = self.get_x_noisy(x, t)
        logits = self(x_noisy, t)
        loss = F.cross_entropy(logits, targets, reduction="none")
        self.write_logs(loss.detach(), logits.detach(), targets.detach())
        return loss.mean(), logits, x_noisy, targets

    def write_logs(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Log the loss and the accuracies of a step."""
        if self._trainer is None:
            return
        prefix = "train" if self.training else "val"
        log = {f"{prefix}/loss": loss.mean()}
        log |= {f"{prefix}/acc@{k}": torch.tensor(self.compute_top_k(logits, targets, k)) for k in (1, 5)}
        sync = self.trainer.world_size > 1
        self.log_dict(log, on_step=self.training, on_epoch=True, batch_size=len(loss), sync_dist=sync)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss at random noise levels."""
        return self.shared_step(batch)[0]

    def on_train_epoch_start(self) -> None:
        """Move the diffusion network, which training does not use, to the CPU to save memory."""
        self.diffusion_model.model.to("cpu")

    def reset_noise_accs(self) -> None:
        """Forget the accuracies by timestep."""
        times = range(0, self.diffusion_model.num_timesteps, self.log_time_interval)
        self.noisy_acc: dict[int, dict[str, list[float]]] = {t: {"acc@1": [], "acc@5": []} for t in times}

    def on_validation_start(self) -> None:
        """Start collecting accuracies by timestep."""
        self.reset_noise_accs()

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss at random noise levels; accuracies at each of `log_steps` ones."""
        loss = self.shared_step(batch)[0]
        for t, accuracies in self.noisy_acc.items():
            _, logits, _, targets = self.shared_step(batch, t)
            for k in (1, 5):
                accuracies[f"acc@{k}"].append(self.compute_top_k(logits, targets, k))
        return loss

    def configure_optimizers(self) -> Any:
        """AdamW at `self.learning_rate`, with `scheduler_config` at every step."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        return ([optimizer], lr_schedules([optimizer], self.scheduler_config)) if self.use_scheduler else optimizer

    @torch.no_grad()
    def log_images(self, batch: Mapping[str, Any], N: int = 8, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Images (B, C, H, W) by name: inputs, labels, and at each noise level the noisy latents and predicted maps."""
        x = self.get_input(batch, self.diffusion_model.first_stage_key)
        log = {"inputs": x}
        labels = self.get_conditioning(batch)
        if self.label_key == "class_label":
            names = batch.get("human_label", labels.tolist())
            log["labels"] = text_to_tensor([str(name) for name in names], *x.shape[2:])
        else:
            log["labels"] = self.diffusion_model.to_rgb(labels)
        for t in range(0, self.log_steps * self.log_time_interval, self.log_time_interval):
            _, logits, x_noisy, _ = self.shared_step(batch, t)
            log[f"inputs@t{t}"] = x_noisy
            if self.label_key == "segmentation":
                predicted = F.one_hot(logits.argmax(dim=1), num_classes=self.num_classes).movedim(-1, 1)
                log[f"pred@t{t}"] = self.diffusion_model.to_rgb(predicted)
        return {key: images[:N] for key, images in log.items()}
