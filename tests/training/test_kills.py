"""kill -9 at random moments of training and saving: no file that looks complete is not, and the run resumes."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.subprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="lives are forked")
@pytest.mark.parametrize("kills", [3, pytest.param(120, marks=pytest.mark.slow)])
def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path, kills):
    command = [sys.executable, "-m", "tests.training.kills", str(tmp_path), str(kills)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    done, midway = map(int, re.search(r"(\d+) kills, (\d+) of them while", result.stdout).groups())
    print(f"{done} kills, {midway} of them while a file was written")
    assert done >= kills and (kills < 100 or midway)  # kills that all miss the saving would prove little
