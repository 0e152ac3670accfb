"""Runs a script's `numbers` on two CPU processes, and prints what each of them saw."""

from distclip.testing import World


def table(seen):
    """Of the answers by rank, each a dict: a line for each name."""
    lines = [f"{'':12}" + "".join(f"rank {rank:<9}" for rank in range(len(seen)))]
    lines += [f"{name:12}" + "".join(f"{row[name]:<14.4g}" for row in seen) for name in seen[0]]
    return "\n".join(line.rstrip() for line in lines)


def show(numbers):
    with World(2) as world:
        print(table(world.run(numbers)))
