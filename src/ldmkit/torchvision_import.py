"""Import torchvision, also where its wheel was built for another torch than the one installed.

PyPI's torchvision for Linux is linked to CUDA. Beside a CPU build of torch its compiled operators
do not load, and the import fails because `torchvision::nms` is unknown. Declaring the two operators
that it registers cures that; ldmkit uses neither. A matching pair is left alone.
"""

import importlib

import torch

_declared: list[torch.library.Library] = []  # a Library takes its operators with it when it dies


def import_torchvision() -> None:
    """Make `import torchvision` (and what imports it: lpips, open_clip) work in this process."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        importlib.import_module("torchvision")
