"""Random runs against torch's own unscale, clip and step: what one thought of is one run in
thousands."""

import math
import random

import pytest
import torch
from torch import nn

import distclip
import skips
from late import judged_late

OPTIMIZERS = {
    "sgd": lambda ps, fused: torch.optim.SGD(ps, 0.1, momentum=0.9, fused=fused),
    "adamw": lambda ps, fused: torch.optim.AdamW(ps, 0.01, fused=fused),
    "adagrad": lambda ps, fused: torch.optim.Adagrad(ps, 0.05, fused=fused),
    "rmsprop": lambda ps, fused: torch.optim.RMSprop(ps, 0.01),
}


def build(draw):
    """Two equal copies of parameters, their optimizers and scalers."""
    dice = random.Random(draw)
    sizes = [
        [dice.randint(1, 40) for _ in range(dice.randint(1, 4))] for _ in range(dice.randint(1, 2))
    ]
    kinds = [(dice.choice(sorted(OPTIMIZERS)), dice.random() < 0.7) for _ in sizes]
    sides = []
    for _ in range(2):
        source = torch.Generator().manual_seed(draw)
        sets = [[nn.Parameter(torch.randn(n, generator=source)) for n in row] for row in sizes]
        optimizers = [OPTIMIZERS[kind](ps, fused) for (kind, fused), ps in zip(kinds, sets)]
        sides.append(
            (sets, optimizers, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2))
        )
    return dice, sides


def give(sets, source, scale, hurt):
    for i, params in enumerate(sets):
        for j, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=source) * scale
            if (i, j) == hurt[:2]:
                p.grad[0] = hurt[2]


def torchs_way(sets, optimizers, scaler, max_norm, used):
    """A bad step in one optimizer keeps all of them still, as one clipper's step does."""
    for optimizer in optimizers:
        if used:
            scaler.unscale_(optimizer)
    params = [p for row in sets for p in row if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad.double() for p in params])
    if norm.isfinite():
        coef = (max_norm / norm).clamp(max=1.0)
        for p in params:
            p.grad.copy_(p.grad.double() * coef)
        for optimizer in optimizers:
            optimizer.step()
    if used:
        for optimizer in optimizers:
            for found in scaler._per_optimizer_states[id(optimizer)][
                "found_inf_per_device"
            ].values():
                found.fill_(float(not norm.isfinite()))
        scaler.update()
    return norm


@pytest.mark.parametrize("waits", [False, True, "device"])
@pytest.mark.parametrize("draw", range(60))
@skips.told(0)
def test_a_random_run_equals_torchs(draw, waits):
    dice, ((mine, own, scaler), (theirs, other, reference)) = build(draw)
    use_scaler, max_norm = dice.random() < 0.7, dice.choice([0.5, 3.0, 1e9])
    clipper = distclip.GradClipper(
        [(f"p{i}.{j}", p) for i, row in enumerate(mine) for j, p in enumerate(row)], max_norm
    )
    judged_late(clipper, waits)
    seen = set()
    for step in range(8):
        scale = 1.0
        if use_scaler:
            scale = float(scaler.scale(torch.ones(())))
            reference.scale(torch.ones(()))
        row = dice.randrange(len(mine))
        hurt = (
            (row, dice.randrange(len(mine[row])), dice.choice([math.inf, -math.inf, math.nan]))
            if dice.random() < 0.3
            else (-1, -1, 0.0)
        )
        for sets in (mine, theirs):
            give(sets, torch.Generator().manual_seed(1000 * draw + step), scale, hurt)
        handle, by_hand = scaler if use_scaler else None, dice.random() < 0.3
        if use_scaler and by_hand:
            scaler.unscale_(own[0])
        if dice.random() < 0.5:
            report = clipper.step(*own, scaler=handle)
        elif len(own) == 1:
            report = clipper.clip_(own[0], scaler=handle)
            if use_scaler:
                scaler.step(own[0])
                scaler.update()
            else:
                own[0].step()
        else:
            report = clipper.step(*own, scaler=handle, update_scaler=False)
            if use_scaler:
                scaler.update()
        norm = torchs_way(theirs, other, reference, max_norm, use_scaler)
        assert bool(report.skipped) == (not norm.isfinite())
        assert bool(report.clipped) == bool(norm.isfinite() and norm > max_norm)
        seen |= {bool(report.clipped), bool(report.skipped)}
        if norm.isfinite():
            torch.testing.assert_close(report.total_norm.double(), norm, rtol=1e-6, atol=0)
        assert not any(hasattr(o, name) for o in own for name in ("grad_scale", "found_inf"))
        if use_scaler:
            assert scaler.state_dict() == reference.state_dict()
        for a, b in zip((p for row in mine for p in row), (p for row in theirs for p in row)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert seen == {True, False} or max_norm == 1e9, "vacuous"
