"""How logs are read: whatever is broken, resumed, old, foreign or large."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from cli.logs import (
    HEADER,
    made_line,
    read,
    rewritten,
    rows_of,
    spiky_norms,
    write_lines,
    write_log,
)
from distclip.cli import main, progress
from distclip.cli.log_reader import read_runs

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def spiky(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("logs") / "spiky.jsonl", spiky_norms())


def test_a_resumed_run_has_two_headers_and_a_later_schema_is_told(tmp_path):
    log = write_lines(
        tmp_path / "run.jsonl", [made_line(i, 1.0) for i in (1, 2, 3)], {"world_size": 8}
    )
    second = HEADER | {
        "distclip_log": 3,
        "world_size": 4,
        "device": None,
        "plan": "?",
        "versions": 7,
    }
    with log.open("a") as file:
        for line in (second, made_line(3, 2.0), made_line(4, 2.0)):
            file.write(json.dumps(line) + "\n")
    run = read(log)
    assert [header.world_size for header in run.headers] == [8, 4]
    assert (run.headers[1].device, run.headers[1].plan, run.headers[1].versions) == ("", (), ())
    assert run.norm.tolist() == [1.0, 1.0, 2.0, 2.0]
    assert run.notes[1] == (
        f"{log}: written by a later distclip (log schema 3); what is new in it is not shown"
    )


def test_a_header_alone_is_no_run_yet(tmp_path, capsys):
    log = write_lines(tmp_path / "run.jsonl", [], {})
    assert main(["suggest", str(log)]) == 2
    assert f"{log}: it has a header and no step yet" in capsys.readouterr().err


def test_runs_are_named_by_their_headers(tmp_path):
    lines = [made_line(1, 1.0)]
    a = write_lines(tmp_path / "a.jsonl", lines, {"run": "same"})
    b = write_lines(tmp_path / "b.jsonl", lines, {"run": "same"})
    c = write_lines(tmp_path / "c.jsonl", lines, {"run": "own\x1b[31m"})
    d = write_lines(tmp_path / "d.jsonl", lines)
    runs, _ = read_runs([*map(str, (a, b, c, d))])
    assert [run.name for run in runs] == ["same (a)", "same (b)", "own\ufffd[31m", "d"]


def test_numbers_that_json_has_not_are_read_all_the_same(tmp_path):
    log = tmp_path / "run.jsonl"
    log.write_text(
        '{"step": 1, "total_norm": NaN, "skipped": 1, "clipped": "false"}\n'
        '{"step": 2, "total_norm": Infinity}\n{"step": 3, "total_norm": "2.5", "coefs": [0.5, -Infinity]}\n'
        '{"step": 4, "total_norm": 1e999}\n{"step": -1, "total_norm": 1}\n{"step": 9007199254740993, "total_norm": 1}\n'
        '{"step": 5, "total_norm": 1.0, "culprits": [{"parameter": "\\ud800x"}, 7], "skipped": true, "notes": 3}\n'
    )
    run = read(log)
    np.testing.assert_array_equal(run.norm, [np.nan, np.nan, 2.5, np.nan, 1.0])
    assert run.skipped.tolist() == [True, False, False, False, True] and run.coef[2] == 0.5
    assert run.details_of(4).culprits[0].parameter in ("?x", "\ufffdx")
    assert run.notes == (f"{log}: 2 lines are no report of distclip and left out: lines 5-6",)


MEASURE = """
import re, sys
from pathlib import Path
from distclip.cli import main, progress
import distclip.cli.report.command
def peak_mib():  # of this program alone: ru_maxrss begins with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) // 1024
before = peak_mib()
code = main(["report", sys.argv[1], "--output", sys.argv[2]])
print(before, peak_mib(), code)
"""


def test_a_large_log_takes_little_memory(tmp_path):
    """A quarter of a million lines: at most 250 bytes a step beyond what the program itself takes;
    a million then stay below 400 MB."""
    steps, log = 250_000, tmp_path / "run.jsonl"
    norms = np.random.default_rng(0).lognormal(0, 0.2, steps).tolist()
    norms[61_234] = 5000.0
    end = json.dumps(
        {k: v for k, v in made_line(1, 0.5).items() if k not in ("step", "total_norm")}
    )[1:]
    with log.open("w") as file:
        file.write(json.dumps(HEADER) + "\n")
        file.writelines(
            f'{{"step": {i}, "total_norm": {norm}, {end}\n' for i, norm in enumerate(norms, 1)
        )
    assert log.stat().st_size > 100e6
    page = tmp_path / "page.html"
    done = subprocess.run([sys.executable, "-c", MEASURE, str(log), str(page)], capture_output=True, text=True, timeout=600, check=True)  # fmt: skip
    before, after, code = map(int, done.stdout.splitlines()[-1].split())
    assert code == 0 and after - before < 75 and after < 160, (
        f"{before} MiB before, {after} MiB after"
    )
    assert page.stat().st_size < 2_000_000 and "step 61,235" in page.read_text()


def test_a_bar_is_shown_on_a_terminal_alone(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_SHOWN_FROM_BYTES", 0)
    monkeypatch.setattr(progress, "_INTERVAL_S", 0.0)
    log = write_lines(tmp_path / "run.jsonl", [made_line(i, 1.0) for i in range(200)])
    read(log)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    read(log)
    said = capsys.readouterr().err
    assert said.startswith("\rreading ") and "100% of" in said and said.endswith("\r\x1b[K")
    assert "█" * 30 in said


def test_runs_of_one_name_are_told_apart(spiky, tmp_path):
    first, second = tmp_path / "a" / "run.jsonl", tmp_path / "b" / "run.jsonl"
    for path in (first, second):
        path.parent.mkdir()
        path.write_text(spiky.read_text())
    assert [run.name for run in read_runs([str(first), str(second), str(first)])[0]] == [
        str(p.with_suffix("")) for p in (first, second)
    ]


NEW = ("cosine", "clip_rate", "skips", "norm_type", "layers", "layer_norms")


def test_logs_of_before_these_fields_are_read(spiky, tmp_path):
    old = tmp_path / "old.jsonl"
    old.write_text(spiky.read_text())
    rewritten(old, lambda row: {name: value for name, value in row.items() if name not in NEW})
    assert set(NEW) <= rows_of(spiky)[0].keys()
    now, before = read(spiky), read(old)
    for name in ("step", "norm", "after", "clipped", "skipped", "coef", "threshold"):
        np.testing.assert_array_equal(getattr(now, name), getattr(before, name))
    np.testing.assert_allclose(now.clip_rate, before.clip_rate, rtol=1e-6)
    assert before.headers == () and before.norm_type == 2


def test_what_cannot_be_read_is_named_and_the_rest_is_used(spiky, tmp_path, capsys):
    lines = spiky.read_text().splitlines()
    # a line cut off by a crash, and the next one appended to what was left
    lines[10] = lines[10][:40]
    lines[20:23] = ["", "no json", "[1, 2]", '{"loss": 1.0}', '{"step": "x", "total_norm": 1}']
    log = tmp_path / "broken.jsonl"
    log.write_bytes("\n".join(lines).encode()[:-30] + b"\xff\xfe")
    assert main(["report", str(log), "--output", str(tmp_path / "page.html")]) == 0
    notes = [
        f"{log}: 5 lines are no report of distclip and left out: lines 11, 22-25",
        f"{log}: line 303, the last, is cut short and left out: the run goes on, or was ended "
        f"while it wrote",
    ]
    assert capsys.readouterr().err.splitlines() == [f"note: {note}" for note in notes]
    run = read(log)
    assert run.notes == tuple(notes) and len(run) == 295


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
    assert main(["report", str(logs), "--output", str(tmp_path / "page.html")]) == 0
    assert capsys.readouterr().err.splitlines() == [f"note: {text}" for text in left_out]
    assert (tmp_path / "page.html").read_text().count("300 steps. ") == 1
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
