"""The fixtures that the pages' blocks name. Each runs a block on one of four ranks, and compares
with the float64 oracle."""

import contextlib
import copy
import json
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_gather_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

import distclip
from docs.setting import batch, gradients, length, loss_of, net, whole
from ended_groups import ended_groups
from parity.oracle import total_norm

FIXTURES = {}
ERRORS = {}  # fixture → what its block must raise


def fixture(run):
    FIXTURES[run.__name__] = run
    return run


def near(seen, wanted, tolerance=1e-5):
    seen, wanted = float(seen), float(wanted)
    assert abs(seen - wanted) <= tolerance * abs(wanted), f"{seen} is not {wanted}"


def run(name, block):
    """On one rank: run the block; answers the norm that it was told, for the comparison over
    ranks."""
    with ended_groups():
        if name not in ERRORS:
            return FIXTURES[name](block)
        try:
            FIXTURES[name](block)
        except ERRORS[name] as error:
            return str(error)
        raise AssertionError(f"{block.where} raised nothing")


def checked(block, model, **more):
    """Run it, and see that a step of lr 1 is as long as the clipped gradient and the norm is that
    of the whole."""
    params = list(model.parameters())
    before = whole(params)
    names = {"model": model, "loss_of": loss_of}
    names |= {"optimizer": torch.optim.SGD(params, 1.0)} | more
    block.run(names)
    norm = total_norm(gradients().values())
    assert norm > 1, "vacuous"
    told = names["report"].total_norm if "report" in names else names["norm"]
    near(told, norm)
    near(length(before, whole(params)), 1.0)
    return float(told).hex()


@fixture
def on_ddp(block):
    return checked(block, DistributedDataParallel(net()))


@fixture
def on_ddp_with_scaler(block):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return checked(block, DistributedDataParallel(net()), scaler=scaler)


@fixture
def autoclip(block):
    model = DistributedDataParallel(net())
    names = {
        "model": model,
        "loss_of": loss_of,
        "optimizer": torch.optim.SGD(model.parameters(), 1e-6),
    }
    block.run(names)
    norm = total_norm(gradients().values())
    near(names["report"].total_norm, 3 * norm, 1e-3)
    near(names["report"].threshold, norm * 1.2, 1e-3)  # the 10th percentile of n and 3n
    return float(names["report"].clip_coef).hex()


@fixture
def on_fsdp2(block):
    return checked_after_wrapping(block)


