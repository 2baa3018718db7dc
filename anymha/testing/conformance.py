"""The conformance tests of a backend: every function, capability, and rule of the layer."""

from anymha.testing.arithmetic import ArithmeticTests
from anymha.testing.arrays import ArrayTests
from anymha.testing.capabilities import CAPABILITIES
from anymha.testing.capability_tests import CapabilityTests
from anymha.testing.framework import FrameworkTests
from anymha.testing.layer import GradientTests, LayerTests

__all__ = ["CAPABILITIES", "Conformance", "FunctionTests", "SemanticsTests"]


# pytest runs the tests of the last base first: functions before the layer, which breaks with them.
class FunctionTests(CapabilityTests, FrameworkTests, ArithmeticTests, ArrayTests):
    """Every function of `anymha.framework.protocol.Ops`, against NumPy; what may be beside them.

    A part of `Conformance`, for a backend whose functions are written before its layer.

    Example:
        >>> from anymha.testing import FunctionTests
        >>> from anymha_numpy import ops
        >>> class TestFunctions(FunctionTests):
        ...     backend = ops
    """


class SemanticsTests(GradientTests, LayerTests):
    """Every rule of the layer, against the float64 oracle.

    A part of `Conformance`: masks, causality, windows, dropout, dtypes and gradients.

    Example:
        >>> from anymha.testing import SemanticsTests
        >>> from anymha_numpy import ops
        >>> class TestMeaning(SemanticsTests):
        ...     backend = ops
    """


class Conformance(SemanticsTests, FunctionTests):
    """All tests of a backend. Name it in `backend`, in a class whose name begins with Test.

    Attributes:
        backend: The module of functions. Or override the fixture `ops`, which gives it.
        requires: Names out of `CAPABILITIES`; what is named here and lacking is a failure.

    Example:
        >>> from anymha.testing import Conformance
        >>> from anymha_numpy import ops
        >>> class TestNumPy(Conformance):
        ...     backend = ops
        ...     requires = ("float64",)
    """
