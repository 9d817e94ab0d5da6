from __future__ import annotations

from collections.abc import Callable

import pytest

from peft_edge.config import ConfigError, load_config


@pytest.fixture
def errors_of() -> Callable[..., str]:
    """Return a function that returns the error message of `load_config` for invalid arguments."""

    def errors_of(*arguments: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load_config(arguments)
        return str(caught.value)

    return errors_of
