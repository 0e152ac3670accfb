"""What the caller passed becomes an agreed `Plan`: which part of which parameter this rank holds,
copied over whom, counted by how much, in which group. Runs when a clipper is built or rebuilt.

In: modules or parameters, the checked options. Out: `Plan`, equal on all ranks where it must be.
It may talk (a few small all-reduces) and refuse; it never reads a gradient.
"""
