"""The decision reaches this rank's gradients, in place, or by a fused optimizer's own pass.

In: a decision and the gradients that were measured. Out: the gradients, multiplied or clamped. It
decides nothing and sends nothing.
"""
