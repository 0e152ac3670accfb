"""`distclip suggest`: which threshold would have clipped a run, and how often."""
