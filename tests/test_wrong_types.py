"""Values of every kind at every argument of every public callable: what is refused is refused in
distclip's own words, that name the argument, before anything was touched or sent."""

import inspect
import logging
import math
import random
import traceback
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn

import distclip
from distclip.testing import count_collectives

SOURCE = str(Path(distclip.__file__).parent)
CPU = torch.device("cpu")


def sgd():
    return torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)


# Made anew for each case: some are used up by looking at them
VALUES = {
    "None": lambda: None, "True": lambda: True, "False": lambda: False, "-1": lambda: -1, "0": lambda: 0, "1": lambda: 1, "2.5": lambda: 2.5, "-0.5": lambda: -0.5, "nan": lambda: math.nan,
    "inf": lambda: math.inf, "-inf": lambda: -math.inf, "10**400": lambda: 10**400, "1j": lambda: 1j, "empty text": lambda: "", "text": lambda: "abc",
    "text of a number": lambda: "1.0", "half of a pair": lambda: "\ud800", "bytes": lambda: b"x", "empty list": lambda: [], "list": lambda: [1], "texts": lambda: ["a"],
    "tuple": lambda: (1, 2), "pairs": lambda: [(0, 5.0), (10, 1.0)], "empty dictionary": lambda: {}, "dictionary": lambda: {"a": 1.0},
    "dictionary of numbers": lambda: {1: 2}, "dictionary of texts": lambda: {"*": "x"}, "set": lambda: {1}, "object": lambda: object(), "class": lambda: int,
    "class of dictionaries": lambda: dict, "function": lambda: len, "lambda": lambda: lambda: None, "0-dim tensor": lambda: torch.tensor(1.0),
    "tensor": lambda: torch.ones(2), "empty tensor": lambda: torch.ones(0), "complex tensor": lambda: torch.ones(2, dtype=torch.complex64),
    "meta tensor": lambda: torch.ones(2, device="meta"), "module": lambda: nn.Linear(2, 2), "class of modules": lambda: nn.Linear,
    "optimizer": lambda: sgd(), "class of optimizers": lambda: torch.optim.SGD, "scheduler": lambda: torch.optim.lr_scheduler.StepLR(sgd(), 1),
    "scaler": lambda: torch.amp.GradScaler("cpu"), "class of scalers": lambda: torch.amp.GradScaler, "float64": lambda: numpy.float64(1.0),
    "float32": lambda: numpy.float32(1.0), "array": lambda: numpy.ones(2), "0-dim array": lambda: numpy.array(1.0), "...": lambda: ..., "range": lambda: range(3),
    "iterator": lambda: iter([1]), "generator": lambda: (i for i in "ab"), "error": lambda: ValueError("x"), "dtype": lambda: torch.float32,
    "device": lambda: CPU, "path": lambda: Path("x"), "logger": lambda: logging.getLogger("distclip.wrong"), "slice": lambda: slice(1),
    "policy": lambda: distclip.FixedNorm(1.0), "class of policies": lambda: distclip.ZClip, "grouping": lambda: distclip.per_layer(),
    "function of groupings": lambda: distclip.per_layer, "exempt": lambda: distclip.Exempt(), "local": lambda: distclip.LOCAL,
}  # fmt: skip
NAMES = list(VALUES)


def parameters():
    made = [("w", nn.Parameter(torch.ones(2))), ("head.w", nn.Parameter(torch.ones(3)))]
    for _, p in made:
        p.grad = torch.full_like(p, 3.0)
    return made


def clipper(named=None, **options):
    return distclip.GradClipper(named or parameters(), **({"max_norm": 1.0} | options))


# Each public callable with arguments that it takes; each is then replaced

