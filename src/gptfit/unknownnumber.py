"""What `.item()` gives before a backward, where a trace has no value: a number that may be added up, printed and
multiplied with, as it does not change what is allocated, and that nothing may be decided on."""

from typing import Any

from gptfit.errors import GptfitError


def no_value(where: str) -> GptfitError:
    """`where` is empty, or " in h.0.attn"."""
    return GptfitError(
        f"cannot trace .item() or a branch on a tensor{where}: a trace has no values",
        "write the step so that shapes and branches do not depend on tensor values",
    )


class UnknownNumber(float):
    """1.0 to whoever prints it. What is computed from it is unknown, too.

    Raises GptfitError where it is compared, or taken for an integer or a condition.
    """

    where: str

    def __new__(cls, where: str) -> "UnknownNumber":
        number = super().__new__(cls, 1.0)
        number.where = where
        return number

    def same(self, *_: Any) -> "UnknownNumber":
        return UnknownNumber(self.where)

    def refuse(self, *_: Any) -> Any:
        raise no_value(self.where)

    __hash__ = float.__hash__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = same
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __mod__ = __rmod__ = __pow__ = __rpow__ = same
    __neg__ = __pos__ = __abs__ = same
    __bool__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = refuse
    __int__ = __index__ = __trunc__ = __floor__ = __ceil__ = refuse

    def __round__(self, n_digits: Any = None) -> Any:
        return self.refuse() if n_digits is None else self.same()
