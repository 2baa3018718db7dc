"""The parity tool tested with itself: injected faults must be named, honest layers passed."""
