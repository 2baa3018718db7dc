"""A fuzzer of the readers of files: ``python -m tests.fuzz`` or ``nox -s fuzz``.

Small honest files of every format are damaged, at random bytes and along the format's structure,
and read, inspected and converted in a process with little memory and little time. Each must end
with an error of anymha, or with the right arrays, and touch no file beside its own.

- `samples`: the honest files.
- `mutations`: the damages; a seed repeats them.
- `worker`: the process that reads.
- `command`: what runs both, and keeps the files that fail.
"""
