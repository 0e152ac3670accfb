"""Jobs of Megatron-Core on gloo ranks: its own layers, DDP and optimizers, each stepped once with
its clipping and once with distclip's."""

import math
import warnings
import zlib
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.overrides import TorchFunctionMode

import distclip
import distclip.testing
from ended_groups import ended_groups

WIDTH, INNER, MAX_NORM = 6, 8, 0.05


class _CudaIsCpu(TorchFunctionMode):
    """Megatron asks for CUDA tensors by name. Here they lie in this machine's memory, and say that
    they are CUDA's; nothing else is changed, and no collective."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        out = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return out.replace("torch.", "torch.cuda.")
        return out


@contextmanager
def on_cpu():
    with (
        _CudaIsCpu(),
        patch.object(torch.cuda, "current_device", lambda: "cpu"),
        patch.object(torch.cuda, "current_stream", lambda: None),
    ):
        yield


def device():
    return "cpu" if dist.get_backend() == "gloo" else "cuda"


@contextmanager
def megatron(gloo=False, **sizes):
    """Within this context Megatron's process groups have these sizes; where the ranks meet over
    gloo it runs on the CPU. `gloo`: with Megatron's further groups over gloo."""
    with warnings.catch_warnings(), on_cpu() if device() == "cpu" else nullcontext():
        warnings.simplefilter("ignore")  # of the import: neither Apex nor Transformer Engine
        from megatron.core import parallel_state

        with ended_groups():  # destroy_model_parallel() forgets them only
            parallel_state.initialize_model_parallel(create_gloo_process_groups=gloo, **sizes)
            try:
                yield parallel_state
            finally:
                parallel_state.destroy_model_parallel()


def drawn(name, shape):
    source = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=source) * 0.7


def config_of(low, **more):
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1,
        hidden_size=WIDTH,
        num_attention_heads=2,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bf16=low == "bf16",
        fp16=low == "fp16",
        params_dtype={"bf16": torch.bfloat16, "fp16": torch.float16}.get(low, torch.float32),
        **more,
    )


def in_ddp(model, config, distributed):
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    return DistributedDataParallel(
        config,
        DistributedDataParallelConfig(
            use_distributed_optimizer=distributed, grad_reduce_in_fp32=True, bucket_size=40
        ),
        model,
    )


def optimizer_of(model, config, low, distributed, clip_grad=0.0, **more):
    """Megatron's DDP around the model, and its optimizer."""
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    wrapped = in_ddp(model, config, distributed)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            bf16=low == "bf16",
            fp16=low == "fp16",
            use_distributed_optimizer=distributed,
            clip_grad=clip_grad,
            params_dtype=config.params_dtype,
            initial_loss_scale=16.0,
            hysteresis=1,
            **more,
        ),
        [wrapped],
        use_gloo_process_groups=False,
    )
    return wrapped, optimizer


def stepped_grads(optimizer, model):
    """(the model's name, range or None, gradient as it was stepped) of what this rank steps."""
    names = {id(p): n.removeprefix("module.") for n, p in model.named_parameters()}
    out = []
    for sub in getattr(optimizer, "chained_optimizers", [optimizer]):
        if hasattr(sub, "shard_fp32_groups"):
            pairs = [
                *zip(sub.model_float16_groups, sub.shard_fp32_from_float16_groups),
                *zip(sub.model_fp32_groups, sub.shard_fp32_groups),
            ]
        elif hasattr(sub, "float16_groups"):
            pairs = [*zip(sub.float16_groups, sub.fp32_from_float16_groups)]
        else:
            pairs = [(group["params"],) * 2 for group in sub.optimizer.param_groups]
        for params, stepped in pairs:
            for param, part in zip(params, stepped, strict=True):
                held = None
                if hasattr(sub, "shard_fp32_groups"):
                    found = sub._get_model_param_range_map(param)["param"]
                    held = slice(found.start, found.end)
                out.append((names[id(param)], held, part.grad.double().flatten()))
    return out


def difference(optimizer, model, wanted):
    """The largest difference of gradients as stepped from `wanted`, [name] → this rank's part of
    the whole, relative to the largest wanted; and how many elements were compared."""
    seen = stepped_grads(optimizer, model)
    largest = max(float(g.abs().max()) for g in wanted.values())
    worst, count = 0.0, 0
    for name, held, grad in seen:
        part = wanted[name].flatten()
        part = part if held is None else part[held]
        worst = max(worst, float((grad - part).abs().max()) if len(part) else 0.0)
        count += len(part)
    return worst / largest, count


