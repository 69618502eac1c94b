"""Instruction data from a language model: a job against a server over real sockets, and its faults."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyvdl.__main__ import main
from pyvdl.data import Record, read_manifest
from pyvdl.instruct.endpoint import Answer, Connection, Endpoint, EndpointError
from pyvdl.instruct.job import JOURNAL_FILE, REJECTED_FILE, Summary, instruct_job, job_folder
from pyvdl.instruct.journal import Journal, Line
from tests.chat_server import ChatServer, Reply, chat, fault

PAIRS = {
    "order of events": "Q: What does the {noun} do first?\nA: It rolls to the left.\n",
    "causes and means": "Q: Why does the {noun} stop?\nA: It hits the wall.\n",
    "one to three words": "1. **Q:** What colour is the {noun}?\n   **A:** green\n",
}
NOUNS = ("ball", "cube", "disc", "star", "ring", "cross")
Respond = Callable[[int, dict[str, Any]], Reply]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def told(asked: dict[str, Any]) -> Reply:
    """A sensible answer to a prompt of ours about one of the records."""
    prompt = asked["messages"][0]["content"]
    noun = re.findall(r"- a (\w+) rolls", prompt)[-1]
    return chat(next(pairs for words, pairs in PAIRS.items() if words in prompt).format(noun=noun))


def records(count: int = 2) -> list[Record]:
    return [Record(key=noun, video=f"{noun}.mp4", captions=(f"a {noun} rolls",)) for noun in NOUNS[:count]]


def connection(server: ChatServer, **settings: Any) -> Connection:
    return Connection(base_url=server.url, **{"retries": 2, "backoff_seconds": 0.01, "concurrency": 1, **settings})


def ask(respond: Respond, **settings: Any) -> tuple[Answer, ChatServer]:
    """What comes of one question to a server that behaves so."""

    async def once(server: ChatServer) -> Answer:
        async with Endpoint("m", 64, None, connection(server, **settings)) as endpoint:
            return await endpoint.ask("what?", 7)

    with ChatServer(respond) as server:
        return asyncio.run(once(server)), server


def run(out: Path, server: ChatServer, count: int = 2, **options: Any) -> Summary:
    settings = options.pop("settings", {})
    return instruct_job(records(count), out, model="m", connection=connection(server, **settings), **options)


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job_folder(out) / JOURNAL_FILE).read_text().splitlines()]


# The endpoint.


def test_a_request_has_prompt_model_seed_and_length_and_no_temperature_unless_asked_for() -> None:
    answer, server = ask(lambda number, asked: chat("Q: a?\nA: b"))
    assert server.requests == [
        {"messages": [{"role": "user", "content": "what?"}], "model": "m", "seed": 7, "max_tokens": 64}
    ]
    assert answer == Answer(
        text="Q: a?\nA: b", model="served-model", requests=1, prompt_tokens=100, completion_tokens=20
    )


def test_an_endpoint_that_refuses_a_field_is_asked_without_it() -> None:
    def respond(number: int, asked: dict[str, Any]) -> Reply:
        if "max_tokens" in asked:
            return fault(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        if "seed" in asked:
            return fault(422, "Extra inputs are not permitted: body.seed")
        return chat("a")

    answer, server = ask(respond, retries=0)
    assert (answer.text, answer.requests) == ("a", 3)
    assert [sorted(set(request) - {"model", "messages"}) for request in server.requests] == [
        ["max_tokens", "seed"],
        ["max_completion_tokens", "seed"],
        ["max_completion_tokens"],
    ]
    answer, server = ask(lambda number, asked: fault(400, "bad seed, bad max_completion_tokens"), retries=0)
    assert (answer.error is None, len(server.requests)) == (False, 3)


CUT = chat("x" * 500).body
TRANSIENT = {
    "HTTP 429": fault(429, retry_after="0"),
    "HTTP 500": fault(500),
    "HTTP 503": fault(503, "loading the model"),
    "a reply without a choice": Reply(body=json.dumps({"choices": [], "model": "m"}).encode()),
    "no chat completion": Reply(body=json.dumps({"detail": "nothing"}).encode()),
    "no chat completion: JSONDecodeError": Reply(body=b'{"choices": [{"mess'),
    "no chat completion: '<html>": Reply(body=b"<html>busy</html>", headers={"Content-Type": "text/html"}),
    "a reply without text": chat(None),
    "connection": Reply(body=CUT, sent=40, headers={"Content-Length": str(len(CUT))}),
    "connection: ": Reply(body=b'7\r\n{"choic\r\n', sent=6, headers={"Transfer-Encoding": "chunked"}),
}


@pytest.mark.parametrize("told", TRANSIENT)
def test_what_may_work_later_is_tried_again(told: str) -> None:
    answer, server = ask(lambda number, asked: TRANSIENT[told] if number < 2 else chat("Q: a?\nA: b"))
    assert (answer.text, answer.error, len(server.requests)) == ("Q: a?\nA: b", None, 3)
    answer, server = ask(lambda number, asked: TRANSIENT[told], retries=1)
    assert answer.text is None
    assert (answer.error or "").startswith(told)
    assert answer.requests == len(server.requests) == 2


def test_a_server_that_hangs_is_not_waited_for() -> None:
    never = threading.Event()
    answer, server = ask(
        lambda number, asked: Reply(body=b"", wait=never) if number == 0 else chat("late"), timeout_seconds=0.3
    )
    assert (answer.text, len(server.requests)) == ("late", 2)
    for sent in (None, 0, 40):
        reply = Reply(body=CUT, sent=sent, wait=never)
        answer, _ = ask(lambda number, asked, reply=reply: reply, timeout_seconds=0.1, retries=1)  # type: ignore[misc]
        assert (answer.error, answer.requests) == ("no answer within 0.1 s", 2)


def test_nobody_at_the_address_is_a_failed_connection() -> None:
    async def once() -> Answer:
        nowhere = Connection(base_url="http://127.0.0.1:9/v1", retries=1, backoff_seconds=0.01)
        async with Endpoint("m", 64, None, nowhere) as endpoint:
            return await endpoint.ask("what?", 7)

    answer = asyncio.run(once())
    assert (answer.error or "").startswith("connection: ConnectError")
    assert answer.requests == 2


def test_retry_after_is_waited_for_by_all_requests() -> None:
    """The endpoint says how long: nobody asks it before, though back-off alone would."""
    times: list[float] = []

    def respond(number: int, asked: dict[str, Any]) -> Reply:
        times.append(time.monotonic())
        return fault(429, Retry_After="1") if number == 0 else chat("Q: a?\nA: b")

    async def both(server: ChatServer) -> list[Answer]:
        async with Endpoint("m", 64, None, connection(server)) as endpoint:
            first = asyncio.create_task(endpoint.ask("one", 1))
            while endpoint._free_at < time.monotonic():
                await asyncio.sleep(0.01)
            return [await endpoint.ask("two", 2), await first]

    with ChatServer(respond) as server:
        answers = asyncio.run(both(server))
    assert [answer.error for answer in answers] == [None, None]
    assert min(times[1:]) - times[0] >= 0.95


@pytest.mark.parametrize(
    ("header", "told"), [("3600", "asks to wait 3600 s"), ("Wed, 01 Jan 2200 00:00:00 GMT", "asks")]
)
def test_an_endpoint_that_asks_for_hours_ends_the_job(header: str, told: str) -> None:
    with pytest.raises(EndpointError, match=told):
        ask(lambda number, asked: fault(429, Retry_After=header))


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (fault(401, "bad\n key " + 1000 * "y"), r"refuses: HTTP 401: .{,300}; check OPENAI_API_KEY$"),
        (fault(403, "not yours"), "refuses: HTTP 403: .*not yours; check the account"),
        (fault(404, "no such model"), "no such model.*; check the address and the model's name, 'm'"),
        (fault(429, "no money", code="insufficient_quota"), "no money.*; check the account"),
    ],
)
def test_what_no_request_would_get_past_ends_the_job(reply: Reply, told: str) -> None:
    with pytest.raises(EndpointError, match=told):
        ask(lambda number, asked: reply)


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (fault(400, "too many tokens"), "HTTP 400"),
        (chat("", finish_reason="content_filter"), "the endpoint's content filter"),
        (chat("", finish_reason="length"), "all tokens went into thoughts: raise max_tokens"),
    ],
)
def test_what_this_request_will_never_get_is_not_tried_again(reply: Reply, told: str) -> None:
    answer, server = ask(lambda number, asked: reply)
    assert len(server.requests) == 1
    assert (answer.error or "").startswith(told)
    assert answer.is_refused


def test_limits_of_requests_and_tokens_hold_back() -> None:
    """At two a minute the second request waits half a minute: it has not come when we stop looking."""

    async def impatient(server: ChatServer, **limits: float) -> None:
        async with Endpoint("m", 64, None, connection(server, **limits)) as endpoint:
            await endpoint.ask("x" * 400, 0)
            async with asyncio.timeout(0.2):
                await endpoint.ask("x" * 400, 0)

    for limits in ({"requests_per_minute": 2}, {"tokens_per_minute": 240}):
        with ChatServer(lambda number, asked: chat("Q: a?\nA: b", usage=(100, 900))) as server:
            with pytest.raises(TimeoutError):
                asyncio.run(impatient(server, **limits))
            assert len(server.requests) <= 1


def test_openai_needs_a_key_and_other_endpoints_get_one_if_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    async def enter() -> None:
        async with Endpoint("m", 64, None):
            pass

    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        asyncio.run(enter())
    assert ask(lambda number, asked: chat("a"))[1].keys == ["Bearer none"]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert ask(lambda number, asked: chat("a"))[1].keys == ["Bearer secret"]


def test_settings_of_a_connection_are_checked() -> None:
    with pytest.raises(ValueError, match="base_url 'localhost:8000': expected an address as http://localhost:8000/v1"):
        Connection(base_url="localhost:8000")
    with pytest.raises(ValueError, match="concurrency=0: expected a number above 0"):
        Connection(concurrency=0)


# The job.


def test_a_job_writes_a_manifest_with_questions_and_where_they_are_from(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer(lambda number, asked: told(asked)) as server:
        made = run(out, server, 3, settings={"concurrency": 4})
    assert made.questions == {"temporal": 3, "causal": 3, "short": 3}
    assert (made.spent.requests, made.spent.prompt_tokens, made.spent.completion_tokens) == (9, 900, 180)
    assert made.spent.account(10, 100) == "9 requests, 900 tokens in, 180 out, cost 0.03"
    assert not list(made.troubles())
    read = read_manifest(out)
    assert [record.key for record in read] == ["ball", "cube", "disc"]
    assert [(q.question, q.answer, q.family) for q in read[1].questions] == [
        ("What does the cube do first?", "It rolls to the left.", "temporal"),
        ("Why does the cube stop?", "It hits the wall.", "causal"),
        ("What colour is the cube?", "green", "short"),
    ]
    origin = read[1].extra["instruct"]
    lines = {line["family"]: line for line in journal(out) if line["key"] == "cube"}
    for family in ("temporal", "causal", "short"):
        sha256 = lines[family]["prompt_sha256"]
        assert origin[family] == {"status": "ok", "model": "served-model", "prompt_sha256": sha256}
    assert {request["seed"] for request in server.requests if "a cube rolls" in request["messages"][0]["content"]} == {
        origin["seed"]
    }


def test_requests_at_a_time_are_limited(tmp_path: Path) -> None:
    """All at once fill the limit, and no more come before one has been answered."""
    gate = threading.Event()

    def respond(number: int, asked: dict[str, Any]) -> Reply:
        if server.most_at_a_time >= 3:
            gate.set()
        return Reply(body=told(asked).body, wait=gate)

    with ChatServer(respond) as server:
        run(tmp_path / "out.jsonl", server, 4, settings={"concurrency": 3})
    assert server.most_at_a_time == 3


def test_one_failing_record_does_not_stop_the_job_and_is_tried_again(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    bad = True

    def respond(number: int, asked: dict[str, Any]) -> Reply:
        return fault(400, "no") if bad and "a cube rolls" in asked["messages"][0]["content"] else told(asked)

    with ChatServer(respond) as server:
        made = run(out, server, 3)
        assert [(line.key, line.family) for line in made.failed] == [
            ("cube", "temporal"),
            ("cube", "causal"),
            ("cube", "short"),
        ]
        assert (
            "3 requests failed, the same command tries them again; the first is that of cube, temporal: HTTP 400"
            in (" ".join(made.troubles()))
        )
        cube = read_manifest(out)[1]
        assert (cube.questions, cube.extra["instruct"]["causal"]["status"][:16]) == ((), "failed: HTTP 400")
        bad = False
        made = run(out, server, 3)
    assert (made.failed, made.questions.total(), len(server.requests)) == ([], 9, 12)


def test_a_job_stops_when_the_endpoint_has_gone_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer(lambda number, asked: told(asked) if number < 4 else fault(500, "gone")) as server:
        with pytest.raises(EndpointError, match=r"the last 3 requests to http.*, the last with: HTTP 500.*goes on"):
            run(out, server, 6, give_up_after=3, settings={"retries": 0})
        assert len(server.requests) == 7
    assert not out.exists()
    with ChatServer(lambda number, asked: told(asked)) as server:
        seen: list[tuple[int, int]] = []
        made = run(out, server, 6, progress=lambda done, total, spent: seen.append((done, total)))
    assert len(server.requests) == 14
    assert seen == [(done, 18) for done in range(5, 19)]
    assert (made.questions.total(), made.spent.requests) == (18, 21)


def test_replies_that_are_cut_or_unreadable_are_told(tmp_path: Path) -> None:
    def respond(number: int, asked: dict[str, Any]) -> Reply:
        if "order of events" in asked["messages"][0]["content"]:
            return chat("I am sorry.", usage=None)
        return chat("Q: What rolls?\nA: a toy\nQ: Where does it", finish_reason="length")

    out = tmp_path / "out.jsonl"
    with ChatServer(respond) as server:
        made = run(out, server, 1)
    assert list(made.troubles()) == ["1 replies have no question that can be read"]
    assert {reason: count for reason, count in made.rejected.items() if count} == {"cut": 2, "repeated": 1}
    assert "1 records with 1 questions (1 causal, 0 short, 0 temporal); 3 pairs left out (2 cut, 1 repeated)" in (
        made.account()
    )
    assert made.spent.account() == "3 requests, 200 tokens in, 40 out (the endpoint does not count those of 1 replies)"
    assert read_manifest(out)[0].extra["instruct"]["temporal"]["status"] == "unreadable"
    rows = [json.loads(line) for line in (job_folder(out) / REJECTED_FILE).read_text().splitlines()]
    assert rows[0] == {
        "key": "ball",
        "family": "causal",
        "question": "Where does it",
        "answer": "",
        "reason": "cut",
    }


def test_a_finished_job_asks_nothing_and_another_recipe_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with ChatServer(lambda number, asked: told(asked)) as server:
        run(out, server)
        before = out.read_bytes()
        out.unlink()
        run(out, server)
        assert (out.read_bytes(), len(server.requests)) == (before, 6)
        with pytest.raises(ValueError, match=r"holds another job \(seed was 0, now 1\)"):
            run(out, server, seed=1)
        with pytest.raises(ValueError, match="records was 2, now 3"):
            run(out, server, 3)
        run(out, server, language="any")
        with pytest.raises(ValueError, match="language 'klingon': expected any or a code as en"):
            run(out, server, language="klingon")
        other = tmp_path / "other.jsonl"
        other.write_text("{}")
        with pytest.raises(ValueError, match="exists and is not of such a job"):
            run(other, server)
    assert len(server.requests) == 6


def test_a_job_that_got_no_answer_binds_nobody(tmp_path: Path) -> None:
    """Whoever mistyped the model's name types it right and starts again."""
    out = tmp_path / "out.jsonl"

    def respond(number: int, asked: dict[str, Any]) -> Reply:
        return told(asked) if asked["model"] == "right" else fault(404, "no such model")

    with ChatServer(respond) as server:
        with pytest.raises(EndpointError, match="no such model"):
            instruct_job(records(), out, model="wrong", connection=connection(server))
        assert instruct_job(records(), out, model="right", connection=connection(server)).questions.total() == 6


