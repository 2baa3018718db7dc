"""The independent float64 oracle, and the problems that it answers."""