def backward(wrapped, x, y, scale=1.0):
    wrapped.zero_grad_buffer()
    ((wrapped(x).float() - y).square().mean() * scale).backward()
    wrapped.finish_grad_sync()


def norm_of(grads):
    return math.sqrt(sum(float(g.norm()) ** 2 for g in grads))


def attached(optimizer, wrapped, **options):
    from distclip.integrations.megatron import attach

    return attach(optimizer, [wrapped], MAX_NORM, **options)


# ----------------------------------------------------------------------------- tensor parallelism

FULL = {
    "column.weight": (INNER, WIDTH),
    "column.bias": (INNER,),
    "row.weight": (WIDTH, INNER),
    "row.bias": (WIDTH,),
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
}


def tensor_parallel_model(config):
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            common = {"config": config, "init_method": lambda w: w, "bias": True}
            self.column = ColumnParallelLinear(WIDTH, INNER, gather_output=False, **common)
            self.row = RowParallelLinear(
                INNER, WIDTH, input_is_parallel=True, skip_bias_add=False, **common
            )
            self.norm = nn.LayerNorm(WIDTH, dtype=config.params_dtype)

        def forward(self, x):
            hidden, _ = self.column(self.norm(x))
            return self.row(torch.tanh(hidden))[0]

    model = Layers()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(part_of(name, drawn(name, FULL[name])))
    return model


def part_of(name, whole):
    """This tensor-parallel rank's part."""
    from megatron.core import parallel_state as state

    rank, size = (
        state.get_tensor_model_parallel_rank(),
        state.get_tensor_model_parallel_world_size(),
    )
    if name.startswith("column"):
        return whole.chunk(size, 0)[rank]
    return whole.chunk(size, 1)[rank] if name == "row.weight" else whole


def dense(p, x):
    x = torch.nn.functional.layer_norm(x, (WIDTH,), p["norm.weight"], p["norm.bias"])
    hidden = torch.tanh(x @ p["column.weight"].T + p["column.bias"])
    return hidden @ p["row.weight"].T + p["row.bias"]


def data(low):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(low, torch.float32)
    return (drawn(name, (8, WIDTH)).to(device(), dtype) for name in "xy")


def gradients(forward, shapes, x, y, parts=1):
    """In float64 and one process, of the mean of the parts' losses: by name, and their norm."""
    params = {n: rounded(n, s, x.dtype).requires_grad_() for n, s in shapes.items()}
    losses = [
        (forward(params, xs, part) - ys).square().mean()
        for part, (xs, ys) in enumerate(zip(x.double().chunk(parts), y.double().chunk(parts)))
    ]
    (sum(losses) / parts).backward()
    grads = {n: p.grad.cpu() for n, p in params.items()}
    return grads, norm_of(grads.values())


def rounded(name, shape, dtype):
    return drawn(name, shape).to(device(), dtype).double()


def fill(model, whole_name=lambda name: name, shapes=None):
    with torch.no_grad():
        for name, param in model.named_parameters():
            shape = param.shape if shapes is None else shapes[name]
            param.copy_(part_of(name, drawn(whole_name(name), shape)))
    return model.to(device())


def my_rows(x):
    from megatron.core import parallel_state as state

    return x.chunk(state.get_data_parallel_world_size())[state.get_data_parallel_rank()]


def one_step(optimizer, wrapped, grads, coef, clipper):
    """What `step` answers, and how far the gradients are from `coef` times this rank's `grads`."""
    with distclip.testing.count_collectives() as seen:
        done, told, _ = optimizer.step()
    off, count = difference(optimizer, wrapped, {n: g * coef for n, g in grads.items()})
    out = {
        "done": bool(done),
        "norm": float(told),
        "off": off,
        "count": count,
        "reduces": sum("reduce" in name and "scatter" not in name for name in seen.names),
    }
    if clipper is not None:
        out["bits"] = float(clipper.last_report.total_norm).hex()
        out["copies"] = sorted({row.copies for row in clipper.plan.rows})
        out["pieces"] = [piece.name for piece in clipper.plan.pieces]
    return out


