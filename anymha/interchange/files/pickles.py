"""The part of pickle that torch's files of weights use, read as data.

A pickle is a program for a small machine that may call anything. This machine knows how to build
dicts, lists, tuples, texts and numbers, and of all functions those below, which describe tensors;
it imports nothing and calls nothing. Another name in the file is an error. The number of its steps
bounds time and memory: a call takes a step for each item of its arguments, and for each in one that
is a text, list, tuple or dict. Values may lie in one another
as deep as they like, as nothing here descends into them; keys of dicts may not, as Python would.

References:
    PyTorch 2.13, ``torch/_utils.py``, ``_rebuild_tensor_v2`` and its kin.
    Python, ``Lib/pickletools.py``, for the machine.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, BinaryIO

from anymha.interchange.files.names import MAX_NAME
from anymha.interchange.files.reader import MAX_AXES
from anymha.text import quoted, shown

MAX_STEPS = 1_500_000
"""A tensor takes about 42 steps."""
SLOW_STEPS = {"SETITEM": 3, "SETITEMS": 3, "REDUCE": 3, "NEWOBJ": 3, "GLOBAL": 15,
              "STACK_GLOBAL": 15, "TUPLE1": 1, "TUPLE2": 1, "TUPLE3": 1}  # fmt: skip
"""The steps that an instruction counts besides, as it takes longer."""
CALL_STEPS = 2
"""The steps that a call counts for each item of its arguments."""
MAX_KEY = 16
"""The most items of a tuple that is a key of a dict."""
MAX_NUMBER = 2**53
"""The greatest number that is a key, as thousands of greater ones may have the same hash."""
MARK = object()


class RefusedPickle(ValueError):
    """A pickle that is broken, or holds more than tensors."""


@dataclass(frozen=True)
class PickledName:
    """The name of a function or class that the pickle mentions."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False)
class PickledObject:
    """An object of a class that is not made: what the pickle says of it.

    Args:
        kind: The name of its class, as ``"torch.distributed.checkpoint.metadata.Metadata"``.
        arguments: Those of its construction.
        state: Its state, which is often a dict of its attributes.
    """

    kind: str
    arguments: tuple[Any, ...]
    state: Any = None

    def __repr__(self) -> str:
        return f"an object of {self.kind}"  # its values may hold one another without end


@dataclass(frozen=True)
class Storage:
    """Elements in a record of their own.

    Args:
        dtype: torch's name of it, as ``"FloatStorage"``.
        key: The record's name.
        size: The number of elements; of bytes where the dtype is untyped.
    """

    dtype: str
    key: str
    size: int


