"""Run a script: its messages as plain lines, an error as one line and an exit code."""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from ldm.cli.startup import prepare
from ldm.distributed import environment
from ldm.trust import allowlist_only

LESS_MEMORY = "--n_samples 1, --tile 512, a smaller --H and --W, or (on a GPU) --lowvram and --precision fp16"
FAREWELL = "Your samples are ready and waiting for you here: \n{} \n \nEnjoy."


class _Console(logging.Handler):
    """Print messages as plain lines on stdout, as the public scripts do; warnings and errors on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one message."""
        warning = record.levelno >= logging.WARNING
        prefix = f"{record.levelname.lower()}: " if warning else ""
        say(f"{prefix}{record.getMessage()}", sys.stderr if warning else sys.stdout)


def say(text: str, stream: TextIO | None) -> None:
    """Print a line above progress bars. A closed, full or missing stream (`| head`, daemons) is no error."""
    bars = sys.modules.get("tqdm")
    above = bars.tqdm.external_write_mode(file=stream) if bars else contextlib.nullcontext()
    with contextlib.suppress(OSError, ValueError, AttributeError), above:
        if stream is not None:
            try:
                stream.write(text + "\n")
            except UnicodeEncodeError:  # a terminal without these characters
                stream.write(text.encode("ascii", "backslashreplace").decode() + "\n")
            stream.flush()


def _close_bars() -> None:
    """Leave the progress bars of failed work where they are, so that the error has a line of its own."""
    bars = sys.modules.get("tqdm")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars else ():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            bar.close()


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Call a script's `main` and return its exit code, with what went wrong as one line on stderr.

    0: all well. 2: the user can mend it (files, options). 1: it failed while running (memory). 130: Ctrl-C.
    Other exceptions are bugs and keep their traceback; `python -X dev` shows it for every error.
    """
    if argv is None:  # the process is this command's
        prepare()
    library = logging.getLogger("ldm")
    console = _Console()
    library.addHandler(console)
    library.setLevel(logging.INFO if environment()[0] == 0 else logging.ERROR)  # of several processes, one reports
    try:
        with allowlist_only():
            main(argv)
        return 0
    except KeyboardInterrupt as error:
        if argv is None:  # the process is about to end, and impatience is to end it no worse
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return _fail(130, str(error) or "interrupted; nothing written")
    except ModuleNotFoundError as error:
        return _fail(2, f"error: {error}: install the requirements first (pip install -r requirements.txt)")
    except (ValueError, ImportError, OSError) as error:
        return _fail(2, f"error: {_one_line(error)}")
    except (RuntimeError, ArithmeticError, MemoryError) as error:
        return _fail(1, f"error: {_one_line(error)}")
    finally:
        library.removeHandler(console)


def _fail(code: int, message: str) -> int:
    if sys.flags.dev_mode and code != 130:
        raise  # the exception that the caller is handling
    _close_bars()
    say(message, sys.stderr)
    return code


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    if text.startswith("out of memory") and " Try " in text:  # training gives advice of its own
        return text
    if isinstance(error, MemoryError) or "out of memory" in text.lower() or "can't allocate memory" in text:
        return f"out of memory{_requested(text)}. Try {LESS_MEMORY}"
    return text


def _requested(text: str) -> str:
    """The requested memory, as torch reports it for CPUs (480000000000 bytes) and GPUs (3.00 GiB), and numpy."""
    found = re.search(r"(?:tried|unable) to allocate ([\d.]+) ?(bytes|[KMGT]i?B)", text, re.IGNORECASE)
    if found is None:
        return ""
    size, unit = float(found[1]), found[2]
    for larger in ("KiB", "MiB", "GiB") if unit == "bytes" else ():
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f" (needs another {size:.4g} {unit})"
