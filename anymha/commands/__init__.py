"""Commands beside those of `anymha.cli`: one module each, with a function `add_command`."""
