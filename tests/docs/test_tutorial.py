"""The tutorial's file, grown by its diffs; every step runs on four ranks and does what the page says."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

PAGE = (Path(__file__).parents[2] / "docs" / "tutorial.md").read_text()


def grown():
    """The file after each step, by the step's name."""
    (first,) = re.findall(r"<!-- file: train.py -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    files, text, name = {"start": first}, first, ""
    for chapter in PAGE.split("\n## ")[2:]:
        for mark, diff in re.findall(
            r"(?:<!-- step: (\w+) -->\n)?```diff\n(.*?)```", chapter, re.DOTALL
        ):
            old = "".join(f"{x[1:]}\n" for x in diff.splitlines() if not x.startswith("+"))
            new = "".join(f"{x[1:]}\n" for x in diff.splitlines() if not x.startswith("-"))
            assert text.count(old) == 1, f"this diff does not fit:\n{diff}"
            text = text.replace(old, new)
            name = mark or name
            files[name] = text
    return files


FILES = grown()


def trained(code, folder):
    """On one rank: the numbers that rank 0 prints, and the parameters' bits. The ranks are there
    already, so that the file's own meeting is left out."""
    meet, part = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = dist.destroy_process_group = lambda *_: None
    names = {}
    try:
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "train.py", "exec"), names)
    finally:
        dist.init_process_group, dist.destroy_process_group = meet, part
    losses = [float(x) for x in re.findall(r"loss ([\w.]+)", out.getvalue())]
    bits = [p.detach().double().sum().item() for p in names["model"].parameters()]
    skipped = names["report"].skips.item() if "report" in names else 0
    return losses, bits, skipped


def test_the_steps(ranks, tmp_path, capsys):
    from distclip.cli import main

    assert list(FILES) == ["start", "measure", "clip", "resume"]
    told = {}
    for name, code in FILES.items():
        (tmp_path / name).mkdir()
        seen = ranks.run(trained, code, str(tmp_path / name))
        assert all(rank[1] == seen[0][1] or name in ("start", "measure") for rank in seen), name
        told[name] = seen[0][0]
    first, *later = told["start"]
    assert first < 0.5 and not any(loss < 2 * first for loss in later), "it never comes back"
    assert told["measure"][0] == pytest.approx(first, rel=1e-3), "measuring changes nothing"
    assert told["clip"][-1] < told["clip"][0] < 0.5
    lines = [json.loads(x) for x in (tmp_path / "clip" / "run.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 200 and lines[49]["clipped"] and lines[49]["total_norm"] > 100
    assert max(line["total_norm"] for line in lines[10:49]) < 1
    assert main(["suggest", str(tmp_path / "measure" / "run.jsonl")]) == 0
    assert "the run diverged at step 50" in capsys.readouterr().out
    assert main(["suggest", str(tmp_path / "clip" / "run.jsonl")]) == 0
    assert "50, 100, 150" in capsys.readouterr().out


def test_it_resumes(ranks, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir(), stopped.mkdir()
    seen = ranks.run(trained, FILES["resume"], str(whole))
    ranks.run(trained, FILES["resume"].replace("200)", "100)"), str(stopped))
    resumed = ranks.run(trained, FILES["resume"], str(stopped))
    assert int(torch.load(stopped / "checkpoint.pt")["step"]) == 200
    for rank in resumed:  # DDP sums its first step in other buckets, so the last digits differ
        assert rank[1] == pytest.approx(seen[0][1], rel=1e-4)
    assert len(resumed[0][0]) == 2, "the last 100 steps alone"
