"""Save, load, combine, check and publish adapters, on disk and on the Hugging Face Hub."""

from peft_edge.hub.adapter_files import save_adapter
from peft_edge.hub.combination import combine_adapters
from peft_edge.hub.pretrained import load_pretrained
from peft_edge.hub.push import push_adapter, push_update

__all__ = ["combine_adapters", "load_pretrained", "push_adapter", "push_update", "save_adapter"]
