"""What drawing imports, and what waits until it is used. Each test asks a Python of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The packages outside the standard library that drawing uses, and those that Lightning cannot be had without. Nothing
# joins them lightly: `python -X importtime -c "import ldm.inference"` says what each takes.
NEEDED = {"PIL", "attr", "einops", "numpy", "omegaconf", "safetensors", "torch", "tqdm", "typing_extensions", "yaml"}
LIGHTNINGS = {"fsspec", "lightning_fabric", "lightning_utilities", "packaging", "pytorch_lightning", "torchmetrics"}
LIGHTNINGS |= {"regex", "rich"}  # if they are there
HEAVY_PARTS = {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "torch.distributed.tensor"}
TORCHS = {"functorch", "mpmath", "sympy", "torchgen", "cuda", "triton"}  # as it pleases
MEASURING = {"coverage"}  # under `pytest --cov`


def asked(code: str, *, cwd: Path = ROOT) -> str:
    """What a new Python prints that runs `code` with the repository on its path."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTED = """
print("IMPORTED", *sorted(name for name, module in sys.modules.items()
    if "site-packages" in (getattr(module, "__file__", None) or "")))
"""


def imported(code: str) -> set[str]:
    return set(asked(code + IMPORTED).rpartition("IMPORTED")[2].split())


@pytest.mark.skipif(int(version("pytorch-lightning").split(".")[1]) < 6, reason="Lightning before 2.6 takes more along")
def test_drawing_imports_only_what_it_needs(tmp_path):
    names = imported(
        f"sys.argv = ['txt2img', '--outdir', {str(tmp_path)!r}, '--n_samples', '1', '--n_iter', '1', '--steps', '1']\n"
        "from scripts import txt2img\n"
        "txt2img.main()"
    )
    assert {"torch", "pytorch_lightning"} <= names  # the question was understood
    assert len(list((tmp_path / "samples").iterdir())) == 1
    packages = {name.partition(".")[0] for name in names if not name.startswith("_")}
    assert not packages - NEEDED - LIGHTNINGS - TORCHS - MEASURING
    assert not names & HEAVY_PARTS


def test_models_are_lightning_modules_whoever_imports_it_first():
    code = "from ldm.models.diffusion.ddpm import LatentDiffusion\n"
    code += "from ldm.models.autoencoder import AutoencoderKL\n"
    check = "print(all(issubclass(kind, pl.LightningModule) for kind in (LatentDiffusion, AutoencoderKL)))"
    assert asked(code + "import pytorch_lightning as pl\n" + check) == "True\n"
    assert asked("import pytorch_lightning as pl\n" + code + check) == "True\n"


def test_what_waits_works_when_it_is_used():
    """Lightning knows compiled models, torchmetrics plots and reads, and the packages are themselves."""
    asked("""
from ldm.lightning import DEFERRED, pl
import lightning_fabric.wrappers as wrappers, torch, torchmetrics
from pytorch_lightning.utilities.compile import _maybe_unwrap_optimized
assert not set(DEFERRED) & set(sys.modules)
model = pl.LightningModule()
assert not isinstance(model, wrappers.OptimizedModule) and "torch._dynamo" not in sys.modules
compiled = torch.compile(model, backend="eager")
assert isinstance(compiled, wrappers.OptimizedModule) and not isinstance(model, wrappers.OptimizedModule)
assert _maybe_unwrap_optimized(compiled) is model

metric = torchmetrics.MeanMetric()
metric.update(2.0)
figure, axes = metric.plot()
import matplotlib.figure, torchmetrics.utilities.plot, transformers
assert isinstance(figure, matplotlib.figure.Figure)
assert callable(torchmetrics.utilities.plot.plot_curve)
from torchmetrics.functional.text import bert
assert bert.AutoModel.from_pretrained == transformers.AutoModel.from_pretrained
assert transformers.AutoModel.__module__.startswith("transformers.models")
""")


def test_training_works_with_what_waits(tmp_path):
    asked(
        """
from ldm.lightning import pl
import torch
class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch, _):
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **quiet)
trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(8, 2), 4))
assert trainer.callback_metrics["loss"] > 0
""",
        cwd=tmp_path,
    )