@fixture
def on_tp(block):
    mesh = init_device_mesh("cpu", (4,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    x, y = batch()
    whole_loss = lambda model: (model(x) - y).square().mean()  # noqa: E731
    return checked_after_wrapping(block, model=model, mesh=mesh, loss_of_the_whole_batch=whole_loss)


def checked_after_wrapping(block, **more):
    """As `checked`, where the block wraps the model by itself."""
    model = more.get("model") or net()
    oracle, before = copy.deepcopy(model), whole(model.parameters())
    names = {"loss_of": loss_of, "make_optimizer": lambda params: torch.optim.SGD(params, 1.0)}
    block.run(names := names | {"model": model} | more)
    norm = total_norm(gradients(oracle).values())
    assert norm > 1, "vacuous"
    near(names["report"].total_norm, norm)
    near(length(before, whole(model.parameters())), 1.0)
    return float(names["report"].total_norm).hex()


@fixture
def accumulating(block):
    """Eight equal micro-batches: two steps, each of the mean of four."""
    model = DistributedDataParallel(net())
    params = list(model.parameters())
    names = {"model": model, "loss_of": loss_of, "optimizer": torch.optim.SGD(params, 1e-6)}
    block.run(names)
    near(names["report"].total_norm, total_norm(gradients().values()), 1e-3)
    assert names["report"].step == 2 and names["report"].clipped
    return float(names["report"].total_norm).hex()


@fixture
def saving(block):
    """By every rank into a folder of its own: the states are equal."""
    model = DistributedDataParallel(net())
    clipper = distclip.GradClipper(model, policy=distclip.AutoClip(10))
    loss_of(model).backward()
    norm = float(clipper.clip_().total_norm)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        block.run({"model": model, "clipper": clipper})
    assert int(clipper.state_dict()["step"]) == 1
    return norm.hex()


@fixture
def saving_distributed(block):
    model = fully_shard(net())
    clipper = distclip.GradClipper(model, policy=distclip.AutoClip(10))
    loss_of(model).backward()
    norm = float(clipper.clip_().total_norm)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    with contextlib.chdir(folder[0]):
        block.run({"model": model, "clipper": clipper})
    assert int(clipper.state_dict()["step"]) == 1
    return norm.hex()


@fixture
def rank_norms(block):
    model = DistributedDataParallel(net())
    optimizer, printed = torch.optim.SGD(model.parameters(), 1.0), []
    names = {"model": model, "optimizer": optimizer, "loss_of": loss_of}
    block.run(names | {"print": lambda *said: printed.extend(said)})
    norms, outlier = printed
    x, y = batch()
    for rank, norm in enumerate(norms.tolist()):
        own = net().double()
        (own(x[rank::4].double()) - y[rank::4].double()).square().mean().backward()
        near(norm, total_norm([p.grad for p in own.parameters()]))
    assert outlier is None
    return str(norms.tolist())


@fixture
def explained(block):
    """What the page needs stands in the log."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        norm = checked(block, DistributedDataParallel(net()))
        if dist.get_rank() == 0:
            header, step = map(json.loads, Path("run.jsonl").read_text().splitlines())
            assert len(header["layers"]) == 2 and len(step["rank_norms"]) == 4
    return norm


@fixture
def private_experts(block):
    """One expert a rank, under one name."""
    model = nn.ModuleDict({"router": nn.Linear(3, 3), "experts": nn.ModuleList([nn.Linear(3, 3)])})
    draw = lambda p, seed: torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    for name, p in model.named_parameters():
        p.grad = draw(p, 10 + dist.get_rank() if "experts" in name else 1)
    names = {"model": model}
    block.run(names)
    wanted = [draw(p, 1) for p in model["router"].parameters()]
    wanted += [draw(p, 10 + r) for p in model["experts"].parameters() for r in range(4)]
    report = names["clipper"].clip_()
    near(report.total_norm, total_norm(wanted))
    return float(report.total_norm).hex()


@fixture
def alone(block):
    """On the first rank, while others do nothing; its norm is its own."""
    if dist.get_rank() == 0:
        model = net()
        x, y = batch()
        (model(x) - y).square().mean().backward()
        names = {"model": model}
        block.run(names)
        near(names["clipper"].clip_().total_norm, total_norm(gradients().values()))
    return ""


@fixture
def on_local_sgd(block):
    """Two ranks reduce together: their norm is that of the mean of their gradients."""
    groups = [dist.new_group(members) for members in ((0, 1), (2, 3))]
    subgroup = groups[dist.get_rank() // 2]
    model = DistributedDataParallel(net())
    params = list(model.parameters())
    before = whole(params)
    names = {"model": model, "subgroup": subgroup, "loss_of": loss_of}
    names |= {"optimizer": torch.optim.SGD(params, 1.0)}
    block.run(names)
    alone = net()
    loss_of(alone).backward()
    mean = [p.grad.double() for p in alone.parameters()]
    for grad in mean:
        dist.all_reduce(grad, group=subgroup)
        grad /= 2
    assert total_norm(mean) > 1, "vacuous"
    near(names["report"].total_norm, total_norm(mean))
    near(length(before, whole(params)), 1.0)
    return ""


@fixture
def on_fsdp1(block):
    model = FullyShardedDataParallel(net(), device_id=torch.device("cpu"), use_orig_params=True)
    with FullyShardedDataParallel.summon_full_params(model):
        before = whole(model.parameters())
    names = {
        "model": model,
        "loss_of": loss_of,
        "optimizer": torch.optim.SGD(model.parameters(), 1.0),
    }
    block.run(names)
    near(names["report"].total_norm, total_norm(gradients().values()))
    with FullyShardedDataParallel.summon_full_params(model):
        near(length(before, whole(model.parameters())), 1.0)
    return float(names["report"].total_norm).hex()


class Container(torch.optim.Optimizer):
    """An optimizer for each part, stepped as one."""

    def __init__(self, parts):
        self.optimizers = [torch.optim.SGD(part.parameters(), 1.0) for part in parts]
        super().__init__([p for part in parts for p in part.parameters()], {})

    def __iter__(self):
        return iter(self.optimizers)

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()


@fixture
def on_fsdp2_parts(block):
    model = net()
    parts = [fully_shard(part) for part in (model[:2], model[2:])]
    optimizers, hooked = Container(parts), []
    optimizers.register_step_post_hook(lambda *_: hooked.append(1))
    before = whole(p for part in parts for p in part.parameters())
    names = {"model_parts": parts, "optimizers": optimizers, "loss_of": loss_of}
    block.run(names)
    assert hooked == [1], "the container's own step ran"
    near(names["report"].total_norm, total_norm(gradients().values()))
    near(length(before, whole(p for part in parts for p in part.parameters())), 1.0)
    return float(names["report"].total_norm).hex()


class MegatronLike(nn.Module):
    """One of two stages, each on two tensor-parallel ranks that are each other's experts too."""

    def __init__(self, stage):
        super().__init__()
        self.column, self.expert, self.norm = (
            nn.Linear(3, 5, bias=False),
            nn.Linear(2, 4, bias=False),
            nn.LayerNorm(3),
        )
        tied = nn.Linear(3, 7, bias=False)
        self.embed, self.head = (tied, None) if stage == 0 else (None, tied)


@fixture
def megatron(block):
    rank = dist.get_rank()
    stage_group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "tensor"))[
        "tensor"
    ].get_group()
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("all", "alone"))["alone"].get_group()
    model = MegatronLike(rank // 2)
    for name, p in model.named_parameters():
        owner = {"column": rank, "expert": 4 + rank, "norm": 8 + rank // 2}.get(
            name.partition(".")[0], 16
        )
        p.main_grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(owner))
    shapes = {"column": (5, 3), "expert": (4, 2), "norm": (3,)}
    draw = lambda owner, shape: torch.randn(shape, generator=torch.Generator().manual_seed(owner))  # noqa: E731
    parts = [draw(r, shapes["column"]) for r in range(4)] + [
        draw(4 + r, shapes["expert"]) for r in range(4)
    ]
    parts += [draw(8 + s, shapes["norm"]) for s in range(2) for _ in ("weight", "bias")] + [
        draw(16, (7, 3))
    ]
    wanted = total_norm(parts)
    names = {
        "model": model,
        "stage_group": stage_group,
        "data_group": alone,
        "expert_data_group": alone,
    }
    block.run(names)
    report = names["clipper"].measure()
    near(report.total_norm, wanted)
    return float(report.total_norm).hex()


