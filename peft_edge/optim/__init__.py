"""GaLore optimizers, parameter groups for weight decay and for GaLore, and optimizer steps in the backward pass."""

from peft_edge.optim.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreSGD
from peft_edge.optim.param_groups import decay_groups, galore_param_groups, update_in_backward

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreSGD", "decay_groups", "galore_param_groups", "update_in_backward"]
