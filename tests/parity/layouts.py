"""Every layout on four ranks. Gradients are whole numbers drawn from the parameter's name, so every
layout must hold the same ones.

`Pull`'s loss is the inner product of each parameter with its drawn gradient, times a factor of the
rank whose mean over the ranks is 1: after the averaging of data parallelism the gradient is the
drawn one, exactly.
"""

import warnings
from dataclasses import dataclass, field
from functools import cache, partial
from zlib import crc32

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, ShardingStrategy
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP1
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from distclip.testing import fully_shard
from parity.oracle import NORMS, total_norm

LAYOUTS = {}
SHAPES = {"a": (16, 4), "b": (7,), "c": (8, 8)}


@dataclass
class Case:
    params: object
    want: list  # the whole model's gradients
    options: dict = field(default_factory=dict)
    tensors: list | None = None  # this rank's parameters, where `params` does not tell
    built: dict | None = None  # p -> clipper, where it must be built before the forward pass

    def parameters(self):
        if self.tensors is not None:
            return self.tensors
        if isinstance(self.params, nn.Module):
            return list(self.params.parameters())
        return [
            p for m in self.params for p in (m.parameters() if isinstance(m, nn.Module) else [m[1]])
        ]


def layout(build, name=None):
    LAYOUTS[name or build.__name__] = build
    return build


@cache
def mesh(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])


def twins():
    """Ranks 0 and 1, or 2 and 3."""
    return mesh(2, 2)["inner"].get_group()


def drawn(name, *shape):
    return torch.randint(
        -8, 9, shape, generator=torch.Generator().manual_seed(crc32(name.encode()))
    ).float()


def factor():
    """1, 3, 5, 7 quarters: 1 on average."""
    return torch.tensor((2 * dist.get_rank() + 1) / 4)


class Pull(nn.Module):
    """A leaf with parameters of the given shapes, and the drawn gradients."""

    def __init__(self, prefix="", shapes=SHAPES):
        super().__init__()
        self.pulls = {}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))
            self.pulls[name] = drawn(f"{prefix}{name}", *shape)

    def forward(self, x):
        return sum((getattr(self, name) * pull).sum() * x for name, pull in self.pulls.items())


class Pair(nn.Module):
    """Two leaves: nested units."""

    def __init__(self, shapes=SHAPES):
        super().__init__()
        self.first, self.second = Pull("first.", shapes), Pull("second.", shapes)

    def forward(self, x):
        return self.first(x) + self.second(x)


def pair_grads(shapes=SHAPES):
    return [
        drawn(f"{half}.{name}", *shape)
        for half in ("first", "second")
        for name, shape in shapes.items()
    ]


def given(name, *shape, on=None, place=None, dtype=torch.float32):
    """(name, parameter with the drawn gradient), plain or placed on a mesh."""
    grad, zero = drawn(name, *shape).to(dtype), torch.zeros(shape, dtype=dtype)
    if on is not None:
        grad, zero = (distribute_tensor(t, on, place, src_data_rank=None) for t in (grad, zero))
    param = nn.Parameter(zero)
    param.grad = grad
    return name, param


def trained(model):
    model(factor()).backward()
    return model


# Data parallel


@layout
def single_process_in_each_rank():
    model = Pair()
    model(torch.tensor(1.0)).backward()
    return Case(model, pair_grads())


@layout
def ddp():
    return Case(trained(DDP(Pair())), pair_grads())


@layout
def ddp_inside_a_module():
    model = nn.ModuleDict({"part": DDP(Pair())})
    trained(model["part"])
    return Case(model, pair_grads())


@layout
def composable_replicate():
    return Case(trained(replicate(Pair())), pair_grads())


@layout
def ddp_frozen():
    model = Pair()
    model.first.requires_grad_(False)
    return Case(trained(DDP(model)), pair_grads()[3:])


@layout
def ddp_tied():
    model = Pair()
    model.second.a = model.first.a
    model.second.pulls["a"] = torch.zeros(16, 4)
    return Case(trained(DDP(model)), [g for i, g in enumerate(pair_grads()) if i != 3])


