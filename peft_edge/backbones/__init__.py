"""timm's edge CNNs as backbones: load, save, name the head and replace it."""

from peft_edge.backbones.checkpoints import fingerprint, save_backbone
from peft_edge.backbones.heads import head_names, replace_head
from peft_edge.backbones.loading import EDGE_FAMILIES, load_backbone

__all__ = ["EDGE_FAMILIES", "fingerprint", "head_names", "load_backbone", "replace_head", "save_backbone"]
