# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Making, changing and asking vDPA devices by the generic netlink family "vdpa" (linux/vdpa.h).

Answers have the shape that ``vdpa -j`` of iproute2 prints, so that what reads one reads the other. Rule of this file:
what the kernel says about a refusal (its extended acknowledgement) goes into the error, with what to type after it.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from typing import Any, Self

from ..errors import device_error
from ..virtio.features import NetFeature, feature_names
from ..virtio.ids import DeviceId, device_name
from .vdpa_bus import bus_device, has_bus, refuse_if_open

MGMTDEV_GET, DEV_NEW, DEV_DEL, DEV_GET, DEV_CONFIG_GET, DEV_VSTATS_GET, DEV_ATTR_SET = 2, 3, 4, 5, 6, 7, 8
_NAMES = {
    MGMTDEV_GET: "mgmtdev show",
    DEV_NEW: "dev add",
    DEV_DEL: "dev del",
    DEV_GET: "dev show",
    DEV_CONFIG_GET: "dev config show",
    DEV_VSTATS_GET: "dev vstats show",
    DEV_ATTR_SET: "dev set",
}

ATTRIBUTES: tuple[tuple[str, str], ...] = (
    ("VDPA_ATTR_UNSPEC", "none"),
    ("VDPA_ATTR_MGMTDEV_BUS_NAME", "asciiz"),
    ("VDPA_ATTR_MGMTDEV_DEV_NAME", "asciiz"),
    ("VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES", "uint64"),
    ("VDPA_ATTR_DEV_NAME", "asciiz"),
    ("VDPA_ATTR_DEV_ID", "uint32"),
    ("VDPA_ATTR_DEV_VENDOR_ID", "uint32"),
    ("VDPA_ATTR_DEV_MAX_VQS", "uint32"),
    ("VDPA_ATTR_DEV_MAX_VQ_SIZE", "uint16"),
    ("VDPA_ATTR_DEV_MIN_VQ_SIZE", "uint16"),
    ("VDPA_ATTR_DEV_NET_CFG_MACADDR", "l2addr"),
    ("VDPA_ATTR_DEV_NET_STATUS", "uint16"),
    ("VDPA_ATTR_DEV_NET_CFG_MAX_VQP", "uint16"),
    ("VDPA_ATTR_DEV_NET_CFG_MTU", "uint16"),
    ("VDPA_ATTR_DEV_NEGOTIATED_FEATURES", "uint64"),
    ("VDPA_ATTR_DEV_MGMTDEV_MAX_VQS", "uint32"),
    ("VDPA_ATTR_DEV_SUPPORTED_FEATURES", "uint64"),
    ("VDPA_ATTR_DEV_QUEUE_INDEX", "uint32"),
    ("VDPA_ATTR_DEV_VENDOR_ATTR_NAME", "asciiz"),
    ("VDPA_ATTR_DEV_VENDOR_ATTR_VALUE", "uint64"),
    ("VDPA_ATTR_DEV_FEATURES", "uint64"),
    ("VDPA_ATTR_DEV_BLK_CFG_CAPACITY", "uint64"),
    ("VDPA_ATTR_DEV_BLK_CFG_SIZE_MAX", "uint32"),
    ("VDPA_ATTR_DEV_BLK_CFG_BLK_SIZE", "uint32"),
    ("VDPA_ATTR_DEV_BLK_CFG_SEG_MAX", "uint32"),
    ("VDPA_ATTR_DEV_BLK_CFG_NUM_QUEUES", "uint16"),
    ("VDPA_ATTR_DEV_BLK_CFG_PHY_BLK_EXP", "uint8"),
    ("VDPA_ATTR_DEV_BLK_CFG_ALIGN_OFFSET", "uint8"),
    ("VDPA_ATTR_DEV_BLK_CFG_MIN_IO_SIZE", "uint16"),
    ("VDPA_ATTR_DEV_BLK_CFG_OPT_IO_SIZE", "uint32"),
    ("VDPA_ATTR_DEV_BLK_CFG_MAX_DISCARD_SEC", "uint32"),
    ("VDPA_ATTR_DEV_BLK_CFG_MAX_DISCARD_SEG", "uint32"),
    ("VDPA_ATTR_DEV_BLK_CFG_DISCARD_SEC_ALIGN", "uint32"),
    ("VDPA_ATTR_DEV_BLK_CFG_MAX_WRITE_ZEROES_SEC", "uint32"),
    ("VDPA_ATTR_DEV_BLK_CFG_MAX_WRITE_ZEROES_SEG", "uint32"),
    ("VDPA_ATTR_DEV_BLK_READ_ONLY", "uint8"),
    ("VDPA_ATTR_DEV_BLK_FLUSH", "uint8"),
)
"""Name and type of each attribute at its number, as since Linux 6.9; before, 21 was a feature word of net devices and the rest was not."""

