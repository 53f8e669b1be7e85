"""What both systems stand on: transformer, training loop, checkpoints, metrics, reports.

Knows neither system, but for names of their fields and parameters in `workdir.LATER_FIELDS`, `optim.MATRICES` and
`mesh.EXPERT_PATTERN`.
"""
