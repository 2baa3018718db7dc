"""`compare` and `assert_parity`: two implementations, one call, and where and why they part."""