def tensor_parallel(low, distributed, size=2):
    """Over the other ranks data parallelism."""
    with megatron(tensor_model_parallel_size=size):
        x, y = data(low)
        grads, norm = gradients(lambda p, x, _: dense(p, x), FULL, x, y)
        out = {"norm": norm}
        for whose in ("own", "ours"):
            config = config_of(low, tensor_model_parallel_size=size)
            wrapped, optimizer = optimizer_of(
                fill(tensor_parallel_model(config), shapes=FULL),
                config,
                low,
                distributed,
                MAX_NORM if whose == "own" else 0.0,
            )
            clipper = attached(optimizer, wrapped) if whose == "ours" else None
            scale = float(optimizer.get_loss_scale())
            backward(wrapped, my_rows(x), my_rows(y), scale)
            parts = {n: part_of(n, g) for n, g in grads.items()}
            out[whose] = one_step(optimizer, wrapped, parts, MAX_NORM / norm, clipper)
        return out


def lost_mark():
    """A weight that is split over tensor-parallel ranks and not marked so."""
    with megatron(tensor_model_parallel_size=2):
        x, y = data("fp32")
        _, norm = gradients(lambda p, x, _: dense(p, x), FULL, x, y)
        out = {"norm": norm}
        config = config_of("fp32", tensor_model_parallel_size=2)
        for whose in ("own", "ours"):
            model = fill(tensor_parallel_model(config), shapes=FULL)
            model.column.weight.tensor_model_parallel = False
            wrapped, optimizer = optimizer_of(
                model, config, "fp32", True, MAX_NORM if whose == "own" else 0.0
            )
            if whose == "ours":
                attached(optimizer, wrapped)
            backward(wrapped, my_rows(x), my_rows(y))
            try:
                out[whose] = float(optimizer.step()[1])
            except distclip.AgreementError as error:
                out[whose] = str(error)
        return out


def norms_of_their_own(grouping):
    """Two ways of groups: Megatron's `grad_norm_group`, and every parameter by itself."""
    with megatron(tensor_model_parallel_size=2):
        x, y = data("fp32")
        grads, _ = gradients(lambda p, x, _: dense(p, x), FULL, x, y)
        config = config_of("fp32", tensor_model_parallel_size=2)
        from megatron.core.optimizer import optimizer as theirs

        out = {
            "by_name": {n: float(g.norm()) for n, g in grads.items()},
            "they_have_groups": hasattr(theirs, "SEPARATE_GRAD_NORM_GROUPS"),  # from 0.19 on
        }
        for whose in ("own", "ours"):
            model = fill(tensor_parallel_model(config), shapes=FULL)
            if grouping == "marks":
                model.norm.weight.grad_norm_group = model.norm.bias.grad_norm_group = "mtp"
            wrapped, optimizer = optimizer_of(
                model, config, "fp32", True, MAX_NORM if whose == "own" else 0.0
            )
            groups = None if grouping == "marks" else distclip.per_parameter()
            clipper = attached(optimizer, wrapped, groups=groups) if whose == "ours" else None
            backward(wrapped, my_rows(x), my_rows(y))
            _, told, _ = optimizer.step()
            stepped = stepped_grads(optimizer, wrapped)
            out[whose] = {
                "told": float(told),
                "others": {
                    n: float(v) for n, v in getattr(optimizer, "grad_norms_by_group", {}).items()
                },
                "marked": sum(float(g.norm()) ** 2 for n, _, g in stepped if "norm." in n),
            }
            if clipper is not None:
                report = clipper.last_report
                out[whose]["groups"] = dict(zip(report.groups, report.group_norms.tolist()))
        return out


# --------------------------------------------------------------------------------------- experts

EXPERT_SHAPES = {
    "into.weight": (WIDTH, WIDTH),
    "into.bias": (WIDTH,),
    **{
        f"expert.{e}.{n}": s
        for e in range(2)
        for n, s in (("weight", (WIDTH,) * 2), ("bias", (WIDTH,)))
    },
}


class Mixture(nn.Module):
    """Rows go to the expert that their rank has."""

    def __init__(self, dtype):
        super().__init__()
        self.into, self.expert = (nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(2))
        for param in self.expert.parameters():
            param.allreduce = False

    def forward(self, x):
        return self.expert(torch.tanh(self.into(x)))


