"""Safe readers of checkpoint files: containers, pickles, storages, safetensors. They import no other part of `ldm`."""


class BadFile(ValueError):
    """An unusable file; the message says why, and `damaged` whether another copy could help."""

    def __init__(self, message: str, *, damaged: bool = True) -> None:
        super().__init__(message)
        self.damaged = damaged


class BadPickle(ValueError):
    """A pickle that is damaged, or that no checkpoint contains; the message says why."""


class UnsafePickle(ValueError):
    """A pickle that asks for names outside the allow-list, listed in `names`."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


def printable(text: str, limit: int = 100) -> str:
    """Return a text from a file as a message may show it: on one line, and not too long."""
    return (text if text.isprintable() else ascii(text))[:limit]
