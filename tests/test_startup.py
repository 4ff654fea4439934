"""What scripts import and set up at the start. Each test starts a new Python."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.subprocess

# The packages outside the standard library that sampling uses, and those that Lightning needs itself. `python -X
# importtime -c "import ldm.inference"` shows what each costs.
NEEDED = {"PIL", "attr", "einops", "numpy", "omegaconf", "safetensors", "torch", "tqdm", "typing_extensions", "yaml"}
LIGHTNINGS = {"fsspec", "lightning_fabric", "lightning_utilities", "packaging", "pytorch_lightning", "torchmetrics"}
LIGHTNINGS |= {"regex", "rich", "scipy"}  # where they are installed
HEAVY_PARTS = {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.distributed.fsdp", "torch.distributed.tensor"}
HEAVY_PARTS |= {"scipy.signal", "scipy.optimize"}
TORCHS = {"functorch", "mpmath", "sympy", "torchgen", "cuda", "triton"}
MEASURING = {"coverage"}  # under `pytest --cov`


def run_python(code: str, *argv: str, cwd: Path = ROOT) -> str:
    """Run `code` in a new Python with the repository on its path; returns its stdout."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORTED = """
print("IMPORTED", *sorted(name for name, module in sys.modules.items()
    if "site-packages" in (getattr(module, "__file__", None) or "")))
"""


@pytest.mark.skipif(int(version("pytorch-lightning").split(".")[1]) < 6, reason="Lightning before 2.6 imports more")
def test_sampling_imports_only_what_it_needs(tmp_path):
    output = run_python(
        f"sys.argv = ['txt2img', '--outdir', {str(tmp_path)!r}, '--n_samples', '1', '--n_iter', '1', '--steps', '1']\n"
        "from ldm import cli\n"
        "from scripts import txt2img\n"
        "assert cli.run(txt2img.main) == 0\n" + IMPORTED
    )
    names = set(output.rpartition("IMPORTED")[2].split())
    assert {"torch", "pytorch_lightning"} <= names
    assert len(list((tmp_path / "samples").iterdir())) == 1
    packages = {name.partition(".")[0] for name in names if not name.startswith("_")}
    assert not packages - NEEDED - LIGHTNINGS - TORCHS - MEASURING
    assert not names & HEAVY_PARTS


def test_models_are_lightning_modules_in_any_order_of_imports():
    code = "from ldm.models.diffusion.ddpm import LatentDiffusion\n"
    code += "from ldm.models.autoencoder import AutoencoderKL\n"
    check = "print(all(issubclass(kind, pl.LightningModule) for kind in (LatentDiffusion, AutoencoderKL)))"
    assert run_python(code + "import pytorch_lightning as pl\n" + check) == "True\n"
    assert run_python("import pytorch_lightning as pl\n" + code + check) == "True\n"
    prepare = "from ldm.cli.startup import prepare; prepare()\n"
    assert run_python(prepare + code + "import pytorch_lightning as pl\n" + check) == "True\n"


def test_a_program_that_imports_ldm_gets_lightning_unchanged():
    run_python("""
from ldm import cli
from ldm.models.diffusion.ddpm import LatentDiffusion
import lightning_fabric.wrappers as wrappers, torch, torchmetrics.utilities.plot as plot
assert wrappers.OptimizedModule is torch._dynamo.OptimizedModule
assert not any(type(finder).__module__.startswith("ldm") for finder in sys.meta_path)
assert callable(plot.plot_single_or_multi_val) and type(plot).__name__ == "module"
""")


def test_deferred_packages_work_when_they_are_used():
    """Lightning knows compiled models, torchmetrics plots and reads, and the packages are themselves."""
    run_python("""
from ldm.cli.startup import DEFERRED, prepare
prepare()
import pytorch_lightning as pl
assert not any(type(finder).__module__.startswith("ldm") for finder in sys.meta_path)
assert type(pl.__spec__.loader).__module__.partition(".")[0] != "ldm"
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


def test_a_release_that_needs_more_than_names_is_imported_without_placeholders(tmp_path):
    package = tmp_path / "pytorch_lightning"
    package.mkdir()
    (package / "__init__.py").write_text("from pytorch_lightning import part\nimport transformers\nok = part.one\n")
    (package / "part.py").write_text(
        "import torch._dynamo as dynamo\nassert type(dynamo).__name__ == 'module'\none = 1\n"
    )
    run_python(f"""
sys.path.insert(0, {str(tmp_path)!r})
from ldm.cli.startup import prepare
prepare()
import pytorch_lightning
assert pytorch_lightning.ok == 1 and type(sys.modules["transformers"]).__name__ != "_PlaceholderModule"
""")


def test_training_works_with_deferred_packages(tmp_path):
    run_python(
        """
from ldm.cli.startup import prepare
prepare()
import pytorch_lightning as pl
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


MEMORY = """
import ctypes, resource, sys
from ldm.cli.startup import retain_freed_memory
retained = len(sys.argv) > 1 and retain_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.memset.argtypes, libc.free.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], [ctypes.c_void_p]
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(5):
        blocks = [libc.malloc(25_000_000) for _ in range(8)]
        for block in blocks: libc.memset(block, 1, 25_000_000)  # 6,100 pages
        for block in blocks: libc.free(block)
work()
before = faults()
work()
print(int(retained), faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_blocks_are_reused_without_being_cleared_again():
    (retained, few), (_, many) = ([int(word) for word in run_python(MEMORY, *argv).split()] for argv in (["1"], []))
    assert retained
    assert 10 * few < many  # a program that does not call it is left alone
