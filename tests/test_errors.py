"""Errors as people meet them: one text on all ranks, which one of them prints whole and the others
as a line, and a link to the page that explains it."""

import pickle
import sys
import traceback

import pytest
import torch
from torch import nn

import distclip
from distclip.errors import docs_place
from distclip.testing import count_collectives
from parity.layouts import given

CLASSES = [
    getattr(distclip, name)
    for name in distclip.__all__
    if isinstance(getattr(distclip, name), type)
    and issubclass(getattr(distclip, name), distclip.DistclipError)
]


@pytest.fixture
def own_metadata(tmp_path, monkeypatch):
    """As if a distclip were installed whose metadata are these lines."""

    def install(*lines):
        folder = tmp_path / "distclip-0.dist-info"
        folder.mkdir(exist_ok=True)
        text = "\n".join(["Metadata-Version: 2.4", "Name: distclip", "Version: 0", *lines, "", ""])
        (folder / "METADATA").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        docs_place.cache_clear()

    yield install
    docs_place.cache_clear()


def test_every_class_has_a_place_of_its_own(own_metadata):
    own_metadata()
    places = {kind.__name__: kind("").page for kind in CLASSES}
    assert len(places) == 7 and places["AgreementError"] == "docs/errors.md#agreementerror"
    assert len(set(places.values())) == 7


def test_the_link_comes_from_the_metadata(own_metadata):
    own_metadata(
        "Project-URL: Source, https://example.org/source",
        "Project-URL: Documentation, https://example.org/distclip/",
    )
    error = distclip.ConfigError("no")
    assert error.page == "https://example.org/distclip/errors/#configerror"
    assert error.__notes__ == [f"what to do: {error.page}"] and str(error) == "no"
    if sys.version_info >= (3, 11):
        assert traceback.format_exception_only(error)[-1] == f"what to do: {error.page}\n"


@pytest.fixture
def own_excepthook(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def printed(error, capsys):
    """What a process prints that ends in this error."""
    sys.excepthook(type(error), error, error.__traceback__)
    return capsys.readouterr().err


def test_a_long_text_is_a_line_elsewhere(capsys, own_excepthook):
    text = "step 7: " + "many words " * 30 + "\nrank 3: w"
    error = distclip.AgreementError(text)
    assert error.brief == str(error) == text and error.full_text_on is None
    error.told_on(0, here=0)
    assert error.brief == text and text in printed(error, capsys)
    error.told_on(0, here=2)
    assert str(error) == text and error.full_text_on == 0
    said = error.brief
    assert said.startswith("step 7: many words") and said.endswith(" … [the whole text: rank 0]")
    assert "\n" not in said and len(said) < 200
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.brief, again.full_text_on) == (text, said, 0)
    assert printed(error, capsys) == f"distclip.errors.AgreementError: {said}\n"
    assert "ValueError: of others" in printed(ValueError("of others"), capsys)


def test_a_text_of_one_line_is_said_whole(capsys, own_excepthook):
    error = distclip.ConfigError("max_norm=-1 is not a threshold")
    error.told_on(1, here=0)
    assert str(error) == error.brief and str(error) in printed(error, capsys)


def test_torchs_hook_is_kept_for_all_else(monkeypatch, capsys):
    """`init_process_group` puts one of its own there."""

    def of_torch(kind, error, trace):
        print(f"[rank3]: {error}", file=sys.stderr)

    of_torch.__module__ = "torch.distributed.distributed_c10d"
    monkeypatch.setattr(sys, "excepthook", of_torch)
    error = distclip.AgreementError("first\nsecond")
    error.told_on(0, here=3)
    assert printed(error, capsys) == (
        "distclip.errors.AgreementError: first [the whole text: rank 0]\n"
    )
    error.told_on(3, here=3)
    assert printed(error, capsys) == "[rank3]: first\nsecond\n"


def test_another_hook_stays(monkeypatch):
    def hook(kind, error, trace):
        pass

    monkeypatch.setattr(sys, "excepthook", hook)
    distclip.ConfigError("no").told_on(1, here=0)
    assert sys.excepthook is hook


def raised(call):
    before, sys.excepthook = sys.excepthook, sys.__excepthook__
    try:
        with count_collectives() as seen:
            call()
    except distclip.DistclipError as error:
        is_short = sys.excepthook is not sys.__excepthook__
        return type(error).__name__, str(error), error.brief, is_short, seen.names
    finally:
        sys.excepthook = before
    raise AssertionError("nothing was raised")


def different_thresholds():
    return raised(lambda: distclip.GradClipper([given("w", 4)], 1.0 + torch.distributed.get_rank()))


def a_bad_argument(rank):
    """A long one, so that its text has something to leave out."""
    bad = torch.distributed.get_rank() >= rank
    mode = "s" * 300 if bad else "skip"
    return raised(lambda: distclip.GradClipper([given("w", 4)], 1.0, on_nonfinite=mode))


def a_replaced_parameter():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0)
    clipper = distclip.GradClipper(model, 1.0)
    if torch.distributed.get_rank() >= 2:
        model[1] = nn.Linear(2, 2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return raised(clipper.clip_)


def one_nan():
    name, p = given("layer.weight", 4)
    p.grad[1] = float("nan")
    return raised(distclip.GradClipper([(name, p)], 1.0, on_nonfinite="raise").clip_)


def teller_of(rows):
    """The rank that prints the whole text; on the others it is a line that names that rank, where
    it leaves something out."""
    tellers = [rank for rank, (*_, is_short, _) in enumerate(rows) if not is_short]
    for rank, (_, text, said, _, _) in enumerate(rows):
        assert text.partition("\n")[0][:100] in said
        if rank in tellers:
            assert said == text
        elif said != text:
            assert said.endswith(f"[the whole text: rank {tellers[0]}]") and len(said) < 200
        assert rank in tellers or "\n" not in said
    return tellers


@pytest.mark.parametrize(
    "job, arguments, teller",
    [
        (different_thresholds, (), 0),
        (a_bad_argument, (0,), 0),
        (a_replaced_parameter, (), 2),
        (one_nan, (), 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_one_rank_tells_what_all_raise(ranks, job, arguments, teller):
    rows = ranks.run(job, *arguments)
    assert len({(kind, text) for kind, text, *_ in rows}) == 1, "the same error on every rank"
    assert teller_of(rows) == [teller]
    names = rows[0][-1]
    assert names and all(row[-1] == names for row in rows)


def test_who_found_it_alone_tells_it(ranks):
    rows = ranks.run(a_bad_argument, 3)
    assert [kind for kind, *_ in rows] == ["AgreementError"] * 3 + ["ConfigError"]
    assert rows[3][1] == rows[3][2], "the whole text where it was found"
    for _, text, said, *_ in rows[:3]:
        assert rows[3][1] in text
        assert said == "another rank could not build its GradClipper: [the whole text: rank 3]"
