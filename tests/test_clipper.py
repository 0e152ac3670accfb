"""One process: coefficient, modes, groups, policies, state, sinks, and refusals of arguments."""

import copy
import gc
import io
import json
import math
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import get_total_norm

import distclip
import skips
from distclip.groups import Grouping

INF, NAN = math.inf, math.nan


def named(*grads, dtype=torch.float32):
    out = []
    for i, grad in enumerate(grads):
        grad = torch.as_tensor(grad, dtype=dtype)
        p = nn.Parameter(torch.zeros_like(grad))
        p.grad = grad.clone()
        out.append((f"layer{i}.weight", p))
    return out


def test_within_the_threshold_nothing_is_written():
    params = named([3.0, 4.0])
    version = params[0][1].grad._version
    report = distclip.GradClipper(params, 5.0).clip_()
    assert report.clip_coef == 1 and not report.clipped and params[0][1].grad._version == version


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e20])
def test_no_epsilon(size):
    params = named([3 * size, 4 * size])
    report = distclip.GradClipper(params, 2.5 * size).clip_()
    assert report.clip_coef.item() == pytest.approx(0.5, rel=1e-6)
    assert params[0][1].grad.tolist() == pytest.approx([1.5 * size, 2 * size], rel=1e-6, abs=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tiny_coefficient_is_not_rounded_to_the_gradients_dtype(dtype):
    params = named([60000.0] * 64, dtype=dtype)
    report = distclip.GradClipper(params, 1e-2).clip_()
    assert report.clip_coef < 6e-8
    assert params[0][1].grad.double().norm().item() == pytest.approx(1e-2, rel=5e-3)


@pytest.mark.parametrize(
    "make",
    [
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9, weight_decay=0.1),
        lambda ps: torch.optim.AdamW(ps, 0.1),
    ],
)
@pytest.mark.parametrize("bad", [INF, NAN])
@skips.told()
def test_a_skipped_step_moves_nothing(make, bad):
    params = named([1.0, 2.0])
    p = params[0][1]
    optimizer, clipper = make([p]), distclip.GradClipper(params, 1.0)
    clipper.clip_()
    optimizer.step()
    for act in (lambda: (clipper.clip_(), optimizer.step()), lambda: clipper.step(optimizer)):
        p.grad = torch.tensor([1.0, bad])
        before = (
            p.detach().clone(),
            {k: v.clone() for k, v in optimizer.state[p].items() if v is not None},
        )
        act()
        assert torch.equal(p, before[0])
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in before[1].items())
    p.grad = torch.tensor([1.0, 2.0])
    assert not clipper.step(optimizer).skipped and not torch.equal(p, before[0])


@skips.told()
def test_the_streak_ends_in_an_error_and_names_culprits_first():
    params = named([1.0], [1.0])
    clipper = distclip.GradClipper(params, 1.0, skip_limit=2)
    for i in range(2):
        params[1][1].grad = torch.tensor([INF])
        report = clipper.clip_()
        assert report.skipped and report.culprits == (
            (("layer1.weight", 0, "inf", "layer0.weight", None),) if i == 0 else ()
        )
    params[1][1].grad = torch.tensor([INF])
    with pytest.raises(
        distclip.NonFiniteError,
        match=r"step 3: 1 gradient tensor is not finite in 3 steps in a "
        r"row .*layer1.weight on rank 0: inf",
    ):
        clipper.clip_()


def test_groups_have_norms_of_their_own():
    params = named([3.0, 4.0], [6.0, 8.0], [1.0])
    rules = {"layer1.*": 5.0, "layer2.*": distclip.Exempt()}
    report = distclip.GradClipper(params, 2.5, groups=distclip.by_name(rules)).clip_()
    assert report.groups == ("layer1.*", "layer2.*", "rest")
    assert report.group_norms.tolist() == [10, 1, 5] and report.coefs.tolist() == [0.5, 1, 0.5]
    assert report.total_norm.item() == pytest.approx(math.hypot(10, 5))
    assert [p.grad.tolist() for _, p in params] == [[1.5, 2], [3, 4], [1]]
    with pytest.raises(ValueError, match=r"3 groups; read report\.coefs"):
        _ = report.clip_coef


class ByNumber(Grouping):
    """A user's own, with what each must have."""

    def assign(self, names, params):
        return [f"number {name[5]}" for name in names]

    def __repr__(self):
        return "by number"


