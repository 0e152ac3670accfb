"""The page: whole, alone, small, in light and dark, and what it says; its figures; logs that are
broken, resumed, old and new."""

import json
import math
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import distclip
from cli.logs import BAD, SPIKES, rewritten, rows_of, spiky_norms, write_log
from distclip.cli import main
from distclip.cli.glyphs import families_for, shorten_name
from distclip.cli.report.heat import _norm_shares
from distclip.cli.report.plots import draw_figures
from distclip.cli.report.plotting import _PNG_COLUMNS, _RC_PARAMS, _WIDE_SIZE, _add_legend
from distclip.cli.report.thinning import clipped_shares, thinned_points
from distclip.cli.run_log import RunError, read_runs

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
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def made(folder, *runs):
    """The page's text, after it was looked over: it needs nothing from outside and holds both forms
    of each figure."""
    output = folder / "out" / "page.html"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    text = output.read_text()
    page = Page(text)
    assert len(text.encode()) < 2_000_000
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe")
        for name, value in attrs.items():
            assert name not in ("src", "href") or value.startswith(
                ("#", "data:image/png;base64,")
            ), (tag, name, value[:80])
    assert (
        "http" not in text and "url(" not in re.sub(r"url\(#", "", text) and "@import" not in text
    )
    ids = Counter(attrs["id"] for _, attrs in page.tags if "id" in attrs)
    assert max(ids.values()) == 1
    used = set(re.findall(r'(?:href="|url\()#([\w-]+)', text))
    assert used and used <= ids.keys()
    shown = page.all("svg")
    assert [svg["class"] for svg in shown] == ["wide", "narrow"] * (len(shown) // 2) and all(
        svg["role"] == "img" for svg in shown
    )
    assert all(len(svg["aria-label"]) > 40 and svg["viewbox"] for svg in shown)
    pictures = sorted(output.parent.glob("page-*.png"))
    assert len(pictures) == len(shown) // 2 >= 3
    assert all(path.read_bytes()[:8] == PNG and path.stat().st_size > 4000 for path in pictures)
    return page, text


@pytest.fixture(scope="module")
def spiky(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("logs") / "spiky.jsonl", spiky_norms())


def test_the_command_writes_a_page_and_pictures(spiky, tmp_path):
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
        "--png",
        "figures",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        "page.html: 2 runs, 3 figures; PNG: figures/page-norm.png, figures/page-coefficient.png, "
    )
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "page-clip_rate.png", "page-coefficient.png", "page-norm.png",
    ]  # fmt: skip
    page = Page((tmp_path / "page.html").read_text())
    assert [text for text in page.texts if text in ("spiky", "other")].count("other") >= 4, (
        "a card, and the legend of each figure"
    )


def test_what_it_says_of_a_run(spiky, tmp_path):
    page, _ = made(tmp_path, spiky)
    norms = np.array(
        [row["total_norm"] if row["total_norm"] is not None else np.nan for row in rows_of(spiky)]
    )
    finite = norms[np.isfinite(norms)]
    assert (
        f"300 steps. {(finite > 1).sum() / 300:.1%} were clipped, to a norm of 1. 3 were skipped."
        in page.texts
    )
    assert (
        f"Norm before clipping: median {np.median(finite):.4g}, largest 45 (step 92)." in page.texts
    )
    assert (
        "3 of 300 steps had norms that are not finite; they are left out of all percentiles"
        in page.texts
    )
    assert any(text.startswith("suggested: max_norm=") for text in page.texts)
    cells = page.texts[page.texts.index("median norm") :]
    assert cells[:4] == ["median norm", f"{np.median(finite):.5g}", "largest norm", "45"]
    skips = page.texts[page.texts.index("spiky: skipped steps") :]
    assert skips[4:13] == [
        "41", "1 gradient is not finite", "w on rank 0: NaN", "42", "1 gradient is not finite", "–",
        "181", "1 gradient is not finite", "w on rank 0: NaN",
    ]  # fmt: skip
    for label in (
        "norm (unit of the gradients)",
        "step (optimizer steps)",
        "coefficient (factor)",
        "clipped steps (%)",
    ):
        assert page.texts.count(label) >= 2, "on the wide and the narrow figure"


