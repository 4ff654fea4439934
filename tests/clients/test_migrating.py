"""What docs/migrating.md says of Lightning 2 and of projects holds."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import pytorch_lightning as pl

from ldm.util import REPOSITORY

TEXT = (REPOSITORY / "docs/migrating.md").read_text(encoding="utf-8")
PAGES = sorted((REPOSITORY / "docs/projects").glob("*.md"))


def test_names_of_lightning():
    """Read from its files, since `support_lightning_1` may have added the former names to this process."""
    folder = Path(pl.__file__).parent
    assert not (folder / "utilities/distributed.py").exists()
    assert hasattr(pl.utilities, "rank_zero_only")
    trainer = (folder / "trainer/trainer.py").read_text(encoding="utf-8")
    assert "from_argparse_args" not in trainer and "resume_from_checkpoint" not in trainer
    known = inspect.signature(pl.Trainer).parameters
    assert "gpus" not in known and {"accelerator", "devices"} <= set(known)
    assert hasattr(pl.loggers, "CSVLogger") and not hasattr(pl.loggers, "TestTubeLogger")


def test_hooks_of_lightning():
    assert list(inspect.signature(pl.LightningModule.on_train_batch_start).parameters) == ["self", "batch", "batch_idx"]
    end = inspect.signature(pl.Callback.on_train_batch_end).parameters
    assert list(end)[-2:] == ["batch", "batch_idx"]
    assert hasattr(pl.LightningModule, "on_train_epoch_end")


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_pages_name_tests(page):
    named = re.findall(r"`(tests/\S+\.py)`", page.read_text(encoding="utf-8"))
    assert named and all((REPOSITORY / name).is_file() for name in named)
    assert f"projects/{page.name}" in TEXT and f"projects/{page.name}" in (REPOSITORY / "mkdocs.yml").read_text()


def test_there_are_six_pages():
    assert len(PAGES) == 6