@pytest.mark.parametrize(
    "groups, names",
    [
        (distclip.per_parameter(), ("layer0.weight", "layer1.weight")),
        (distclip.per_layer(), ("layer0", "layer1")),
        (ByNumber(), ("number 0", "number 1")),
    ],
)
def test_groups_have_coefficients_of_their_own(groups, names):
    report = distclip.GradClipper(named([3.0, 4.0], [6.0, 8.0]), 5.0, groups=groups).clip_()
    assert report.groups == names and report.coefs.tolist() == [1, 0.5]


def test_per_param_group():
    params = named([3.0, 4.0], [6.0, 8.0])
    optimizer = torch.optim.SGD([{"params": [params[1][1]]}], 0.1)
    report = distclip.GradClipper(params, 5.0, groups=distclip.per_param_group(optimizer)).clip_()
    assert report.groups == ("param_group 0", "rest") and report.group_norms.tolist() == [10, 5]


@pytest.mark.filterwarnings("ignore:value clipping turned the gradient")
@pytest.mark.parametrize("p", [1.0, 2.0, INF])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_value_clipping_reports_what_it_did(p, scale):
    params = named([1.0, -8.0, 2.0], [0.5])
    report = distclip.GradClipper(params, policy=distclip.FixedValue(1.5), norm_type=p).clip_(
        grad_scale=scale
    )
    raw = torch.tensor([1.0, -8.0, 2.0, 0.5]).double() * scale
    want = raw.clamp(-1.5, 1.5)
    assert torch.cat([q.grad for _, q in params]).tolist() == want.tolist()
    assert report.clipped and report.norm_after.item() == pytest.approx(
        want.norm(p).item(), rel=1e-6
    )
    assert report.total_norm.item() == pytest.approx(raw.norm(p).item(), rel=1e-6)


def test_normalize_lengthens_too_and_leaves_zero_alone():
    params = named([0.3, 0.4])
    distclip.GradClipper(params, policy=distclip.Normalize(10.0)).clip_()
    assert params[0][1].grad.tolist() == pytest.approx([6, 8])
    assert (
        distclip.GradClipper(named([0.0]), policy=distclip.Normalize(10.0)).clip_().clip_coef == 1
    )


def test_grad_scale_is_one_factor_with_the_coefficient():
    params = named([6.0, 8.0])
    report = distclip.GradClipper(params, 2.5).clip_(grad_scale=0.5)
    assert (report.total_norm, report.clip_coef, report.norm_after) == (5, 0.5, 2.5)
    assert params[0][1].grad.tolist() == [1.5, 2.0]


class Running:
    """A user's own policy: threshold = twice the mean norm so far."""

    def init(self, groups, device):
        return (
            torch.zeros(groups, dtype=torch.float64, device=device),
            torch.zeros(groups, dtype=torch.float64, device=device),
        )

    def decide(self, norms, state):
        total, count = state
        threshold = torch.where(count > 0, 2 * total / count.clamp(min=1), INF)
        coef = torch.where(norms.per_group > threshold, threshold / norms.per_group, 1.0)
        return distclip.Scale(coef, threshold), (total + norms.per_group, count + 1)


@skips.told()
def test_a_users_policy_keeps_its_state_from_bad_steps_and_over_checkpoints():
    params = named([3.0, 4.0])
    p = params[0][1]
    clipper = distclip.GradClipper(params, policy=Running())

    def step(clipper, *grad):
        p.grad = torch.tensor(grad)
        return clipper.clip_()

    assert step(clipper, 3.0, 4.0).threshold == INF
    assert step(clipper, NAN, 1.0).skipped
    assert step(clipper, 30.0, 40.0).threshold == 10
    file = io.BytesIO()
    torch.save(clipper.state_dict(), file)
    file.seek(0)
    again = distclip.GradClipper(params, policy=Running())
    again.load_state_dict(torch.load(file, weights_only=True))
    assert step(again, 1.0, 0.0).threshold == 55 and int(again.state_dict()["step"]) == 4
    with pytest.raises(ValueError, match="the checkpoint's policy is 'Running'"):
        distclip.GradClipper(params, 1.0).load_state_dict(clipper.state_dict())


