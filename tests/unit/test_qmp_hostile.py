# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""Clients of the monitor that mean no good, or are slow, or many: each is answered or hung up on, and nobody waits for it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.homes import socket_path
from tests.support.qmp import PATIENCE, Qmp, Raw, service
from tests.support.service import works
from vdpa_bridge.service.qmp import DEEPEST, LONGEST, MOST_CLIENTS, Monitor, Splitter
from vdpa_bridge.service.qmp_commands import QmpError


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory whose path leaves room for names of sockets."""
    with socket_path() as path:
        yield Path(path).parent


def at(folder: Path) -> Qmp:
    return Qmp(folder / "qmp")


def test_negotiation_comes_first(folder: Path) -> None:
    with service(folder) as server:
        with Raw(folder / "qmp") as raw:
            greeting = raw.hear()
            assert greeting is not None
            assert greeting["QMP"].keys() == {"version", "capabilities"}
            for message in ({"execute": "stop"}, {"execute": "nonsense", "id": 7}):
                answer = raw.ask(message)
                assert answer is not None
                assert (answer["error"]["class"], answer.get("id")) == ("CommandNotFound", message.get("id"))
            works(folder / "disk")
            assert raw.ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}, "id": [1]}) == {
                "error": {"class": "GenericError", "desc": "Capability 'oob' is not offered"},
                "id": [1],
            }
            assert raw.ask({"execute": "qmp_capabilities", "id": None}) == {"return": {}, "id": None}, "no event came before"
        server.end()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"nonsense\n", "Invalid JSON syntax"),
        (b"\xff\xfe\x00\n", "Invalid JSON syntax"),
        (b"{nonsense}", "Invalid JSON syntax"),
        (b'{"execute": "\xff"}', "Invalid JSON syntax"),
        (b'{"execute" "stop"}', "Invalid JSON syntax"),
        (b"[]", "must be a JSON object"),
        (b'[{"execute": "stop"}]', "must be a JSON object"),
        (b"{}", "lacks member 'execute'"),
        (b'{"execute": 1}', "lacks member 'execute'"),
        (b'{"exec-oob": "stop"}', "'exec-oob' is unexpected"),
        (b'{"execute": "stop", "arguments": []}', "'arguments' must be an object"),
        (b'{"execute": ' + b"[" * DEEPEST + b"\n", f"depth limit of {DEEPEST}"),
        (b"]\n", "Invalid JSON syntax"),
        (b'{"execute": ' + b"1" * 5000 + b"}", "Invalid JSON syntax"),
    ],
)
def test_nonsense_is_answered_and_the_client_goes_on(folder: Path, data: bytes, text: str) -> None:
    with service(folder), Raw(folder / "qmp") as raw:
        raw.begin()
        answer = raw.ask(data)
        assert answer is not None
        assert text in answer["error"]["desc"]
        assert raw.ask({"execute": "query-status", "id": "x"}) == {"return": {"running": True, "status": "running"}, "id": "x"}


def test_messages_in_pieces_and_many_at_once(folder: Path) -> None:
    with service(folder), Raw(folder / "qmp") as raw:
        raw.begin()
        message = json.dumps({"execute": "query-status", "id": 'a "}{" \\" b'}).encode()
        for place in range(0, len(message), 3):
            raw.send(message[place : place + 3])
        assert raw.hear() == {"return": {"running": True, "status": "running"}, "id": 'a "}{" \\" b'}
        raw.send(b"".join(json.dumps({"execute": "query-status", "id": number}).encode() for number in range(300)))
        answers = [raw.hear() for _ in range(300)]
        assert [answer and answer["id"] for answer in answers] == [*range(300)], "in order"


def test_a_message_without_an_end(folder: Path) -> None:
    with service(folder):
        with Raw(folder / "qmp") as raw:
            raw.begin()
            with pytest.raises((BrokenPipeError, ConnectionResetError)):
                raw.send(b'{"execute": "' + b"x" * 1000 * LONGEST)
        with at(folder) as monitor:
            assert monitor.ask("query-status")["running"]
        with Raw(folder / "qmp") as raw:
            raw.begin()
            raw.send(b'{"execute": "' + b"x" * LONGEST)
            answer = raw.hear()
            assert answer is not None
            assert f"at most {LONGEST} bytes" in answer["error"]["desc"]


def test_answers_wait_for_their_reader_and_so_do_the_commands_behind_them(folder: Path) -> None:
    with service(folder) as server, at(folder) as monitor:
        with Raw(folder / "qmp") as busy:
            busy.begin()
            busy.sock.setblocking(False)
            end = time.monotonic() + 2
            while time.monotonic() < end:
                try:
                    busy.sock.send(b'{"execute": "query-qmp-schema"}' * 100)
                except BlockingIOError:
                    break
            assert time.monotonic() < end, "it is not read for ever"
            works(folder / "disk")
            assert monitor.ask("query-status")["running"]
            held = Path(f"/proc/{server.process.pid}/status").read_text().split("VmRSS:")[1].split()[0]
            assert int(held) < 300_000
        server.end()


def test_who_leaves_events_unread_is_hung_up_on(folder: Path) -> None:
    monitor = Monitor(str(folder / "qmp"), lambda name, arguments: {"name": name})
    try:
        monitor.start()
        with Raw(folder / "qmp") as deaf, Raw(folder / "qmp") as other:
            deaf.begin()
            other.begin()
            for number in range(40):
                for _ in range(1000):
                    monitor.emit("VDPA_DEVICE_RESIZED", device="disk", change=str(number))
                while (event := other.hear()) is not None and event["data"]["change"] != str(number):
                    pass
                for _ in range(999):
                    assert other.hear() is not None
            assert other.ask({"execute": "query-status"}) == {"return": {"name": "query-status"}}
            deaf.sock.setblocking(True)
            heard = 0
            with suppress(ConnectionResetError):
                while deaf.hear() is not None:
                    heard += 1
            assert heard < 40_000
    finally:
        monitor.close()
    monitor.emit("STOP")
    monitor.close()


def test_a_defect_is_answered_and_logged(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(name: str, arguments: object) -> object:
        raise KeyError(name)

    monitor = Monitor(str(folder / "qmp"), fail)
    try:
        monitor.start()
        with Raw(folder / "qmp") as raw:
            raw.begin()
            answer = raw.ask({"execute": "query-status", "id": 1})
            assert answer is not None
            assert (answer["error"]["class"], answer["id"]) == ("GenericError", 1)
            assert raw.ask({"execute": "query-status", "arguments": 1}) is not None
    finally:
        monitor.close()
    assert "a defect of this service, at command query-status" in caplog.text


def test_nonsense_without_end_waits_for_who_reads_no_answers(folder: Path) -> None:
    with service(folder) as server, Raw(folder / "qmp") as raw:
        raw.begin()
        raw.sock.setblocking(False)
        end = time.monotonic() + 5
        with suppress(BlockingIOError):
            while time.monotonic() < end:
                raw.sock.send(b"x\n" * 10_000)
        assert time.monotonic() < end, "it is not read for ever"
        works(folder / "disk")
        server.end()


def test_a_crowd_is_turned_away(folder: Path) -> None:
    with service(folder) as server, ExitStack() as stack:
        crowd = [stack.enter_context(Raw(folder / "qmp")) for _ in range(MOST_CLIENTS)]
        for raw in crowd:
            raw.begin()
        with Raw(folder / "qmp") as late:
            assert late.hear() is None
        assert crowd[0].ask({"execute": "stop"}) == {"return": {}} or crowd[0].hear() == {"return": {}}
        for raw in crowd[1:]:
            event = raw.hear()
            assert event is not None
            assert event["event"] == "STOP"
        crowd[1].close()
        end = time.monotonic() + PATIENCE
        while True:
            with Raw(folder / "qmp") as next_one:
                if next_one.hear() is not None:
                    break
            assert time.monotonic() < end
        server.end()


def test_one_in_the_middle_of_a_message_keeps_nobody_waiting(folder: Path) -> None:
    with service(folder) as server, Raw(folder / "qmp") as half, at(folder) as monitor:
        half.begin()
        half.send(b'{"execute": "sto')
        assert monitor.ask("query-status")["running"]
        works(folder / "disk")
        half.send(b'p"}')
        assert monitor.event("STOP")
        server.end()


# The parts -----------------------------------------------------------------------------------------------------------------------------

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=12)


@given(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=5), st.data())
def test_objects_are_found_however_they_are_cut(objects: list[dict[str, object]], data: st.DataObject) -> None:
    spaces = st.sampled_from(["", " ", "\n", "\r\n\t "])
    stream = b"".join((json.dumps(each, ensure_ascii=data.draw(st.booleans())) + data.draw(spaces)).encode() for each in objects)
    splitter, found = Splitter(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        splitter.feed(stream[:cut])
        stream = stream[cut:]
        while (message := splitter.next()) is not None:
            found.append(json.loads(message))
    assert found == objects


@given(st.binary(max_size=300))
def test_no_bytes_are_too_wrong_to_go_on(noise: bytes) -> None:
    splitter = Splitter()
    splitter.feed(noise)
    for _ in range(1000):
        try:
            if splitter.next() is None:
                break
        except QmpError:
            continue
    else:
        raise AssertionError("it does not come to an end")
    splitter.feed(b"}]}\"]}\n" * (DEEPEST + 1))
    for _ in range(10 * DEEPEST):
        try:
            splitter.next()
        except QmpError:
            continue
