"""The command line: a module for each command, with a function `add_command`."""
