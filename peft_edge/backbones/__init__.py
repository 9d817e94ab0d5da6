"""Load and save timm's edge CNNs, replace and grow their classifiers, and set their class names."""

from peft_edge.backbones.heads import change_classes, class_names, grow_head, head_names, replace_head, set_class_names
from peft_edge.backbones.loading import EDGE_FAMILIES, fingerprint, load_backbone, save_backbone, set_preprocessing
from peft_edge.backbones.weights import WeightMatch, import_weights

__all__ = [
    "EDGE_FAMILIES",
    "WeightMatch",
    "change_classes",
    "class_names",
    "fingerprint",
    "grow_head",
    "head_names",
    "import_weights",
    "load_backbone",
    "replace_head",
    "save_backbone",
    "set_class_names",
    "set_preprocessing",
]