@dataclass(frozen=True)
class StridedTensor:
    """A tensor: where its elements lie in a storage.

    Args:
        storage: The storage.
        offset: The first element.
        shape: The shape.
        strides: How far elements are apart, by axis.
        dtype: torch's name of the dtype where the storage is untyped, as ``"float8_e5m2"``.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str | None = None


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StridedTensor:
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise RefusedPickle("a tensor has no storage, or not a stride for each axis")
    if len(shape) > MAX_AXES:
        raise RefusedPickle(f"a tensor has {len(shape)} axes")
    sizes = (offset, *shape, *strides)
    if any(type(size) is not int or not 0 <= size < 2**63 for size in sizes):
        raise RefusedPickle(f"a tensor has the offset, shape and strides {quoted(sizes)}")
    return StridedTensor(storage, offset, tuple(shape), tuple(strides))


def _typed_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> StridedTensor:
    tensor = _tensor(storage, offset, shape, strides)
    dtype = rest[2]  # after `requires_grad` and the hooks
    if not isinstance(dtype, PickledName) or dtype.module != "torch":
        raise RefusedPickle(f"a tensor has the dtype {_word(dtype)}")
    return StridedTensor(tensor.storage, offset, tensor.shape, tensor.strides, dtype.name)


def _subclass(function: Any, kind: Any, arguments: Any, *state: Any) -> Any:
    return _call(function, arguments)


def _dict(pairs: Any = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in pairs}


def _key(key: Any) -> Any:
    """A key of a dict; Python descends into a tuple without end to find its hash."""
    parts = key if isinstance(key, tuple) else (key,)
    kinds = _PLAIN if isinstance(key, tuple) else _KEYS
    if len(parts) > MAX_KEY or not all(isinstance(part, kinds) for part in parts):
        raise RefusedPickle(
            "a key of a dict is neither a text nor a number, nor a tuple of these, of up to "
            f"{MAX_KEY}"
        )
    for part in parts:
        if isinstance(part, (str, bytes)) and len(part) > MAX_NAME:
            raise RefusedPickle(f"its name {quoted(part)} is too long")
        if isinstance(part, (int, float)) and abs(part) > MAX_NUMBER:
            raise RefusedPickle(f"a key of a dict is a number beyond {MAX_NUMBER}")
    return key


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "collections.OrderedDict": _dict,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *names: None,
    "builtins.set": lambda items=(): list(items),
    "__builtin__.set": lambda items=(): list(items),
    "_codecs.encode": lambda text, *rest: text,
    # What training loops save besides weights. It is left out.
    **dict.fromkeys(
        (
            "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",
            "argparse.Namespace", "pathlib.PosixPath", "pathlib._local.PosixPath",
            "pathlib.WindowsPath", "datetime.datetime", "datetime.timedelta", "collections.deque",
            "__builtin__.complex", "__builtin__.bytearray", "__builtin__.slice",
            "__builtin__.xrange", "builtins.complex", "builtins.bytearray", "builtins.slice",
            "builtins.range", "omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig",
            "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata",
            "omegaconf.nodes.AnyNode",
            "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
        ),
        lambda *parts: None,
    ),
    **dict.fromkeys(
        (
            "collections.defaultdict", "collections.Counter",
            "pytorch_lightning.utilities.parsing.AttributeDict",
            "lightning.pytorch.utilities.parsing.AttributeDict",
            "lightning.fabric.utilities.data.AttributeDict",
            "lightning_fabric.utilities.data.AttributeDict",
        ),
        lambda *parts: {},
    ),
}  # fmt: skip
_KINDS = (
    "torch.Tensor", "torch.nn.parameter.Parameter", "numpy.ndarray", "builtins.list",
    "builtins.dict", "builtins.int", "builtins.float", "__builtin__.list", "__builtin__.dict",
    "__builtin__.int", "__builtin__.long", "__builtin__.float", "typing.Any",
)  # fmt: skip
"""Classes that are mentioned and not called."""


_SIZED = (str, bytes, dict, list, tuple)
_PLAIN = (str, bytes, int, float, type(None))
_KEYS = (*_PLAIN, PickledName, PickledObject, Storage, StridedTensor)


def _word(value: Any) -> str:
    """How messages call a value: by its name, a text itself, others by their type alone."""
    if isinstance(value, (PickledName, str)):
        return shown(value)
    return type(value).__name__


def _named(module: Any, name: Any, classes: Container[str]) -> PickledName:
    if not isinstance(module, str) or not isinstance(name, str):
        raise RefusedPickle("a name is no text")
    full = PickledName(module, name)
    dtype = full.module in ("torch", "torch.storage") and full.name.isidentifier()
    if not dtype and not any(str(full) in known for known in (_FUNCTIONS, _KINDS, classes)):
        raise RefusedPickle(
            f"it holds {shown(full)}, which is code to run, and no code of a file is run. In "
            "torch, save `model.state_dict()`"
        )
    return full


def _call(function: Any, arguments: Any) -> Any:
    if not isinstance(function, PickledName) or str(function) not in _FUNCTIONS:
        raise RefusedPickle(f"it calls {_word(function)}, and no code of a file is run")
    if not isinstance(arguments, tuple):
        raise RefusedPickle(f"it calls {function} with {type(arguments).__name__}")
    return _FUNCTIONS[str(function)](*arguments)


def _storage(ident: Any) -> Storage:
    word, kind, key, _, size, *view = ident
    if any(view):  # of torch before 0.4
        raise RefusedPickle("it has a storage that is a view of another one")
    if not isinstance(key, (str, int)):
        raise RefusedPickle("the key of a storage is neither a text nor a number")
    if word != "storage" or not isinstance(kind, PickledName) or type(size) is not int or size < 0:
        raise RefusedPickle(f"it has an unknown reference {quoted(ident)}")
    return Storage(kind.name, str(key), size)


class PickleMachine:
    """Runs a pickle of tensors.

    Args:
        program: The pickle, or a stream that holds it from here on; after `run` the stream is at
            the pickle's end.
        classes: Names of classes whose objects the pickle may have besides, as `PickledObject`s.

    Attributes:
        storages: The storages that the pickle mentions, by key, once it has run.
    """

    def __init__(self, program: bytes | BinaryIO, classes: Container[str] = ()) -> None:
        self._classes = classes
        self._program = io.BytesIO(program) if isinstance(program, bytes) else program
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._steps = 0
        self.storages: dict[str, Storage] = {}

    def run(self) -> Any:
        """Run the pickle: the result is dicts, lists, `StridedTensor`s and plain values.

        Raises:
            RefusedPickle: it is broken, has too many steps, or holds more than tensors.
        """
        try:
            stream, stack, push, pushed = self._program, self._stack, self._stack.append, _PUSHED
            constants = _CONSTANTS
            while code := stream.read(1):
                name, read = _INSTRUCTIONS[code]
                self._steps += 1
                if name in pushed:
                    push(read(stream) if read else None)
                elif name in constants:
                    push(constants[name]())
                elif name == "STOP":
                    return stack.pop()
                else:
                    self._step(name, read(stream) if read else None)
                if self._steps > MAX_STEPS:
                    self._check_steps()
        except RefusedPickle:
            raise
        except _WRONG as error:
            raise RefusedPickle(f"its pickle is broken ({shown(error)})") from error
        raise RefusedPickle("its pickle is broken (pickle exhausted before seeing STOP)")

    def _check_steps(self) -> None:
        if self._steps > MAX_STEPS:
            raise RefusedPickle(f"its pickle takes more than {MAX_STEPS} steps")

    def _step(self, name: str, argument: Any) -> None:
        stack, memo = self._stack, self._memo
        self._steps += SLOW_STEPS.get(name, 0)
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _TUPLES:
            count = _TUPLES[name]
            items = self._marked() if count is None else stack[-count:]
            if count is not None:
                del stack[-count:]
                if len(items) < count:
                    raise IndexError("a tuple of more than there is")
            stack.append(tuple(items))
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(), stack.pop()][::-1] if name == "SETITEM" else self._marked()
            stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._marked()
            stack[-1].extend(items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            last = stack.pop() if name == "STACK_GLOBAL" else None
            module, word = (stack.pop(), last) if last else argument.split(" ", 1)
            stack.append(_named(module, word, self._classes))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            named = isinstance(function, PickledName)
            if isinstance(arguments, tuple) and not (named and str(function) == "_codecs.encode"):
                sizes = [len(arguments), *(len(a) for a in arguments if isinstance(a, _SIZED))]
                self._steps += CALL_STEPS * sum(sizes)
                self._check_steps()
            known = named and str(function) in self._classes
            called = PickledObject(str(function), arguments) if known else None
            stack.append(called if called else _call(function, arguments))
        elif name == "BINPERSID":
            storage = _storage(stack.pop())
            self.storages[storage.key] = storage
            stack.append(storage)
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], PickledObject):
                stack[-1].state = state  # that of others, as an OrderedDict, has no tensors
        elif name not in ("PROTO", "FRAME"):
            raise RefusedPickle(
                f"its pickle has the instruction {name}, which no file of tensors needs"
            )

    def _marked(self) -> list[Any]:
        """Pop the items above the last mark."""
        items, pop = [], self._stack.pop
        while (top := pop()) is not MARK:
            items.append(top)
        items.reverse()
        return items


_PUSHED = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "SHORT_BINSTRING", "BINSTRING",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_TUPLES = {"TUPLE": None, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_INSTRUCTIONS: dict[bytes, tuple[str, Callable[[BinaryIO], Any] | None]] = {
    one.code.encode("latin-1"): (one.name, one.arg.reader if one.arg else None)
    for one in pickletools.opcodes
}
_WRONG = (
    ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, MemoryError,
)  # fmt: skip
