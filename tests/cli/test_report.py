"""The page: whole, alone, small, and what it says; its PNGs; outputs that are refused. What a reader
does with it: test_browser.py. How logs are read: test_log_reader.py."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
from base64 import b64decode, b64encode
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import distclip
from cli.logs import made_line, rows_of, spiky_norms, write_lines, write_log
from distclip.cli import main
from distclip.cli.glyphs import families_for, shorten_name
from distclip.cli.log_reader import read_runs
from distclip.cli.norm_history import NormHistory
from distclip.cli.report.page_data import merged_columns, short_labels
from distclip.cli.report.pictures import _RC_PARAMS, _SIZE_INCHES, _TITLE_COLUMNS, _add_legend
from distclip.cli.report.thinning import extreme_positions, kept_positions

EMPTY = {"meta", "br", "img", "link", "input", "hr"}
PNG = b"\x89PNG\r\n\x1a\n"


class Page(HTMLParser):
    """Tags are closed in order; all attributes and texts are kept."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == [], "left open"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), "an attribute twice"
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script") and data.strip():
            self.texts.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def made(folder, *runs):
    """The page and its text, after it was looked over: it needs nothing from outside and runs no
    script but its own two."""
    output = folder / "out" / "page.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    text = output.read_text()
    page = Page(text)
    assert len(text.encode()) < 2_000_000
    for tag, attrs in page.tags:
        assert tag not in ("link", "iframe", "img", "object", "svg")
        assert not {"src", "href", "style"} & attrs.keys() and not any(
            name.startswith("on") for name in attrs
        )
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 2 and len(page.all("script")) == 3, "two programs and the data"
    for own in (*scripts, re.search(r"<style>(.*?)</style>", text, re.DOTALL)[1]):
        assert b64encode(hashlib.sha256(own.encode()).digest()).decode() in policy
    assert "@import" not in text and "url(" not in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    return page, text


def data_of(text):
    """What the figures are drawn from."""
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def column(packed, num):
    if not isinstance(packed, dict):
        return np.full(num, np.nan if packed is None else packed)
    ((kind, text),) = packed.items()
    return np.frombuffer(b64decode(text), {"f4": "<f4", "f8": "<f8", "u1": "u1"}[kind])


@pytest.fixture(scope="module")
def spiky(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("logs") / "spiky.jsonl", spiky_norms())