def mixture(p, x, part):
    x = torch.tanh(x @ p["into.weight"].T + p["into.bias"])
    return x @ p[f"expert.{part % 2}.weight"].T + p[f"expert.{part % 2}.bias"]


def experts(low, distributed):
    """Expert parallel 2 × expert data parallel 2, as chained optimizers."""
    with megatron(expert_model_parallel_size=2) as state:
        x, y = data(low)
        grads, norm = gradients(mixture, EXPERT_SHAPES, x, y, parts=4)
        mine = state.get_expert_model_parallel_rank()
        local = {n.replace(f"expert.{mine}.", "expert."): g for n, g in grads.items()}
        out = {"norm": norm}
        for whose in ("own", "ours"):
            config = config_of(low, expert_model_parallel_size=2, num_moe_experts=2)
            model = fill(
                Mixture(config.params_dtype),
                lambda name: name.replace("expert.", f"expert.{mine}."),
            )
            wrapped, optimizer = optimizer_of(
                model, config, low, distributed, MAX_NORM if whose == "own" else 0.0
            )
            clipper = attached(optimizer, wrapped) if whose == "ours" else None

            scale = float(optimizer.get_loss_scale())
            backward(wrapped, my_rows(x), my_rows(y), scale)
            seen = one_step(optimizer, wrapped, local, MAX_NORM / norm, clipper)
            # now a gradient that is not finite, in one expert alone
            backward(wrapped, my_rows(x), my_rows(y), scale)
            if mine == 1:
                wrapped.module.expert.weight.main_grad.fill_(math.inf)
            before = [p.detach().clone() for p in wrapped.parameters()]
            subs = optimizer.chained_optimizers
            seen["bad_done"] = bool(optimizer.step()[0])
            seen["bad_moved"] = any(
                bool((b != p).any()) for b, p in zip(before, wrapped.parameters(), strict=True)
            )
            seen["scales"] = [float(sub.get_loss_scale()) for sub in subs]
            out[whose] = seen
        return out


# --------------------------------------------------------------------------------------- pipeline

TIED = "embedding.word_embeddings.weight"
STAGE_SHAPES = {TIED: (WIDTH, WIDTH), "first.weight": (WIDTH,) * 2, "second.weight": (WIDTH,) * 2}


class Stage(nn.Module):
    def __init__(self, number):
        super().__init__()
        layer, tied = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        if number == 0:
            self.embedding = nn.Module()
            self.embedding.word_embeddings = tied
            self.first = layer
        else:
            self.second, self.output_layer = layer, tied
            tied.weight.shared = True
        tied.weight.shared_embedding = True

    def forward(self, x):
        if hasattr(self, "embedding"):
            return torch.tanh(self.first(self.embedding.word_embeddings(x)))
        return self.output_layer(self.second(x))


def pipe(p, x, _):
    hidden = torch.tanh(x @ p[TIED].T @ p["first.weight"].T)
    return hidden @ p["second.weight"].T @ p[TIED].T


