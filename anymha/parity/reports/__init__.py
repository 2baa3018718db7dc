"""The forms of the report: HTML, JUnit, Markdown, terminal, JSON of several comparisons."""
