"""The main job: every case on every backend, judged against the oracle."""
