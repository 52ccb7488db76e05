"""One random stream per (seed, facets): a new facet never changes what an old one draws."""

import hashlib

import numpy as np


def derive(seed: int, *facets: str | int) -> int:
    """A 64-bit seed that depends on `seed` and every facet, equal on every machine and Python."""
    text = "\x1f".join([str(seed), *(f"{type(f).__name__}:{f}" for f in facets)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def rng(seed: int, *facets: str | int) -> np.random.Generator:
    """A fresh numpy generator for this seed and these facets, e.g. `rng(0, "motion", clip)`."""
    return np.random.Generator(np.random.PCG64(derive(seed, *facets)))
