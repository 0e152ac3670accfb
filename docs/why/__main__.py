"""All scripts of this folder in one go: python docs/why [--json]"""

import importlib
import json
import sys
from pathlib import Path

from distclip.testing import World
from showing import table

SCRIPTS = sorted({p.stem for p in Path(__file__).parent.glob("*.py")} - {"__main__", "showing"})

if __name__ == "__main__":
    found = {}
    with World(2) as world:
        for name in SCRIPTS:
            script = importlib.import_module(name)
            found[name] = world.run(script.numbers)
            if "--json" not in sys.argv:
                print(f"{name}: {script.__doc__}\n{table(found[name])}\n")
    if "--json" in sys.argv:
        print(json.dumps(found))
