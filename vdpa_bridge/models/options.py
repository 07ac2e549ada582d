# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Options of models as users write them: text to values, with errors that say what is allowed."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def check_options(kind: str, options: Mapping[str, str], known: Collection[str]) -> None:
    """ValueError that names the options that *kind* does not have."""
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"model {kind} has no option {', '.join(unknown)}; there is: {', '.join(sorted(known))}")


def parse_size(text: str) -> int:
    """Bytes of ``4096``, ``64K``, ``256M``, ``1G`` (powers of 1024)."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is not a size; it is written 4096, 64K, 256M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_duration(name: str, text: str) -> int:
    """Nanoseconds of ``50us``, ``1ms``, at most 10 ms; 0 for ``off``."""
    match = re.fullmatch(r"(\d{1,5})(us|ms)", text)
    length = int(match[1]) * (1000 if match[2] == "us" else 1_000_000) if match else 0 if text in ("off", "0") else -1
    if not 0 <= length <= 10_000_000:
        raise ValueError(f"{name}={text}; it is off, or a time up to 10ms, such as 50us")
    return length


def parse_switch(name: str, text: str) -> bool:
    """True for on, yes, true, 1; False for off, no, false, 0."""
    if text.lower() in ("on", "yes", "true", "1"):
        return True
    if text.lower() in ("off", "no", "false", "0"):
        return False
    raise ValueError(f"{name}={text}; it is on or off")


def parse_count(name: str, text: str, least: int, most: int) -> int:
    """A number within [least, most]."""
    if not text.isdecimal() or not least <= int(text) <= most:
        raise ValueError(f"{name}={text}; it is a number from {least} to {most}")
    return int(text)