OPTIONS: dict[str, tuple[str, Callable[[str], object]]] = {
    "mac": ("VDPA_ATTR_DEV_NET_CFG_MACADDR", lambda text: _matching(text, r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", "an address like 02:00:00:00:00:01")),
    "mtu": ("VDPA_ATTR_DEV_NET_CFG_MTU", lambda text: _number(text, 16)),
    "max_vqp": ("VDPA_ATTR_DEV_NET_CFG_MAX_VQP", lambda text: _number(text, 16)),
    "device_features": ("VDPA_ATTR_DEV_FEATURES", lambda text: _number(text, 64)),
}
"""What ``dev add`` takes beside name and mgmtdev: the attribute, and text to its value (ValueError)."""
SETTABLE = ("mac", "mtu")
"""What ``dev set`` takes."""

_HINTS = {
    (DEV_NEW, errno.EEXIST): "there is a device of that name; vdpa-bridge mgmt dev show",
    (DEV_NEW, errno.ENODEV): "vdpa-bridge mgmt mgmtdev show lists what can make devices",
    (DEV_NEW, errno.EINVAL): "a VDUSE device must have been made by its daemon before; features must be within dev_features of mgmtdev show",
    (DEV_NEW, errno.EOPNOTSUPP): "this mgmtdev does not take one of the options",
    (DEV_ATTR_SET, errno.EOPNOTSUPP): "this kernel or the device's driver cannot change that; dev del and dev add can",
    (DEV_CONFIG_GET, errno.EOPNOTSUPP): "the kernel takes apart what NICs and disks have; vdpa-bridge show vdpa:NAME asks the device itself",
    (DEV_VSTATS_GET, errno.EOPNOTSUPP): "the device's driver has no statistics",
    (DEV_VSTATS_GET, errno.EAGAIN): "a driver must have set FEATURES_OK before",
}


def _number(text: str, bits: int) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise ValueError(f"{text} is not a number") from None
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{text} does not fit {bits} bits")
    return value


def _matching(text: str, pattern: str, what: str) -> str:
    if not re.fullmatch(pattern, text):
        raise ValueError(f"{text} is not {what}")
    return text


class Management:
    """One netlink socket. OSError that says what was asked of which device, what the kernel says to it, and what to do."""

    def __init__(self, trace: Callable[[str], None] = lambda line: None) -> None:
        """*trace* gets a line for each request."""
        if not has_bus():
            raise device_error(errno.EPROTONOSUPPORT, "netlink", "vdpa", "this kernel has no such family: modprobe vdpa")
        from pyroute2.netlink import genlmsg
        from pyroute2.netlink.exceptions import NetlinkError
        from pyroute2.netlink.generic import GenericNetlinkSocket

        self._trace = trace
        self._error = NetlinkError
        self._message = type("vdpa_message", (genlmsg,), {"prefix": "VDPA_ATTR_", "nla_map": ATTRIBUTES})
        self._socket = GenericNetlinkSocket(ext_ack=True)
        try:
            self._socket.bind("vdpa", self._message)
        except NetlinkError as error:
            self._socket.close()
            why = "devices are managed from the initial network namespace: nsenter --net=/proc/1/ns/net"
            raise device_error(error.code, "netlink", "vdpa", why) from None
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Questions -------------------------------------------------------------------------------------------------------

    def mgmtdevs(self, handle: str = "") -> dict[str, dict[str, Any]]:
        """What can make devices: classes, queues and features of each."""
        found = {}
        for message in self._ask(MGMTDEV_GET, handle, _handle_attributes(handle) if handle else []):
            classes = message.get_attr("VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES") or 0
            ids = [number for number in range(64) if classes >> number & 1]
            found[_handle(message)] = {
                "supported_classes": [device_name(number) for number in ids],
                "max_supported_vqs": message.get_attr("VDPA_ATTR_DEV_MGMTDEV_MAX_VQS") or 0,
                "dev_features": feature_names(ids[0] if len(ids) == 1 else None, message.get_attr("VDPA_ATTR_DEV_SUPPORTED_FEATURES") or 0),
            }
        return found

    def devices(self, name: str = "") -> dict[str, dict[str, Any]]:
        """Type, management device and queues of each."""
        found = {}
        for message in self._ask(DEV_GET, name):
            number = message.get_attr("VDPA_ATTR_DEV_ID")
            facts = {
                "type": "network" if number == DeviceId.NET else device_name(number),
                "mgmtdev": _handle(message),
                "vendor_id": message.get_attr("VDPA_ATTR_DEV_VENDOR_ID"),
                "max_vqs": message.get_attr("VDPA_ATTR_DEV_MAX_VQS"),
                "max_vq_size": message.get_attr("VDPA_ATTR_DEV_MAX_VQ_SIZE"),
            }
            found[message.get_attr("VDPA_ATTR_DEV_NAME")] = {key: value for key, value in facts.items() if value is not None}
        return found

    def config(self, name: str = "") -> dict[str, dict[str, Any]]:
        """The configuration space of a device, or of each, as far as the kernel takes it apart.

        Each is asked for by itself: Linux 6.12 ends a dump at the first device that is neither NIC nor disk.
        """
        found: dict[str, dict[str, Any]] = {}
        for each in [name] if name else self.devices():
            try:
                (message,) = self._ask(DEV_CONFIG_GET, each)
                found[each] = _config(message)
            except OSError as error:
                if name or error.errno != errno.EOPNOTSUPP:
                    raise
                found[each] = {}
        return found

    def vstats(self, name: str, index: int) -> dict[str, Any]:
        """What the device's driver counts for a queue."""
        (message,) = self._ask(DEV_VSTATS_GET, name, [("VDPA_ATTR_DEV_QUEUE_INDEX", index)])
        names = [value for key, value in message["attrs"] if key == "VDPA_ATTR_DEV_VENDOR_ATTR_NAME"]
        values = [value for key, value in message["attrs"] if key == "VDPA_ATTR_DEV_VENDOR_ATTR_VALUE"]
        return _queue_type(message, index) | dict(zip(names, values, strict=False))

    # Changes ---------------------------------------------------------------------------------------------------------

    def add(self, name: str, mgmtdev: str, options: dict[str, str]) -> None:
        """Make a device; *options* are those of OPTIONS, as text."""
        self._ask(DEV_NEW, name, [*_handle_attributes(mgmtdev), *_attributes(options, tuple(OPTIONS))], f"{name} of {mgmtdev}")

    def delete(self, name: str) -> None:
        """Delete a device; EBUSY while its node is open."""
        if (device := bus_device(name)) is not None:
            refuse_if_open(device, "dev del")
        self._ask(DEV_DEL, name)

    def change(self, name: str, options: dict[str, str]) -> None:
        """Change what SETTABLE names."""
        self._ask(DEV_ATTR_SET, name, _attributes(options, SETTABLE))

    # Netlink ---------------------------------------------------------------------------------------------------------

    def _ask(self, command: int, name: str, attributes: list[tuple[str, object]] | None = None, where: str = "") -> list[Any]:
        """One request: about all when *name* is empty, a dump then."""
        from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST

        message = self._message()
        message["cmd"], message["version"] = command, 1
        message["attrs"] = list(attributes or [])
        if name and command != MGMTDEV_GET:
            message["attrs"].append(("VDPA_ATTR_DEV_NAME", name))
        changes = command in (DEV_NEW, DEV_DEL, DEV_ATTR_SET)
        flags = NLM_F_REQUEST | (NLM_F_ACK if changes else 0 if name else NLM_F_DUMP)
        shown = " ".join(f"{key.removeprefix('VDPA_ATTR_').lower()}={value}" for key, value in message["attrs"])
        try:
            answers = list(self._socket.nlm_request(message, msg_type=self._socket.prid, msg_flags=flags))
        except self._error as error:
            text = str(error.args[1]) if len(error.args) > 1 else ""
            self._trace(f"{_NAMES[command]} {shown} = errno {error.code}: {text}".replace("  ", " "))
            raise self._refused(command, where or name or "all devices", error.code, text) from None
        self._trace(f"{_NAMES[command]} {shown} = {len(answers)} messages".replace("  ", " "))
        return answers

    def _refused(self, command: int, where: str, number: int, said: str) -> OSError:
        words = [said] if said and said != os.strerror(number) else []
        if number == errno.EPERM:
            words.append("it needs CAP_NET_ADMIN: sudo vdpa-bridge mgmt ...")
        elif number == errno.ENODEV and command != DEV_NEW:
            words.append("vdpa-bridge mgmt dev show lists the devices")
        elif hint := _HINTS.get((command, number)):
            words.append(hint)
        return device_error(number, _NAMES[command], where, "; ".join(words))


def _handle(message: Any) -> str:
    bus, name = message.get_attr("VDPA_ATTR_MGMTDEV_BUS_NAME"), message.get_attr("VDPA_ATTR_MGMTDEV_DEV_NAME")
    return f"{bus}/{name}" if bus else str(name)


def _handle_attributes(handle: str) -> list[tuple[str, object]]:
    bus, _, name = handle.rpartition("/")
    attributes: list[tuple[str, object]] = [("VDPA_ATTR_MGMTDEV_BUS_NAME", bus)] if bus else []
    return [*attributes, ("VDPA_ATTR_MGMTDEV_DEV_NAME", name)]


def _attributes(options: dict[str, str], allowed: tuple[str, ...]) -> list[tuple[str, object]]:
    if unknown := sorted(set(options) - set(allowed)):
        raise ValueError(f"no option {', '.join(unknown)}; there is: {', '.join(allowed)}")
    found: list[tuple[str, object]] = []
    for key, text in options.items():
        attribute, parse = OPTIONS[key]
        try:
            found.append((attribute, parse(text)))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from None
    return found


def _queue_type(message: Any, index: int) -> dict[str, str]:
    """What a queue of a NIC is for: pairs come first, the control queue behind them."""
    if message.get_attr("VDPA_ATTR_DEV_ID") != DeviceId.NET:
        return {}
    features = message.get_attr("VDPA_ATTR_DEV_NEGOTIATED_FEATURES") or 0
    pairs = message.get_attr("VDPA_ATTR_DEV_NET_CFG_MAX_VQP") or 1
    control = features & NetFeature.CTRL_VQ and index == 2 * pairs
    return {"queue_type": "control_vq" if control else ("rx", "tx")[index % 2]}


_CONFIG = {
    "VDPA_ATTR_DEV_NET_CFG_MACADDR": "mac",
    "VDPA_ATTR_DEV_NET_CFG_MAX_VQP": "max_vq_pairs",
    "VDPA_ATTR_DEV_NET_CFG_MTU": "mtu",
}


def _config(message: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in message["attrs"]:
        if key == "VDPA_ATTR_DEV_NET_STATUS":
            found |= {"link": "up" if value & 1 else "down", "link_announce": bool(value & 2)}
        elif key == "VDPA_ATTR_DEV_NEGOTIATED_FEATURES":
            found["negotiated_features"] = feature_names(message.get_attr("VDPA_ATTR_DEV_ID"), value)
        elif key in _CONFIG:
            found[_CONFIG[key]] = value
        elif key.startswith("VDPA_ATTR_DEV_BLK_") and message.get_attr("VDPA_ATTR_DEV_ID") == DeviceId.BLOCK:
            found[key.removeprefix("VDPA_ATTR_DEV_BLK_").removeprefix("CFG_").lower()] = value
    return found
