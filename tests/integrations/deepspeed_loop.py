"""A DeepSpeed loop with distclip's one line: `deepspeed_loop.py "STAGE DTYPE" ...` on every rank;
prints what each case found."""

import gc
import json
import math
import sys
import tempfile

import deepspeed
import torch
import torch.distributed as dist

import distclip
import distclip.testing
from deepspeed_setting import DTYPES, change, config_of, loss_scale, masters_of
from distclip.integrations.deepspeed import attach
from distclip.integrations.deepspeed_internals import adapter_for
from problem import HUGE, TINY, data, loss_of, net, off, oracle

STAGE, DTYPE, LOW = "", "", torch.float32  # of the engine that is tried now


def config(micro=1, scale=None, clipping=0.0, **more):
    return config_of(STAGE, DTYPE, micro, scale, clipping, **more)


def masters(engine):
    return masters_of(engine, STAGE)


def expected(x, y):
    """From the parameters and inputs as they are rounded."""
    grads, norm = oracle(net().to(LOW), x, y)
    return grads, float(norm)


def batch():
    return data(1, 4 * dist.get_world_size(), LOW)


def started(
    max_norm=None, micro=1, split=False, momentum=0.0, scale=None, by_param_group=False, **options
):
    model = net()
    params = (
        [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        if split
        else list(model.parameters())
    )
    optimizer = torch.optim.SGD(params, 1.0, momentum=momentum)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(micro, scale))
    if by_param_group:
        options["groups"] = distclip.per_param_group(engine.optimizer)
    return engine, attach(engine, max_norm, **options)


def train(engine, x, y, micro=1, factor=1.0):
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
    for xs, ys in zip(x[mine].chunk(micro), y[mine].chunk(micro)):
        engine.backward(loss_of(engine, xs, ys) * factor)
        engine.step()


def one_step(max_norm, micro=1, reference=None, **options):
    engine, clipper = started(max_norm, micro, **options)
    x, y = batch()
    before = masters(engine)
    with distclip.testing.count_collectives() as seen:
        train(engine, x, y, micro)
    after = masters(engine)
    moved = change(before, after)
    grads, norm = expected(x, y)
    report = clipper.last_report
    coef = min(1.0, max_norm / norm) if max_norm is not None else 1.0
    out = {
        "norm": norm,
        "norm_off": abs(float(report.total_norm) / norm - 1),
        "engine_norm": engine.get_global_grad_norm() == float(report.total_norm),
        "coef": float(report.coefs[0]),
        "off": off(after, before, {n: g * coef for n, g in grads.items()}),
        "bits": float(report.total_norm).hex(),
        "calls": report.step,
        "collectives": len(seen.names),
        "moved": max(float(m.abs().max()) for m in moved.values()),
    }
    # the same step without clipping, scaled: exact whatever the gradients were rounded to
    if reference is not None:
        out["scaled_off"] = off(
            after, before, {n: g * float(report.coefs[0]) for n, g in reference.items()}
        )
    return out, moved


def without_distclip():
    """How many collectives DeepSpeed's own clipping takes."""
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config(clipping=0.1)
    )
    x, y = batch()
    with distclip.testing.count_collectives() as seen:
        train(engine, x, y)
    return {"collectives": len(seen.names)}


def by_groups():
    """Each param group by a norm of its own."""
    engine, clipper = started(0.2, split=True, by_param_group=True)
    x, y = batch()
    before = masters(engine)
    train(engine, x, y)
    after = masters(engine)
    grads, _ = expected(x, y)
    norms = [
        math.sqrt(sum(float(g.norm()) ** 2 for n, g in grads.items() if n.startswith(part)))
        for part in ("0.", "2.")
    ]
    wanted = {
        n: g * min(1.0, 0.2 / norms[0 if n.startswith("0.") else 1]) for n, g in grads.items()
    }
    return {"groups": list(clipper.plan.groups), "off": off(after, before, wanted), "norms": norms}


def clamped():
    engine, _ = started(None, policy=distclip.FixedValue(0.03))
    x, y = batch()
    before = masters(engine)
    train(engine, x, y)
    moved = change(before, masters(engine))
    return {"largest": max(float(m.abs().max()) for m in moved.values())}


def by_patterns():
    """A part of the model alone, the rest exempt; and every parameter by its own norm."""
    x, y = batch()
    grads, _ = expected(x, y)
    out = {}
    for name, groups in {
        "part": distclip.by_name({"0.*": 0.1, "*": distclip.Exempt()}),
        "each": distclip.per_parameter(),
    }.items():
        engine, clipper = started(0.1, groups=groups)
        before = masters(engine)
        train(engine, x, y)
        after = masters(engine)
        own = {n: float(g.norm()) for n, g in grads.items()}
        first = math.hypot(own["0.weight"], own["0.bias"])
        coefs = {
            n: min(1.0, 0.1 / (own[n] if name == "each" else first))
            if name == "each" or n.startswith("0.")
            else 1.0
            for n in own
        }
        out[name] = {
            "off": off(after, before, {n: g * coefs[n] for n, g in grads.items()}),
            "norm_off": abs(
                float(clipper.last_report.total_norm)
                / (first if name == "part" else expected(x, y)[1])
                - 1
            ),
            "clips": max(coefs.values()) < 1 if name == "each" else first > 0.1,
        }
    return out


