"""The tests of anymha; a package, so that they share `tests.support`."""
