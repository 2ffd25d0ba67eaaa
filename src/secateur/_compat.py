"""One workaround, kept apart: torchvision's compiled operators are missing beside a CPU build of torch from PyPI.

The only torchvision wheel on PyPI is built for CUDA; next to torch+cpu its library does not load, so `torchvision::nms`
is undefined and `import torchvision` fails (pytorch/vision#9085), and with it timm and open_clip. Declaring the two
operators that the import needs is enough for transforms, datasets and models; detection operators stay unavailable.
A healthy torchvision is never touched.
"""

from __future__ import annotations

import importlib
import sys

_library = None


def ensure_torchvision() -> None:
    """Make `import torchvision` work; does nothing where it works already or is not installed."""
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        import torch

        _library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]
        importlib.import_module("torchvision")