class Odd(torch.nn.Module):
    """Sizes that no number of ranks divides, and a layer that is never used."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.unused, self.b = (
            torch.nn.Linear(6, 7),
            torch.nn.Linear(3, 5),
            torch.nn.Linear(7, 3, bias=False),
        )
        self.gain = torch.nn.Parameter(torch.tensor([1.5]))

    def forward(self, x):
        return self.b(torch.tanh(self.a(x))) * self.gain


def odd_sizes():
    model = Odd()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config()
    )
    clipper = attach(engine, 0.1)
    x, y = batch()
    _, norm = oracle_of_odd(x, y[:, :3])
    train(engine, x, y[:, :3])
    return {"norm": norm, "norm_off": abs(float(clipper.last_report.total_norm) / norm - 1)}


def oracle_of_odd(x, y):
    model = Odd().to(LOW).double()
    loss_of(model, x.double(), y.double()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return grads, math.sqrt(sum(float(g.norm()) ** 2 for g in grads.values()))


ADAPTIVE = {
    "zclip": lambda: (distclip.ZClip(warmup=3), None),
    "adagc": lambda: (distclip.AdaGC(warmup=2), distclip.per_parameter()),
}
FACTORS = (1.0, 1.3, 0.8, 1.1, 9.0, 1.0)


def followed(policy, groups, reports):
    """The coefficients of a clipper in one process that sees the same norms, as gradients of one
    element each."""
    names = reports[0].groups
    params = [(name, torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))) for name in names]
    own = distclip.GradClipper(params, policy=policy, groups=groups, process_group=distclip.LOCAL)
    out = []
    for report in reports:
        for (_, param), norm in zip(params, report.group_norms):
            param.grad = norm.double().reshape(1).clone()
        out.append(own.clip_().coefs.double())
    return out


def adaptive():
    """Policies with a state decide as they do outside, and what they decide is what happens."""
    x, y = batch()
    out = {}
    for name, make in ADAPTIVE.items():
        policy, groups = make()
        engine, clipper = started(None, policy=policy, groups=groups)
        reports, lengths = [], []
        for factor in FACTORS:
            before = masters(engine)
            train(engine, x, y, factor=factor)
            reports.append(clipper.last_report)
            moved = change(before, masters(engine))
            lengths.append(math.sqrt(sum(float(m.norm()) ** 2 for m in moved.values())))
        wanted = followed(*make(), reports)
        after = [float(r.norm_after) for r in reports]
        out[name] = {
            "coef_off": max(
                float((r.coefs.double() - w).abs().max()) for r, w in zip(reports, wanted)
            ),
            "length_off": max(abs(seen / told - 1) for seen, told in zip(lengths, after)),
            "smallest": min(float(r.coefs.min()) for r in reports),
        }
    return out


def checkpointed():
    """The clipper's state goes in `client_state`."""
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder)
    x, y = batch()
    coefs = []
    for resumed in (False, True):
        engine, clipper = started(None, policy=distclip.AutoClip(window=8))
        if resumed:
            _, client = engine.load_checkpoint(folder[0], tag="a")
            clipper.load_state_dict(client["clipper"])
        else:
            for factor in FACTORS[:3]:
                train(engine, x, y, factor=factor)
            engine.save_checkpoint(
                folder[0], tag="a", client_state={"clipper": clipper.state_dict()}
            )
        seen = []
        for factor in FACTORS[3:]:
            train(engine, x, y, factor=factor)
            seen.append(float(clipper.last_report.clip_coef))
        coefs.append(seen)
    return {"coefs": coefs, "step": int(clipper.state_dict()["step"])}