def many(count: int) -> list[Record]:
    return [Record(key=str(i), video="v.mp4", captions=(f"a ball rolls {i:02d}",)) for i in range(count)]


def test_any_number_of_refusals_stops_no_job(tmp_path: Path) -> None:
    """Records 1 to 8 are refused, 24 requests in a row; the first run ends amid them as by a kill."""
    out, killed = tmp_path / "out.jsonl", True
    refusals = (fault(400, "too long"), fault(403, "flagged"), chat("", finish_reason="content_filter"))

    def respond(number: int, asked: dict[str, Any]) -> Reply:
        if killed and number == 24:
            return fault(401, "gone")
        is_refused = re.search(r"rolls 0[1-8]", asked["messages"][0]["content"])
        return refusals[number % 3] if is_refused else told(asked)

    with ChatServer(respond) as server:
        options: dict[str, Any] = {"model": "m", "connection": connection(server)}
        with pytest.raises(EndpointError, match="gone"):
            instruct_job(many(10), out, **options)
        killed = False
        for _ in range(2):
            made = instruct_job(many(10), out, **options)
            assert (len(made.failed), made.questions.total()) == (24, 6)
    again = [re.findall(r"rolls (\d\d)", prompt)[-1] for prompt in server.prompts()[25:55]]
    assert again[:6] == ["08"] * 3 + ["09"] * 3, "what was never asked comes first"
    assert again[6:27] == [f"0{i}" for i in range(1, 8) for _ in range(3)]
    assert len(server.requests) == 25 + 27 + 24