@fixture
def megatron_optimizer(block):
    from integrations import megatron_cases as cases

    with cases.megatron(gloo=True, tensor_model_parallel_size=2):
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        x, y = cases.data("fp32")
        grads, norm = cases.gradients(lambda p, x, _: cases.dense(p, x), cases.FULL, x, y * 3)
        assert norm > 1, "vacuous"
        config = cases.config_of("fp32", tensor_model_parallel_size=2)
        model = cases.fill(cases.tensor_parallel_model(config), shapes=cases.FULL)
        names = {
            "OptimizerConfig": OptimizerConfig,
            "get_megatron_optimizer": get_megatron_optimizer,
            "model": cases.in_ddp(model, config, distributed=False),
            "train_to_the_step": lambda model, _: cases.backward(
                model, cases.my_rows(x), cases.my_rows(y * 3)
            ),
        }
        block.run(names)
        assert names["update_successful"]
        near(names["grad_norm"], norm)
        wanted = {n: cases.part_of(n, g) / norm for n, g in grads.items()}
        off, count = cases.difference(names["optimizer"], names["model"], wanted)
        assert count and off < 1e-5
        return float(names["grad_norm"]).hex()


@fixture
def keras_clipnorm(block):
    model = DistributedDataParallel(net())
    before = whole(model.parameters())
    block.run(
        {"model": model, "loss_of": loss_of, "optimizer": torch.optim.SGD(model.parameters(), 1.0)}
    )
    norms = [float(g.norm()) for g in gradients().values()]
    assert max(norms) > 1, "vacuous"
    for b, a, norm in zip(before, whole(model.parameters()), norms, strict=True):
        near((b - a).norm(), min(1.0, norm))


@fixture
def keras_clipvalue(block):
    model = DistributedDataParallel(net())
    before = whole(model.parameters())
    block.run(
        {"model": model, "loss_of": loss_of, "optimizer": torch.optim.SGD(model.parameters(), 1.0)}
    )
    grads = gradients().values()
    assert max(float(g.abs().max()) for g in grads) > 0.5, "vacuous"
    for b, a, g in zip(before, whole(model.parameters()), grads, strict=True):
        assert torch.allclose(b - a, g.clamp(-0.5, 0.5), atol=1e-6)


