# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge i2c``: transfers on the bus of an I2C device."""

from __future__ import annotations

import click

from .common import HEX, SIZE, Group, Output, Trace, common_options, opened, target_argument, target_of, timeout_option


@click.group(
    name="i2c",
    short_help="Talk to devices on an I2C bus.",
    cls=Group,
    examples="""
vdpa-bridge i2c 'vhost-user:/run/i2c.sock?type=i2c' scan
vdpa-bridge i2c 'vhost-user:/run/i2c.sock?type=i2c' transfer 50 00 --expect 16
""",
)
@target_argument
def command(target: str) -> None:
    """Talk to devices on the I2C bus TARGET. Addresses are hex and have 7 bits."""


@command.command()
@common_options
@click.pass_context
def scan(ctx: click.Context, output: Output, trace: Trace) -> None:
    """List the addresses that answer to a transfer without data, between those that the bus keeps to itself."""
    from ..drivers import I2cDriver
    from ..errors import DeviceBroken

    found = []
    with opened(target_of(ctx), trace) as device, I2cDriver(device) as bus:
        for address in range(0x08, 0x78):
            try:
                bus.transfer(address)
            except (DeviceBroken, TimeoutError):
                raise
            except OSError:
                continue
            found.append(address)
    output.emit({"addresses": found}, lambda: click.echo(" ".join(f"{address:02x}" for address in found)))


@command.command()
@click.argument("address", type=HEX)
@click.argument("data", type=HEX, default=b"")
@click.option("--expect", type=SIZE, default=0, metavar="BYTES", help="How much to read afterwards.")
@timeout_option
@common_options
@click.pass_context
def transfer(ctx: click.Context, address: bytes, data: bytes, expect: int, timeout: float, output: Output, trace: Trace) -> None:
    """Write DATA (hex) to the device at ADDRESS, then read, in one transaction; print what was read."""
    from ..drivers import I2cDriver

    with opened(target_of(ctx), trace) as device, I2cDriver(device) as bus:
        answer = bus.transfer(int.from_bytes(address, "big"), data, expect, timeout)
    output.emit({"data": answer.hex()}, lambda: click.echo(answer.hex()))