def test_an_endpoint_that_refuses_all_ends_the_job(tmp_path: Path) -> None:
    with (
        ChatServer(lambda number, asked: fault(400, "no temperature")) as server,
        pytest.raises(EndpointError, match=r"the last 20 requests to http.*no temperature"),
    ):
        instruct_job(many(10), tmp_path / "out.jsonl", model="m", connection=connection(server))
    assert len(server.requests) == 20


def test_half_a_surrogate_pair_ends_no_job(tmp_path: Path) -> None:
    """In a caption, in a reply as the server sends it, in JSON that a reply holds, in an error."""
    data, out = tmp_path / "data.jsonl", tmp_path / "out.jsonl"
    data.write_text('{"key": "ball", "video": "ball.mp4", "captions": ["a \\ud83d ball \\ud83d\\ude00 rolls"]}\n')
    replies = (
        fault(400, "no \ud83d"),
        chat("Q: Why does the \ud83d ball stop?\nA: It hits the wall."),
        chat('[{"question": "What \\ud83d colour is the ball?", "answer": "green"}]'),
    )
    with ChatServer(lambda number, asked: replies[number]) as server:
        options: dict[str, Any] = {"model": "m", "connection": connection(server)}
        made = instruct_job(read_manifest(data), out, **options)
    assert made.failed[0].error == "HTTP 400: Error code: 400 - no ?"
    (record,) = read_manifest(out)
    assert record.captions == ("a ? ball \U0001f600 rolls",)
    rows = [json.loads(line) for line in (job_folder(out) / REJECTED_FILE).read_text().splitlines()]
    assert [question.question for question in record.questions] + [row["question"] for row in rows] == [
        "Why does the ? ball stop?",
        "What ? colour is the ball?",
    ]


