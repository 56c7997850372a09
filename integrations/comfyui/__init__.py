"""ComfyUI nodes of visualcloze_deft: in-context image grids on FLUX.1-Fill, with adapters."""

from .generating import Generate
from .loading import LoadAdapter, LoadModel
from .package import missing
from .rows import ExampleRows, QueryRow
from .tasks import ChooseTask

NODES = {
    "VCDeftLoadModel": (LoadModel, "VisualCloze Load Model"),
    "VCDeftLoadAdapter": (LoadAdapter, "VisualCloze Load Adapter"),
    "VCDeftChooseTask": (ChooseTask, "VisualCloze Choose Task"),
    "VCDeftExampleRows": (ExampleRows, "VisualCloze Example Rows"),
    "VCDeftQueryRow": (QueryRow, "VisualCloze Query Row"),
    "VCDeftGenerate": (Generate, "VisualCloze Generate"),
}
NODE_CLASS_MAPPINGS = {name: node for name, (node, _) in NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {name: title for name, (_, title) in NODES.items()}
__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]

if line := missing():
    import logging

    logging.warning(line)
