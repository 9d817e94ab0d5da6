"""The typed configuration of a run."""

from peft_edge.config.reader import ConfigError, describe_keys, flatten, load_config, to_yaml
from peft_edge.config.schema import RunConfig, Section

__all__ = ["ConfigError", "RunConfig", "Section", "describe_keys", "flatten", "load_config", "to_yaml"]