def test_records_of_which_nothing_is_told_are_left_out_and_told(tmp_path: Path) -> None:
    silent = Record(key="silent", video="v.mp4", captions=(" ",))
    with ChatServer(lambda number, asked: told(asked)) as server:
        made = instruct_job([silent, *records(1)], tmp_path / "out.jsonl", model="m", connection=connection(server))
        assert list(made.troubles()) == ["1 records left out: nothing is told of them, the first is silent"]
        with pytest.raises(ValueError, match="none of the 1 records has captions or a narrative"):
            instruct_job([silent], tmp_path / "no.jsonl", model="m", connection=connection(server))
    with (
        ChatServer(lambda number, asked: chat("I cannot.")) as server,
        pytest.raises(ValueError, match="not one question came of 1 records"),
    ):
        run(tmp_path / "none.jsonl", server, 1)


# The journal.


def line(key: str) -> Line:
    counts = {"requests": 1, "prompt_tokens": 5, "completion_tokens": 2, "unmetered": 0}
    fixed: dict[str, Any] = {"prompt_sha256": "0", "model": "m", "seed": 1, "error": None, "is_cut": False, **counts}
    return Line(key=key, family="short", reply="Q: ü?\n\u2028A: b", **fixed)


def test_a_journal_survives_half_written_and_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as first:
        for key in ("a", "b", "c"):
            first.append(line(key))
    whole = path.read_bytes().splitlines(keepends=True)
    for cut in (1, len(whole[2]) // 2, len(whole[2]) - 1):
        path.write_bytes(whole[0] + whole[1] + whole[2][:cut])
        with Journal(path) as second:
            assert list(second.lines) == [("a", "short"), ("b", "short")]
            second.append(line("d"))
        assert path.read_bytes().count(b"\n") == 3
    path.write_bytes(whole[0] + b"\0" * 20 + b"\n" + b'{"key": "a"}\n' + whole[2])
    with Journal(path) as third:
        assert (list(third.lines), third.damaged) == ([("a", "short"), ("c", "short")], 2)
        assert third.lines["a", "short"] == line("a")
        assert third.spent.prompt_tokens == 10
        with pytest.raises(ValueError, match="another process is at work on this job"):
            Journal(path)


# The command.


def manifest(folder: Path, count: int) -> Path:
    path = folder / "data.jsonl"
    rows = [{"key": noun, "video": f"{noun}.mp4", "captions": [f"a {noun} rolls"]} for noun in NOUNS[:count]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_killed_command_goes_on(tmp_path: Path) -> None:
    """Killed with requests on their way and one answered half: what was answered is not asked again."""
    data, out = manifest(tmp_path, 4), tmp_path / "out.jsonl"
    argv = [sys.executable, "-m", "pyvdl", "instruct", "--data", str(data), "--out", str(out), "--model", "m"]
    never = threading.Event()

    def respond(number: int, asked: dict[str, Any]) -> Reply:
        return told(asked) if number < 5 else Reply(body=b"", wait=never)

    with ChatServer(respond) as server:
        process = subprocess.Popen([*argv, "--base-url", server.url, "--concurrency", "2"], stderr=subprocess.PIPE)
        while len(server.requests) < 7:
            assert process.poll() is None, (process.stderr or sys.stdin).read()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not out.exists()
    answered = {(row["key"], row["family"]) for row in journal(out)}
    assert len(answered) == 5
    with ChatServer(lambda number, asked: told(asked)) as server:
        assert main([*argv[3:], "--base-url", server.url]) == 0
        assert len(server.requests) == 7
    assert [len(record.questions) for record in read_manifest(out)] == [3, 3, 3, 3]


def test_the_command_tells_counts_cost_and_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = manifest(tmp_path, 2), tmp_path / "new" / "out.jsonl"

    def respond(number: int, asked: dict[str, Any]) -> Reply:
        return fault(400, "no") if number == 0 else told(asked)

    with ChatServer(respond) as server:
        argv = ["instruct", "--data", str(data), "--out", str(out), "--model", "m", "--base-url", server.url]
        argv += ["--concurrency", "1", "--temperature", "0.5", "--seed", "3", "--retries", "0"]
        assert main([*argv, "--price-in", "1000", "--price-out", "5000"]) == 0
        told_out, told_err = capsys.readouterr()
        assert told_out.splitlines() == [
            f"{out}: 2 records with 5 questions (2 causal, 2 short, 1 temporal)",
            "6 requests, 500 tokens in, 100 out, cost 1.00",
        ]
        assert told_err.startswith(
            "1 requests failed, the same command tries them again; the first is that of ball, temp"
        )
        assert {request["temperature"] for request in server.requests} == {0.5}
    assert main([*argv[:5], "--model", "other", "--seed", "3", "--temperature", "0.5"]) == 1
    assert "model was 'm', now 'other'" in capsys.readouterr().err
    assert main(argv[:5]) == 1
    assert "is what a language model writes" in capsys.readouterr().err
    assert main([*argv[:4], str(tmp_path / "rules.jsonl"), "--retries", "3"]) == 2
    assert "--retries is for a language model: name it with --model" in capsys.readouterr().err
    assert main([*argv[:4], str(data), "--model", "m"]) == 2
    assert "--out is --data" in capsys.readouterr().err