def test_sinks(tmp_path, caplog):
    class Full:
        def write(self, report):
            raise OSError("no space left")

    params = named([3.0, 4.0])
    log = tmp_path / "runs" / "a.jsonl"
    clipper = distclip.GradClipper(
        params, 2.5, sinks=[Full(), distclip.JSONLSink(log), distclip.LoggingSink()]
    )
    caplog.set_level("INFO", logger="distclip")
    with pytest.warns(
        RuntimeWarning,
        match="Full failed at step 1 and is off from now on, "
        "training goes on: OSError: no space left",
    ):
        clipper.clip_()
    params[0][1].grad = torch.tensor([NAN, 1.0])
    clipper.clip_()
    header, *rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert header["distclip_log"] == 2
    assert rows[0]["total_norm"] == 5 and rows[0]["clip_coef"] == 0.5
    assert (
        rows[1]["skipped"]
        and rows[1]["total_norm"] is None
        and rows[1]["culprits"][0]["kind"] == "NaN"
    )
    assert "norm 5" in caplog.text and "step 2 skipped" in caplog.text


def test_clipping_before_backward_is_told_once():
    clipper = distclip.GradClipper(nn.Linear(2, 2), 1.0)
    with pytest.warns(RuntimeWarning, match="after backward"):
        clipper.clip_()
    clipper.clip_()


REFUSED = {
    "no threshold": (lambda: distclip.GradClipper(nn.Linear(2, 2)), "exactly one of max_norm and "
                                                                    "policy, not neither"),
    "zero": (lambda: distclip.GradClipper(nn.Linear(2, 2), 0), "max_norm=0 sets every gradient to "
                                                               "zero.*allow_zero=True"),
    "negative": (lambda: distclip.FixedValue(-1), "clip_value=-1.0 is not a threshold"),
    "nan": (lambda: distclip.Normalize(NAN), "norm=nan is not a threshold"),
    "nothing": (lambda: distclip.GradClipper([], 1.0), "params holds no parameters"),
    "no policy": (lambda: distclip.GradClipper(nn.Linear(2, 2), policy="norm"), "policy='norm' has "
                                                                                "no init and decide"),
    "p": (lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0, norm_type=9), "norm_type=9: p must be "
                                                                           "above 0 and at most 8"),
    "mode": (
        lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0, on_nonfinite="zero"),
        "on_nonfinite='zero'; it is one of 'skip', 'raise', 'propagate'",
    ),
    "tolerance": (lambda: distclip.GradClipper(nn.Linear(2, 2), 1.0, drift_tolerance=-1.0), "drift_tolerance=-1.0 must be positive"),
    "item": (lambda: distclip.GradClipper([3], 1.0), r"params\[0\] is a int"),
    "names": (lambda: distclip.GradClipper([named([1.0])[0], named([1.0])[0]], 1.0), "two different parameters are named 'layer0.weight'"),
    "meta": (
        lambda: distclip.GradClipper(nn.Linear(2, 2, device="meta"), 1.0),
        "weight is on the device meta; distclip clips on the CPU and on CUDA. A model on `meta` "
        "has no values yet",
    ),
    "by_name": (lambda: distclip.by_name({}), "give at least one pattern"),
}  # fmt: skip