def pipeline(distributed):
    """Pipeline parallel 2 × data parallel 2, with an embedding tied over the stages."""
    with megatron(pipeline_model_parallel_size=2) as state:
        x, y = data("fp32")
        grads, norm = gradients(pipe, STAGE_SHAPES, x, y)
        grads["output_layer.weight"] = grads[TIED]
        stage = state.get_pipeline_model_parallel_rank()
        other = (dist.get_rank() + 2) % 4
        pairs = [dist.new_group([rank, rank + 2]) for rank in range(2)]
        out = {"norm": norm}
        for whose in ("own", "ours"):
            config = config_of("fp32", pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
            model = fill(Stage(stage), lambda n: TIED if n == "output_layer.weight" else n)
            wrapped, optimizer = optimizer_of(
                model, config, "fp32", distributed, MAX_NORM if whose == "own" else 0.0
            )
            clipper = attached(optimizer, wrapped) if whose == "ours" else None
            wrapped.zero_grad_buffer()
            if stage == 0:
                hidden = wrapped(my_rows(x))
                dist.send(hidden.detach(), other)
                dist.recv(upstream := torch.empty_like(hidden), other)
                hidden.backward(upstream)
            else:
                dist.recv(hidden := torch.empty_like(my_rows(x)), other)
                (wrapped(hidden.requires_grad_()) - my_rows(y)).square().mean().backward()
                dist.send(hidden.grad, other)
            wrapped.finish_grad_sync()
            tied = model.embedding.word_embeddings if stage == 0 else model.output_layer
            dist.all_reduce(tied.weight.main_grad, group=pairs[dist.get_rank() % 2])
            out[whose] = one_step(optimizer, wrapped, grads, MAX_NORM / norm, clipper)
        return out


def spikes():
    """fp16: a spike that the policy leaves out, and then the state in another clipper."""
    from distclip.integrations.megatron import attach, detach

    def policy():
        return distclip.SkipSpikes(distclip.FixedNorm(MAX_NORM), factor=20.0, warmup=2)

    with megatron(tensor_model_parallel_size=2):
        x, y = data("fp16")
        config = config_of("fp16", tensor_model_parallel_size=2)
        wrapped, optimizer = optimizer_of(
            fill(tensor_parallel_model(config), shapes=FULL), config, "fp16", True
        )
        clipper = attach(optimizer, wrapped, policy=policy())
        out = {"done": [], "moved": [], "told": [], "scales": []}
        for factor in (1.0, 1.0, 1.0, 100.0, 1.0):
            if len(out["done"]) == 3:  # the same goes on in another clipper
                state = clipper.state_dict()
                detach(optimizer)
                clipper = attach(optimizer, wrapped, policy=policy())
                clipper.load_state_dict(state)
            scale = float(optimizer.get_loss_scale())
            backward(wrapped, my_rows(x), my_rows(y), scale * factor)
            before = [p.detach().clone() for p in wrapped.parameters()]
            done, told, _ = optimizer.step()
            out["done"].append(bool(done))
            out["told"].append(float(told))
            out["moved"].append(
                any(bool((b != p).any()) for b, p in zip(before, wrapped.parameters(), strict=True))
            )
            out["scales"].append(float(optimizer.get_loss_scale()))
        return out


# ---------------------------------------------------------------------------- refusals, and the end


def refusals():
    from distclip.integrations.megatron import attach, detach

    with megatron(tensor_model_parallel_size=2) as state:
        config = config_of("fp32", tensor_model_parallel_size=2)
        wrapped, optimizer = optimizer_of(
            fill(tensor_parallel_model(config), shapes=FULL), config, "fp32", True, clip_grad=1.0
        )
        texts = []

        def tried(call, *args, **options):
            try:
                call(*args, **options)
                texts.append("")
            except ValueError as error:
                texts.append(str(error))

        tried(attach, optimizer, wrapped, 1.0)
        tried(attach, optimizer, wrapped, 1.0, fold="never")
        tried(attach, optimizer.chained_optimizers[0].optimizer, wrapped, 1.0)
        tried(attach, optimizer, nn.Linear(2, 2), 1.0, take_over=True)
        with patch.object(state, "model_parallel_is_initialized", lambda: False):
            tried(attach, optimizer, wrapped, 1.0, take_over=True)
        uneven = fill(tensor_parallel_model(config), shapes=FULL)
        if state.get_tensor_model_parallel_rank() == 1:
            uneven.more = nn.Parameter(torch.zeros(5))
        wrapped_too, optimizer_too = optimizer_of(uneven, config, "fp32", True)
        tried(attach, optimizer_too, wrapped_too, 1.0)
        features = []
        config_too = optimizer_too.chained_optimizers[0].config
        for name, value in (
            ("use_precision_aware_optimizer", True),
            ("optimizer_cpu_offload", True),
            ("optimizer_cuda_graph", True),
            ("grad_norm_skip_threshold", 5.0),
        ):
            if hasattr(config_too, name):  # the last two from 0.19 on
                with patch.object(config_too, name, value):
                    tried(attach, optimizer_too, wrapped_too, 1.0)
                features.append([name, texts.pop()])
        own_step = optimizer.step
        tried(attach, optimizer, wrapped, 1.0, take_over=True)
        tried(attach, optimizer, wrapped, 1.0)
        zero = optimizer.chained_optimizers[0].config.clip_grad
        detach(optimizer)
        tried(detach, optimizer)
        return {
            "texts": texts,
            "features": features,
            "detached": optimizer.step == own_step,
            "clip_grad": [zero, optimizer.chained_optimizers[0].config.clip_grad],
        }
