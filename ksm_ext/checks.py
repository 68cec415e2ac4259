"""Argument checks with the one message form of the library.

Every message reads ```<name>` must be <expected>, got <found>. <what to do>.``
``ValueError`` is for shapes and values, ``TypeError`` for kinds and dtypes, ``RuntimeError`` for
numerics and environment.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from numbers import Integral, Real
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_SHOWN, _LONGEST = 6, 80  # parts of a sequence, and letters of anything, in a line


def message(name: str, expected: str, found: str, remedy: str) -> str:
    """Compose the one message form of the module's head."""
    return f"`{name}` must be {expected}, got {found}. {remedy}"


def shape_text(tensor: Tensor) -> str:
    """Spell a shape as ``(m, n)`` for a message."""
    return "shape (" + ", ".join(str(size) for size in tensor.shape) + ")"


def brief(result: Any) -> str:
    """``Name(table=(60, 2) float64, number=3)``: a dataclass in a line, to be its ``__repr__``."""
    shown = (f"{each.name}={_shown(getattr(result, each.name))}" for each in fields(result))
    return f"{type(result).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (tuple, list, dict)) and len(value) > _SHOWN:
        return f"{type(value).__name__} of {len(value):,}"
    first, *rest = repr(value).split("\n")
    return first if len(first) <= _LONGEST and not rest else f"{first[:_LONGEST]}…"


def listed(names: Iterable[object], shown: int = 6) -> str:
    """A few names in a line, and how many more there are."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - shown:,} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


def counted(count: int, noun: str) -> str:
    """Such as ``1 task`` and ``1,000 tasks``."""
    return f"{count:,} {noun}" + "s" * (count != 1)


def check_choice(
    name: str, value: object, choices: Sequence[object], remedy: str = "Choose one of these."
) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if not any(isinstance(value, type(each)) and value == each for each in choices):
        raise ValueError(
            message(name, f"one of {', '.join(map(repr, choices))}", _shown(value), remedy)
        )


def check_ndim(name: str, tensor: Tensor, ndim: int, meaning: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``ndim`` dimensions; ``meaning`` names them."""
    if tensor.ndim != ndim:
        remedy = "Reshape it so that its dimensions have this meaning."
        raise ValueError(message(name, f"{ndim}-dimensional {meaning}", shape_text(tensor), remedy))


def check_finite(name: str, tensor: Tensor, remedy: str = "") -> None:
    """Raise ``ValueError`` naming the first non-finite entries of ``tensor``."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor.detach().sum())):
        return  # one pass over memory: a sum has a NaN or an infinity if an entry has
    if not bool(torch.isfinite(tensor).all()):
        bad = (~torch.isfinite(tensor)).nonzero()
        first = tuple(bad[0].tolist())
        found = f"{len(bad)} NaN or infinite entries, the first {tensor[first].item()} at {first}"
        remedy = remedy or "Drop the subsets concerned, or find out why their runs diverged."
        raise ValueError(message(name, "finite", found, remedy))


def check_samples(name: str, good: Tensor, *, start: int = 0) -> None:
    """Raise ``ValueError`` naming the samples from ``start`` on that are not ``good`` (b,) bool."""
    if not bool(good.all()):
        numbers = (start + (~good).nonzero()[:5, 0]).tolist()
        found = f"NaN or infinity, or such a gradient, on samples {', '.join(map(str, numbers))}"
        remedy = "Look at these samples and the model's outputs for them."
        raise ValueError(message(name, "finite", found, remedy))


def check_positive_int(name: str, value: object, minimum: int = 1) -> int:
    """``value`` as Python's own integer, of any kind (not bool) and at least ``minimum``."""
    number = _item(value)
    remedy = f"Pass a whole number >= {minimum}."
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(message(name, "an integer", type(value).__name__, remedy))
    if number < minimum:
        raise ValueError(message(name, f"at least {minimum}", str(value), remedy))
    if int(number) >= 2**63:
        remedy = "Choose a smaller one."
        raise ValueError(message(name, "below 2**63", _shown(number), remedy))
    return int(number)


def check_real(
    name: str, value: object, expected: str = "a number", remedy: str = "Pass a number."
) -> float:
    """``value`` as Python's own float, of any real kind (not bool); NaN passes."""
    number = _item(value)
    if isinstance(number, bool) or not isinstance(number, Real):
        shown = value is None or isinstance(value, (str, bool))
        found = repr(value) if shown else type(value).__name__
        raise TypeError(message(name, expected, found, remedy))
    try:
        return float(number)
    except OverflowError as error:
        found = "one beyond the range of a float"
        raise ValueError(message(name, expected, found, remedy)) from error


