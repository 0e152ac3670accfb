"""Four faults in one run of four ranks, each found from the log and the page alone: step, layer, rank
and note. Which layer and which rank is told by a float64 oracle in one process."""

import html
import json
import math
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.cli import main

STEPS, ROWS, WIDTH = 60, 16, 12
BATCH, LAYER, NONFINITE, DRIFTED = 24, 32, 40, 50  # steps, as the log counts them
SCALED, BROKEN = "layers.1.down.weight", "layers.2.up.weight"


class Block(nn.Module):
    """Pre-norm, with a small output: its own gradients show what becomes of its weights."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        nn.init.normal_(self.down.weight, std=0.02)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(4))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        nn.init.normal_(self.head.weight)  # else most of every gradient is its own

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def built():
    torch.manual_seed(3)
    return Net()


def data_of(step, rank, with_faults):
    """All ranks read the same, so that one per cent of a gradient shows; one of them reads garbage
    once."""
    source = torch.Generator().manual_seed(7)
    x, y = torch.randn(ROWS, WIDTH, generator=source), torch.randn(ROWS, 3, generator=source)
    y = y + 0.02 * torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(step))
    return x, y + 100 if with_faults and (step, rank) == (BATCH, 1) else y


def loss_at(model, step, rank, with_faults):
    x, y = (t.to(next(model.parameters()).dtype) for t in data_of(step, rank, with_faults))
    return (model(x) - y).square().mean()


def note_of(step, rank):
    return {"file": f"part-{rank}.bin", "row": step * ROWS}


def trained(with_faults, log):
    """Rates so small that the weights stay nearly what they are."""
    rank, net = dist.get_rank(), built()
    model = DDP(net)
    clipper = distclip.GradClipper(
        model,
        1.0,
        watch=distclip.Watch(distclip.per_layer(2), every=1000),
        rank_norms=distclip.RankNorms(model),
        sinks=[distclip.JSONLSink(log)],
    )
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    scaled, broken = net.get_parameter(SCALED), net.get_parameter(BROKEN)
    for step in range(1, STEPS + 1):
        optimizer.zero_grad()
        kept, hooks = scaled.detach().clone(), []
        if with_faults and step == LAYER:
            scaled.data.mul_(100)
        if with_faults and (step, rank) == (NONFINITE, 3):
            hooks = [broken.register_hook(lambda grad: grad + math.inf)]
        if with_faults and step >= DRIFTED and rank == 2:
            hooks = [p.register_hook(lambda grad: grad * 1.01) for p in net.parameters()]
        loss_at(model, step, rank, with_faults).backward()
        for hook in hooks:
            hook.remove()
        clipper.step(optimizer, note=note_of(step, rank))
        if with_faults and step == LAYER:
            scaled.data.copy_(kept)
    clipper._writer.flush()


def oracle(step):
    """(the layer with the largest share of the squared norm, each rank's own norm), float64."""
    grads = []
    for rank in range(4):
        net = built().double()
        if step == LAYER:
            net.get_parameter(SCALED).data.mul_(100)
        loss_at(net, step, rank, True).backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    own = [math.sqrt(sum(float(g.square().sum()) for g in of.values())) for of in grads]
    sums = {}
    for name in grads[0]:
        mean = torch.stack([of[name] for of in grads]).mean(0)
        layer = re.match(r"layers\.\d|\w+", name)[0]
        sums[layer] = sums.get(layer, 0.0) + float(mean.square().sum())
    return max(sums, key=sums.__getitem__), own


def of_log(log):
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert lines[0]["distclip_log"] == 2
    return {row["step"]: row for row in lines[1:]}


def rows_of_page(log, page):
    """Step → the texts of its row in the table of the largest steps, or of those skipped."""
    assert main(["report", str(log), "--output", str(page)]) == 0
    out = {}
    for row in re.findall(r"<tr[^>]*>(.*?)</tr>", page.read_text(), re.DOTALL):
        cells = [
            html.unescape(re.sub(r"<[^>]*>", " ", cell)).strip()
            for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        ]
        if cells and cells[0].isdecimal():
            out.setdefault(int(cells[0]), " | ".join(cells))
    return out


def share(row):
    norms = dict(zip(row["layers"], row["layer_norms"], strict=True))
    return max(norms, key=norms.__getitem__)


def test_four_faults_are_named_with_step_layer_rank_and_note(ranks, tmp_path):
    logs = {faulty: tmp_path / f"{faulty}.jsonl" for faulty in (True, False)}
    for faulty, log in logs.items():
        ranks.run(trained, faulty, str(log))
    rows, page = of_log(logs[True]), rows_of_page(logs[True], tmp_path / "faulty.html")

    def noted(step, *who):
        notes = {(n["rank"], n["step"]): n["note"] for n in rows[step]["notes"]}
        assert all(notes[rank, step] == note_of(step, rank) for rank in range(4))
        for rank in who:
            assert f"rank {rank}: {json.dumps(note_of(step, rank))}" in page[step]

    # a poisoned batch on rank 1
    layer, own = oracle(BATCH)
    row = rows[BATCH]
    assert (row["matters"], row["outlier_rank"], share(row)) == ("outlier", 1, layer)
    assert own[1] > 5 * own[0], "vacuous"
    assert row["rank_norms"] == pytest.approx(own, rel=1e-2)
    assert layer in page[BATCH] and "| 1, norm " in page[BATCH]
    noted(BATCH, 1)

    # a weight of one layer, 100 times as large on all ranks: no rank stands out
    layer, own = oracle(LAYER)
    row = rows[LAYER]
    assert layer == SCALED[: len(layer)], "vacuous"
    assert (row["matters"], row["outlier_rank"], share(row)) == ("outlier", None, layer)
    assert f"| {layer}: " in page[LAYER]
    noted(LAYER, 0, 1, 2, 3)

    # an inf in one layer, on rank 3
    row = rows[NONFINITE]
    assert (row["matters"], row["outlier_rank"]) == ("skipped", 3)
    (culprit,) = {c["parameter"]: c for c in row["culprits"]}.values()
    assert culprit["parameter"] == BROKEN
    assert (culprit["before"], culprit["after"]) == ("layers.2.norm.bias", "layers.2.up.bias")
    assert BROKEN in page[NONFINITE] and "| 3, norm " in page[NONFINITE]
    noted(NONFINITE, 3)

    # from a step on a rank's gradients are off by 1 %
    first, later = rows[DRIFTED], [rows[step] for step in range(DRIFTED + 1, STEPS + 1)]
    assert (first["matters"], first["outlier_rank"]) == ("outlier", 2)
    assert abs(first["deviation"]) < 4, "the norm of the whole does not show it"
    assert first["rank_deviation"] == pytest.approx(math.log(1.01) / 1e-3, rel=1e-2)
    assert share(first) in page[DRIFTED] and "| 2, norm " in page[DRIFTED]
    assert all(row["outlier_rank"] == 2 for row in later), "it goes on"
    assert {row["matters"] for row in later} <= {None, "largest"}, "told once"
    noted(DRIFTED, 2)

    # the same run without them
    for step, row in of_log(logs[False]).items():
        assert row["outlier_rank"] is None and row["matters"] in (None, "largest"), step
        assert not row["culprits"]
    assert "stands out" not in json.dumps(rows_of_page(logs[False], tmp_path / "clean.html"))
