"""What a case is, and the damage that all areas do to bytes, texts and numbers."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WORDS = (
    *("nan", "-nan", "NaN", "inf", "-inf", "Infinity", "1e400", "-1e400", "1e308", "1e-308", "5e-324", "-0.0", "0"),
    *("-1", "1", "0.5", "1e5", "1e10", "2147483648", "-9223372036854775809", "9" * 30, "9" * 5000, "0x10", "1_000"),
    *("1,5", "3.0.1", "٣", "½", "", " ", "None", "null", "true", "[]", "{}", "?", ".", "-", "'", '"', "\\", "%s", "\0"),
    *("Qq", "D", "X", "\ufeff", "\udcff", "é", "\U0001f600", "a" * 3000, "(1)", "data_", "loop_", "../../etc/passwd"),
)
NUMBERS = (
    *(float("nan"), float("inf"), float("-inf"), -1.0, 0.0, -0.0, 1e-320, 1e308, -1e308, 1e30, 0.5, 2.0, 1.0),
    *(0, 1, -1, 2, 255, 256, 65536, 2**31, 2**63, -(2**63), 10**30),
)


@dataclass
class Case:
    """One input for cfrl, in the working folder.

    command: words of the command line after `cfrl`, or a function that calls into it.
    names: a refusal has to hold one of them: the file's name, the setting's.
    wrong: why the input must be refused; "" where that is not known beforehand.
    sound: it must not be refused.
    check: looks at what came of an accepted input; says what is wrong with it, or "".
    """

    command: list[str] | Callable[[], object]
    names: Sequence[str]
    wrong: str = ""
    sound: bool = False
    check: Callable[[], str] = lambda: ""


Area = Callable[[random.Random], Case]


def damaged(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut off, changed, moved, repeated, or none of the kind."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        start = rng.randrange(len(data) + 1)
        part = slice(start, start + rng.choice((1, 2, 4, 8, 64, 512)))
        size = len(data[part])
        match rng.randrange(8):
            case 0:
                del data[start:]
            case 1:
                data[part] = rng.randbytes(size)
            case 2:
                data[part] = bytes((byte ^ 1 << rng.randrange(8)) for byte in data[part])
            case 3:
                data[part] = rng.choice((b"\0", b"\xff", b"\x7f")) * size
            case 4:
                data[part] = data[part] * rng.choice((0, 2, 50))
            case 5:
                data[start:start] = rng.randbytes(rng.choice((1, 8, 200)))
            case 6:
                data[start : start + 8] = rng.choice((2**63 - 1, 2**64 - 1, 2**32, 2**31, 0)).to_bytes(8, "little")
            case 7:
                data = data or bytearray(rng.randbytes(rng.choice((0, 1, 100))))
    return bytes(data)


def garbled(rng: random.Random, text: str, words: Sequence[str] = WORDS) -> str:
    """Words and lines replaced, removed, repeated or swapped."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        lines = text.splitlines(keepends=True)
        spots = [spot.span() for spot in re.finditer(r"[\w.+-]+|[^\w\s]", text)]
        if not lines or not spots:
            return rng.choice(words)
        row, (start, end) = rng.randrange(len(lines)), rng.choice(spots)
        match rng.randrange(9):
            case 0 | 1 | 2 | 3:
                text = text[:start] + rng.choice(words) + text[end:]
            case 4:
                del lines[row]
                text = "".join(lines)
            case 5:
                lines[row] *= rng.choice((2, 3, 200))
                text = "".join(lines)
            case 6:
                other = rng.randrange(len(lines))
                lines[row], lines[other] = lines[other], lines[row]
                text = "".join(lines)
            case 7:
                text = text[:start]
            case 8:
                one, two = text[start:end], rng.choice(spots)
                text = text[:start] + text[slice(*two)] + text[end:] if two[0] > end else text.replace(one, "", 1)
    return text
