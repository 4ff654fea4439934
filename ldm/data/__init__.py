"""Data sets: the drawn scenes that the bundled model learns from, and the judge that scores pictures of them."""