def fsdp1(strategy, use_orig_params):
    over = mesh(2, 2) if "HYBRID" in strategy.name else mesh(4)
    wrap = partial(
        FSDP1,
        sharding_strategy=strategy,
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        device_mesh=over,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NO_SHARD is deprecated, and still used
        model = Pair()
        model.first = wrap(model.first)
        return Case(trained(wrap(model)), pair_grads())


for _strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"):
    for _orig in (True, False):
        layout(
            partial(fsdp1, ShardingStrategy[_strategy], _orig),
            f"fsdp1_{_strategy.lower()}_{'orig' if _orig else 'flat'}",
        )


def fsdp2(shapes, *over, **policy):
    model = Pair(shapes)
    fully_shard(model.first, mesh=mesh(*over), **policy)
    return Case(trained(fully_shard(model, mesh=mesh(*over), **policy)), pair_grads(shapes))


layout(partial(fsdp2, {"a": (8, 4), "b": (4,)}, 4), "fsdp2_even")
layout(partial(fsdp2, {"a": (7, 4), "b": (5,)}, 4), "fsdp2_uneven")
layout(partial(fsdp2, {"a": (3, 4), "b": (1,)}, 4), "fsdp2_empty_shards")
layout(partial(fsdp2, {"a": (7, 4), "b": (5,)}, 2, 2), "hsdp_2x2")
layout(
    partial(fsdp2, {"a": (7, 4), "b": (5,)}, 4, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "fsdp2_cpu_offload",
)


# Tensor parallel


class Net(nn.Module):
    """Whole-number weights: gradients are exact."""

    def __init__(self, norm=False):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8) if norm else nn.Identity()
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(drawn(name, *p.shape).sign())

    def forward(self, x):
        return self.norm(self.down(self.up(x).relu()))


def gathered(model):
    """The whole gradients as they are held, float64; a collective of the test, not of distclip."""
    return [
        (g.full_tensor() if hasattr(g, "full_tensor") else g).double()
        for g in (p.grad for p in model.parameters())
    ]


def tp_net(on, norm=False):
    return parallelize_module(Net(norm), on, {"up": ColwiseParallel(), "down": RowwiseParallel()})


@layout
def tp_colwise_rowwise():
    model = tp_net(mesh(4))
    model(drawn("x", 3, 8)).square().sum().backward()
    return Case(model, gathered(model))


@layout
def tp_sequence_parallel():
    plan = {
        "up": ColwiseParallel(input_layouts=Shard(0)),
        "down": RowwiseParallel(output_layouts=Shard(0)),
        "norm": SequenceParallel(sequence_dim=0),
    }
    model = parallelize_module(Net(norm=True), mesh(4), plan)
    y = model(drawn(f"x{dist.get_rank()}", 2, 8))
    y = y.to_local() if hasattr(y, "to_local") else y
    (y * drawn("pull", 2, 8)).sum().backward()
    for p in model.norm.parameters():
        p.grad = p.grad.redistribute(placements=p.placements)
    return Case(model, gathered(model))


@layout
def tp_fsdp2():
    """The norm is in no tensor-parallel plan: its DTensors lie on the data-parallel meshes alone, a
    copy on each."""
    model = fully_shard(tp_net(mesh(2, 2)["inner"], norm=True), mesh=mesh(2, 2)["outer"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of FSDP2, about the view that row-parallel layers return
        model(drawn(f"x{dist.get_rank() // 2}", 3, 8)).square().sum().backward()
    return Case(model, gathered(model))


@layout
def tp_inside_ddp():
    """torch hides these parameters from the first forward on: the clippers are built right after
    wrapping."""
    clean, x = Net(norm=True), [drawn(f"x{i}", 3, 8) for i in range(2)]
    (sum(clean(part).square().sum() for part in x) / 2).backward()
    want = [p.grad.double() for p in clean.parameters()]
    model = DDP(tp_net(mesh(2, 2)["inner"], norm=True), device_mesh=mesh(2, 2)["outer"])
    params = list(model.parameters())
    built = {p: distclip.GradClipper(model, total_norm(want, p) / 2, norm_type=p) for p in NORMS}
    model(x[dist.get_rank() // 2]).square().sum().backward()
    return Case(params, want, tensors=params, built=built)


class Adapted(nn.Module):
    """A frozen linear layer, and two small ones beside it (LoRA)."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 16).requires_grad_(False)
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 16, bias=False)
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(
                    torch.randn(
                        p.shape, generator=torch.Generator().manual_seed(crc32(name.encode()))
                    )
                )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@layout
def lora_beside_a_frozen_tensor_parallel_base():
    """Data-parallel meshes of one rank each: only the frozen base says that the four ranks work on
    one model."""
    clean, x = Adapted(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    clean(x).square().sum().backward()
    on = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "tp"))
    model = Adapted()
    parallelize_module(model.base, on["tp"], ColwiseParallel(output_layouts=Replicate()))
    fully_shard(model, mesh=on["dp"])
    model(x).square().sum().backward()
    for param in model.base.parameters():
        # fully_shard of torch 2.8 leaves gradients on frozen parameters that share a unit with
        # trainable ones
        param.grad = None
    return Case(model, [p.grad.double() for p in clean.parameters() if p.grad is not None])


@layout
def tp_under_a_declared_group():
    on = mesh(2, 2)["inner"]
    params = [
        given("col", 6, 4, on=on, place=[Shard(0)]),
        given("norm", 5, on=on, place=[Replicate()]),
    ]
    return Case(
        params,
        [drawn("col", 6, 4), drawn("norm", 5)],
        {"replicated_over": {"*": mesh(2, 2)["outer"].get_group()}},
    )


@layout
def context_parallel():
    """Parameters are copies over the data and the sequence ranks alike; gradients were reduced over
    both."""
    return Case(
        [given("w", 6, 4), given("b", 5)],
        [drawn("w", 6, 4), drawn("b", 5)],
        {"replicated_over": {"*": dist.group.WORLD}},
    )


# Pipeline and expert parallel


@layout
def pipeline_of_two_stages_with_a_tied_embedding():
    stage = dist.get_rank() // 2
    params = [given(f"{stage}.body", 4, 4)]
    params = [
        ("body", params[0][1]),
        (("emb.weight", "head.weight")[stage], given("tied", 7, 4)[1]),
    ]
    options = {"replicated_over": {"*": twins()}, "shared": (("emb.weight", "head.weight"),)}
    return Case(
        params, [drawn("0.body", 4, 4), drawn("1.body", 4, 4), drawn("tied", 7, 4)], options
    )


@layout
def pipeline_of_stages_whose_parameters_have_equal_names():
    """Sharded within each stage; no mesh joins the stages, so that equal names are different
    parameters."""
    stage = dist.get_rank() // 2
    placed = {"on": mesh(2, 2)["inner"], "place": [Shard(0)]}
    params = [
        (n, given(f"{stage}.{n}", *shape, **placed)[1])
        for n, shape in (("body", (6, 4)), ("norm", (5,)))
    ]
    return Case(
        params,
        [
            drawn(f"{s}.{n}", *shape)
            for s in (0, 1)
            for n, shape in (("body", (6, 4)), ("norm", (5,)))
        ],
    )


@layout
def pipeline_of_several_stages_per_rank():
    stages = [nn.Linear(3, 5) for _ in range(4)]
    for i, stage in enumerate(stages):
        for name, p in stage.named_parameters():
            p.grad = drawn(f"{i}.{name}", *p.shape)
    want = [p.grad.clone() for stage in stages for p in stage.parameters()]
    return Case(stages[dist.get_rank() // 2 :: 2], want, {"replicated_over": {"*": twins()}})


@layout
def experts_on_a_mesh_of_their_own():
    grid = mesh(2, 2)
    params = [given("dense", 6, 4, on=mesh(4), place=[Shard(0)]), given("gate", 5)]
    params += [
        given("norm", 9, on=grid, place=[Replicate()] * 2),
        given("experts", 4, 6, on=grid, place=[Shard(1), Shard(0)]),
    ]
    return Case(
        params, [drawn("dense", 6, 4), drawn("gate", 5), drawn("norm", 9), drawn("experts", 4, 6)]
    )


class LocalPull(Pull):
    """Of parameters that are sharded already: each rank pulls at its own part."""

    def forward(self, x):
        return sum(
            (getattr(self, name).to_local() * pull).sum() * x for name, pull in self.pulls.items()
        )


def expert_parallel_beside_fsdp2(num_experts):
    """Experts sharded over their first dimension, each part over the ranks of its data mesh; all
    else over the four ranks."""
    grid, shapes = mesh(2, 2), {"router": (4, 6), "experts": (num_experts, 6, 3), "out": (5,)}
    parts = {
        name: (LocalPull if name == "experts" else Pull)(f"{name}.", {"w": shape})
        for name, shape in shapes.items()
    }
    placed = distribute_tensor(
        parts["experts"].w.detach(), grid["inner"], [Shard(0)], src_data_rank=None
    )
    parts["experts"].w = nn.Parameter(placed)
    parts["experts"].pulls["w"] = (
        parts["experts"].pulls["w"].chunk(2)[grid["inner"].get_local_rank()]
    )
    for name, part in parts.items():
        fully_shard(part, mesh=grid["outer"] if name == "experts" else mesh(4))
        part(torch.tensor(1.0)).backward()
    outer, inner = grid.get_coordinate()
    there = torch.arange(num_experts).chunk(2)[inner].chunk(2)
    held = len(there[outer]) if outer < len(there) else 0
    assert len(parts["experts"].w.to_local()) == held, "not the shards that are meant"
    return Case(
        nn.ModuleDict(parts), [drawn(f"{name}.w", *shape) for name, shape in shapes.items()]
    )


layout(partial(expert_parallel_beside_fsdp2, 4), "expert_parallel_beside_fsdp2")
# three on each expert rank, so two and one on the ranks of its data mesh
layout(partial(expert_parallel_beside_fsdp2, 6), "experts_uneven_over_data_ranks")
# two and one; one rank holds none
layout(partial(expert_parallel_beside_fsdp2, 3), "experts_uneven_over_expert_ranks")


@layout
def experts_of_one_name_on_data_meshes_of_their_own():
    """Different experts under one name, each sharded over a data mesh that does not hold the
    others: only a declaration tells."""
    grid, here = mesh(2, 2), dist.get_rank() % 2
    params = [given("dense", 6, 4, on=mesh(4), place=[Shard(0)])]
    params.append(("expert", given(f"expert{here}", 4, 3, on=grid["outer"], place=[Shard(0)])[1]))
    want = [drawn("dense", 6, 4), drawn("expert0", 4, 3), drawn("expert1", 4, 3)]
    return Case(params, want, {"replicated_over": {"expert": distclip.PRIVATE}})


@layout
def experts_private_to_their_ranks():
    params = [given("gate", 5), ("expert", given(f"expert{dist.get_rank()}", 4, 3)[1])]
    want = [drawn("gate", 5), *(drawn(f"expert{r}", 4, 3) for r in range(4))]
    return Case(params, want, {"replicated_over": {"expert": distclip.PRIVATE}})


@layout
def expert_without_tokens():
    params = [given("gate", 5), given(f"expert{dist.get_rank()}", 4, 3)]
    if dist.get_rank() == 1:
        params[1][1].grad = None
    return Case(params, [drawn("gate", 5), *(drawn(f"expert{r}", 4, 3) for r in (0, 2, 3))])


@layout
def rank_without_any_gradient():
    params = [given(f"stage{dist.get_rank()}", 4, 3)]
    if dist.get_rank() == 0:
        params[0][1].grad = None
    return Case(params, [drawn(f"stage{r}", 4, 3) for r in (1, 2, 3)])


# Kinds of gradient


@layout
def sparse_embedding():
    emb = nn.Parameter(torch.zeros(10, 3))
    emb.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 4, 4, 9]]), drawn("rows", 4, 3), (10, 3), check_invariants=True
    )
    return Case([("emb", emb), given("head", 4)], [emb.grad.to_dense(), drawn("head", 4)])


@layout
def mixed_dtypes():
    kinds = {"half": torch.float16, "brain": torch.bfloat16, "single": torch.float32}
    params = [given(n, 6, 5, dtype=d) for n, d in kinds.items()] + [
        given(f"{n}.sharded", 6, 5, dtype=d, on=mesh(4), place=[Shard(0)]) for n, d in kinds.items()
    ]
    return Case(params, [drawn(n, 6, 5) for n, _ in params])


@layout
def gradients_elsewhere():
    name, param = given("w", 6, 4)
    param.main_grad, param.grad = param.grad, None
    return Case([(name, param)], [drawn("w", 6, 4)], {"grad_of": lambda p: p.main_grad})
