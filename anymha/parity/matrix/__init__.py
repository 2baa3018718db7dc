"""The matrix: every case on every backend, judged against the oracle."""
