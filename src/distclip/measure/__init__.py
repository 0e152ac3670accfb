"""This rank's gradients become float64 power sums.

In: parameters with their gradients, the plan. Out: a `LocalMeasurement`, one number for each
parameter, and what is wrong here as texts. It never communicates and never raises: what is wrong
travels in the message. (`grad_placements` alone talks, before a step, and only where
`partial_grads="reduce"` asks it to.)
"""