def test_light_and_dark_have_all_colours(spiky, tmp_path):
    _, text = made(tmp_path, spiky)
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = (
        style[: style.index("@media (prefers-color-scheme: dark)")],
        style[style.index("@media (prefers-color-scheme: dark)") :],
    )
    drawn = text[text.index("<svg") :]
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert {"--ink", "--muted", "--grid", "--s0"} <= used
    for name in used:
        assert f"{name}: #" in light and f"{name}: #" in dark
    assert not re.findall(r"(?:fill|stroke): #(?!fff)[0-9a-f]{6}", drawn), (
        "a colour that would stay in the dark"
    )


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
    page, _ = made(tmp_path, logs)
    said = [text for text in page.texts if text.startswith("150 steps. ")]
    assert re.fullmatch(
        r"150 steps. [\d.]+% were clipped, to a threshold between [\d.]+ and "
        r"[\d.]+. None was skipped.",
        said[0],
    )
    assert said[1:] == [
        "150 steps. 100.0% were clipped; 2 groups have thresholds from 0.5 to 2. None was skipped.",
        "150 steps. No threshold was set: it only measured. None was skipped.",
        "150 steps. 0.0% were clipped, to a norm of 2. 1 was skipped.",
        "150 steps. At 100.0% elements were clamped to ±0.25. None was skipped.",
    ]
    assert "left out by the policy: norm 70" in page.texts
    assert "layers: which group dominates" in page.texts and page.texts.count("share (%)") == 2
    assert "0.5 – 2" in page.texts, "thresholds of the groups"


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