OPTIONS = {
    "max_norm": 1.0, "policy": None, "norm_type": 2.0, "groups": None, "on_nonfinite": "skip", "process_group": None,
    "replicated_over": None, "shared": (), "grad_of": None, "drift_tolerance": 1e-5, "skip_limit": 20, "fold": "auto",
    "partial_grads": "refuse", "watch": None, "rank_norms": None, "sinks": (),
}  # fmt: skip
BUILT = {
    "AGC": {"clipping": 0.01, "eps": 1e-3},
    "AdaGC": {"lambda_rel": 1.04, "lambda_abs": 1.0, "beta": 0.99, "warmup": 100},
    "AutoClip": {"percentile": 10.0, "window": 100},
    "Escalate": {
        "policy": distclip.FixedNorm(1.0), "skip": 1, "lower_lr": 3, "roll_back": 6, "window": 100, "sigma": 6.0, "factor": 2.0,
        "history": 128, "warmup": 32,
    },
    "Exempt": {"in_total": False},
    "FixedNorm": {"max_norm": 1.0, "allow_zero": False},
    "FixedValue": {"clip_value": 1.0, "allow_zero": False},
    "JSONLSink": {"path": "x.jsonl", "groups_every": 1, "run": None},
    "LoggingSink": {"logger": None, "level": 20, "every": 1},
    "Normalize": {"norm": 1.0, "allow_zero": False},
    "Scheduled": {"schedule": [(0, 1.0)], "allow_zero": False},
    "SkipSpikes": {"policy": distclip.FixedNorm(1.0), "sigma": 6.0, "window": 128, "warmup": 64, "factor": 2.0},
    "TensorBoardSink": {"log_dir": "x", "every": 1},
    "WandbSink": {"run": None, "every": 1},
    "Warmup": {"policy": distclip.FixedNorm(1.0), "steps": 10, "max_norm": 1.0},
    "Watch": {"groups": distclip.per_layer(), "every": 1},
    "ZClip": {"z_threshold": 2.5, "alpha": 0.97, "warmup": 25, "max_norm": math.inf},
    "by_name": {"table": {"*": 1.0}},
    "per_expert": {"pattern": "*", "others": None},
    "per_layer": {"depth": 1},
    "per_param_group": {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.1)},
    "per_parameter": {},
    "GradClipper": {"params": None, **OPTIONS},
}  # fmt: skip
# in torch's place
DROP_INS = {
    "clip_grad_norm_": {"parameters": None, "max_norm": 1.0, "norm_type": 2.0},
    "get_total_norm": {"tensors": None, "norm_type": 2.0},
    "clip_grads_with_norm_": {"parameters": None, "max_norm": 1.0, "total_norm": torch.tensor(3.0)},
    "clip_grad_value_": {"parameters": None, "clip_value": 1.0},
}
METHODS = {
    "clip_": {"optimizer": None, "scaler": None, "grad_scale": 1.0, "note": None},
    "step": {"scaler": None, "update_scaler": True, "grad_scale": 1.0, "note": None},
    "decide": {"grad_scale": 1.0, "dynamic_loss_scale": False, "note": None},
    "apply_": {"params": ()},
    "measure": {"of": "grad"},
    "rebuild": {"params": None},
    "load_state_dict": {"state": None},
    "audit": {},
    "state_dict": {},
}
# records are what distclip fills in; torch reads these two for speed and truth alone
RECORDS = {"Clamp", "ClipReport", "Culprit", "LocalGrads", "Norms", "Note", "Scale", "UnitScale"}
# what they take cannot be named, or needs ranks: see their own tests
ELSEWHERE = {"RankNorms", "by_optimizer"}
UNCHECKED = {"error_if_nonfinite", "foreach"}


def test_no_public_callable_is_left_out():
    public = {name: getattr(distclip, name) for name in distclip.__all__}
    others = {
        name
        for name, thing in public.items()
        if callable(thing)
        and not (
            isinstance(thing, type)
            and (issubclass(thing, Exception) or getattr(thing, "_is_protocol", False))
        )
    }
    assert others - RECORDS - ELSEWHERE == BUILT.keys() | DROP_INS.keys()
    for name in BUILT | DROP_INS:
        signature = inspect.signature(public[name]).parameters
        assert signature.keys() - UNCHECKED == (BUILT | DROP_INS)[name].keys(), name
    methods = {n for n, m in vars(distclip.GradClipper).items() if callable(m) and n[0] != "_"}
    assert methods == METHODS.keys()
    for name, arguments in METHODS.items():
        own = inspect.signature(getattr(distclip.GradClipper, name)).parameters
        assert own.keys() - {"self", "optimizers"} == arguments.keys()


def what_is_wrong_with(error, who, changed):
    """None for a refusal in distclip's own words that name the argument."""
    if not isinstance(error, (distclip.DistclipError, TypeError, ValueError)):
        return f"is a {type(error).__name__}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if not frame.filename.startswith(SOURCE):
        return f"was raised in {frame.filename}:{frame.lineno}"
    text = str(error)
    words = {*changed, who, "threshold", "scaler", "parameters", "(step, threshold)", "checkpoint"}
    if not any(word in text for word in words):
        return "names no argument"
    # of other ranks it says which error they met
    if "Error: " in text and not isinstance(error, distclip.AgreementError):
        return "passes on an error of Python's"
    return None


def told(who, call, changed):
    """A line if the call raised something that it should not; "refused" or None otherwise."""
    try:
        call()
    except Exception as error:
        wrong = what_is_wrong_with(error, who, changed)
        return f"{who}({changed}) {wrong}: {error!r}"[:300] if wrong else "refused"
    return None


def replaced(seed, arguments):
    """Each argument by each value, then pairs of them drawn at random: (argument → name)."""
    singles = [{argument: name} for argument in arguments for name in NAMES]
    draw = random.Random(seed)
    pairs = [
        {argument: draw.choice(NAMES) for argument in draw.sample(sorted(arguments), 2)}
        for _ in range(40 if len(arguments) > 1 else 0)
    ]
    return singles + pairs


def with_values(arguments, changed):
    return arguments | {argument: VALUES[name]() for argument, name in changed.items()}


def checked(lines, refusals_at_least):
    """Nothing raw, and not vacuous."""
    raw = [line for line in lines if line not in (None, "refused")]
    assert not raw, f"{len(raw)} in all:\n" + "\n".join(raw[:40])
    assert lines.count("refused") >= refusals_at_least


