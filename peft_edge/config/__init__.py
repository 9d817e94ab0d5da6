"""The typed configuration of a run."""

from peft_edge.config.reader import ConfigError, check_grid_keys, describe_keys, flatten, load_config, to_yaml
from peft_edge.config.schema import RunConfig, Section

__all__ = [
    "ConfigError", "RunConfig", "Section", "check_grid_keys", "describe_keys", "flatten", "load_config", "to_yaml",
]  # fmt: skip
