"""distclip inside the frameworks that own the training loop. Each file needs its framework, and is imported only by who names it."""
