"""Right and wrong uses, for type checkers."""
