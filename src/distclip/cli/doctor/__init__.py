"""`distclip doctor`: facts about this machine or cluster, and checks of clipping against a float64
oracle."""
