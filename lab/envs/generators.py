"""The global random generators of Python and numpy, which some environments draw from. No torch."""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def seed_generators(entropy: Sequence[int]) -> None:
    """Seed both from non-negative integers."""
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)


def generator_states() -> tuple[Any, ...]:
    """The states of both, to be compared."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), name, np.asarray(keys).tobytes(), *rest


@contextlib.contextmanager
def kept_generators() -> Iterator[None]:
    """Afterwards both have the state that they had before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
