"""What the programs beside this file share: whether distclip is asked for, and the line that the test
reads. Each program is a small training that its package's users write; `python PROGRAM own` clips as
the package does, `python PROGRAM distclip` by the lines that end in `# distclip`, with those that end
in `# own` left out. It is imported before all other packages."""

import json
import os
import sys

import torch

DISTCLIP = sys.argv[1:] == ["distclip"]
STEPS = 20

torch.manual_seed(0)
# torchvision, which timm imports, comes built for CUDA: where its operators do not load, its own
# import asks for these two all the same
if not hasattr(torch.ops.torchvision, "nms"):
    _operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def tell(losses, norms=()):
    """Once, on the first rank. `norms` is empty where the package does not tell them."""
    if int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK", 0)) == 0:
        floats = [[float(value) for value in each] for each in (losses, norms)]
        print("RESULT", json.dumps({"losses": floats[0], "norms": floats[1]}))


def tokens(rows, length, vocabulary=64, seed=1):
    """[rows, length] int64: sequences that repeat, so that there is something to learn."""
    source = torch.Generator().manual_seed(seed)
    period = torch.randint(vocabulary, (rows, 4), generator=source)
    return period.repeat(1, length // 4 + 1)[:, :length]
