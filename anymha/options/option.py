"""`Option`: the type of an option that is passed in several forms, and read in one of them."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

In_contra = TypeVar("In_contra", contravariant=True)
Out_co = TypeVar("Out_co", covariant=True)
T = TypeVar("T")


class Option(Generic[In_contra, Out_co]):
    """A field that is passed as one type, and read as another.

    Type checkers take it for the field's descriptor. It is an annotation: no code creates one.
    """

    def __get__(self, instance: Any, owner: Any) -> Out_co:
        raise NotImplementedError

    def __set__(self, instance: Any, value: In_contra) -> None:
        raise NotImplementedError


def taken(annotation: Any) -> Any:
    """The type that is passed, of an annotation ``"Option[In, Out]"``; others stay as they are."""
    text = str(annotation)
    return text[len("Option[") : text.rindex(",")] if text.startswith("Option[") else annotation


def shows_taken(cls: type[T]) -> type[T]:
    """Show in `help` of a dataclass what its options take."""
    shown: Any = cls.__init__
    shown.__annotations__ = {name: taken(x) for name, x in shown.__annotations__.items()}
    return cls
