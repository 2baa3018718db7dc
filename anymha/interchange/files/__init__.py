"""Arrays by name in files: one module for each format, and a table of them in `formats`."""
