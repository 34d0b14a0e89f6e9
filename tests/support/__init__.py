"""What the tests share: small real models, data, Trainers, processes, a hub."""

import pytest

# So that assertions of the helpers say what came.
pytest.register_assert_rewrite(f"{__name__}.models", f"{__name__}.processes")
