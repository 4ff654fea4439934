"""Training of first stages: autoencoder and discriminator by Lightning's manual optimisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.checkpoint import init_from_checkpoint
from ldm.lightning import pl
from ldm.models.model_info import ModelInfo
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.ema import LitEma
from ldm.util import instantiate_from_config

if TYPE_CHECKING:
    from pytorch_lightning.core.optimizer import LightningOptimizer

ADAM = {"target": "torch.optim.Adam", "params": {"betas": (0.5, 0.9)}}


class FirstStage(pl.LightningModule):
    """What both kinds of autoencoder share: image batches, training, validation, loading.

    A subclass has `encoder`, `decoder`, `loss` and the rest of `NETWORKS`, and says in `losses` how a batch becomes a
    reconstruction and a loss. The loss is called as the public ones are, and may have a `discriminator`.

    One backward pass serves autoencoder and discriminator, on the same reconstructions; the original made them a second
    time for the discriminator. `global_step` counts batches, or groups of `accumulate_grad_batches` of them, as it did
    in the original with its two optimisers: what `disc_start`, schedules and `max_steps` mean stays the same.

    `learning_rate` and the three attributes below are set from outside; they stand for the Trainer's options, which
    Lightning does not offer to modules that optimise by hand.
    """

    NETWORKS: tuple[str, ...] = ("encoder", "decoder", "quant_conv", "post_quant_conv")

    info: ModelInfo | None = None  # set by `ldm.inference.load_first_stage`
    encoder: Encoder
    decoder: Decoder
    loss: Any  # what `lossconfig` makes
    colorize: Tensor
    learning_rate: float
    accumulate_grad_batches: int = 1
    gradient_clip_val: float = 0.0  # of the autoencoder's gradient, and of the discriminator's
    gradient_clip_algorithm: str = "norm"

    def __init__(
        self,
        image_key: str,
        monitor: str | None,
        colorize_nlabels: int | None,
        optimizer_config: Mapping[str, Any] | None,
        scheduler_config: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.image_key = image_key
        self.optimizer_config = optimizer_config or ADAM
        self.scheduler_config = scheduler_config
        self.generator_lr_factor = 1.0
        self.model_ema: LitEma | None = None
        if monitor is not None:
            self.monitor = monitor
        if colorize_nlabels is not None:
            # Random projection that shows segmentation maps as colours.
            self.register_buffer("colorize", torch.randn(3, colorize_nlabels, 1, 1))

    # ---- what a first stage is ----

    @property
    def downsampling_factor(self) -> int:
        """Pixels a side of one latent position."""
        return 2 ** (len(self.encoder.down) - 1)

    def networks(self) -> nn.ModuleDict:
        """The modules that make up the autoencoder, without its loss."""
        return nn.ModuleDict({name: self.get_submodule(name) for name in self.NETWORKS})

    def get_last_layer(self) -> Tensor:
        """The weight on which adversarial training balances its gradients."""
        return self.decoder.last_layer

    def init_from_ckpt(self, path: str, ignore_keys: Sequence[str] = ()) -> None:
        """Load weights from a checkpoint file, leaving out keys that start with one of `ignore_keys`."""
        missing = init_from_checkpoint(self, path, ignore_keys=ignore_keys)
        if self.model_ema is not None and any(key.startswith("model_ema.") for key in missing):
            self.model_ema.reset(self.networks())

    @contextmanager
    def ema_scope(self, context: str | None = None) -> Iterator[None]:
        """Within it the autoencoder has its averaged weights, if there are any."""
        if self.model_ema is None:
            yield
            return
        self.model_ema.swap(self.networks())
        try:
            yield
        finally:
            self.model_ema.swap(self.networks())

    # ---- batches ----

    def get_input(self, batch: Mapping[str, Tensor], k: str) -> Tensor:
        """Images (B, H, W, C) or (B, H, W) of a batch as (B, C, H, W) float32.

        Raises ValueError for sizes that the autoencoder cannot give back.
        """
        x = batch[k]
        if x.ndim == 3:
            x = x[..., None]
        height, width, f = x.shape[1], x.shape[2], self.downsampling_factor
        if height % f or width % f:
            raise ValueError(f"pictures of {width} x {height} pixels do not fit: both sides must be multiples of {f}")
        return x.movedim(-1, 1).to(memory_format=torch.contiguous_format).float()

    def losses(self, x: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, dict[str, Tensor]]]]:
        """The reconstruction of x (B, C, H, W), and the loss as a function of (optimizer_idx, global_step, ...)."""
        raise NotImplementedError

    # ---- training ----

    def on_fit_start(self) -> None:
        """Lightning's hook: refuse to train without a loss."""
        if isinstance(self.loss, nn.Identity):
            raise ValueError(
                f"this {type(self).__name__} has no loss to train with: its lossconfig is torch.nn.Identity, or it was "
                "built without memory to be filled from a file; ldm.modules.losses has losses"
            )

    def training_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Lightning's hook: gradients of a batch, and a step of the optimisers where one is due."""
        x = self.get_input(batch, self.image_key)
        _, loss_of = self.losses(x)
        optimizers = _as_list(self.optimizers())
        # the discriminator's weights stay out of this graph: each side has its own gradient after one backward pass
        self.toggle_optimizer(optimizers[0])
        aeloss, parts = loss_of(0, self.global_step, last_layer=self.get_last_layer(), split="train")
        self.untoggle_optimizer(optimizers[0])
        loss, shown = aeloss, {"aeloss": aeloss.detach()}
        if len(optimizers) > 1:
            discloss, disc_parts = loss_of(1, self.global_step, last_layer=self.get_last_layer(), split="train")
            loss, shown, parts = aeloss + discloss, shown | {"discloss": discloss.detach()}, parts | disc_parts
        self._check_finite(loss, parts)

        due = self._step_is_due(batch_idx)
        # processes need to agree on gradients only before a step
        with nullcontext() if due else getattr(self.trainer.strategy, "block_backward_sync", nullcontext)():
            self.manual_backward(loss / self.accumulate_grad_batches)
        if due:
            self._step(optimizers)
        options: dict[str, Any] = {
            "on_step": True,
            "on_epoch": True,
            "batch_size": len(x),
            "sync_dist": self.trainer.world_size > 1,
        }
        self.log_dict(shown, prog_bar=True, **options)
        self.log_dict(parts, **options)
        return aeloss.detach()

    def _step_is_due(self, batch_idx: int) -> bool:
        number = batch_idx + 1
        last = self.trainer.is_last_batch or number >= self.trainer.num_training_batches
        return number % self.accumulate_grad_batches == 0 or last

    def _step(self, optimizers: Sequence[LightningOptimizer]) -> None:
        """Step every optimiser on the gradients of one backward pass; then schedules and averages."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)  # float16 has one
        scale = None if scaler is None else scaler.get_scale()
        for i, optimizer in enumerate(optimizers):
            if i == 0:
                optimizer.step()
            else:
                if scaler is not None:
                    # the step before may have changed the scale, but these gradients were made at the old one
                    _multiply_gradients(optimizer.optimizer, scaler.get_scale() / scale)
                # past Lightning's wrapper, whose every step counts as one of training
                self.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None)
            optimizer.zero_grad()
        for scheduler in _as_list(self.lr_schedulers()):
            scheduler.step()
        if self.model_ema is not None:
            self.model_ema(self.networks())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Lightning's hook, which sees gradients as they are in every precision: clip them."""
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, self.gradient_clip_val, self.gradient_clip_algorithm)

    def _check_finite(self, loss: Tensor, parts: Mapping[str, Tensor]) -> None:
        finite = bool(loss.isfinite())
        if self.trainer.world_size > 1:  # all stop together, or the others would wait forever
            finite = self.trainer.strategy.reduce_boolean_decision(finite, all=True)
        if not finite:
            bad = [f"{name} = {float(value.detach()):g}" for name, value in parts.items() if not value.isfinite()]
            raise FloatingPointError(
                f"loss is not finite at step {self.global_step}: {', '.join(bad) or 'in another process'}; "
                "try a lower learning rate, or lightning.trainer.gradient_clip_val=1.0"
            )

    def configure_optimizers(self) -> Any:
        """Lightning's hook: an optimiser for the autoencoder and, if there is one, another for the discriminator."""
        optimizers = [self._optimizer(self.trained_parameters(), self.generator_lr_factor * self.learning_rate)]
        discriminator = getattr(self.loss, "discriminator", None)
        if discriminator is not None:
            optimizers.append(self._optimizer(list(discriminator.parameters()), self.learning_rate))
        if self.scheduler_config is None:
            return optimizers, []
        factor = instantiate_from_config(self.scheduler_config).schedule
        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=factor) for optimizer in optimizers]
        return optimizers, [{"scheduler": schedule, "interval": "step", "frequency": 1} for schedule in schedules]

    def trained_parameters(self) -> list[nn.Parameter]:
        """What the autoencoder's optimiser trains."""
        return [parameter for parameter in self.networks().parameters() if parameter.requires_grad]

    def _optimizer(self, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        if "lr" in (self.optimizer_config.get("params") or {}):
            raise ValueError("optimizer_config: the learning rate is model.base_learning_rate; leave out params.lr")
        return instantiate_from_config(self.optimizer_config, params=parameters, lr=lr)

    # ---- looking at it ----

    @torch.no_grad()
    def validation_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> None:
        """Lightning's hook: losses and PSNR of the weights, and of their averages as val_ema/..."""
        self._validate(batch, "val")
        if self.model_ema is not None:
            with self.ema_scope():
                self._validate(batch, "val_ema")

    def _validate(self, batch: Mapping[str, Tensor], split: str) -> None:
        x = self.get_input(batch, self.image_key)
        reconstructions, loss_of = self.losses(x)
        sides = 1 if getattr(self.loss, "discriminator", None) is None else 2
        logged = {f"{split}/psnr": psnr(reconstructions, x).mean()}
        for optimizer_idx in range(sides):
            loss, parts = loss_of(optimizer_idx, self.global_step, last_layer=self.get_last_layer(), split=split)
            logged |= parts if optimizer_idx else {f"{split}/aeloss": loss} | parts
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=self.trainer.world_size > 1)

    def to_rgb(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in -1..1 of maps with more channels; those with 3 or fewer stay as they are."""
        if x.shape[1] <= 3:
            return x
        if not hasattr(self, "colorize"):
            raise ValueError(f"to show maps of {x.shape[1]} channels a model needs colorize_nlabels: {x.shape[1]}")
        x = F.conv2d(x, self.colorize)
        return 2 * (x - x.min()) / (x.max() - x.min()) - 1


def psnr(y: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB (B,) of pictures y for x, both (B, C, H, W) in -1..1; y is cut to that range."""
    mse = (y.float().clamp(-1, 1) - x).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / mse)


def _as_list(value: Any) -> list[Any]:
    """Lightning gives one optimiser or schedule as itself, several as a list, none as None."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _multiply_gradients(optimizer: torch.optim.Optimizer, factor: float) -> None:
    if factor != 1:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(gradients, factor)
