"""The one collective of a step, and the channel over which set-up and failure paths talk.

In: this rank's power sums and check words, packed into one vector. Out: the same vector, summed
over all ranks. It knows nothing of parameters or policies; whatever is sent goes through `Channel`.
"""
