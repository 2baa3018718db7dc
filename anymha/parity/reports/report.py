"""`Comparison`: the result of a comparison, and the forms in which it is written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from anymha.interchange.files.atomic_write import write_atomically
from anymha.parity.reports.comparison_view import comparison_document
from anymha.parity.reports.document import Document, to_json
from anymha.parity.reports.junit import to_junit
from anymha.parity.reports.markdown import to_markdown
from anymha.parity.reports.outcome import Outcome
from anymha.parity.reports.page import to_page
from anymha.parity.reports.result import ComparisonResult
from anymha.parity.stages.saved_case import save_case


@dataclass(frozen=True)
class Comparison(ComparisonResult):
    """Two implementations on the same inputs.

    Args:
        reference: The name of what is right.
        candidate: The name of what is judged.
        stages: What was compared, in order: stages, scores, weights, gradients.
        first_divergence: The first stage that is wrong itself; None where all agree.
        diagnosis: Why they differ; None where they do not.
        not_exercised: Features of the call that change nothing with these inputs.
        notes: What a reader should know.
        request: The call.
        traces: The results of both.
        exact: The reference's stages in float64.
        reported: The stages that the candidate reports.
        command_names: The names of both on the command line, where they come from there.
        environment: The versions and switches under which it ran.

    Example:
        >>> import anymha, numpy as np
        >>> from anymha.parity import compare
        >>> layer = anymha.MultiHeadAttention(2, 4, query_features=8, backend="numpy", seed=0)
        >>> x = np.random.default_rng(0).standard_normal((2, 5, 8)).astype("float32")
        >>> def port(query, use_causal_mask):
        ...     return layer(query)
        >>> report = compare(layer, port, x, use_causal_mask=True)
        >>> report.passed, report.first_divergence
        (False, 'masked_logits')
        >>> print(report.to_markdown().splitlines()[0])
        ### ❌ port against anymha in numpy
    """

    def __repr__(self) -> str:
        return f"<Comparison: {self.verdict}>"

    def __str__(self) -> str:
        return self.to_text()

    def to_json(self, path: str | Path) -> None:
        """Write everything but the arrays as JSON; docs/compare.md has the schema.

        Args:
            path: The file.

        Raises:
            FileError: it cannot be written.
        """
        write_atomically(Path(path), to_json(self._document()))

    def to_html(self, path: str | Path) -> None:
        """Write one HTML file that loads nothing: verdict, stages, pictures, cause, how to repeat.

        Args:
            path: The file.

        Raises:
            FileError: it cannot be written.
        """
        write_atomically(Path(path), to_page(self._document()))

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The report as Markdown, for the summary of a CI job.

        Args:
            path: Where to write it too.

        Returns:
            The text.

        Raises:
            FileError: it cannot be written.
        """
        text = to_markdown(self._document())
        if path is not None:
            write_atomically(Path(path), text)
        return text

    def to_junit(self, path: str | Path) -> None:
        """Write JUnit's XML: a test case for each stage.

        Args:
            path: The file.

        Raises:
            FileError: it cannot be written.
        """
        write_atomically(Path(path), to_junit(self._document()))

    def save(self, path: str | Path) -> None:
        """Write inputs, masks, arguments, and the known weights of both, into an ``.npz`` file.

        ``anymha compare REFERENCE CANDIDATE --inputs case.npz`` repeats the case.

        Args:
            path: The file.

        Raises:
            FileError: it cannot be written, or does not end in ``.npz``.
        """
        save_case(Path(path), self.request, self.traces)

    def with_notes(self, *notes: str) -> Comparison:
        """The same with further notes."""
        return dataclasses.replace(self, notes=(*self.notes, *notes))

    def _document(self) -> Document:
        return comparison_document([Outcome("", self.reference, self.candidate, self)])