def test_a_long_run_with_many_groups_stays_small_and_keeps_its_spike(tmp_path):
    log, steps, names = (
        tmp_path / "long.jsonl",
        100_000,
        [f"model.layers.{i}.weight" for i in range(200)],
    )
    draw = np.random.default_rng(0)
    norms, parts = draw.lognormal(0, 0.2, steps), draw.random((200, 200)).tolist()
    norms[61_234] = 5000
    with log.open("w") as file:
        for i, norm in enumerate(norms.tolist()):
            row = {
                "step": i + 1,
                "total_norm": norm,
                "norm_after": min(norm, 1.0),
                "clipped": norm > 1,
                "skipped": False,
                "nonfinite": 0,
            }
            if i % 500 == 499:  # as JSONLSink(groups_every=500) writes it
                own = parts[i // 500]
                row |= {
                    "groups": names,
                    "group_norms": own,
                    "coefs": [1.0] * 200,
                    "threshold": [1.0] * 200,
                }
            file.write(json.dumps(row) + "\n")
    page, text = made(tmp_path, log)
    assert any("largest 5000 (step 61,235)" in said for said in page.texts)
    assert "others have" in text and "The 24 largest of 200" in text
    top = [float(tick) for tick in page.texts if re.fullmatch(r"1000|10000", tick)]
    assert top, "the axis reaches up to the spike"


def test_thinning_keeps_extremes_and_gaps():
    y = np.sin(np.arange(10_000) / 50)
    y[[123, 7777]] = 9.0, -9.0
    y[5000] = np.nan
    x = np.arange(10_000) * 2
    kept_x, kept_y = thinned_points(x, y, 100)
    assert len(kept_x) <= 301 and (np.diff(kept_x) > 0).all()
    assert np.nanmax(kept_y) == 9 and np.nanmin(kept_y) == -9 and np.isnan(kept_y).sum() == 1
    assert (y[kept_x // 2][~np.isnan(kept_y)] == kept_y[~np.isnan(kept_y)]).all()
    assert (
        thinned_points(x[:150], y[:150], 100)[1] is not None
        and len(thinned_points(x[:150], y[:150], 100)[0]) == 150
    )


def test_shares_of_clipped_steps_and_of_groups_are_those_of_numpy(tmp_path):
    norms = np.where(np.arange(500) % 5 == 0, 2.0, 0.5)
    (one,), _ = read_runs([str(write_log(tmp_path / "run.jsonl", norms))])
    _, share = clipped_shares(one, 50)
    assert share.tolist() == [0.2] * 50
    log = write_log(
        tmp_path / "parts.jsonl",
        [1.0, 2.0, math.nan],
        names=("a", "b"),
        groups=distclip.per_parameter(),
    )
    rewritten(
        log,
        lambda row: (
            row
            | {
                "group_norms": [3.0 * row["step"], None if row["step"] == 3 else 4.0 * row["step"]],
                "norm_type": 2.0,
            }
        ),
    )
    (two,), _ = read_runs([str(log)])
    np.testing.assert_allclose(
        _norm_shares(two, two.parts[0]), [[36, 64], [36, 64], [np.nan, np.nan]], rtol=1e-12
    )


def test_the_rolling_rate_of_old_logs(tmp_path):
    norms = np.random.default_rng(3).lognormal(0, 0.5, 700)
    log = rewritten(
        write_log(tmp_path / "run.jsonl", norms),
        lambda row: {k: v for k, v in row.items() if k != "clip_rate"},
    )
    (one,), _ = read_runs([str(log)])
    clipped = np.array([row["clipped"] for row in rows_of(log)])
    expected = [clipped[max(0, i - 499) : i + 1].mean() for i in range(700)]
    assert 0.1 < clipped.mean() < 0.9
    np.testing.assert_allclose(one.clip_rate.numpy(), expected, rtol=1e-12)


def test_bent_directions_and_watched_layers_are_drawn(tmp_path):
    watch = distclip.Watch(distclip.per_parameter(), every=10)
    options = {"names": ("a", "b"), "direction": (0.96, 0.28, 0.0, 0.0), "watch": watch}
    with pytest.warns(RuntimeWarning, match="its cosine with the raw one is 0.88"):
        log = write_log(tmp_path / "run.jsonl", np.ones(60), distclip.FixedValue(0.2), **options)
    (one,), _ = read_runs([str(log)])
    gradient = np.array([0.96, 0.28, 0.0, 0.0] * 2) / math.sqrt(2)
    clamped = gradient.clip(-0.2, 0.2)
    np.testing.assert_allclose(
        one.cosine,
        gradient @ clamped / np.linalg.norm(gradient) / np.linalg.norm(clamped),
        rtol=1e-6,
    )
    assert one.parts[0].kind == "layer" and one.parts[0].steps.tolist() == [10, 20, 30, 40, 50, 60]
    np.testing.assert_allclose(_norm_shares(one, one.parts[0]), 50, rtol=1e-6)
    page, _ = made(tmp_path, log)
    assert (
        "Cosine between raw and clipped gradient" in page.texts
        and "run: which layer dominates" in page.texts
    )
    assert page.texts[page.texts.index("clipped, of the last 500 steps") + 1] == "100.00%"
    assert any(
        text.startswith("value clipping bends the direction: at 100.0% of the steps")
        for text in page.texts
    )


NEW = ("cosine", "clip_rate", "skips", "norm_type", "layers", "layer_norms")


def test_logs_of_before_these_fields_are_read(spiky, tmp_path):
    old = tmp_path / "old.jsonl"
    old.write_text(spiky.read_text())
    rewritten(old, lambda row: {name: value for name, value in row.items() if name not in NEW})
    assert set(NEW) <= rows_of(spiky)[0].keys()
    _, now = made(tmp_path, spiky)
    _, before = made(tmp_path, old)
    assert Page(before).texts == [text.replace("spiky", "old") for text in Page(now).texts]


def test_what_cannot_be_read_is_named_and_the_rest_is_used(spiky, tmp_path, capsys):
    lines = spiky.read_text().splitlines()
    # a line cut off by a crash, and the next one appended to what was left
    lines[10] = lines[10][:40]
    lines[20:23] = ["", "no json", "[1, 2]", '{"loss": 1.0}', '{"step": "x", "total_norm": 1}']
    log = tmp_path / "broken.jsonl"
    log.write_bytes("\n".join(lines).encode()[:-30] + b"\xff\xfe")
    page, _ = made(tmp_path, log)
    notes = [
        f"{log}: 5 lines are no report of distclip and left out: lines 11, 22-25",
        f"{log}: line 302, the last, is cut short and left out: the run goes on, or was ended "
        f"while it wrote",
    ]
    assert capsys.readouterr().err.splitlines() == [f"note: {note}" for note in notes]
    assert set(notes) <= set(page.texts) and any(
        text.startswith("295 steps. ") for text in page.texts
    )


def test_of_repeated_steps_the_later_line_counts(tmp_path, capsys):
    log = write_log(tmp_path / "run.jsonl", [2.0] * 20)
    text = log.read_text()
    log.write_text(
        text + "".join(json.dumps(row | {"total_norm": 3.0}) + "\n" for row in rows_of(log)[14:])
    )
    (one,), _ = read_runs([str(log)])
    assert one.norm.tolist() == [2.0] * 14 + [3.0] * 6
    assert one.notes == (
        f"{log}: 6 steps are there more than once (a run that was resumed?); the later line counts",
    )
    log.write_text(text + text.splitlines()[4] + "\n")
    (two,), _ = read_runs([str(log)])
    assert two.notes[1] == (
        f"{log}: its last line is step 5, yet step 20 stands before it; were "
        f"two runs written to one file?"
    )


def empty(path):
    path.write_text("")


def no_log(path):
    path.write_bytes(PNG + bytes(range(256)) + b"\n{}\n")


def folder(path):
    path.mkdir()


WRITE = 'write one with GradClipper(..., sinks=[distclip.JSONLSink("run.jsonl")])'
UNUSABLE = {
    "missing": (
        lambda path: None,
        "{}: No such file or directory; pass the file that JSONLSink wrote",
    ),
    "empty": (empty, "{}: it is empty; " + WRITE),
    "something else": (no_log, "{}: none of its 5 lines is a report of distclip; " + WRITE),
    "an empty folder": (
        folder,
        "{} is a folder without *.jsonl files; pass the file that JSONLSink wrote",
    ),
}


@pytest.mark.parametrize("command", ["report", "suggest"])
@pytest.mark.parametrize("make, text", UNUSABLE.values(), ids=UNUSABLE)
def test_a_log_that_cannot_be_used_is_exit_code_2(
    make, text, command, spiky, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.jsonl"
    make(path)
    assert main([command, str(spiky), str(path)]) == 2
    assert capsys.readouterr().err == f"distclip {command}: {text.format(path)}\n"
    assert not (tmp_path / "report.html").exists()


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
import distclip.cli.report.html, distclip.cli.report.plots  # what Python and matplotlib cache is on the disk before it is full
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
sys.exit(main(sys.argv[1:]))
"""


def test_a_full_disk_leaves_the_old_page_and_pictures(spiky, tmp_path):
    made(tmp_path, spiky)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert len(before) == 4 and max(map(len, before.values())) > 30_000, "vacuous"
    other = write_log(tmp_path / "other.jsonl", spiky_norms(seed=5))
    command = [
        sys.executable,
        "-c",
        FULL,
        "report",
        str(other),
        "--output",
        str(tmp_path / "out" / "page.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
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


def test_a_picture_is_not_written_over_a_log_either(spiky, tmp_path, capsys):
    log = tmp_path / "page-norm.png"
    log.write_text(spiky.read_text())
    assert main(["report", str(log), "--output", str(tmp_path / "page.html")]) == 2
    assert f"{log} {IS_READ}" in capsys.readouterr().err and log.read_text() == spiky.read_text()


def test_of_a_folder_what_is_no_log_is_left_out_and_named(spiky, tmp_path, capsys):
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "good.jsonl").write_text(spiky.read_text())
    (logs / "a_nan.jsonl").write_text('{"step": 1, "total_norm": null}\n')
    (logs / "b_empty.jsonl").write_text("")
    (logs / "c_foreign.jsonl").write_text('{"loss": 1.0}\n' + "[" * 100_000 + "\n")
    (logs / "d_folder.jsonl").mkdir()
    (logs / "e_loop.jsonl").symlink_to(logs / "e_loop.jsonl")
    os.mkfifo(logs / "f_pipe.jsonl")  # nobody writes into it: reading it would wait for ever
    left_out = [
        f"left out: {logs}/b_empty.jsonl: it is empty; {WRITE}",
        f"left out: {logs}/c_foreign.jsonl: none of its 2 lines is a report of distclip; {WRITE}",
        f"left out: {logs}/d_folder.jsonl is no file",
        f"left out: {logs}/e_loop.jsonl: Too many levels of symbolic links; pass the file that "
        f"JSONLSink wrote",
        f"left out: {logs}/f_pipe.jsonl is no file",
    ]
    page, _ = made(tmp_path, logs)
    assert capsys.readouterr().err.splitlines() == [f"note: {text}" for text in left_out]
    assert sum(text.startswith("300 steps. ") for text in page.texts) == 1
    nothing = (
        f"left out: {logs}/a_nan.jsonl: none of its 1 steps has a finite norm above 0; log "
        f"a "
        f"run that trains"
    )
    assert main(["suggest", "--json", str(logs)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [run["run"] for run in said["runs"]] == [str(logs / "good.jsonl")] and said[
        "left_out"
    ] == [nothing, *left_out]
    (logs / "good.jsonl").unlink()
    assert main(["suggest", str(logs)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "distclip suggest: none of the folder's files can be used", nothing, *left_out,
    ]  # fmt: skip
    assert main(["suggest", str(spiky), str(logs / "b_empty.jsonl")]) == 2, (
        "one that is named itself must be a log"
    )


NAMES = (
    "layers.$x_1$.weight",
    "层.权重",
    "a^{b}\\frac{1}",
    "#0f5fa9",
    "0.00001234",
    "two\nlines\x1b[31m",
    "m" * 300,
)


def test_names_are_text_in_figures_too(tmp_path, capsys):
    """No mathtext, no missing glyph that is told for each figure, no name that leaves the picture;
    and none of them changed."""
    logs = tmp_path / "logs"
    options = {"names": NAMES, "groups": distclip.per_parameter()}
    write_log(logs / "cost in $ and more $.jsonl", [0.5, 2.0] * 20, **options)
    write_log(logs / ("W" * 150 + ".jsonl"), [0.5, 2.0] * 20)
    write_log(logs / os.fsdecode(b"caf\xe9.jsonl"), [0.5, 2.0] * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page, _ = made(tmp_path, logs)
    shown = {
        "layers.$x_1$.weight",
        "a^{b}\\frac{1}",
        "#0f5fa9",
        "0.00001234",
        "two lines\ufffd[31m",
        "层.权重",
    }
    assert shown <= set(page.texts)
    assert {"cost in $ and more $", "W" * 150, "caf\ufffd"} <= set(page.texts)
    unknown = families_for(["层权重"])[1]
    note = (
        [f"note: no font here has {unknown}: boxes stand for them in the PNGs; the page shows them"]
        if unknown
        else []
    )
    assert capsys.readouterr().err.splitlines() == note


@pytest.mark.parametrize(
    "names",
    [["W" * 150] * 2, ["层" * 90] * 3, [f"run {i}" for i in range(8)]],
    ids=["W", "CJK", "eight"],
)
def test_a_legend_stays_inside_its_picture(names):
    with warnings.catch_warnings(), matplotlib.rc_context(_RC_PARAMS):
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure = Figure(figsize=_WIDE_SIZE, layout="constrained")
        axes = figure.subplots()
        _add_legend(figure, [shorten_name(name, _PNG_COLUMNS) for name in names])
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


def test_shortened_names_keep_their_ends():
    assert shorten_name("abc", 3) == "abc" and shorten_name("abcdefghij", 6) == "ab…hij"
    assert shorten_name("层" * 10, 20) == "层" * 10 and shorten_name("层" * 10, 10) == "层层…层层"


def test_without_matplotlib_it_says_what_to_install(spiky, capsys, monkeypatch, tmp_path):
    for module in [m for m in sys.modules if m.startswith("distclip.cli.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(spiky)]) == 1
    assert capsys.readouterr().err == (
        'distclip report: figures need matplotlib: pip install "distclip[report]"\n'
    )


def test_runs_of_one_name_are_told_apart(spiky, tmp_path):
    first, second = tmp_path / "a" / "run.jsonl", tmp_path / "b" / "run.jsonl"
    for path in (first, second):
        path.parent.mkdir()
        path.write_text(spiky.read_text())
    assert [run.name for run in read_runs([str(first), str(second), str(first)])[0]] == [
        str(p.with_suffix("")) for p in (first, second)
    ]


def test_the_oracle_sees_spikes_and_gaps(spiky):
    """Not vacuous: the log that most tests here use has what they look for."""
    (one,), _ = read_runs([str(spiky)])
    assert one.step[one.norm > 10].tolist() == [at + 1 for at in SPIKES] and one.step[
        one.skipped
    ].tolist() == [at + 1 for at in BAD]
    assert torch.equal(one.skipped, ~one.finite) and {
        figure.name for figure in draw_figures([one])[0]
    } == {"norm", "coefficient", "clip_rate"}
    with pytest.raises(RunError):
        read_runs([str(spiky.with_name("none"))])
