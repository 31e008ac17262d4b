"""Numbers as the paper prints them: `82.5`, `355 mln`, `6.7 B`, `52%`, `1.24e-4`."""

import re
from dataclasses import dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal

_PATTERN = re.compile(r"(?P<number>-?\d+(\.\d+)?([eE][-+]?\d+)?)\s*(?P<unit>%|M|mln|B)?")
_SCALES = {"": 1, "%": 1, "M": 10**6, "mln": 10**6, "B": 10**9}


@dataclass(frozen=True)
class Printed:
    """A printed number with its digits.

    Attributes:
        number: The number before the unit, digits kept (`Decimal("0.10")` has two decimals).
        unit: `%`, `M`, `mln`, `B` or empty.
    """

    text: str
    number: Decimal
    unit: str

    @property
    def value(self) -> float:
        """The value in units of one (of one percent for `%`): `355 mln` is 355e6."""
        return float(self.number * _SCALES[self.unit])

    @property
    def rounding(self) -> float:
        """Half a unit of the last printed digit, in the unit of `value`: 0.05 for `82.5`."""
        return float(self.digit * _SCALES[self.unit] / 2)

    def round(self, exact: float) -> "Printed":
        """Print `exact` with the same digits and unit, halves away from zero."""
        return self._print(exact, ROUND_HALF_UP)

    def truncate(self, exact: float) -> "Printed":
        """Print `exact` with the same digits and unit, the rest cut off."""
        return self._print(exact, ROUND_DOWN)

    @property
    def digit(self) -> Decimal:
        """A unit of the last printed digit, before the unit: 0.1 for `82.5` and for `6.7 B`."""
        return Decimal(1).scaleb(int(self.number.as_tuple().exponent))

    def _print(self, exact: float, mode: str) -> "Printed":
        number = (Decimal(repr(exact)) / _SCALES[self.unit]).quantize(self.digit, rounding=mode)
        return Printed(f"{number}{'' if self.unit in ('', '%') else ' '}{self.unit}", number, self.unit)


def parse(text: str) -> Printed:
    """Read a printed number.

    Raises:
        ValueError: If the text is not a number with a known unit.
    """
    match = _PATTERN.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"cannot read {text!r} as a printed number; a number and one of %, M, mln, B are understood")
    return Printed(text.strip(), Decimal(match["number"]), match["unit"] or "")