@pytest.mark.parametrize("make, text", REFUSED.values(), ids=REFUSED)
def test_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_complex_gradients_have_a_norm_and_no_order():
    p = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.tensor([3j, 4.0])
    assert distclip.GradClipper([("w", p)], 2.5).clip_().total_norm == 5
    assert p.grad.tolist() == [1.5j, 2.0]
    with pytest.raises(
        distclip.GradientError, match="its elements cannot be clamped; clip its norm, or exempt it"
    ):
        distclip.GradClipper([("w", p)], policy=distclip.FixedValue(1.0)).clip_()
    assert p.grad.tolist() == [1.5j, 2.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sparse_gradients_that_are_not_coalesced(dtype):
    p = nn.Parameter(torch.zeros(6, 2, dtype=dtype))
    p.grad = torch.sparse_coo_tensor(
        [[4, 1, 4]],
        [[3.0, 0.0], [0.0, 0.0], [0.0, 4.0]],
        (6, 2),
        dtype=dtype,
        check_invariants=True,
    )
    report = distclip.GradClipper([("w", p)], 2.5).clip_()
    assert report.total_norm == 5 and p.grad.to_dense()[4].tolist() == [1.5, 2.0]
    distclip.GradClipper([("w", p)], policy=distclip.FixedValue(1.75)).clip_()
    assert p.grad.to_dense()[4].tolist() == [1.5, 1.75]


COPIES = {
    "deep copy": copy.deepcopy,
    "pickle": lambda things: pickle.loads(pickle.dumps(things)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_copy_steps_its_own_optimizer_and_watches_its_own_model(copied, fused, steps):
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, fused=fused)
    clipper = distclip.GradClipper(model, policy=distclip.AutoClip(50.0))
    for step in range(steps):
        _fill(model, step + 5.0)
        clipper.step(optimizer)
    other, its, stepped = copied((model, clipper, optimizer))
    del clipper  # the copy does not live by what watches for the first one
    gc.collect()
    before = [p.detach().clone() for p in model.parameters()]
    for size in (9.0, 3.0):
        reference, want = [p.detach().clone() for p in other.parameters()], size * 14**0.5
        _fill(other, size)
        report = its.step(stepped)
        assert float(report.total_norm) == pytest.approx(want)
        now = [p.detach() for p in other.parameters()]
        moved = [float((a - b).norm()) for a, b in zip(reference, now, strict=True)]
        assert min(moved) > 0
    assert all(torch.equal(p, kept) for p, kept in zip(model.parameters(), before, strict=True))
    other.register_parameter("unused", nn.Parameter(torch.zeros(2)))  # without a gradient
    _fill(other, 1.0)
    other.unused.grad = None
    its.step(stepped)
    other.unused.grad = torch.ones(2)
    with pytest.raises(distclip.GradientError, match="unused joined the model after"):
        its.step(stepped)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_deep_copy_of_model_and_clipper_clips_the_copy(steps):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    clipper = distclip.GradClipper(model, 1.0)
    for _ in range(steps):
        _fill(model, 5.0)
        clipper.clip_()
    other, its = copy.deepcopy((model, clipper))
    for filled, value in ((model, 7.0), (other, 11.0)):
        _fill(filled, value)
    # 14 gradients
    assert float(its.clip_().total_norm) == pytest.approx(11 * 14**0.5)
    assert float(get_total_norm([p.grad for p in other.parameters()])) == pytest.approx(1.0)
    assert all((p.grad == 7.0).all() for p in model.parameters())
    _fill(other, 0.01)  # nothing to clip
    assert float(its.clip_().clip_rate) == pytest.approx((steps + 1) / (steps + 2))
    kept = its.state_dict()
    assert int(kept["history.calls"]) == steps + 2
    assert int(kept["history.clipped"].sum()) == steps + 1
    assert float(clipper.clip_().total_norm) == pytest.approx(7 * 14**0.5)
    assert float(get_total_norm([p.grad for p in model.parameters()])) == pytest.approx(1.0)


def _fill(model, value):
    for p in model.parameters():
        p.grad = torch.full_like(p, value)


class RatioOfNorms(distclip.FixedNorm):
    """Asks its clipper for the norm of the parameters while it looks at the gradients."""

    num_stats = 1

    def local_stats(self, own):
        seen.append(float(clippers[0].measure(of="param").total_norm))
        return torch.zeros(own.groups, 1, dtype=torch.float64)


seen, clippers = [], []


def test_a_measurement_within_a_measurement_changes_nothing():
    params = named([3.0, 4.0], [12.0])
    for _, p in params:
        p.data.fill_(1.0)
    clippers[:] = [distclip.GradClipper(params, policy=RatioOfNorms(1.0))]
    seen.clear()
    for _ in range(2):  # the second finds its gradients again
        report = clippers[0].clip_()
    assert seen == pytest.approx([3**0.5] * len(seen)) and seen
    assert float(report.total_norm) == pytest.approx(1.0)


def test_measurements_from_two_threads_do_not_mix():
    params = named([3.0, 4.0], [12.0])
    for _, p in params:
        p.data.fill_(1.0)
    clipper, found = distclip.GradClipper(params, 1.0, process_group=distclip.LOCAL), []

    def of_parameters():
        found.extend(float(clipper.measure(of="param").total_norm) for _ in range(300))

    thread = threading.Thread(target=of_parameters)
    thread.start()
    norms = {float(clipper.measure().total_norm) for _ in range(300)}
    thread.join()
    assert norms == {13.0} and found == pytest.approx([3**0.5] * 300)
