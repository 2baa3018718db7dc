"""Commands beside those of `anymha.cli.main`: one module each, with a function `add_command`."""