@pytest.mark.parametrize("name", [name for name in BUILT if BUILT[name] and name != "GradClipper"])
def test_policies_groupings_and_sinks(name):
    make = getattr(distclip, name)
    lines = []
    for changed in replaced(name, BUILT[name]):
        arguments = with_values(BUILT[name], changed)
        with count_collectives() as seen:
            lines.append(told(name, lambda: make(**arguments), changed))  # noqa: B023
        assert not seen.names
    checked(lines, 20)


# a tensor that requires no gradient is a parameter, of which the clipper warns
untrained = pytest.mark.filterwarnings("ignore:GradClipper. of its .* none is trainable")


@untrained
def test_the_clipper_itself():
    lines = []
    for changed in replaced("GradClipper", BUILT["GradClipper"]):
        arguments = with_values(BUILT["GradClipper"] | {"params": parameters()}, changed)
        if "policy" in changed and "max_norm" not in changed:
            arguments["max_norm"] = None
        lines.append(told("GradClipper", lambda: distclip.GradClipper(**arguments), changed))  # noqa: B023
    checked(lines, 500)


@pytest.mark.parametrize("name", DROP_INS)
def test_functions_in_torchs_place(name):
    lines = []
    for changed in replaced(name, DROP_INS[name]):
        named = parameters()
        first = next(iter(DROP_INS[name]))
        arguments = DROP_INS[name] | {
            first: [p.grad if first == "tensors" else p for _, p in named]
        }
        arguments = with_values(arguments, changed)
        call = getattr(distclip, name)
        lines.append(told(name, lambda: call(**arguments), changed))  # noqa: B023
        assert lines[-1] is None or all((p.grad == 3).all() for _, p in named), "nothing is touched"
    checked(lines, 30)


def changed_by(name, arguments, changed):
    """One call of a method, of a new clipper: the line, whether parameters and gradients stayed."""
    named = parameters()
    own = clipper(named)
    optimizer = torch.optim.SGD([p for _, p in named], 1.0)
    arguments = dict(arguments)
    if name == "load_state_dict" and not changed:
        arguments["state"] = own.state_dict()
    if name == "apply_":
        own.decide()
    arguments = with_values(arguments, changed)
    first = (optimizer,) if name == "step" else ()
    line = told(name, lambda: getattr(own, name)(*first, **arguments), changed)
    stayed = all((p.grad == 3).all() and (p == 1).all() for _, p in named)
    return line, stayed


@untrained
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name]])
def test_methods_of_the_clipper(name):
    lines = []
    for changed in replaced(name, METHODS[name]):
        line, stayed = changed_by(name, METHODS[name], changed)
        lines.append(line)
        assert line is None or stayed, "nothing is touched"
    checked(lines, 20)


def test_anything_in_the_place_of_an_optimizer():
    lines = []
    for name in NAMES:
        named = parameters()
        own, thing = clipper(named), VALUES[name]()
        lines.append(told("step", lambda: own.step(thing), {"optimizer": name}))  # noqa: B023
        assert lines[-1] is None or all((p.grad == 3).all() for _, p in named)
    checked(lines, 50)


# On four ranks: told on all of them, and the ranks go on together

CASES = 20
ON_RANKS = ["GradClipper", "clip_", "step", "decide", "measure"]


def on_ranks(seed, odd):
    """The cases that a seed draws, with the value on all ranks or on rank 3 alone; afterwards a call
    that is right."""
    draw, rows = random.Random(seed), []
    for _ in range(CASES):
        who = draw.choice(ON_RANKS)
        arguments = (BUILT | METHODS)[who]
        argument = draw.choice(sorted(arguments.keys() - {"process_group"}))
        changed = {argument: draw.choice(NAMES)}
        named = parameters()
        used = changed if not odd or dist.get_rank() == 3 else {}
        if who == "GradClipper":
            given = with_values(arguments | {"params": named}, used)
            with count_collectives() as seen:
                line = told(who, lambda: distclip.GradClipper(**given), changed)  # noqa: B023
            stayed = True
        else:
            with count_collectives() as seen:
                line, stayed = changed_by(who, arguments, used)
        rows.append((who, changed, line, stayed, seen.names))
    named = parameters()
    norm = clipper(named).clip_().total_norm.item()
    return rows, norm


@pytest.mark.parametrize("odd", [False, True], ids=["on all ranks", "on one rank"])
def test_all_ranks_are_told(ranks, odd):
    (first, *others), norms = zip(*ranks.run(on_ranks, "ranks", odd))
    assert norms == (pytest.approx(math.sqrt(5 * 9)),) * 4, "they are still together"
    refused = 0
    for case, *elsewhere in zip(first, *others):
        who, changed, line, stayed, names = case
        refused += line == "refused"
        for _, _, other, also, same in elsewhere:
            if not odd:
                assert other == line, (who, changed, line, other)
            assert (other is None) == (line is None), (who, changed, line, other)
            assert same == names, (who, changed, "all ranks send the same")
            assert line is None or (stayed and also), (who, changed)
        assert line is None or names, "told together"
        assert line in (None, "refused"), (who, changed, line)
    assert refused >= CASES // 2
