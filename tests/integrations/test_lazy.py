"""`distclip.integrations` after `import distclip` alone: found when it is named, and what is
missing is named with its extra."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from integrations.launched import SOURCE

FRAMEWORKS = ["accelerate", "deepspeed", "lightning", "megatron", "torchtitan", "transformers"]


def told_by(program):
    """The JSON that a fresh interpreter prints last."""
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


HIDDEN = """
import json, sys
for name in {hidden}:
    sys.modules[name] = None  # as if it were not installed
import distclip
def text(statement):
    try:
        exec(statement, {{"distclip": distclip}})
    except (ImportError, AttributeError) as error:
        return f"{{type(error).__name__}}: {{error}}"
print(json.dumps([text(statement) for statement in {statements}]))
"""


def said(hidden, *statements):
    return told_by(HIDDEN.format(hidden=hidden, statements=list(statements)))


def test_without_the_framework_its_extra_is_named():
    lacks = (
        "ModuleNotFoundError: distclip.integrations.{0} needs {0}, which is not installed "
        'here: pip install "distclip[{0}]"'
    )
    named = [f"distclip.integrations.{name}" for name in FRAMEWORKS]
    imported = "from distclip.integrations.lightning import GradientClipping"
    seen = said(FRAMEWORKS, *named, imported, "import distclip.integrations.accelerate")
    assert seen == [lacks.format(name) for name in [*FRAMEWORKS, "lightning", "accelerate"]]


def test_names_that_there_are_not():
    assert said([], "distclip.integration", "distclip.integrations.keras") == [
        "AttributeError: module 'distclip' has no attribute 'integration'",
        "AttributeError: module 'distclip.integrations' has no attribute 'keras'; it has "
        "accelerate, deepspeed, lightning, megatron, torchtitan, transformers",
    ]


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_trainer_needs_accelerate_too():
    assert said(["accelerate"], "distclip.integrations.transformers") == [
        "ModuleNotFoundError: distclip.integrations.transformers needs accelerate, which is not "
        "installed here: "
        'pip install "distclip[transformers,accelerate]"'
    ]


@pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed")
def test_lightning_does_not_need_accelerate():
    assert said(
        ["accelerate"], "distclip.integrations.lightning.GradientClipping(max_norm=1.0)"
    ) == [None]


def test_nothing_is_imported_before_it_is_named():
    program = """
import json, sys
import distclip
before = [name for name in sys.modules if name.startswith("distclip.integrations")]
listed = "integrations" in dir(distclip)
inside = [name for name in dir(distclip.integrations) if not name.startswith("_")]
loaded = sorted({"accelerate", "deepspeed", "lightning", "megatron", "torchtitan", "transformers"} & sys.modules.keys())
print(json.dumps([before, listed, inside, loaded]))
"""
    assert told_by(program) == [[], True, FRAMEWORKS, []]
