# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""``vdpa-bridge serve`` as a service: real processes, killed by their number, with clients good and bad on several devices."""

from __future__ import annotations

import json
import os
import re
import resource
import select
import signal
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.homes import socket_path
from tests.support.raw import ENTER, HELLO, Raw
from tests.support.service import Serve, disk, listening, refused, serving, works
from vdpa_bridge import ops
from vdpa_bridge.drivers import BlkDriver
from vdpa_bridge.vhost_user.framing import HEADER, frame
from vdpa_bridge.wire import EMPTY


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory whose path leaves room for names of sockets."""
    with socket_path() as path:
        yield Path(path).parent


# Several devices ---------------------------------------------------------------------------------------------------------


def test_two_clients_on_two_devices_at_once(folder: Path) -> None:
    a, b = folder / "a.sock", folder / "b.sock"
    with serving(f"{a}=model:blk?serial=a", f"{b}=model:blk?serial=b") as server:
        assert server.ready(2) == [f"serving model:blk?serial={n} on {folder}/{n}.sock (vdpa=prefer)\n" for n in "ab"]
        with disk(a) as one, disk(b, "off") as two, BlkDriver(one) as first, BlkDriver(two) as second:
            for turn in range(10):
                first.write(0, bytes([turn]) * 512)
                second.write(0, bytes([turn + 100]) * 512)
                assert first.read(0, 512) == bytes([turn]) * 512
                assert second.read(0, 512) == bytes([turn + 100]) * 512
            assert (first.get_id(), second.get_id()) == ("a", "b")
        server.end()
    assert list(folder.iterdir()) == []


def test_a_client_that_misbehaves_is_dropped_with_its_reason_and_the_other_device_works_on(folder: Path) -> None:
    good, bad = folder / "good.sock", folder / "bad.sock"
    with serving(f"{good}=model:blk", f"{bad}=model:blk", "-v", "--log-format", "json", "--timeout", "0.3") as server:
        server.ready(2)
        with disk(good) as device, BlkDriver(device) as driver:
            for number, (sent, last_words, rule) in enumerate(
                [
                    (HEADER.pack(1, 1, 1 << 30), 0, "payload of 1073741824"),
                    (ENTER + HELLO[:5], 0, "did not end within 0.3 s"),
                    (ENTER + ENTER, 1, "instead of HELLO"),
                ]
            ):
                with Raw(str(bad)) as raw:
                    raw.send(sent)
                    driver.write(0, bytes([number]) * 512)
                    assert len(list(iter(raw.reply, None))) == last_words
                assert driver.read(0, 512) == bytes([number]) * 512
                server.logs(rule)
            with Raw(str(bad)) as stalls:  # and keeps its device while the other one goes
                stalls.send(b"\1")
                assert driver.read(0, 512) == b"\2" * 512
        works(good)
        works(bad)
        server.end()
    lines = [json.loads(line) for line in server.log.splitlines()]
    drops = [line for line in lines if line["event"] == "drop"]
    assert len(drops) >= 3
    assert {(line["device"], line["level"], line["pid"], line["uid"]) for line in drops} == {("bad", "warning", os.getpid(), os.getuid())}
    assert all(set(line) == {"time", "level", "device", "event", "pid", "uid", "mode", "seconds", "reason"} for line in drops)
    for name in ("good", "bad"):
        ends = [line for line in lines if line["device"] == name and line["event"] in ("disconnect", "drop")]
        assert len(ends) == sum(line["event"] == "connect" for line in lines if line["device"] == name) >= 2
    assert next(line["reason"] for line in lines if line["event"] == "disconnect" and line["mode"] == "vDPA") == "the client hung up"


def test_a_log_that_nobody_reads_stalls_nobody(folder: Path) -> None:
    path = folder / "s"

    def misbehave() -> None:
        with Raw(str(path)) as raw:
            raw.send(HEADER.pack(1, 1, 1 << 30))
            assert raw.hung_up()

    with serving(f"{path}=model:blk", "-v", deaf=True) as server:
        server.ready()
        for _ in range(700):  # two lines for each, more than pipe and queue take
            misbehave()
        works(path)
        server.listen()
        server.logs(f"connect pid={os.getpid()}")
        deadline = time.monotonic() + 10
        while "lines_lost_before=" not in server.log and time.monotonic() < deadline:
            misbehave()
        server.logs(r"lines_lost_before=\d\d+")
        server.end()
    with serving(f"{path}=model:blk", "-v", deaf=True) as server:
        server.ready()
        for _ in range(100):
            misbehave()
        assert server.end() < 2, "the end does not wait for the log's reader either"


def test_one_that_cannot_be_opened_keeps_all_from_starting_or_is_tried_again(folder: Path) -> None:
    file = folder / "disk"
    words = f"{folder}/a.sock=model:blk", f"{folder}/b.sock=model:blk?file={file}"
    log = refused(*words)
    assert log == f"error: b: No such file or directory: {file}\n"
    assert list(folder.iterdir()) == []
    with serving(*words, "--keep-going") as server:
        server.ready(2)
        assert re.search(r"ERROR b: unavailable: No such file", server.logs("unavailable"))
        works(folder / "a.sock")
        with Raw(f"{folder}/b.sock") as raw:
            assert raw.hung_up()
        server.logs(rf"ERROR b: refuse pid={os.getpid()} uid=\d+: cannot open the device: No such file")
        file.write_bytes(bytes(8192))
        works(folder / "b.sock")
        server.end()
    assert "floppy" in refused(f"{folder}/a.sock=model:blk", f"{folder}/b.sock=model:floppy", "--keep-going", status=2)


def test_a_socket_that_cannot_be_had_is_left_out_by_keep_going(folder: Path) -> None:
    words = f"{folder}/none/a.sock=model:blk", f"{folder}/b.sock=model:blk"
    assert "cannot listen on" in refused(*words)
    assert not (folder / "b.sock").exists()
    with serving(*words, "--keep-going") as server:
        assert "b.sock" in server.ready()[0]
        works(folder / "b.sock")
        server.end()
    assert "no device is left" in refused(words[0], "--keep-going")


def _end_of_200(folder: Path) -> float:
    with serving(*[f"{folder}/{n}.sock=model:blk?size=1M" for n in range(200)], "--json") as server:
        assert len(json.loads(server.ready()[0])["devices"]) == 200
        clients = [disk(folder / f"{n}.sock") for n in range(0, 200, 10)]
        works(folder / "199.sock")
        seconds = server.end()
        for client in clients:
            client.close()
    assert list(folder.iterdir()) == []
    return seconds


def test_200_devices_end_within_a_second_though_clients_hold_some(folder: Path) -> None:
    """Once in three times at least: others may want the processors of this machine, too."""
    assert any(_end_of_200(folder) < 1 for _ in range(3))


# Configuration -----------------------------------------------------------------------------------------------------------


def test_a_configuration_says_everything_and_options_are_its_defaults(folder: Path) -> None:
    config = folder / "c.toml"
    config.write_text(
        f"""
        [[device]]
        target = "model:blk?serial=one"
        socket-path = "{folder}/one"
        name = "first"
        socket-mode = "660"
        socket-group = {os.getgid()}
        timeout = 0.5
        vdpa = "off"
        relay = "on"
        [[device]]
        target = "model:blk?serial=two"
        socket-path = "{folder}/two.sock"
        """
    )
    with serving("--config", str(config), "--vdpa", "require", "--socket-mode", "0606", "--json") as server:
        (line,) = server.ready()
        assert [(d["name"], d["vdpa"]) for d in json.loads(line)["devices"]] == [("first", "off"), ("two", "require")]
        modes = [stat.S_IMODE((folder / name).stat().st_mode) for name in ("one", "two.sock")]
        assert modes == [0o660, 0o606]
        works(folder / "one", vdpa="off")
        works(folder / "two.sock")
        server.end()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "nothing found"),
        ("[[device]", "c.toml: "),
        ("device = 1", "[[device]] tables"),
        ("[[device]]\ntarget='model:blk'\n[more]", "more found"),
        ("device = [1]", "device 1: is no table"),
        ("[[device]]", "device 1: target is missing"),
        ("[[device]]\ntarget='model:blk'\nsocket='s'", "unknown key socket; there is: target, socket-path"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\nsocket-mode=660", 'octal, as in "660"'),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\nsocket-mode='999'", "999 is not an octal mode"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\nsocket-group='nosuchgroup'", "no group is called 'nosuchgroup'"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\nrelay='maybe'", "relay = maybe; it is auto, on or off"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\ntimeout='5'", "not a number of seconds"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\ntimeout=0", "0.1 to 3600"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\ntimeout=nan", "0.1 to 3600"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\nvdpa='maybe'", "require, prefer or off"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\nname='a b'", "name 'a b'"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='" + "s" * 108 + "'", "107 is what fits"),
        ("[[device]]\ntarget='model:blk'\n", "has no socket"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='s'\n" * 2, "two devices have socket path"),
        ("[[device]]\ntarget='model:blk'\nsocket-path='d/s'\n[[device]]\ntarget='model:blk'\nsocket-path='s'", "two devices have name s"),
    ],
)
def test_a_wrong_configuration_is_status_2_and_says_where(folder: Path, text: str, says: str) -> None:
    from click.testing import CliRunner

    from vdpa_bridge.cli import main

    config = folder / "c.toml"
    config.write_text(text)
    result = CliRunner().invoke(main, ["serve", "--config", str(config)])
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "nothing to serve"),
        (("model:blk", "--fd", "3", "--socket-path", "s"), "not both"),
        (("model:blk", "model:blk", "--socket-path", "s"), "exactly one TARGET"),
        (("=model:blk",), "PATH=TARGET"),
        (("model:blk?serial=x",), "--socket-path"),
        (("model:blk", "--socket-path", "s", "--socket-group", "nosuchgroup"), "no group"),
    ],
)
def test_wrong_words(words: tuple[str, ...], says: str) -> None:
    from click.testing import CliRunner

    from vdpa_bridge.cli import main

    result = CliRunner().invoke(main, ["serve", *words])
    assert result.exit_code == 2, result.output
    assert says in result.stderr


# Signals and death -------------------------------------------------------------------------------------------------------


def test_a_hangup_reads_sizes_again_and_loses_nothing(folder: Path) -> None:
    file, path = folder / "disk", folder / "s"
    file.write_bytes(bytes(1 << 20))
    with serving(f"{path}=model:blk?file={file}", f"{folder}/net=model:net", "-v") as server:
        server.ready(2)
        with disk(path) as device, BlkDriver(device) as driver:
            driver.write(0, b"a" * 512)
            event = os.eventfd(0, os.EFD_NONBLOCK)
            try:
                device.set_config_call(event)
                os.truncate(file, 2 << 20)
                server.process.send_signal(signal.SIGHUP)
                server.logs("s: resize: 2048 sectors before, 4096 now")
                server.logs("reload: sizes of disks")
                assert select.select([event], [], [], 5)[0], "the driver was not told"
                device.set_config_call(-1)
            finally:
                os.close(event)
            assert int.from_bytes(device.get_config(0, 8), "little") == 4096
            assert driver.read(0, 512) == b"a" * 512
        server.end()
    assert server.log.count(" connect ") == 1


def test_a_server_tells_whom_it_serves(folder: Path) -> None:
    with serving(f"{folder}/a=model:blk", f"{folder}/b=model:blk") as server:
        server.ready(2)
        with disk(folder / "a") as device:
            device.get_features()
            server.process.send_signal(signal.SIGUSR1)
            assert f"serves process {os.getpid()} of user {os.getuid()}" in server.logs("a: status")
            server.logs("b: status served=0: waits for a client")
        server.end(signal.SIGINT)


def test_a_signal_while_devices_are_opened_ends_it(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(folder / "silent"))
        silent.listen()
        with serving(f"vhost-user:{folder}/silent?timeout=60", "--socket-path", f"{folder}/s") as server:
            accepted, _ = silent.accept()
            with accepted:
                time.sleep(0.1)
                assert server.end() < 1
    assert not (folder / "s").exists()


def test_the_death_of_a_thread_is_told_and_ends_the_process(folder: Path) -> None:
    """Somebody shuts a socket down that was shared with us: accept fails for good."""
    with listening(folder / "a") as (shared,), serving(f"{folder}/b=model:blk") as bystander:
        bystander.ready()
        with serving("model:blk", "--fd", str(shared.fileno()), "--log-format", "json", fds=[shared.fileno()]) as server:
            server.ready()
            shared.shutdown(socket.SHUT_RDWR)
            assert server.wait() == 1
            (line,) = [json.loads(line) for line in server.log.splitlines()]
            assert (line["event"], line["level"]) == ("died", "critical")
            assert "Invalid argument" in line["reason"]
            assert "Traceback" in line["traceback"]
        works(folder / "b")


def test_descriptors_are_enough_where_the_soft_limit_is_low(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        server = Serve(*[f"{folder}/{n}=model:blk?size=1M" for n in range(60)], "--json")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        server.ready()
        works(folder / "59")
        server.end()
    finally:
        server.close()


def test_a_device_that_hangs_stalls_no_other_and_not_the_end(folder: Path) -> None:
    """The device behind one of two sockets stops in the middle of an operation: its process is frozen."""
    inner, outer, other = folder / "inner", folder / "outer", folder / "other"
    with serving(f"{inner}=model:blk") as frozen:
        frozen.ready()
        with serving(f"{outer}=vhost-user:{inner}?timeout=60", f"{other}=model:blk") as server:
            server.ready(2)
            works(outer)
            with Raw(str(outer)) as raw:
                raw.enter()
                assert raw.ask(ops.SET_OWNER, EMPTY) == 0
                frozen.process.send_signal(signal.SIGSTOP)
                os.waitpid(frozen.process.pid, os.WUNTRACED)  # until all of its threads have stopped
                raw.send(frame(ops.GET_STATUS.number))
                works(other)
                server.process.send_signal(signal.SIGHUP)
                works(other, b"h")
                start = time.monotonic()
                server.process.terminate()
                while other.exists() or outer.exists():
                    assert time.monotonic() < start + 1, "sockets go at once"
                assert server.wait() == 1
                assert time.monotonic() < start + 8
            assert re.search(r"ERROR outer: stuck: not given back within 5 s", server.log)
            assert "other: stuck" not in server.log
