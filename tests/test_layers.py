"""The order of the folders, no cycles inside one, and where torch.distributed may appear."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "distclip"

# What stands in a room (a folder, or a file beside the folders) imports from its own room and from
# those above it in this list. What lies beside one another in src/distclip/README.md's picture lies
# one below the other here: later stages know earlier ones.
ROOMS = [
    "versions",
    "errors",
    "passed",
    "values",
    "p_norm",
    "torch_internals",
    "records",
    "groups",
    "kernels",
    "exchange",
    "policies",
    "setup",
    "optimizers",
    "request",
    "measure",
    "decide",
    "apply",
    "report",
    "stages",
    "step",
    "clipper",
    "functional",
    "testing",
    "api",
    "__init__",
    "integrations",
    "cli",
    "__main__",
]

# Public as files: what stands below __init__ may use these too.
PUBLIC_FILES = {"distclip.testing", "distclip.kernels", "distclip.versions"}

# Elsewhere the mathematics and the decisions know nothing of ranks. records: the type of placements
# alone.
DISTRIBUTED = {
    "torch_internals.dtensor",
    "torch_internals.fsdp1",
    "records",
    "setup.parameters",
    "setup.placement",
    "setup.reductions",
    "exchange.channel",
    "functional",
    "testing",
    "integrations.deepspeed_internals.engine",
    "integrations.deepspeed_internals.sharded",
    "integrations.joined_ranks",
    "integrations.megatron",
}
DISTRIBUTED |= {
    f"cli.doctor.{part}"
    for part in (
        "command",
        "store",
        "watchdog",
        "facts",
        "layouts",
        "speed_checks",
        "framework_jobs",
        "torchtitan_job",
    )
}  # it runs the layouts
# These name a type of it, in a signature or an isinstance, and call nothing.
TYPES_ONLY = {
    "clipper": {"ProcessGroup"},
    "torch_internals.join": {"Join", "Joinable"},
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


def own_imports(text):
    """distclip's own files that a source text imports, by their names below `distclip`; "" for the
    package itself."""
    for module, names in imports(text):
        if module == "distclip":
            files = [name for name in names if name in FILES]
            yield from files or [""]
        elif module.startswith("distclip."):
            inner = module.removeprefix("distclip.")
            files = [f"{inner}.{name}" for name in names if f"{inner}.{name}" in FILES]
            yield from files or [inner]


def room_of(name):
    return name.split(".")[0]


def out_of_order(name, text):
    """Imports of distclip's own files that do not stand in the room of `name` or above it."""
    room = room_of(name)
    above = set(ROOMS[: ROOMS.index(room)])
    if "__init__" not in above:
        return [inner for inner in own_imports(text) if room_of(inner) not in {*above, room}]
    # what stands below __init__ uses public names, and no file that is not public
    return [
        inner
        for inner in own_imports(text)
        if inner
        and room_of(inner) != room
        and f"distclip.{inner}" not in PUBLIC_FILES
        and not (name == "__main__" and inner == "cli")
    ]


FILES = {module_name(path): path for path in SOURCE.rglob("*.py")}


def test_every_file_has_its_room():
    assert {room_of(name) for name in FILES} == set(ROOMS), (
        "put a new folder, or a file beside the folders, into ROOMS"
    )


@pytest.mark.parametrize("name", sorted(FILES))
def test_imports_come_from_above(name):
    assert out_of_order(name, FILES[name].read_text()) == []


def test_no_files_import_one_another_in_a_circle():
    graph = {
        name: {inner for inner in own_imports(path.read_text()) if inner in FILES}
        for name, path in FILES.items()
    }
    assert sum(map(len, graph.values())) > 100, "vacuous"
    for name in ("__init__", "integrations", "cli"):  # look their files up when they are named
        graph[name] = set()
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_the_check_catches_a_violation():
    assert out_of_order(
        "measure.collect", "def f():\n    from distclip.clipper import GradClipper\n"
    ) == ["clipper"]
    assert out_of_order("exchange.message", "from distclip import decide, errors") == ["decide"]
    assert out_of_order("measure.units", "from distclip.decide import audit") == ["decide.audit"]
    assert out_of_order("clipper", "import torch\nfrom distclip.apply import fused") == []
    assert out_of_order("integrations.accelerate", "from distclip import GradClipper, stages") == [
        "stages"
    ]
    assert out_of_order(
        "cli.doctor.command", "from distclip.testing import World\nimport distclip.kernels.native"
    ) == ["kernels.native"]
    assert out_of_order("integrations.accelerate", "from distclip.clipper import GradClipper") == [
        "clipper"
    ]


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
    found = {
        name: names for name, path in FILES.items() if (names := of_distributed(path.read_text()))
    }
    assert set(found) == DISTRIBUTED | set(TYPES_ONLY)
    assert {name: found[name] for name in TYPES_ONLY} == TYPES_ONLY
    assert of_distributed("from torch import distributed as d") == {"distributed"}
