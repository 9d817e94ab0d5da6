"""GaLore optimizers, and the parameter groups that training uses."""

from peft_edge.optim.galore import GaLoreAdafactor, GaLoreAdamW, GaLoreSGD
from peft_edge.optim.param_groups import decay_groups, galore_param_groups, update_in_backward

__all__ = ["GaLoreAdafactor", "GaLoreAdamW", "GaLoreSGD", "decay_groups", "galore_param_groups", "update_in_backward"]
