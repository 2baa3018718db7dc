"""The self-test of `compare`: injected faults must be named, correct layers must pass."""
