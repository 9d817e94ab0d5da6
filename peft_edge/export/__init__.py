"""Export an adapted model for a device: the merged network, the tensors that changed, or a training step."""

from peft_edge.export.device import export_train_step
from peft_edge.export.device_states import import_state
from peft_edge.export.differences import apply_diff, save_result, write_diff
from peft_edge.export.exporter import export_model
from peft_edge.export.formats import FORMATS
from peft_edge.export.step_checks import StepReport
from peft_edge.export.verification import Comparison, Images, comparison_table, read_images

__all__ = [
    "FORMATS",
    "Comparison",
    "Images",
    "StepReport",
    "apply_diff",
    "comparison_table",
    "export_model",
    "export_train_step",
    "import_state",
    "read_images",
    "save_result",
    "write_diff",
]
