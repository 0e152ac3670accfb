"""What a reader has to keep in mind on the way of one step: how many kinds of records are made."""

import dataclasses
import sys

import pytest
import torch
from torch import nn

import distclip
from distclip.decide.global_norms import GlobalNorms
from distclip.exchange.message import CHECK_WORDS
from late import judged_late

MOST = 10


def is_record(thing):
    """A policy's own, of which no other code knows, do not count."""
    kind = type(thing)
    if kind.__module__.startswith("distclip.policies."):
        return False
    return kind.__module__.startswith("distclip.") and (
        dataclasses.is_dataclass(kind) or hasattr(kind, "_fields")
    )


def records_of(call):
    """Every record that some function of distclip has in its hands when it returns; each is kept, so
    that no other one is taken for it."""
    found = {}

    def look(frame, event, answer):
        if event != "return" or not frame.f_globals.get("__name__", "").startswith("distclip."):
            return
        for thing in (answer, *frame.f_locals.values()):
            for record in (thing, *thing) if type(thing) is tuple else (thing,):
                if is_record(record):
                    found[id(record)] = record

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def made_in(clipper_call, before):
    """Kinds of records that one call makes: what the call before it had, too, is of the set-up."""
    steps = []
    for _ in range(3):
        before()
        steps.append(records_of(clipper_call))
    return {type(record).__name__ for key, record in steps[2].items() if key not in steps[1]}


@pytest.mark.parametrize("late", [False, "device"])
@pytest.mark.parametrize("policy", [distclip.FixedNorm(1.0), distclip.AutoClip()], ids=repr)
@pytest.mark.parametrize("method", ["clip_", "step", "step with a scaler and a sink"])
def test_few_kinds_of_records_are_made_in_a_step(method, policy, late):
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0) if "scaler" in method else None
    reports = []
    sinks = [reports.append] if scaler is not None else []
    clipper = judged_late(distclip.GradClipper(model, policy=policy, sinks=sinks), late)

    def before():
        loss = model(torch.ones(3, 4)).square().sum()
        optimizer.zero_grad()
        (loss if scaler is None else scaler.scale(loss)).backward()

    def call():
        if method == "clip_":
            clipper.clip_()
        else:
            clipper.step(optimizer, scaler=scaler)

    made = made_in(call, before)
    assert bool(reports) == bool(sinks), "vacuous"
    usual = {"LocalMeasurement", "GlobalNorms", "ClipDecision", "StepStatus", "ClipReport"}
    assert made >= usual, "vacuous"
    made.add("Request")  # of a plain `clip_` it is made once
    assert len(made) <= MOST, sorted(made)


def test_what_is_checked_has_the_same_order_in_the_message_and_in_the_norms():
    first = (*CHECK_WORDS, "agreed", "finite")
    assert GlobalNorms._fields[: len(first)] == first
