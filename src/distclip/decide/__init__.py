"""The reduced message becomes a decision that is equal on every rank.

In: the reduced message, the policies and their states. Out: global norms, a `ClipDecision`, or an
error that every rank raises. A step that is fine sends nothing more; naming what is wrong does.
"""
