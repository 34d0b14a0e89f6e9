"""One row per method: what every test of all methods runs them with."""

from __future__ import annotations

import pytest

from hf_mlprune.levels import LEVELS
from hf_mlprune.methods import METHODS

#: Settings with which a method prunes a tiny model in a few steps: method -> settings.
SETTINGS = {
    "fisher": {"levels": LEVELS, "block_shape": (8, 4)},
    "group-lasso": {"levels": LEVELS, "block_shape": (1, 4), "lasso_weight": 1e-4},
    "magnitude": {"levels": LEVELS, "block_shape": (8, 4)},
    "mlpruning": {"levels": LEVELS, "block_shape": (8, 4)},
    "random": {"levels": LEVELS, "block_shape": (8, 4)},
    "snip": {"levels": ("heads", "ffn")},
}
assert set(SETTINGS) == set(METHODS)

each_method = pytest.mark.parametrize("method", SETTINGS)
