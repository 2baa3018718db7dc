"""Two implementations compared stage by stage, and the errors that rounding explains."""
