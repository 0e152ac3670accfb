"""The order of the layers, where torch.distributed may appear, and what importing distclip pulls in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "distclip"

# A file imports only from those above it. A new file gets its place here.
ORDER = [
    "versions",
    "errors",
    "records",
    "groups",
    "fsdp1",
    "naming",
    "unfinished",
    "placement",
    "exchange",
    "tables",
    "holders",
    "plan",
    "kernels.build",
    "kernels.pool",
    "kernels.native",
    "kernels.triton_programs",
    "kernels.triton_lists",
    "kernels",
    "rows",
    "measure",
    "apply",
    "gradlist",
    "policies.policy",
    "policies.fixed",
    "policies.value",
    "policies.normalize",
    "policies.schedule",
    "policies.autoclip",
    "policies.zclip",
    "policies.adagc",
    "policies.agc",
    "policies.warmup",
    "policies.spikes",
    "policies",
    "deciding",
    "answers",
    "wire",
    "guard",
    "options",
    "amp",
    "owners",
    "calls",
    "expected",
    "collecting",
    "units",
    "sensing",
    "fold",
    "host",
    "history",
    "memory",
    "audit",
    "judging",
    "acting",
    "summary",
    "saving",
    "reading",
    "prepared",
    "report",
    "sinks",
    "trackers",
    "stepping",
    "clipper",
    "functional",
    "testing",
    "__init__",
    "integrations",
    "integrations.deepspeed_inside.engine",
    "integrations.deepspeed_inside.sharded",
    "integrations.deepspeed_inside.whole",
    "integrations.deepspeed_inside",
    "integrations.deepspeed",
    "integrations.scaler_rounds",
    "integrations.accelerate",
    "integrations.transformers",
    "integrations.lightning",
    "cli",
    "cli.doctor_records",
    "cli.doctor_board",
    "cli.doctor_watch",
    "cli.doctor_facts",
    "cli.doctor_layouts",
    "cli.doctor_clips",
    "cli.doctor_speed",
    "cli.doctor_table",
    "cli.doctor",
    "cli.runs",
    "cli.advice",
    "cli.suggest",
    "cli.svg",
    "cli.plotting",
    "cli.thinning",
    "cli.curves",
    "cli.heat",
    "cli.report_plots",
    "cli.report_html",
    "cli.report_page",
    "__main__",
]

# Public as files: what stands below __init__ may use these too.
PUBLIC_FILES = {"distclip.testing", "distclip.kernels", "distclip.versions"}

# Elsewhere the mathematics and the decisions know nothing of ranks. records: the type of placements alone.
DISTRIBUTED = {"records", "fsdp1", "naming", "placement", "exchange", "functional", "testing", "integrations.deepspeed_inside.sharded"}
DISTRIBUTED |= {f"cli.doctor{part}" for part in ("", "_board", "_watch", "_facts", "_layouts", "_speed")}  # it runs the layouts
# These name a type of it, in a signature or an isinstance, and call nothing.
TYPES_ONLY = {
    "clipper": {"ProcessGroup"},
    "collecting": {"DTensor"},
    "expected": {"DTensor"},
    "fold": {"DTensor"},
    "unfinished": {"FSDPModule"},
}


def module_name(path):
    name = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(text):
    """(module, names) of every import in a source text, at any depth."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", [alias.name for alias in node.names]


def out_of_order(name, text, order=ORDER):
    """Imports of distclip's own files that do not stand above `name`."""
    above = set(order[: order.index(name)])
    public = "__init__" in above  # what stands below it uses public names, and no file
    found = []
    for module, names in imports(text):
        if module == "distclip":
            found += [n for n in names if (n in above if public else n not in above)]
        elif public and name != "__main__" and not module.startswith(f"distclip.{name.split('.')[0]}"):
            found += [module] if module.startswith("distclip.") and module not in PUBLIC_FILES else []
        elif module.startswith("distclip."):
            inner = module.removeprefix("distclip.")
            found += [inner] if inner not in above else []
    return found


FILES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def test_every_file_has_its_place():
    assert sorted(FILES) == sorted(ORDER), "put a new file into ORDER"


@pytest.mark.parametrize("name", ORDER)
def test_imports_come_from_above(name):
    assert out_of_order(name, FILES[name].read_text()) == []


def test_the_check_catches_a_violation():
    assert out_of_order("measure", "def f():\n    from distclip.clipper import GradClipper\n") == ["clipper"]
    assert out_of_order("measure", "from distclip import audit, errors") == ["audit"]
    assert out_of_order("clipper", "import torch\nfrom distclip import apply") == []
    assert out_of_order("integrations.accelerate", "from distclip import GradClipper, apply") == ["apply"]
    assert out_of_order("cli.doctor", "from distclip.testing import World\nimport distclip.kernels.native") == ["distclip.kernels.native"]
    assert out_of_order("integrations.accelerate", "from distclip.clipper import GradClipper") == ["distclip.clipper"]


def of_distributed(text):
    """Names that a text takes from torch.distributed."""
    found = set()
    for module, names in imports(text):
        if module.startswith("torch.distributed"):
            found |= set(names) or {module}
        elif module == "torch" and "distributed" in names:
            found.add("distributed")
    return found


def test_where_torch_distributed_appears():
    found = {name: names for name, path in FILES.items() if (names := of_distributed(path.read_text()))}
    assert set(found) == DISTRIBUTED | set(TYPES_ONLY)
    assert {name: found[name] for name in TYPES_ONLY} == TYPES_ONLY
    assert of_distributed("from torch import distributed as d") == {"distributed"}


def test_importing_distclip_pulls_in_torch_alone():
    show = "import sys; {}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"

    def loaded(statement):
        done = subprocess.run([sys.executable, "-c", show.format(statement)], capture_output=True, text=True, check=True, timeout=600)
        return set(done.stdout.split())

    extra = loaded("import distclip") - loaded("import torch, torch.distributed.fsdp, torch.distributed.tensor")
    assert extra - set(sys.stdlib_module_names) == {"distclip"}
