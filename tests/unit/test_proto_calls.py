"""Calls, events and logs between two ends: every message kind, and what a peer may do wrong with it."""

from __future__ import annotations

from typing import Any

import pytest

from byre_proto import errors, events, frames, limits, messages
from byre_proto.encoding import pack, unpack
from byre_proto.errors import ByreError, DeadlineExceeded, InvalidRequest, NotSupported, RequestTooLarge
from byre_proto.frames import LocalProtocolError, RemoteProtocolError
from tests.fuzz.pair import Pair


def sample(kind: str) -> Any:
    """A value of a kind of the table."""
    if kind.endswith("?"):
        return sample(kind[:-1])
    if kind[0] == "[":
        return [sample(kind[1:-1])] * 2
    if kind[0] == "{":
        return {"a": sample(kind[1:-1])}
    return {"int": 7, "str": "text", "bytes": b"\x00\xff", "bool": True, "any": {"x": [1, None, 2.5]}}[kind]


def full(table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    return {field: sample(spec[0]) for field, spec in table.items()}


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("method", messages.METHODS)
def test_every_method_through_both_ends(method: str, chunk: int) -> None:
    arguments, result = map(full, messages.METHODS[method])
    for reverse in (False, True):
        pair = Pair(chunk=chunk)
        asker, server = pair.ends(reverse=reverse)
        call = asker.session.request(method, arguments, timeout=1.5)
        pair.exchange()
        assert server.take_one(events.RequestReceived) == events.RequestReceived(call, method, arguments, 1.5)
        server.session.reply(call, result)
        pair.exchange()
        assert asker.take_one(events.ReplyReceived) == events.ReplyReceived(call, result)


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("name", messages.EVENTS)
def test_every_event_through_both_ends(name: str, chunk: int) -> None:
    fields = full(messages.EVENTS[name])
    for reverse in (False, True):
        pair = Pair(chunk=chunk)
        teller, hearer = pair.ends(reverse=reverse)
        teller.session.event(name, fields)
        pair.exchange()
        assert hearer.take_one(events.EventReceived) == events.EventReceived(name, fields)


def test_missing_fields_take_their_defaults_and_defaults_are_not_shared() -> None:
    pair = Pair()
    seen = []
    for _ in range(2):
        pair.first.session.request("process.create", {})
        pair.exchange()
        arguments = pair.second.take_one(events.RequestReceived).arguments
        seen.append(list(arguments["args"]))
        arguments["args"].append("changed by a handler")
    assert seen == [[], []]


@pytest.mark.parametrize("error_class", sorted(errors.BY_CODE.values(), key=lambda c: c.code))
def test_every_error_arrives_as_its_class(error_class: type[ByreError]) -> None:
    pair = Pair()
    call = pair.call()
    pair.second.session.fail(call, error_class("it failed", hint="try", path="/x", count=3))
    pair.exchange()
    error = pair.first.take_one(events.ErrorReceived).error
    assert type(error) is error_class
    assert (error.message, error.hint, error.data) == ("it failed", "try", {"path": "/x", "count": 3})
    assert str(error) == "it failed (try)"


def test_an_error_of_a_newer_peer_keeps_its_code() -> None:
    pair = Pair()
    call = pair.call()
    pair.first.feed(frames.encode(frames.ERROR, 0, pack([call, "brand-\x1bnew", "m", "", {}])))
    error = pair.first.take_one(events.ErrorReceived).error
    assert type(error) is ByreError
    assert error.data == {"code": "brand-\\x1bnew"}


def test_texts_of_a_peer_are_escaped() -> None:
    pair = Pair()
    call = pair.call()
    data = {"k\x1b": "value"}
    pair.first.feed(frames.encode(frames.ERROR, 0, pack([call, "internal", "a\x1b[31m\u202eb", "\x00", data])))
    error = pair.first.take_one(events.ErrorReceived).error
    assert (error.message, error.hint) == ("a\\x1b[31m\\u202eb", "\\x00")
    assert error.data == {"k\\x1b": "value"}


@pytest.mark.parametrize("evidence", [{"x": object()}, {"x": "\ud800"}, {"x": b"b" * 70_000}, {"x": {1: 2}}])
def test_evidence_that_cannot_be_carried_does_not_cost_the_answer(evidence: dict[str, Any]) -> None:
    pair = Pair()
    call = pair.call()
    pair.second.session.fail(call, ByreError("m\ud800" + "\U000e0001" * 5000, hint="h" * 9000, **evidence))
    pair.exchange()
    error = pair.first.take_one(events.ErrorReceived).error
    assert error.message.startswith("m\\ud800")
    assert error.data == {}


# -- deadlines, cancellation (B44) --------------------------------------------------------------------------


@pytest.mark.behaviour("B44")
def test_a_late_reply_is_harmless_and_the_connection_goes_on() -> None:
    pair = Pair()
    late, other = pair.call(), pair.call("system.stacks")
    pair.first.session.forget(late)
    pair.second.session.reply(late, {"info": {}})
    pair.second.session.reply(other, {"text": "here"})
    pair.exchange()
    assert pair.first.take_one(events.ReplyReceived).call == other
    late = pair.call()
    pair.first.session.forget(late)
    pair.second.session.fail(late, DeadlineExceeded("too late"))
    pair.exchange()
    assert pair.first.take() == []
    assert pair.first.connection.connected
    assert pair.second.connection.connected


@pytest.mark.behaviour("B47")
def test_replies_come_in_any_order() -> None:
    pair = Pair()
    calls = [pair.call() for _ in range(5)]
    for call in reversed(calls):
        pair.second.session.reply(call, {"info": {"n": call}})
    pair.exchange()
    assert [e.call for e in pair.first.take()] == calls[::-1]  # type: ignore[attr-defined]


def test_a_cancelled_call_gets_one_verdict() -> None:
    pair = Pair()
    call = pair.call()
    pair.first.session.cancel(call)
    pair.exchange()
    assert pair.second.take_one(events.CancelReceived).call == call
    pair.second.session.fail(call, errors.Cancelled("as asked"))
    pair.exchange()
    assert isinstance(pair.first.take_one(events.ErrorReceived).error, errors.Cancelled)
    pair.first.session.cancel(call)
    assert pair.first.output() == b""
    with pytest.raises(LocalProtocolError):
        pair.second.session.reply(call, {})
    with pytest.raises(LocalProtocolError):
        pair.second.session.fail(call, ByreError("twice"))


def test_a_cancel_that_crosses_the_reply_is_dropped() -> None:
    pair = Pair()
    call = pair.call()
    pair.second.session.reply(call, {"info": {}})
    pair.first.session.cancel(call)
    pair.exchange()
    assert pair.second.take() == []
    assert pair.first.take_one(events.ReplyReceived)


@pytest.mark.parametrize("timeout, arrives", [(None, None), (0, 0), (-5, 0), (0.25, 0.25), (86400.5, 86400.5)])
def test_deadlines_are_relative_and_never_negative(timeout: float | None, arrives: float | None) -> None:
    pair = Pair()
    pair.first.session.request("system.info", {}, timeout)
    pair.exchange()
    assert pair.second.take_one(events.RequestReceived).timeout == arrives


def test_a_negative_deadline_of_a_peer_is_no_time() -> None:
    pair = Pair()
    pair.second.feed(frames.encode(frames.REQUEST, 0, pack([1, "system.info", {}, -7])))
    assert pair.second.take_one(events.RequestReceived).timeout == 0


# -- a request that is wrong fails alone (B45, B46) ----------------------------------------------------------


@pytest.mark.behaviour("B45")
@pytest.mark.parametrize(
    "method, arguments, error",
    [
        ("process.signal", {"process": 1}, InvalidRequest),
        ("process.signal", {"process": "1", "signal": 9}, InvalidRequest),
        ("process.signal", {"process": True, "signal": 9}, InvalidRequest),
        ("process.signal", {"process": 1, "signal": 9, "typo": 1}, InvalidRequest),
        ("process.create", {"args": "true"}, InvalidRequest),
        ("process.create", {"args": [b"true"]}, InvalidRequest),
        ("process.create", {"env": {1: "x"}}, InvalidRequest),
        ("process.create", {"oci": {1: "x"}}, LocalProtocolError),
        ("process.create", {"oci": object()}, LocalProtocolError),
        ("process.create", {"args": ["\ud800"]}, LocalProtocolError),
        ("process.create", {"args": ["x"] * (limits.MAX_ELEMENTS + 1)}, LocalProtocolError),
        ("process.create", {"args": ["x" * limits.MAX_CONTROL]}, RequestTooLarge),
        ("no.such", {}, NotSupported),
    ],
)
def test_a_wrong_request_fails_alone_at_the_sender(
    method: str, arguments: dict[str, Any], error: type[ByreError]
) -> None:
    pair = Pair()
    with pytest.raises(error):
        pair.first.session.request(method, arguments)
    assert pair.first.output() == b""
    pair.call()


@pytest.mark.behaviour("B45", "B46")
@pytest.mark.parametrize(
    "method, arguments, error",
    [
        ("process.signal", {"process": 1}, InvalidRequest),
        ("process.signal", {"process": "1", "signal": 9}, InvalidRequest),
        ("no.such\x1b", {}, NotSupported),
        ("", {}, NotSupported),
    ],
)
def test_a_wrong_request_of_a_peer_is_answered_with_its_id(
    method: str, arguments: dict[str, Any], error: type[ByreError]
) -> None:
    pair = Pair()
    pair.second.feed(frames.encode(frames.REQUEST, 0, pack([41, method, arguments, None])))
    assert pair.second.take() == []
    sent = pair.second.output()
    assert sent[4] == frames.ERROR
    call, code, message, _, _ = unpack(sent[frames.HEADER_SIZE :])
    assert (call, code) == (41, error.code)
    assert "\x1b" not in message
    pair.second.feed(frames.encode(frames.REQUEST, 0, pack([42, "system.info", {}, None])))
    assert pair.second.take_one(events.RequestReceived)


def test_a_field_that_only_a_newer_peer_knows_is_dropped() -> None:
    pair = Pair()
    pair.second.feed(frames.encode(frames.REQUEST, 0, pack([1, "system.info", {"newer": 1}, None])))
    assert pair.second.take_one(events.RequestReceived).arguments == {}
    pair.second.feed(frames.encode(frames.EVENT, 0, pack(["newer.event", {"x": 1}])))
    pair.second.feed(frames.encode(frames.EVENT, 0, pack(["vm.exit", {"reason": "r", "x": 1}])))
    assert pair.second.take_one(events.EventReceived).fields == {"reason": "r"}


def test_an_answer_over_the_limit_becomes_an_error() -> None:
    pair = Pair()
    call = pair.call()
    pair.second.session.reply(call, {"info": {"x": "y" * limits.MAX_CONTROL}})
    pair.exchange()
    assert isinstance(pair.first.take_one(events.ErrorReceived).error, RequestTooLarge)


@pytest.mark.parametrize("result", [{}, {"info": 1}, {"info": {}, "more": 1}, {"info": {"x": object()}}])
def test_a_wrong_answer_becomes_an_error_so_that_the_caller_gets_a_verdict(result: dict[str, Any]) -> None:
    pair = Pair()
    call = pair.call()
    pair.second.session.reply(call, result)
    pair.exchange()
    error = pair.first.take_one(events.ErrorReceived).error
    assert error.code == "internal"
    assert "the answer to system.info is wrong" in error.message


def test_arguments_that_are_not_utf8_pass_unchanged() -> None:
    pair = Pair()
    odd = b"caf\xe9\xff".decode("utf-8", "surrogateescape")
    pair.first.session.request("process.create", {"args": ["ls", odd]})
    pair.exchange()
    assert pair.second.take_one(events.RequestReceived).arguments["args"] == ["ls", odd]


# -- what closes the connection ------------------------------------------------------------------------------


def _message(kind: int, *fields: object) -> bytes:
    return frames.encode(kind, 0, pack(list(fields)))


@pytest.mark.behaviour("B45")
@pytest.mark.parametrize(
    "bad, reason",
    [
        (_message(frames.REQUEST, 0, "system.info", {}, None), "call 0 is not above"),
        (_message(frames.REQUEST, -1, "system.info", {}, None), "call -1 is not above"),
        (_message(frames.REQUEST, limits.MAX_CALL_ID + 1, "system.info", {}, None), "is not above"),
        (_message(frames.REQUEST, 1, "system.info", {}), "4 fields"),
        (_message(frames.REQUEST, 1, "system.info", {}, None, 0), "4 fields"),
        (_message(frames.REQUEST, 1, "system.info", [], None), "a list stands where dict"),
        (_message(frames.REQUEST, 1, b"system.info", {}, None), "a bytes stands where str"),
        (_message(frames.REQUEST, True, "system.info", {}, None), "a bool stands where int"),
        (_message(frames.REQUEST, 1, "system.info", {}, True), "a bool stands where int or nil"),
        (_message(frames.REQUEST, 1, "system.info", {}, 1.5), "a float stands where int or nil"),
        (_message(frames.EVENT, "vm.exit", {}), "reason is missing"),
        (_message(frames.EVENT, "vm.exit", {"reason": 1}), "must be str"),
        (_message(frames.LOG, "s", -1, "m", 0), "level -1"),
        (_message(frames.LOG, "s", limits.MAX_LOG_LEVEL + 1, "m", 0), "level 101"),
        (_message(frames.LOG, "s", 10, "m", -1), "after -1 dropped"),
        (frames.encode(frames.REQUEST, 0, b"\xc1"), "malformed message"),
        (frames.encode(frames.REQUEST, 0, b""), "malformed message"),
        (frames.encode(frames.REQUEST, 0, b"\x93\x01"), "malformed message"),
        (frames.encode(frames.REQUEST, 0, b"\xc0\xc0"), "malformed message"),
        (frames.encode(frames.REQUEST, 0, b"\x81\x01\x01"), "malformed message"),
        (frames.encode(frames.REQUEST, 0, b"\xc7\x00\x05"), "malformed message"),
        (frames.encode(frames.REQUEST, 0, b"\xd6\xff\x00\x00\x00\x00"), "malformed message"),
        (frames.encode(frames.REQUEST, 0, b"\x91" * 5000 + b"\xc0"), "malformed message"),
        (frames.encode_integer(frames.ACK, 0, 1), "1 frames are acknowledged"),
    ],
)
def test_a_malformed_frame_closes_the_connection_with_its_reason(bad: bytes, reason: str) -> None:
    for reverse in (False, True):
        pair = Pair()
        other, side = pair.ends(reverse=reverse)
        side.feed(bad)
        error = side.closed()
        assert isinstance(error, RemoteProtocolError)
        assert reason in error.message
        other.feed(side.output())
        told = other.closed()
        assert told.code == "protocol-error"
        assert isinstance(told, ConnectionError)
        assert error.message in told.message


def test_a_call_id_is_used_once() -> None:
    pair = Pair()
    pair.second.feed(_message(frames.REQUEST, 5, "system.info", {}, None))
    pair.second.feed(_message(frames.REQUEST, 5, "system.info", {}, None))
    assert "call 5 is not above 5" in pair.second.closed().message


def test_a_result_of_the_wrong_shape_closes_the_connection() -> None:
    pair = Pair()
    call = pair.call()
    pair.first.feed(_message(frames.REPLY, call, {"info": 5}))
    assert "the answer to system.info: system.info: info must be {any}" in pair.first.closed().message


def test_answers_to_no_call_are_dropped() -> None:
    pair = Pair()
    pair.first.feed(_message(frames.REPLY, 99, {}) + _message(frames.ERROR, 98, "internal", "m", "", {}))
    pair.first.feed(frames.encode_integer(frames.CANCEL, 0, 97))
    assert pair.first.take() == []
    assert pair.first.connection.connected


def test_call_ids_go_past_32_bits() -> None:
    pair = Pair()
    pair.first.session._next_call = 1 << 32
    call = pair.call()
    assert call == 1 << 32
    pair.first.session.cancel(call)
    pair.exchange()
    assert pair.second.take_one(events.CancelReceived).call == call


# -- logs, pings -------------------------------------------------------------------------------------------


@pytest.mark.behaviour("B50")
def test_log_lines_arrive_one_by_one_and_cannot_forge_others() -> None:
    pair = Pair()
    pair.second.session.log("agent", 20, "one\ntwo \x1b[0m\ud800")
    pair.exchange()
    assert pair.first.take() == [
        events.LogReceived("agent", 20, "one", 0),
        events.LogReceived("agent", 20, "two \\x1b[0m\\\\ud800".replace("\\\\", "\\"), 0),
    ]
    pair.first.feed(_message(frames.LOG, "a\nb", 30, "x\ny", 0))
    assert pair.first.take() == [events.LogReceived("a\\nb", 30, "x\\ny", 0)]


def test_a_level_out_of_range_is_brought_into_it() -> None:
    pair = Pair()
    pair.second.session.log("agent", -5, "low")
    pair.second.session.log("agent", 10**6, "high")
    pair.exchange()
    assert [e.level for e in pair.first.take()] == [0, limits.MAX_LOG_LEVEL]  # type: ignore[attr-defined]


def test_pings_come_back_with_their_token_ahead_of_data() -> None:
    pair = Pair()
    number = pair.stream()
    pair.second.session.send(number, bytes(16384))
    pair.first.session.ping((1 << 64) - 1)
    pair.exchange()
    assert pair.first.take()[0] == events.PongReceived((1 << 64) - 1)
