"""The layers that are timed, by framework. Each module runs in a process of its own."""