# Pipelines: ranks 0 and 1 are the first stage, 2 and 3 the second; 0 and 2, 1 and 3 are pipelines


class First(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Linear(5, 6, bias=False), nn.Linear(6, 6)

    def forward(self, x):
        return torch.tanh(self.body(self.embed(x)))


class Last(nn.Module):
    """`body` is another parameter than the first stage's, under one name."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(5, 6, bias=False)

    def forward(self, x):
        return torch.tanh(self.body(x)) @ self.head.weight


def pipeline_loss(out, target):
    return (out - target).square().mean()


def stages_of(tied):
    torch.manual_seed(1)
    first, last = First(), Last()
    if tied:
        with torch.no_grad():
            last.head.weight.copy_(first.embed.weight)
    return first, last


def whole_pipeline(tied):
    """Gradients in one process; of a tied pair the sum, once."""
    source = torch.Generator().manual_seed(7)
    x, y = torch.randn(8, 5, generator=source) * 3, torch.randn(8, 5, generator=source) * 9
    first, last = (stage.double() for stage in stages_of(tied))
    pipeline_loss(last(first(x.double())), y.double()).backward()
    embed, head = first.embed.weight, last.head.weight
    own = [
        p.grad
        for stage in (first, last)
        for p in stage.parameters()
        if p is not embed and p is not head
    ]
    return x, y, [*own, embed.grad + head.grad] if tied else [*own, embed.grad, head.grad]


def pipelined(block, tied=False, ddp=True):
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipe", "data"))
    index, data = rank // 2, grid["data"].get_group()
    module = stages_of(tied)[index]
    if ddp:
        module = DistributedDataParallel(module, process_group=data)
    stage = PipelineStage(module, index, 2, torch.device("cpu"), group=grid["pipe"].get_group())
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=pipeline_loss)
    x, y, grads = whole_pipeline(tied)
    half = slice(rank % 2 * 4, rank % 2 * 4 + 4)
    params = list(module.parameters())
    names = {
        "stages": [module], "schedule": schedule, "optimizer": torch.optim.SGD(params, 1.0),
        "inputs": (x[half],) if index == 0 else (), "targets": {"target": y[half]} if index == 1 else {}, "stage_group": data,
        "tied_group": grid["pipe"].get_group(), "tied": next(p for n, p in module.named_parameters() if "embed" in n or "head" in n),
    }  # fmt: skip
    before = whole(params)
    block.run(names)
    if "report" not in names:  # the block only builds the clipper
        schedule.step(*names["inputs"], **names["targets"])
        for p in params:
            dist.all_reduce(p.grad, group=data)
            p.grad /= 2
        names["report"] = names["clipper"].step(names["optimizer"])
    report, norm = names["report"], total_norm(grads)
    assert norm > 1, "vacuous"
    near(report.total_norm, norm)
    # the step of the whole model: each stage is on two ranks, a tied pair on four
    moved = [b - a for b, a in zip(before, whole(params), strict=True)]
    holders = [
        4 if tied and ("embed" in n or "head" in n) else 2 for n, _ in module.named_parameters()
    ]
    square = torch.tensor(
        [sum(float(m.norm()) ** 2 / h for m, h in zip(moved, holders, strict=True))],
        dtype=torch.float64,
    )
    dist.all_reduce(square)
    near(square.sqrt(), 1.0)
    return float(report.total_norm).hex()


@fixture
def pipeline(block):
    return pipelined(block)


@fixture
def pipeline_plain_stages(block):
    return pipelined(block, ddp=False)


@fixture
def pipeline_tied(block):
    return pipelined(block, tied=True)


def undeclared_stages(block):
    """The same without what the page says has to be said."""
    try:
        pipelined(
            block._replace(code=block.code.replace(', replicated_over={"*": stage_group}', "")),
            ddp=False,
        )
    except distclip.AgreementError as error:
        return str(error)
    return ""


# Context parallelism: ranks 0 and 1 hold the two parts of the first sequence, 2 and 3 those of the
# second


class Attention(nn.Module):
    """Over keys and values that are gathered from the context ranks."""

    def __init__(self, group=None):
        super().__init__()
        torch.manual_seed(2)
        self.qkv, self.out, self.group = nn.Linear(4, 12), nn.Linear(4, 4), group

    def forward(self, x):  # [tokens of this rank, 4]
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if self.group is not None:
            k, v = (all_gather_single_autograd(t.contiguous(), 0, self.group) for t in (k, v))
        return self.out(torch.softmax(q @ k.T / 2, -1) @ v)


def sequences():
    source = torch.Generator().manual_seed(9)
    return torch.randn(2, 6, 4, generator=source) * 3, torch.randn(2, 6, 4, generator=source) * 9


def in_context(block):
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    x, y = (t[rank // 2, rank % 2 * 3 : rank % 2 * 3 + 3] for t in sequences())
    oracle = Attention().double()
    sum(
        (oracle(a.double()) - b.double()).square().mean() for a, b in zip(*sequences(), strict=True)
    ).div(2).backward()
    norm = total_norm([p.grad for p in oracle.parameters()])
    model = Attention(grid["context"].get_group())
    names = {
        "model": model, "mesh": grid,
        "data_group": grid["data"].get_group(), "data_context_group": dist.group.WORLD, "ranks": 4, "tokens": 12 * 4,
        "loss_of": lambda m: (m(x) - y).square().mean(), "summed_loss_of": lambda m: (m(x) - y).square().sum(),
        "optimizer": torch.optim.SGD(model.parameters(), 1.0),
    }  # fmt: skip
    if "context_tokens" in block.mark:
        names["model"] = DistributedDataParallel(model)
        names["clipper"] = distclip.GradClipper(names["model"], max_norm=1.0)
    before = whole(model.parameters())
    block.run(names)
    assert norm > 1, "vacuous"
    near(names["report"].total_norm, norm)
    near(length(before, whole(model.parameters())), 1.0)
    return float(names["report"].total_norm).hex()


for name in ("context_fsdp2", "context_ddp", "context_forgotten", "context_tokens"):
    FIXTURES[name] = in_context
ERRORS["context_forgotten"] = distclip.AgreementError


# Replica groups: ranks 0 and 1, ranks 2 and 3


def replica_groups(story):
    """The page's blocks in order: a step of both, one of the first group alone, the second is back,
    one group of all four."""
    rank = dist.get_rank()
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "inside"))
    inside, both = grid["inside"].get_group(), grid["replica"].get_group()
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("all", "alone"))["alone"].get_group()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def average(model, quorum):
        for p in model.parameters():
            for group in (inside, quorum):
                dist.all_reduce(p.grad, group=group)
                p.grad /= dist.get_world_size(group)

    def healed(model):
        for layer in (model[0], model[2]):
            for name, p in list(layer.named_parameters()):
                dist.broadcast(p.data, group=both, group_src=0)
                if rank >= 2:  # the group that was away has new parameters
                    setattr(layer, name, nn.Parameter(p.data.clone()))
        optimizer.param_groups[0]["params"] = list(model.parameters())

    def norm_now(rows):
        """Of the model as it is, over these rows, in one process."""
        copy, (x, y) = net().double(), batch()
        copy.load_state_dict(model.state_dict())
        (copy(x[rows].double()) - y[rows].double()).square().mean().backward()
        norm = total_norm([p.grad for p in copy.parameters()])
        assert norm > 1, "vacuous"
        return norm

    names = {
        "model": model,
        "optimizer": optimizer,
        "loss_of": loss_of,
        "average": average,
        "healed": healed,
    }
    names |= {"replica_group": inside, "new_replica_group": dist.group.WORLD, "quorum": both}
    first, change, other = story
    told = [norm_now(slice(None))]
    first.run(names)
    near(names["report"].total_norm, told[0])

    def step(quorum, rows):
        optimizer.zero_grad()
        wanted = norm_now(rows)
        loss_of(model).backward()
        average(model, quorum)
        report = names["clipper"].step(optimizer)
        near(report.total_norm, wanted)
        return float(report.total_norm).hex()

    if rank < 2:  # the others are gone
        step(alone, [0, 1, 4, 5])  # the rows of ranks 0 and 1
    state = [names["clipper"].state_dict()]
    dist.broadcast_object_list(state, group=both, group_src=0)
    assert rank < 2 or int(names["clipper"].state_dict()["step"]) == 1
    names["state"] = state[0]
    change.run(names)
    bits = [step(both, slice(None))]
    other.run(names)
    bits.append(step(both, slice(None)))
    assert int(names["clipper"].state_dict()["step"]) == 4
    return bits
