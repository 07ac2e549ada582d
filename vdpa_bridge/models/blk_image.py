# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Which image the options of a disk name, and which sizes they give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .image import FileImage, Image, Limits, memory_image, open_image
from .nbd import NbdImage
from .options import parse_count, parse_size, parse_switch

SECTOR = 512
DEFAULT_SIZE = "256M"
LARGEST = 1 << 62
"""Bytes; keeps every offset that passes the range check within a signed 64-bit file offset."""
_LARGEST_BLOCK = 64 << 10
"""Bytes: Linux drives no disk with larger ones."""
_LARGEST_OPTIMUM = 1 << 30
_PLACES = "file", "size", "nbd"
_SIZES = "blk-size", "physical-size", "min-io-size", "opt-io-size"
IMAGE_OPTIONS = *_PLACES, "nbd-timeout", *_SIZES, "alignment-offset", "discard"


def open_disk(options: Mapping[str, str], readonly: bool) -> Image:
    """What the options name, with the sizes that they give it. ValueError, or OSError when it cannot be opened."""
    chosen = [place for place in _PLACES if place in options]
    if len(chosen) > 1:
        raise ValueError(f"a disk has {chosen[0]}= or {chosen[1]}=, not both: {'an export' if 'nbd' in chosen else 'a file'} brings its size")
    if "nbd-timeout" in options and "nbd" not in options:
        raise ValueError("nbd-timeout= is for nbd=")
    timeout = parse_count("nbd-timeout", options.get("nbd-timeout", "30"), 1, 3600)
    sizes = {name: _size(name, options[name]) for name in (*_SIZES, "alignment-offset") if name in options}
    discards = parse_switch("discard", options.get("discard", "on"))
    size = parse_size(options.get("size", DEFAULT_SIZE))
    if size < SECTOR or size > LARGEST:
        raise ValueError(f"size={options['size']}; a disk has {SECTOR} bytes to {LARGEST}")
    if "nbd" in options:
        image: Image = NbdImage(options["nbd"], readonly=readonly, timeout=timeout)
    elif "file" in options:
        image = FileImage(open_image(options["file"], readonly))
    else:
        image = FileImage(memory_image(size // SECTOR * SECTOR), holes=True)
    try:
        image.limits = sized(image.limits, sizes, discards)
    except BaseException:
        image.close()
        raise
    return image


def _size(name: str, text: str) -> int:
    size = parse_size(text)
    if name in ("blk-size", "physical-size") and (size & (size - 1) or not SECTOR <= size <= _LARGEST_BLOCK):
        raise ValueError(f"{name}={text}; it is a power of 2 from {SECTOR} to {_LARGEST_BLOCK}")
    if not 0 <= size <= _LARGEST_OPTIMUM:
        raise ValueError(f"{name}={text}; it is at most {_LARGEST_OPTIMUM}")
    return size


def sized(limits: Limits, sizes: Mapping[str, int], discards: bool) -> Limits:
    """The image's limits, as a user wants them, and in whole blocks; ValueError for what cannot be, or cannot be told to a driver.

    What an image says and a driver cannot be told is dropped instead: it is advice."""
    block = sizes.get("blk-size", limits.block)
    if block < limits.block:
        raise ValueError(f"blk-size={block}: the image has blocks of {limits.block} bytes")
    if block > _LARGEST_BLOCK:
        raise ValueError(f"the image has blocks of {block} bytes, and no driver takes more than {_LARGEST_BLOCK}")
    physical = sizes.get("physical-size", max(limits.physical, block))
    if physical < block:
        raise ValueError(f"physical-size={physical}: a logical block has {block} bytes")

    def blocks(name: str, size: int, most: int) -> int:
        """*size*, if it can be told: up to *most* blocks."""
        if size % block == 0 and size // block <= most:
            return size
        if name in sizes:
            raise ValueError(f"{name}={size}; it is a multiple of the {block} bytes of a block, at most {most * block}")
        return 0

    return replace(
        limits,
        block=block,
        physical=physical,
        offset=blocks("alignment-offset", sizes.get("alignment-offset", limits.offset), 0xFF),
        smallest=blocks("min-io-size", sizes.get("min-io-size", limits.smallest), 0xFFFF),
        best=blocks("opt-io-size", sizes.get("opt-io-size", limits.best), 0xFFFFFFFF),
        discard=limits.discard // block * block if discards else 0,
        granule=max(limits.granule, block),
        longest=limits.longest // block * block,
    )