def scheduled():
    """A scheduler that is built after `attach`: only at stage 0 in float32 is the engine's
    optimizer one of torch's."""
    engine, clipper = started(0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(engine.basic_optimizer, 1, gamma=0.5)
    x, y = batch()
    before = masters(engine)
    train(engine, x, y)
    scheduler.step()
    length = math.sqrt(sum(float(m.norm()) ** 2 for m in change(before, masters(engine)).values()))
    return {
        "length": length,
        "lr": engine.basic_optimizer.param_groups[0]["lr"],
        "calls": clipper.last_report.step,
    }


def growth():
    """fp16: the loss scale grows at every second step; no clip changes by it."""
    engine, clipper = started(0.05, scale={"loss_scale_window": 2, "initial_scale_power": 4})
    x, y = batch()
    lengths, scales = [], []
    for _ in range(6):
        before = masters(engine)
        train(engine, x, y)
        moved = change(before, masters(engine))
        assert float(clipper.last_report.total_norm) > 0.05, "vacuous"
        lengths.append(math.sqrt(sum(float(m.norm()) ** 2 for m in moved.values())))
        scales.append(loss_scale(engine, STAGE))
    return {"lengths": lengths, "scales": scales}


def skipping():
    """A spike that the policy leaves out, and a gradient that is not finite."""
    spikes = distclip.SkipSpikes(distclip.FixedNorm(0.05), factor=20.0, warmup=2)
    engine, clipper = started(None, policy=spikes, momentum=0.9)
    out = {"moved": [], "skipped": [], "scale": [], "engine": [], "nonfinite": [], "norms": []}
    x, y = batch()
    for factor in (1.0, 1.0, 1.0, 300.0, 1.0, math.inf, 1.0):
        before = masters(engine)
        train(engine, x, y, factor=factor)
        out["moved"].append(
            any(bool((m != 0).any()) for m in change(before, masters(engine)).values())
        )
        out["skipped"].append(bool(clipper.last_report.skipped))
        out["nonfinite"].append(int(clipper.last_report.nonfinite) > 0)
        out["engine"].append(engine.skipped_steps)
        out["norms"].append([float(clipper.last_report.total_norm), engine.get_global_grad_norm()])
        if DTYPE == "fp16":
            out["scale"].append(loss_scale(engine, STAGE))
    return out


def refusals():
    model = net()
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config(clipping=1.0)
    )
    texts = []
    table = {"take_over": True, "groups": {"weight": 1.0}}
    for options in ({}, {"take_over": True, "fold": "never"}, table, {"take_over": True}, {}):
        try:
            attach(engine, 0.1, **options)
            texts.append(str(engine.gradient_clipping()))
        except ValueError as error:
            texts.append(str(error))
    return texts


def missing():
    """Another version of DeepSpeed: what the optimizer lacks, and what the engine lacks."""
    texts = []
    for at_engine in (False, True):
        model = net()
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config()
        )
        needs = adapter_for(engine).needed_names
        if at_engine:
            del engine.torch_autocast_z0_gradscaler
        elif needs:
            delattr(engine.optimizer, needs[0])
        else:
            continue
        try:
            attach(engine, 0.1)
        except ValueError as error:
            texts.append(str(error).replace(deepspeed.__version__, "X"))
    return texts


def unsupported():
    texts, cases = [], []
    model = net()
    sliced, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), 1.0), config=config()
    )
    sliced.mpu = object()  # where deepspeed.initialize(mpu=...) puts it
    cases.append(lambda: attach(sliced, 0.1))
    model, extra = net(), torch.nn.Parameter(torch.zeros(3))
    # from stage 1 on DeepSpeed itself cannot take a parameter that is not in the model
    if STAGE[0] == "0":
        optimizer = torch.optim.SGD([*model.parameters(), extra], 1.0)
        strange, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config())
        cases.append(lambda: attach(strange, 0.1))
    if STAGE[0] in "12" and "fp32acc" not in STAGE and "offload" not in STAGE:
        optimizer = torch.optim.SGD(model.parameters(), 1.0)
        unmeasured, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config(compute_grad_norm=False)
        )
        cases.append(lambda: attach(unmeasured, 0.1))
    for case in cases:
        try:
            case()
            texts.append("")
        except ValueError as error:
            texts.append(str(error))
    return texts


def tried():
    huge, unclipped = one_step(HUGE)
    cases = {
        "huge": huge,
        "clip": one_step(0.1, reference=unclipped)[0],
        "tiny": one_step(TINY, reference=unclipped)[0],
        "two_groups": one_step(0.1, split=True, reference=unclipped)[0],
        "accumulate": one_step(0.1, micro=2)[0],
        "without_distclip": without_distclip(),
        "by_groups": by_groups(),
        "by_patterns": by_patterns(),
        "clamped": clamped(),
        "adaptive": adaptive(),
        "skipping": skipping(),
        "odd": odd_sizes(),
        "checkpoint": checkpointed(),
        "refusals": refusals(),
        "missing": missing(),
        "unsupported": unsupported(),
    }
    if DTYPE == "fp16":
        cases["growth"] = growth()
    if (STAGE, DTYPE) == ("0", "fp32"):
        cases["scheduled"] = scheduled()
    return cases


def main():
    global STAGE, DTYPE, LOW
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    fused, out = deepspeed.runtime.engine.FusedAdam, {}
    for engine in sys.argv[1:]:
        STAGE, DTYPE = engine.split()
        LOW = DTYPES[DTYPE]
        # FusedAdam needs a GPU; its wrapper is the same for any optimizer
        deepspeed.runtime.engine.FusedAdam = torch.optim.SGD if "fused" in STAGE else fused
        out[engine] = tried()
        gc.collect()
        gc.freeze()  # the first engine imports more: see deepspeed_setting.py
    print("RESULT " + json.dumps(out), flush=True)
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


main()