def check_positive(
    name: str,
    value: object,
    remedy: str,
    *,
    zero: bool = False,
) -> float:
    """``value`` as Python's own float, finite and above zero, or ``zero`` where that is fine."""
    expected = "non-negative" if zero else "positive"
    number = check_real(name, value, f"a {expected} number", remedy)
    if not math.isfinite(number):
        expected = "finite"
    elif number > 0 or (zero and number == 0):
        return number
    raise ValueError(message(name, expected, str(number), remedy))


def check_level(name: str, value: object) -> float:
    """``value`` as Python's own float, strictly between 0 and 1: the coverage of an interval."""
    level = check_real(name, value)
    if not 0 < level < 1:
        remedy = "Pass 0.95 for 95 % intervals."
        raise ValueError(message(name, "strictly between 0 and 1", str(level), remedy))
    return level


def check_seed(name: str, value: object) -> int:
    """``value`` as Python's own integer of 64 bits, as PyTorch's generators take it."""
    return check_positive_int(name, value, minimum=-(2**63))


def check_function(
    name: str, value: object, arguments: Sequence[str], remedy: str, answer: str = "(b,)"
) -> None:
    """Raise ``TypeError`` unless ``value`` can be called with these arguments, by place."""
    expected = f"a function ({', '.join(arguments)}) -> {answer}"
    check_callable(name, value, expected, remedy)
    try:
        signature = inspect.signature(cast(Callable[..., Any], value))
    except ValueError:  # of compiled functions, which tell none
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise TypeError(message(name, expected, f"one of {signature}", remedy)) from error


def check_kind(name: str, value: object, kind: type, expected: str, remedy: str) -> None:
    """Raise ``TypeError`` unless ``value`` is one of a class."""
    if not isinstance(value, kind):
        raise TypeError(message(name, expected, type(value).__name__, remedy))


def check_tensor(name: str, value: object) -> None:
    """Raise ``TypeError`` unless ``value`` is a tensor."""
    check_kind(name, value, Tensor, "a tensor", "Convert it to one.")


def check_bool(name: str, value: object) -> bool:
    """``value`` as Python's own bool, of NumPy's and PyTorch's kind too; no number is one."""
    flag = _item(value)
    if not isinstance(flag, bool):
        raise TypeError(message(name, "True or False", _shown(value), "Pass one of the two."))
    return flag


def check_local_device(name: str, value: Any) -> torch.device | None:
    """``value`` as a device that is there; None stays."""
    try:
        return None if value is None else torch.empty(0, device=value).device
    except (TypeError, RuntimeError, ValueError, OverflowError, AssertionError) as error:
        remedy = "Pass 'cpu', or 'cuda' where there is a GPU."
        raise ValueError(
            message(name, "a device of this machine", _shown(value), remedy)
        ) from error


def check_several(name: str, value: Any, what: str) -> list[Any]:
    """What is in ``value``, read once: any iterable but text and mappings."""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping, type)):
        try:
            return list(value)
        except TypeError:
            pass  # an array of no dimensions
    raise TypeError(message(name, f"a list of {what}", _shown(value), "Put it into a list."))


def check_callable(name: str, value: object, expected: str, remedy: str) -> None:
    """Raise ``TypeError`` unless ``value`` can be called, and is no class."""
    if not callable(value) or isinstance(value, type):
        raise TypeError(message(name, expected, _shown(value), remedy))


_BY_ANNOTATION: dict[Any, Callable[[str, Any], Any]] = {
    bool: check_bool,
    torch.device | str | None: check_local_device,
}


def checked(function: Function) -> Function:
    """``function`` with its flags and devices checked, the arguments that are annotated as such."""
    parameters = inspect.signature(function).parameters
    checks = {
        name: _BY_ANNOTATION[each.annotation]
        for name, each in parameters.items()
        if each.annotation in _BY_ANNOTATION
    }

    @wraps(function)
    def checking(*given: Any, **named: Any) -> Any:
        placed = (
            checks[name](name, value) if name in checks else value
            for name, value in zip(parameters, given, strict=False)
        )
        for name in checks.keys() & named.keys():
            named[name] = checks[name](name, named[name])
        return function(*placed, *given[len(parameters) :], **named)

    return cast(Function, checking)


def _item(value: object) -> object:
    """What a scalar of NumPy, or an array or tensor of no dimensions, holds."""
    if isinstance(value, np.longdouble):
        return float(value)  # which has no Python number of its own
    if isinstance(value, (np.generic, np.ndarray, Tensor)) and value.ndim == 0:
        return value.item()
    return value
