"""What a step saw and did, as the caller gets it and as sinks write it.

In: norms, decision and flags of a step. Out: a `ClipReport`; host copies reach the sinks one call
late on CUDA. It changes nothing, and a sink that fails never stops the training.
"""