def test_the_command_writes_a_page_and_on_demand_pictures(spiky, tmp_path):
    other = write_log(tmp_path / "other.jsonl", spiky_norms(260, 1), distclip.FixedNorm(0.5))
    command = [
        sys.executable,
        "-m",
        "distclip",
        "report",
        str(spiky),
        str(other),
        "--output",
        "page.html",
    ]
    done = subprocess.run(
        [*command, "--png", "figures"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "page.html: 2 runs; PNG: figures/page-norm.png, figures/page-coefficient.png, "
        "figures/page-clip_rate.png\n"
    )
    pictures = sorted((tmp_path / "figures").iterdir())
    assert [path.name for path in pictures] == ["page-clip_rate.png", "page-coefficient.png", "page-norm.png"]  # fmt: skip
    assert all(path.read_bytes()[:8] == PNG and path.stat().st_size > 4000 for path in pictures)
    page = Page((tmp_path / "page.html").read_text())
    assert {"spiky", "other", "Largest steps: spiky", "Skipped steps: other"} <= set(page.texts)


def test_the_page_alone_imports_neither_torch_nor_matplotlib(spiky, tmp_path):
    program = (
        "import sys; from distclip.cli import main; "
        f"code = main(['report', {str(spiky)!r}, '--output', {str(tmp_path / 'page.html')!r}]); "
        "print({'torch', 'matplotlib', 'numpy'} & sys.modules.keys(), code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)  # fmt: skip
    assert done.stdout.splitlines()[1] == "{'numpy'} 0"
    assert len(list(tmp_path.iterdir())) == 1, "no picture that nobody asked for"


def test_what_it_says_of_a_run(spiky, tmp_path):
    page, _ = made(tmp_path, spiky)
    norms = np.array(
        [row["total_norm"] if row["total_norm"] is not None else np.nan for row in rows_of(spiky) if "step" in row]
    )  # fmt: skip
    finite = norms[np.isfinite(norms)]
    share = (finite > 1).sum() / 300
    assert (
        f"300 steps. {share:.0%} were clipped, to a norm of 1. 3 were skipped.".replace("%", " %")
        in page.texts
    )
    assert (
        f"Norm before clipping: median {np.median(finite):.4g}, largest 45 (step 92)." in page.texts
    )
    assert any(text.startswith("suggested: max_norm=") for text in page.texts)
    cells = page.texts[page.texts.index("median norm") :]
    assert cells[:4] == ["median norm", f"{np.median(finite):.5g}", "largest norm", "45"]
    largest = page.texts[page.texts.index("Largest steps: spiky") :]
    assert largest[1:5] == ["step", "norm", "× running median", "what was done"]
    median = np.nanmedian(norms[41:142])
    assert largest[5:13] == ["92", "45", f"{45 / median:.2g}", "clipped to 1", "251", "30", f"{30 / np.nanmedian(norms[200:300]):.2g}", "clipped to 1"]  # fmt: skip
    skips = page.texts[page.texts.index("Skipped steps: spiky") :]
    assert skips[1:6] == ["step", "norm", "culprits", "what was done", "41"]
    assert "w on rank 0: NaN" in skips and "skipped: 1 gradient was not finite" in skips


def test_kinds_of_runs_side_by_side(tmp_path):
    norms = 1 + 0.1 * np.sin(np.arange(150))
    logs = tmp_path / "logs"
    write_log(logs / "adaptive.jsonl", norms, distclip.AutoClip(50))
    write_log(
        logs / "layers.jsonl",
        norms,
        names=("a.w", "a.b", "c.w"),
        groups=distclip.by_name({"a.*": 0.5, "c.*": 2.0}),
    )
    write_log(logs / "measured.jsonl", norms, distclip.FixedNorm(math.inf))
    write_log(
        logs / "spikes.jsonl",
        np.where(np.arange(150) == 99, 70.0, norms),
        distclip.SkipSpikes(distclip.FixedNorm(2.0)),
    )
    write_log(logs / "value.jsonl", norms, distclip.FixedValue(0.25))
    page, text = made(tmp_path, logs)
    said = [text for text in page.texts if text.startswith("150 steps. ")]
    assert re.fullmatch(
        r"150 steps. \d+ % were clipped, to a threshold between [\d.]+ and [\d.]+. None was skipped.",
        said[0],
    )
    assert said[1:] == [
        "150 steps. 100 % were clipped; 2 groups have thresholds from 0.5 to 2. None was skipped.",
        "150 steps. No threshold was set: it only measured. None was skipped.",
        "150 steps. 0 % were clipped, to a norm of 2. 1 was skipped.",
        "150 steps. At 100 % elements were clamped to ±0.25. None was skipped.",
    ]
    assert "skipped: by the policy" in page.texts and "0.5 – 2" in page.texts
    data = data_of(text)
    assert [run["boundsNorm"] for run in data["runs"]] == [True, False, True, True, False]
    assert [heat["run"] for heat in data["heats"]] == [1] and "cosine" not in data["runs"][0]


def test_the_header_of_a_run_is_shown(tmp_path):
    lines = [made_line(step, 1.0) for step in range(1, 4)]
    log = write_lines(tmp_path / "run.jsonl", lines, {"run": "seed 3", "layers": ["a", "b"]})
    page, _ = made(tmp_path, log)
    facts = page.texts
    for name, value in {
        "run": "seed 3", "policy": "FixedNorm(1.0)", "norm": "p = 2", "ranks": "4", "not finite": "skip", "watched": "2 layers",
        "parameters": "12 with 34,567 elements", "started by": "torchrun", "device": "cpu", "begun": "2026-11-26 21:00 UTC",
        "versions": "distclip 0.1.0, torch 2.13.0, python 3.11.7",
    }.items():  # fmt: skip
        assert any(facts[i : i + 2] == [name, value] for i in range(len(facts))), name
    held = page.texts[page.texts.index("Who holds what") :]
    assert held[6:11] == ["12", "34,567", "replicated", "0-3", "4"]


def notable_lines():
    """Step 60 is the largest, rank 2's; 80 is not finite; from 90 on rank 3 stands out."""
    for step in range(1, 201):
        more, norm = {}, 1 + 0.01 * math.sin(step)
        if step == 60:
            norm = 30.0
            more = {
                "matters": "outlier", "layers": ["a", "b", "c"], "layer_norms": [1.0, 29.9, 2.0], "outlier_rank": 2,
                "rank_deviation": 40.0, "rank_norms": [1.0, 1.1, 59.0, 0.9], "action": "lower_lr",
                "notes": [{"rank": r, "step": 60, "note": {"shard": f"<{r}>"}, "cut": r == 2} for r in range(4)]
                + [{"rank": 2, "step": 59, "note": "before", "cut": False}],
            }  # fmt: skip
        if step == 80:
            norm = math.nan
            who = {"parameter": "b.w", "rank": 1, "kind": "inf", "before": "a.w", "after": "c.w"}
            more = {"culprits": [who], "layers": ["a", "b", "c"], "layer_norms": [1.0, None, 1.0]}
        if step >= 90:
            more = {"outlier_rank": 3, "rank_deviation": 9.0, "rank_norms": [1.0, 1.0, 1.0, 1.01]}
        yield made_line(step, norm, **more)


def test_a_notable_step_has_its_layer_rank_culprit_and_notes(tmp_path):
    page, _ = made(tmp_path, write_lines(tmp_path / "run.jsonl", notable_lines(), {}))
    at = page.texts.index("Largest steps: run")
    assert page.texts[at + 1 : at + 8] == [
        "step", "norm", "× running median", "layer, its share", "rank", "notes", "what was done",
    ]  # fmt: skip
    row = page.texts[at + 8 : at + 21]
    assert row[:5] == ["60", "30", "30", "b: 99.4 %", "2, norm 59, 40 deviations"]
    assert row[5] == 'rank 2: {"shard": "<2>"} (cut when it was logged)', (
        "the rank's own comes first"
    )
    assert row[6:11] == [
        'rank 0: {"shard": "<0>"}', "3 more", 'rank 1: {"shard": "<1>"}', 'rank 3: {"shard": "<3>"}',
        "rank 2, step 59: before",
    ]  # fmt: skip
    assert row[11] == "clipped to 1; asked to lower the learning rate"
    assert "90" in page.texts[at:] and "3, norm 1.01, 9 deviations" in page.texts[at:], (
        "the first of a streak"
    )
    assert page.texts.count("3, norm 1.01, 9 deviations") < 25, "not each of it"
    skips = page.texts[page.texts.index("Skipped steps: run") :]
    assert skips[6:11] == ["80", "not finite", "b: not finite", "b.w on rank 1: inf (finite: a.w before, c.w after)", "skipped: 1 gradient was not finite"]  # fmt: skip


def test_notes_of_a_thousand_ranks_are_shown_in_part(tmp_path):
    """This step's first, of these the rank's that lies off; and the page stays small."""
    notes = [
        {"rank": rank, "step": step, "note": f"{'x' * 1000}", "cut": False} for rank in range(1000) for step in (58, 59, 60)
    ]  # fmt: skip
    lines = [made_line(i, 1.0 + (i == 60), notes=notes if i in (60, 70, 71) else [], outlier_rank=777, skipped=i > 69) for i in range(1, 200)]  # fmt: skip
    page, _ = made(tmp_path, *(write_lines(tmp_path / f"{i}.jsonl", lines, {}) for i in range(4)))
    at = page.texts.index("Largest steps: 0")
    row = page.texts[page.texts.index("60", at) :]
    shown = [text for text in row[: row.index("clipped to 1")] if text.startswith("rank ")]
    assert [text.split(":")[0] for text in shown] == [
        "rank 777",
        *(f"rank {rank}" for rank in range(11)),
    ]
    assert "and 2,988 more in the log" in row and max(map(len, shown)) < 180
    later = page.texts[page.texts.index("Skipped steps: 0") :]
    assert any(text.startswith("rank 777, step 60: xxx") for text in later)


def test_a_spike_is_told_with_its_layer_and_rank(tmp_path, capsys):
    log = write_lines(tmp_path / "run.jsonl", notable_lines(), {})
    assert main(["suggest", "--json", str(log)]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    (text,) = [finding["text"] for finding in run["findings"] if finding["kind"] == "spikes"]
    assert (
        "; 99.4 % of the largest in b; rank 2 had by far the largest gradients, of norm 59" in text
    )


def said_of_ranks(tmp_path, capsys, lines):
    log = write_lines(tmp_path / "run.jsonl", lines, {})
    assert main(["suggest", "--json", str(log)]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    return [finding["text"] for finding in run["findings"] if finding["kind"] == "rank"]


def test_a_rank_that_lies_off_is_a_finding(tmp_path, capsys):
    assert said_of_ranks(tmp_path, capsys, notable_lines()) == [
        "the gradients of rank 3 lie off those of the others at 100 % of the steps from step 90 on, and at 0 % before: "
        "look at its data and its device"
    ]


def test_ranks_that_lie_off_by_chance_are_none(tmp_path, capsys):
    """Four ranks, one of which lies off at two steps of five by chance; then rank 2 at most."""
    draw = np.random.default_rng(0)
    by_chance = [int(draw.integers(4)) if draw.random() < 0.4 else None for _ in range(1000)]
    lines = [made_line(i, 1.0, outlier_rank=rank) for i, rank in enumerate(by_chance, 1)]
    assert said_of_ranks(tmp_path, capsys, lines) == []
    for line in lines[600:]:
        line["outlier_rank"] = 2 if draw.random() < 0.7 else line["outlier_rank"]
    (text,) = said_of_ranks(tmp_path, capsys, lines)
    share, step, before = map(int, re.fullmatch(
        r"the gradients of rank 2 lie off those of the others at (\d+) % of the steps from step (\d+) on, and at (\d+) % before: .*", text
    ).groups())  # fmt: skip
    assert 65 < share < 80 and 590 <= step <= 610 and 5 < before < 15
    for line in lines[:600]:
        line["outlier_rank"] = 2 if draw.random() < 0.7 else line["outlier_rank"]
    (text,) = said_of_ranks(tmp_path, capsys, lines)
    assert re.search(
        r"rank 2 lie off those of the others at 7\d % of the steps, first at step \d:", text
    )


def test_a_long_run_with_many_groups_stays_small_and_keeps_its_spikes(tmp_path):
    steps, names = 100_000, [f"model.layers.{i}.weight" for i in range(200)]
    draw = np.random.default_rng(0)
    norms, parts = draw.lognormal(0, 0.2, steps), draw.random((200, 200)).tolist()
    spikes = [61_233, 61_234, 61_236, 5, 99_998]
    norms[spikes] = [4000, 5000, 4500, 300, 200]

    def lines():
        for i, norm in enumerate(norms.tolist()):
            row = {"step": i + 1, "total_norm": norm, "clipped": norm > 1, "skipped": False}
            if i % 500 == 499:  # as JSONLSink(groups_every=500) writes it
                own = parts[i // 500]
                row |= {"groups": names, "group_norms": own, "coefs": [1.0] * 200, "threshold": [1.0] * 200}  # fmt: skip
            yield row

    page, text = made(tmp_path, write_lines(tmp_path / "long.jsonl", lines()))
    assert any("largest 5000 (step 61,235)" in said for said in page.texts)
    data = data_of(text)
    (run,), (heat,) = data["runs"], data["heats"]
    num = run["kept"]
    kept, values = column(run["step"], num).astype(int), column(run["norm"], num)
    assert num < 30_000 < steps and {at + 1 for at in spikes} <= set(kept)
    np.testing.assert_allclose(values, norms[kept - 1], rtol=1e-6)
    assert heat["total"] == 200 and len(heat["byMean"]) == len(heat["byLargest"]) == 24
    assert heat["labels"][0].startswith("layers.") and heat["removed"] == ["model.", ".weight"]


def test_rows_of_a_heat_map_are_chosen_by_mean_or_by_maximum(tmp_path):
    """A layer that holds nearly all of one step, and nothing else, is among the largest by
    maximum."""
    names = [f"l{i}" for i in range(60)]

    def line(step):
        norms = [2.0] * 30 + [1.0] * 30
        if step == 777:
            norms[59] = 500.0
        return made_line(step, 1.0, layers=names, layer_norms=norms)

    _, text = made(tmp_path, write_lines(tmp_path / "run.jsonl", map(line, range(1, 1001)), {}))
    (heat,) = data_of(text)["heats"]
    assert "l59" in [heat["names"][i] for i in heat["byLargest"]]
    assert "l59" not in [heat["names"][i] for i in heat["byMean"]]
    shares = column(heat["shares"], 0).reshape(len(heat["names"]), -1)
    row = shares[heat["names"].index("l59")]
    assert row.max() == 254 and (row > 200).sum() == 1
    first = column(heat["first"], 0)
    assert first[row.argmax()] <= 777 < first[row.argmax() + 1]


def test_thinning_keeps_extremes_of_every_stretch(tmp_path):
    y = np.sin(np.arange(10_000) / 50)
    y[[123, 7777]] = 9.0, -9.0
    y[5000] = np.nan
    kept = extreme_positions(y, 100)
    assert len(kept) <= 200 and (np.diff(kept) > 0).all() and {123, 7777} <= set(kept)
    for start in range(0, 10_000, 100):
        part = kept[(kept >= start) & (kept < start + 100)]
        assert np.nanmax(y[part]) == np.nanmax(y[start : start + 100])
        assert np.nanmin(y[part]) == np.nanmin(y[start : start + 100])
    norms = np.ones(10_000)
    norms[2000:2003] = 8.0, 20.0, 9.0
    norms[[4000, 4001]] = np.nan
    (run,), _ = read_runs([str(write_lines(tmp_path / "run.jsonl", [made_line(i, n) for i, n in enumerate(norms.tolist())]))])  # fmt: skip
    kept = kept_positions(NormHistory(run), 300)
    assert {0, 2000, 2001, 2002, 4000, 4001, 9999} <= set(kept) and len(kept) <= 310
    assert len(kept_positions(NormHistory(run), 10_000)) == 10_000


def test_columns_of_a_heat_map_are_maxima(tmp_path):
    log = write_lines(tmp_path / "run.jsonl", [
        made_line(i, 1.0, layers=["a", "b"], layer_norms=[1.0, 50.0 if i == 13 else 0.1]) for i in range(1, 101)
    ])  # fmt: skip
    (run,), _ = read_runs([str(log)])
    first, last, shares = merged_columns(run.parts[0], np.array([0, 1]), 10)
    assert first.tolist() == list(range(1, 101, 10)) and last.tolist() == list(range(10, 101, 10))
    assert (
        shares[1, 1] > 0.99
        and (np.delete(shares[:, 1], 1) < 0.02).all()
        and (shares[:, 0] > 0.9).all()
    )


def test_labels_lose_what_all_names_share():
    assert short_labels(["m.l.0.w", "m.l.1.w"]) == (["l.0", "l.1"], ["m.", ".w"])
    assert short_labels(["experts.1000", "experts.1011"]) == (["experts.1000", "experts.1011"], [])
    assert short_labels(["a", "b.c"]) == (["a", "b.c"], [])


def test_many_runs_share_the_room_of_a_page(tmp_path):
    for i in range(30):
        write_lines(tmp_path / "logs" / f"run {i:02}.jsonl", [made_line(s, 1.0 + (s * i) % 7) for s in range(2000)])  # fmt: skip
    page, text = made(tmp_path, tmp_path / "logs")
    data = data_of(text)
    assert len(data["runs"]) == 30 and sum(run["kept"] for run in data["runs"]) < 40_000
    assert sum(tag == "details" and "open" in attrs for tag, attrs in page.tags) == 3, (
        "more are folded"
    )


def test_names_that_look_like_html(tmp_path):
    log = write_log(
        tmp_path / "a<b>&'\".jsonl",
        [1.0, math.nan],
        names=("<i>.w", "<i>.b"),
        groups=distclip.per_parameter(),
    )
    page, _ = made(tmp_path, log)
    assert "a<b>&'\"" in page.texts and "<i>.w on rank 0: NaN" in page.texts


@pytest.mark.parametrize(
    "norms",
    [[1.0], [math.nan] * 5, [0.0] * 5, [1e300, 1e-300, 1.0]],
    ids=["one", "none finite", "zeros", "far"],
)
def test_runs_with_next_to_nothing_in_them(norms, tmp_path):
    log = tmp_path / "run.jsonl"
    rows = [
        {
            "step": i + 1,
            "total_norm": n if math.isfinite(n) else None,
            "skipped": not math.isfinite(n),
        }
        for i, n in enumerate(norms)
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page, _ = made(tmp_path, log)
    assert any(text.startswith(f"{len(norms)} step") for text in page.texts)


def test_a_page_that_cannot_be_written_is_exit_code_1(spiky, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert (
        main(["report", str(spiky), "--output", str(tmp_path / "file" / "folder" / "page.html")])
        == 1
    )
    assert capsys.readouterr().err.startswith("distclip report: [Errno ")


FULL = """
import resource, sys
from distclip.cli import main
import distclip.cli.report.page, distclip.cli.report.pictures  # what Python and matplotlib cache is on the disk before it is full
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_the_old_page_and_pictures(spiky, tmp_path):
    command = [
        "report",
        "--output",
        str(tmp_path / "out" / "page.html"),
        "--png",
        str(tmp_path / "out"),
    ]
    assert main([*command, str(spiky)]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(before) == 4 and max(map(len, before.values())) > 30_000, "vacuous"
    other = write_log(tmp_path / "other.jsonl", spiky_norms(seed=5))
    done = subprocess.run(
        [sys.executable, "-c", FULL, *command, str(other)], capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(
        "distclip report: [Errno 27] File too large"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before, (
        "nothing else is left there either"
    )


def at(name):
    return lambda folder, log: (folder / name, [log])


def linked(folder, log):
    """The page's name is a link to the log."""
    (folder / "page.html").symlink_to(log)
    return folder / "page.html", [log]


def named_as_a_page(folder, log):
    page = folder / "run.html"
    page.write_text(log.read_text())
    return page, [page]


def in_a_folder(folder, log):
    """Of a folder that is read."""
    (folder / "page.html").hardlink_to(log)
    return folder / "page.html", [folder]


def of_another_run(folder, log):
    page = folder / "other.html"
    page.write_text(log.read_text())
    return page, [log]


IS_READ = "is a log that is read here, and a log is never overwritten; name another output"
REFUSED_OUTPUTS = {
    "the log": (at("run.jsonl"), IS_READ),
    "a link to it": (linked, IS_READ),
    "a log named .html": (named_as_a_page, IS_READ),
    "one of a folder": (in_a_folder, IS_READ),
    "a log that is not read": (
        of_another_run,
        "is there and is no HTML page; it stays as it is, name another file",
    ),
    "png": (at("page.png"), "the page is HTML; name a file that ends in .html"),
    "no ending": (at("page"), "the page is HTML; name a file that ends in .html"),
    "another log's name": (at("new.jsonl"), "the page is HTML; name a file that ends in .html"),
}


@pytest.mark.parametrize("make, text", REFUSED_OUTPUTS.values(), ids=REFUSED_OUTPUTS)
def test_an_output_that_would_destroy_something_is_refused(make, text, spiky, tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    log.write_text(spiky.read_text())
    output, runs = make(tmp_path, log)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["report", *map(str, runs), "--output", str(output)]) == 2
    said = capsys.readouterr()
    assert (
        said.out == ""
        and said.err.startswith("distclip report: ")
        and str(output) in said.err
        and text in said.err
    )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_picture_is_written_over_no_log_and_nothing_else_but_a_picture(spiky, tmp_path, capsys):
    log = tmp_path / "page-norm.png"
    log.write_text(spiky.read_text())
    command = ["report", "--output", str(tmp_path / "page.html"), "--png", str(tmp_path)]
    assert main([*command, str(log)]) == 2
    assert f"{log} {IS_READ}" in capsys.readouterr().err and log.read_text() == spiky.read_text()
    assert main([*command, str(spiky)]) == 2
    assert f"{log} is there and is no PNG; it stays as it is" in capsys.readouterr().err
    assert main([*command[:-1], str(log), str(spiky)]) == 2
    assert f"{log} is a file where a folder is needed for --png" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


NAMES = (
    "layers.$x_1$.weight",
    "层.权重",
    "a^{b}\\frac{1}",
    "#0f5fa9",
    "0.00001234",
    "two\nlines\x1b[31m",
    "m" * 300,
)


def test_names_are_text_in_pictures_and_on_the_page(tmp_path, capsys):
    """No mathtext, no missing glyph that is told for each figure, and none of them changed."""
    logs = tmp_path / "logs"
    options = {"names": NAMES, "groups": distclip.per_parameter()}
    write_log(logs / "cost in $ and more $.jsonl", [0.5, 2.0] * 20, **options)
    write_log(logs / ("W" * 150 + ".jsonl"), [0.5, 2.0] * 20)
    write_log(logs / os.fsdecode(b"caf\xe9.jsonl"), [0.5, 2.0] * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        command = [
            "report",
            str(logs),
            "--output",
            str(tmp_path / "page.html"),
            "--png",
            str(tmp_path),
        ]
        assert main(command) == 0
    unknown = families_for(["层权重"])[1]
    note = (
        [f"note: no font here has {unknown}: boxes stand for them in the PNGs; the page shows them"]
        if unknown
        else []
    )
    assert capsys.readouterr().err.splitlines() == note
    page, text = made(tmp_path, logs)
    assert {"cost in $ and more $", "W" * 150, "caf\ufffd"} <= set(page.texts)
    (heat,) = data_of(text)["heats"]
    assert set(heat["names"]) == {*NAMES[:5], "two lines\ufffd[31m", NAMES[6]}
    assert len(list(tmp_path.glob("page-*.png"))) == 4


@pytest.mark.parametrize(
    "names",
    [["W" * 150] * 2, ["层" * 90] * 3, [f"run {i}" for i in range(8)]],
    ids=["W", "CJK", "eight"],
)
def test_a_legend_stays_inside_its_picture(names):
    with warnings.catch_warnings(), matplotlib.rc_context(_RC_PARAMS):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        axes = figure.subplots()
        for name in names:
            axes.plot([], [], label=shorten_name(name, _TITLE_COLUMNS))
        _add_legend(figure, axes)
        figure.draw_without_rendering()
        (legend,) = figure.legends
        box = legend.get_window_extent()
    assert (
        box.x0 >= 0
        and box.x1 <= figure.bbox.width
        and box.y0 >= 0
        and box.y1 < axes.get_tightbbox().y0
    )
    assert len(legend.get_texts()) == len(names)


def test_bent_directions_and_layers_have_pictures(tmp_path):
    lines = [made_line(i, 1.0, cosine=[0.5], layers=["a", "b"], layer_norms=[None if i == 9 else 1.0, i]) for i in range(1, 50)]  # fmt: skip
    log = write_lines(tmp_path / "run.jsonl", lines)
    command = ["report", str(log), "--output", str(tmp_path / "page.html"), "--png", str(tmp_path)]
    assert main(command) == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "page-norm", "page-coefficient", "page-clip_rate", "page-cosine", "page-layers-1",
    }  # fmt: skip
    assert "cosine" in data_of((tmp_path / "page.html").read_text())["runs"][0]


def test_without_matplotlib_only_the_pictures_are_missing(spiky, capsys, monkeypatch, tmp_path):
    for module in [m for m in sys.modules if m.startswith("distclip.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(spiky), "--png", "figures"]) == 1
    assert capsys.readouterr().err == (
        'distclip report: --png needs matplotlib: pip install "distclip[report]"\n'
    )
    assert main(["report", str(spiky)]) == 0


def test_shortened_names_keep_their_ends():
    assert shorten_name("abc", 3) == "abc" and shorten_name("abcdefghij", 6) == "ab…hij"
    assert shorten_name("层" * 10, 20) == "层" * 10 and shorten_name("层" * 10, 10) == "层层…层层"
