"""torch.nn.utils.clip_grad_norm_, float16: the norm overflows, and nothing is left of the gradient.

Its norm has the gradients' dtype: past 65,504 it is inf, and the coefficient 0. Shown: the length
of the gradient after clipping to 1.
"""

import torch
from torch import nn

import distclip
from showing import show


def model_after_backward():
    model = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(4)]).half()
    sum((layer.weight * 400).sum() for layer in model).backward()  # a norm of 80,000
    return model


def length(model):
    return float(torch.stack([p.grad.double().norm() for p in model.parameters()]).norm())


def numbers():
    ours, theirs = model_after_backward(), model_after_backward()
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    distclip.clip_grad_norm_(ours.parameters(), 1.0)
    return {"right": 1.0, "torch": length(theirs), "distclip": length(ours)}


if __name__ == "__main__":
    show(numbers)
