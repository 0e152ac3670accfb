"""The command itself: exit codes, closed pipes, and who speaks among ranks. What it imports:
tests/test_import.py."""

import os
import signal
import subprocess
import sys

import pytest

from cli.logs import write_log
from distclip.cli import main
from launch.programs import interruptible

COMMAND = [sys.executable, "-m", "distclip"]


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("logs") / "run.jsonl", [0.5, 2.0] * 100)


def piped(*arguments, **environment):
    """Exit code and stderr of a command whose reader is gone before it writes."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300, check=False,
            env=os.environ | environment,
        )  # fmt: skip
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["suggest", "LOG"],
        ["suggest", "--json", "LOG"],
        ["report", "LOG"],
        ["doctor", "--list"],
    ],
)
def test_a_closed_pipe_is_no_error_text(arguments, log, tmp_path):
    arguments = [str(log) if word == "LOG" else word for word in arguments]
    arguments += ["--output", str(tmp_path / "page.html")] if arguments[0] == "report" else []
    code, said = piped(*arguments)
    assert said == ""
    assert code == 141 or (code == 0 and arguments == ["--help"]), (
        "as of a program that SIGPIPE ended; argparse overlooks it unbuffered"
    )
    assert arguments[0] != "report" or (tmp_path / "page.html").stat().st_size > 10_000, (
        "it was written before"
    )


def test_the_doctor_goes_on_when_nobody_reads():
    assert piped("doctor", "--only", "copies") == (0, "")


def test_many_lines_into_a_pipe_that_closes_after_the_first(log):
    done = subprocess.run(
        ["bash", "-c", '"$@" | head -n 1; echo "${PIPESTATUS[0]}"', "bash", *COMMAND, "suggest", str(log)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    first, code = done.stdout.splitlines()
    assert first.startswith(f"{log}: 200 steps") and code in ("0", "141") and done.stderr == ""


def test_a_wrong_option_is_told_by_one_rank_of_a_node(capsys, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    for rank, said in (
        ("0", "distclip doctor: error: argument --timeout: abc is not a number of seconds above 0"),
        ("3", ""),
    ):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            main(["doctor", "--timeout", "abc"])
        assert capsys.readouterr().err.splitlines()[-1:] == [said][: len(said)]


@pytest.mark.parametrize("value", ["abc", "0", "-1", "nan", "inf", ""])
def test_seconds_that_are_none(value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", f"--timeout={value}"])
    assert (
        f"argument --timeout: {value} is not a number of seconds above 0" in capsys.readouterr().err
    )


def test_ctrl_c_has_no_traceback(log, tmp_path):
    pipe = tmp_path / "run.jsonl"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [*COMMAND, "suggest", str(pipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=interruptible,
    )
    with pipe.open("wb"):  # opens once the command reads, which then waits
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=300)
    assert (process.returncode, said) == (130, "")
