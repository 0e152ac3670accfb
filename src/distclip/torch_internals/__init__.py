"""Everything of torch that is private, in one room: DTensor's and FSDP1's inside, GradScaler's
records, `join()`'s mark.

What `nn.Module` keeps under `_parameters` and `_modules` is read in `setup` too. Each file checks
what it reads and refuses what it does not know by name, so that another release of torch ends in a
sentence.
"""
