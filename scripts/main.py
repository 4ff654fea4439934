#!/usr/bin/env python
"""scripts/train.py under its public name: `python scripts/main.py --base CONFIG -t --gpus 0,`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a clone works without installation

from ldm import cli
from scripts.train import main

if __name__ == "__main__":
    sys.exit(cli.run(main))
