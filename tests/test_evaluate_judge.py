"""evaluate.py judge and its requests, against a small server that answers, refuses, hangs and breaks off as it is told."""

import http.server
import json
import math
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate

openai = pytest.importorskip("openai")
ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-test-3f9a51c07be2d846"


# -------------------------------------------------------------------------------------------------------------- the server
class Server(http.server.ThreadingHTTPServer):
    """Calls behave(request, nth), where nth counts how often the same body has come, for every request -> a text to answer
    with, a dict of what a reply holds besides, bytes to send, or a fault: (status, headers) or "cut", "truncated", "page",
    "hang", "drip", a byte a quarter of a second."""

    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.released = threading.Lock(), threading.Event()
        self.reset(lambda request, nth: fair(request))
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def reset(self, behave, latency=0.0):
        self.behave, self.latency, self.requests, self.seen, self.times, self.keys = behave, latency, [], Counter(), [], set()
        self.under_way = self.most = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address):
        pass  # a client that was killed or gave up


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        server, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        with server.lock:
            server.requests.append((self.path, request))
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            server.seen[body] += 1
            server.under_way += 1
            server.most, nth, behave = max(server.most, server.under_way), server.seen[body], server.behave
        answer = behave(request, nth)
        if answer == "hang":
            server.released.wait(30)
        time.sleep(server.latency)
        with server.lock:
            server.under_way -= 1
        if isinstance(answer, bytes):
            return self.send(200, answer)
        if answer == "drip":
            self.send(200, b"", length=10**6)
            while not server.released.wait(0.25):
                self.wfile.write(b" ")
                self.wfile.flush()
        if isinstance(answer, tuple):
            message = f"refused, your key {self.headers['Authorization']} notwithstanding"
            if len(answer) > 1 and isinstance(answer[1], str):  # the server's own words
                message, answer = answer[1], answer[:1]
            return self.send(answer[0], json.dumps(dict(error=dict(message=message))).encode(), **dict(answer[1:]))
        if answer == "page":
            return self.send(200, b"<html>a proxy</html>", **{"Content-Type": "text/html"})
        text = answer if isinstance(answer, dict) else dict(text=answer, finish_reason="stop")
        if "messages" in request:
            choice = dict(index=0, message=dict(role="assistant", content=text["text"]), finish_reason=text["finish_reason"])
        else:
            choice = dict(index=0, text=text["text"], finish_reason=text["finish_reason"])
        reply = dict(id="1", object="x", created=0, model=text.get("model", "judge-2026"), choices=[choice])
        if "usage" in text:
            reply["usage"] = dict(prompt_tokens=1, completion_tokens=text["usage"], total_tokens=1)
        payload = json.dumps(reply).encode()
        if answer == "truncated":
            return self.send(200, payload[:-20])
        self.send(200, payload[:30] if answer == "cut" else payload, length=len(payload))

    def send(self, status, payload, length=None, **headers):
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": length or len(payload)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)


def content(request):
    return request["messages"][-1]["content"]


def texts_a_b(request):
    return re.search(r"(?:Response|Summary) A:\n+(.*?)\n\n\w+ B:\n+(.*?)\n\nFIRST", content(request), re.S).groups()


def fair(request):
    """A judge who prefers the text with more good in it, and A of equals."""
    a, b = texts_a_b(request)
    return f"Comparison: one is better.\nMore helpful: {'A' if a.count('good') >= b.count('good') else 'B'}"


@pytest.fixture(scope="module")
def one_server():
    server = Server()
    yield server
    server.released.set()
    server.shutdown()


@pytest.fixture
def server(one_server, monkeypatch, process_group):
    one_server.reset(lambda request, nth: fair(request))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)  # what the server does not ask for; half a second
    patience(monkeypatch)
    return one_server


def patience(monkeypatch, timeout=5, max_retries=2):
    """What the client is told, here and not in a process of its own."""
    monkeypatch.setattr("plumbing.server.PATIENCE", dict(timeout=timeout, max_retries=max_retries))


# ---------------------------------------------------------------------------------------------------------------- the runs
def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def samples(path, n, k=1, ours="good {}", theirs="bad {}"):
    """n prompts with k completions each."""
    row = lambda i: dict(format=2, prompt=f"\n\nHuman: question {i}?\n\nAssistant:", references=[theirs.format(i)],
                         completions=[f"{ours.format(i)} {j}" for j in range(k)], ended=[True] * k)
    return write_jsonl(path, map(row, range(n)))


def command(server, tmp_path, *more, **flags):
    flags = dict(api=server.url, judge="gpt-4o-mini", out=tmp_path / "verdicts.jsonl") | flags
    return [*(str(word) for name, value in flags.items() for word in (f"--{name}", value)), *more]


def judge(server, tmp_path, **flags):
    """-> the summary."""
    evaluate.judge(evaluate.parse_args(["judge", *command(server, tmp_path, **flags)]))
    return json.loads((tmp_path / "verdicts.summary.json").read_text())


def start(argv):
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background were told to ignore it
    return subprocess.Popen([sys.executable, ROOT / "evaluate.py", "judge", *argv], preexec_fn=heed, **streams)


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def no_key(tmp_path, *texts):
    """The key is in none of the texts and in no file."""
    for text in (*texts, *(path.read_text() for path in tmp_path.rglob("*") if path.is_file())):
        assert KEY not in text and KEY[6:] not in text


# ----------------------------------------------------------------------------------------------- prompts, verdicts, figures
def test_table_2(shared):
    paper = (shared / "paper.txt").read_text()
    printed = paper[paper.index("For the following dialogue history") : paper.index("Table 2: Prompt for GPT-4")]
    filled = evaluate.COMPARE.format(prompt="<dialogue history>", a="<Response A>", b="<Response B>")
    assert filled.split() == printed.split()


def test_texts_are_sent_as_they_are(server, tmp_path):
    """Braces and backslashes are no template's; blanks around a text are gone; an empty completion is judged."""
    row = dict(format=2, prompt=" {prompt} \\n {a}", completions=["  {b} good", ""], references=[" {0} ", "unused"])
    assert judge(server, tmp_path, samples=write_jsonl(tmp_path / "s", [row]))["scored"] == 2
    for (path, request), ours in zip(sorted(server.requests, key=lambda r: "{b}" not in content(r[1])), ("{b} good", "")):
        assert path == "/v1/chat/completions" and request["temperature"] == 0 and request["model"] == "gpt-4o-mini"
        assert "Dialogue history:\n\n{prompt} \\n {a}\n\nResponse A:" in content(request)
        assert sorted(texts_a_b(request)) == sorted([ours, "{0}"]) and "unused" not in content(request)


@pytest.mark.parametrize("text, choice", [
    ("Comparison: A is better.\nMore helpful: A", "A"), ('Comparison: x\n\nMore helpful: "B"\n', "B"), ("**More helpful:** B.", "B"),
    ("MORE HELPFUL: Response A", "A"), ("Comparison: fine\nB", "B"), ("__A__", "A"), ("Preferred: Summary B", None),
    ("Response A:\nquoted\nResponse B:\nquoted\nMore helpful: B", "B"), ("", None), ("Both are fine.", None),
    ("More helpful: A or B", None), ("More helpful: A\nMore helpful: B", "B"), ("More helpful: a", None), ("A\nB", "B"),
    ("One said \"Preferred: B\"\nPreferred: B\n\nThat is wrong.\n\nA", "A"), ("More helpful: B\n\nThank you.", "B"),
    ("Comparison: B is more helpful. A", None), ("A good answer is more helpful: B rambles", None), ("More helpful: C", None),
    ('More helpful: <"A" or "B">', None), ("-" * 100000 + "x", None)])
def test_parse_choice(text, choice):
    assert evaluate.parse_choice(text) == choice


@pytest.mark.parametrize("text, rating", [
    ("Rating: [[5]]", 5), ("[[7.5]] and [[2]]", 7.5), ("so [6]", None), ("as in [1]", None), ("[3] of its points: [[8]]", 8), ("[[10.0]]", 10),
    ("[[10]]", 10), ("[[1]]", 1), ("Rating: 5", None), ("[[0]]", None), ("[[11]]", None), ("[[85]]", None),
    ("[[-3]]", None), ("[[five]]", None), ("", None), ("[[" + "1" * 10**6, None), ("[[1" * 10**6, None)])
def test_parse_rating(text, rating):
    assert evaluate.parse_rating(text) == rating


def test_positions():
    """Balanced, a pure function of (seed, prompt, j), and other for another of each."""
    bits = lambda seed, j: np.array([evaluate.request_seed(seed, f"prompt {i}", j) % 2 for i in range(4000)])
    a = bits(0, 0)
    assert abs(a.mean() - 0.5) < 4 * 0.5 / math.sqrt(4000) and (a == bits(0, 0)).all()
    for b in (bits(1, 0), bits(0, 1)):
        assert abs((a == b).mean() - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert evaluate.request_seed(0, "a", 0) == 1806043053 and 0 <= evaluate.request_seed(0, [dict(role="user", content="a")], 0) < 2**31


# ----------------------------------------------------------------------------------------------------- results of comparisons
def test_fair_judge(server, tmp_path, capsys):
    """Ours are better: all won, wherever they stand; the files changed about: none."""
    good, bad = samples(tmp_path / "good", 60, k=2), samples(tmp_path / "bad", 60, k=2, ours="bad {}")
    result = judge(server, tmp_path, samples=good)
    assert (result["win_rate"], result["scored"], result["malformed"], result["missing"], result["prompts"]) == (1, 120, 0, 0, 60)
    assert result["win_rate_se"] == 0 and 0.3 < result["share_a"] < 0.7
    printed = capsys.readouterr().out
    assert '"win_rate": 1.0' in printed and f'"share_a": {result["share_a"]}' in printed
    assert judge(server, tmp_path, samples=good, against=bad)["win_rate"] == 1
    assert judge(server, tmp_path, samples=bad, against=good)["win_rate"] == 0
    assert len(server.requests) == 360  # the second and third run are other requests in the same ledger


def test_biased_judge(server, tmp_path):
    """Always A: half are won, and the position figure says why."""
    server.reset(lambda request, nth: "More helpful: A")
    result = judge(server, tmp_path, samples=samples(tmp_path / "s", 200))
    assert result["share_a"] == 1
    first = [row["completion_is"] == "A" for row in read_jsonl(tmp_path / "verdicts.jsonl")]
    assert result["win_rate"] == np.mean(first) and abs(result["win_rate"] - 0.5) < 4 * 0.5 / math.sqrt(200)
    assert result["win_rate_se"] == pytest.approx(np.std(first, ddof=1) / math.sqrt(200))


def test_error_is_that_of_prompts(server, tmp_path):
    """The mean over prompts and its error, against numpy; what a prompt's completions say together counts once."""
    server.reset(lambda request, nth: fair(request) if "question 1?" in content(request) else "More helpful: A")
    result = judge(server, tmp_path, samples=samples(tmp_path / "s", 40, k=3))
    won = {}
    for row in read_jsonl(tmp_path / "verdicts.jsonl"):
        won.setdefault(row["prompt"], []).append(row["verdict"] == row["completion_is"])
    means = [np.mean(of_prompt) for of_prompt in won.values()]
    assert len(means) == 40 and 0 < np.std(means)
    assert result["win_rate"] == pytest.approx(np.mean(means))
    assert result["win_rate_se"] == pytest.approx(np.std(means, ddof=1) / math.sqrt(40))


def test_what_has_no_opponent(server, tmp_path):
    ours = [dict(format=2, prompt=p, completions=["good", "good"]) for p in "abc"]
    theirs = [dict(format=2, prompt=p, completions=said) for p, said in (("c", ["x", "good good"]), ("a", ["x"]))]
    flags = dict(samples=write_jsonl(tmp_path / "ours", ours), against=write_jsonl(tmp_path / "theirs", theirs))
    result = judge(server, tmp_path, **flags)
    assert result["unmatched"] == 3  # both of b, the second of a
    assert result["scored"] == 3 and result["win_rate"] == pytest.approx((1 + 0.5) / 2)  # a, c
    with pytest.raises(evaluate.UserError, match="nothing to judge"):
        judge(server, tmp_path, samples=tmp_path / "ours")  # without references


def test_equal_completions(server, tmp_path):
    """Two completions of a prompt are two verdicts, though their texts be equal; a row that stands twice is one."""
    rows = [dict(format=2, prompt=f"question {i}", completions=["good", "good"], references=["bad"]) for i in range(8)]
    assert judge(server, tmp_path, samples=write_jsonl(tmp_path / "s", rows))["scored"] == 16 == len(server.requests)
    result = judge(server, tmp_path, samples=write_jsonl(tmp_path / "s", rows + rows))
    assert (result["scored"], result["prompts"], len(server.requests)) == (16, 8, 16)


def test_malformed(server, tmp_path, capsys):
    """Kept in the judge's words, counted, listed, not scored, not asked again unless its line is deleted."""
    prose = "I would rather not\nchoose."
    server.reset(lambda request, nth: prose if "question 3?" in content(request) else fair(request))
    result = judge(server, tmp_path, samples=samples(tmp_path / "s", 6))
    lines = read_jsonl(tmp_path / "verdicts.jsonl")
    row = next(row for row in lines if row["verdict"] is None)
    assert (result["scored"], result["malformed"], result["missing"], result["win_rate"]) == (5, 1, 0, 1)
    assert row["text"] == prose and result["malformed_verdicts"] == {row["key"]: "I would rather not choose."}
    assert row["model"] == "judge-2026" and '"malformed": 1' in capsys.readouterr().out
    assert judge(server, tmp_path, samples=tmp_path / "s") == result and len(server.requests) == 6
    server.reset(lambda request, nth: fair(request))
    write_jsonl(tmp_path / "verdicts.jsonl", [row for row in lines if row["verdict"]])
    assert judge(server, tmp_path, samples=tmp_path / "s")["scored"] == 6 and len(server.requests) == 1


# ------------------------------------------------------------------------------------------------------- what goes wrong
def test_faults_are_retried(server, tmp_path, monkeypatch):
    """Each kind once or twice, then an answer: all are scored, and each verdict is asked for until it is there, no more."""
    faults = [(429, ("Retry-After", "1")), (503, ("Retry-After", "1")), (500,), "cut", "hang"]

    def behave(request, nth):
        fault = faults[int(re.search(r"question (\d+)", content(request))[1]) % len(faults)]
        return fault if nth <= (1 if fault == "hang" else 2) else fair(request)

    server.reset(behave)
    patience(monkeypatch, timeout=1)
    began = time.monotonic()
    result = judge(server, tmp_path, samples=samples(tmp_path / "s", 10), concurrency=10)
    assert result["scored"] == 10 and result["win_rate"] == 1 and len(server.requests) == 8 * 3 + 2 * 2
    assert 2 <= time.monotonic() - began < 10  # Retry-After was honoured
    for body in {json.dumps(request) for _, request in server.requests if "question 0?" in content(request)}:
        times = [t for t, (_, request) in zip(server.times, server.requests) if json.dumps(request) == body]
        assert all(later - t >= 0.95 for t, later in zip(times, times[1:]))


def test_failures_do_not_stop_the_run(server, tmp_path, capsys):
    """What fails for good is counted; the same command asks that alone."""
    broken = {"1?": "truncated", "4?": "page", "5?": (503,), "7?": (429, ("Retry-After", "9999"))}
    server.reset(lambda request, nth: next((f for q, f in broken.items() if f"question {q}" in content(request)), fair(request)))
    with pytest.raises(evaluate.UserError, match="4 of 9 requests failed.*the same command asks") as error:
        judge(server, tmp_path, samples=samples(tmp_path / "s", 9))
    summary = json.loads((tmp_path / "verdicts.summary.json").read_text())
    assert (summary["scored"], summary["missing"]) == (5, 4) and '"missing": 4' in capsys.readouterr().out
    no_key(tmp_path, str(error.value))
    server.reset(lambda request, nth: fair(request))
    assert judge(server, tmp_path, samples=tmp_path / "s")["scored"] == 9 and len(server.requests) == 4


def test_a_server_that_is_down_is_left_alone(server, tmp_path, monkeypatch):
    """After 20 failures in a row; not after 25 here and there."""
    patience(monkeypatch, max_retries=0)
    server.reset(lambda request, nth: (503,))
    with pytest.raises(evaluate.UserError, match="2. of 100 requests failed.*after 20 in a row no more"):
        judge(server, tmp_path, samples=samples(tmp_path / "s", 100), concurrency=4)
    assert 20 <= len(server.requests) < 20 + 4 and json.loads((tmp_path / "verdicts.summary.json").read_text())["missing"] == 100
    server.reset(lambda request, nth: (503,) if re.search(r"question \d?[02468]\?", content(request)) else fair(request))
    with pytest.raises(evaluate.UserError, match="50 of 100 requests failed"):
        judge(server, tmp_path, samples=tmp_path / "s", concurrency=4)
    assert len(server.requests) == 100


@pytest.mark.parametrize("status", [307, 401, 403, 404])
def test_refusals_stop_the_run(server, tmp_path, status):
    server.reset(lambda request, nth: (status,))
    with pytest.raises(evaluate.UserError, match=f"{server.url} refuses a request.*{status}") as error:
        judge(server, tmp_path, samples=samples(tmp_path / "s", 50), concurrency=2)
    assert len(server.requests) <= 4
    no_key(tmp_path, str(error.value))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_request_that_is_refused(server, tmp_path, status):
    """By a content filter, or as too long: one failed item, asked again by the next run; all others are judged."""
    refused = lambda request, nth: (status,) if "question 3?" in content(request) else fair(request)
    server.reset(refused)
    with pytest.raises(evaluate.UserError, match=f"1 of 20 requests failed.*{status}") as error:
        judge(server, tmp_path, samples=samples(tmp_path / "s", 20), concurrency=2)
    summary = json.loads((tmp_path / "verdicts.summary.json").read_text())
    assert (summary["scored"], summary["missing"], len(server.requests)) == (19, 1, 20)
    no_key(tmp_path, str(error.value))
    with pytest.raises(evaluate.UserError, match="1 of 1 requests failed"):
        judge(server, tmp_path, samples=tmp_path / "s")
    assert len(server.requests) == 21
    server.reset(lambda request, nth: fair(request))
    assert judge(server, tmp_path, samples=tmp_path / "s")["scored"] == 20 and len(server.requests) == 1


def test_refusals_of_many(server, tmp_path):
    """However many in a row, they do not keep the others from being asked; if nothing at all is answered, it ends."""
    number = lambda request: int(re.search(r"question (\d+)", content(request))[1])
    server.reset(lambda request, nth: (400,) if 1 <= number(request) < 50 else fair(request))
    with pytest.raises(evaluate.UserError, match="49 of 60 requests failed"):
        judge(server, tmp_path, samples=samples(tmp_path / "s", 60), concurrency=1)
    assert len(server.requests) == 60 and len(read_jsonl(tmp_path / "verdicts.jsonl")) == 11
    server.reset(lambda request, nth: (400,))
    with pytest.raises(evaluate.UserError, match="20 of 60 requests failed"):
        judge(server, tmp_path, samples=tmp_path / "s", judge="other", concurrency=1)
    assert len(server.requests) == 20


# What OpenAI's reasoning models say.
NO_MAX_TOKENS = (400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
NO_TEMPERATURE = (400, "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) value is supported.")


def reasoning_model(request, nth):
    if "max_tokens" in request:
        return NO_MAX_TOKENS
    return NO_TEMPERATURE if request.get("temperature", 1) != 1 else fair(request)


def test_a_judge_that_wants_another_form(server, tmp_path, capsys):
    """It is asked in the form that it takes, found once; the verdicts' keys are those of any other judge's."""
    server.reset(reasoning_model)
    assert judge(server, tmp_path, samples=samples(tmp_path / "s", 5), concurrency=1)["scored"] == 5
    assert len(server.requests) == 5 + 2
    for _, request in server.requests[2:]:
        assert request["max_completion_tokens"] == 2048 and not {"max_tokens", "temperature"} & request.keys()
    printed = capsys.readouterr().out
    assert printed.count("does not take temperature: asked without it") == 1 and printed.count("asked max_completion_tokens") == 1
    keys = {row["key"] for row in read_jsonl(tmp_path / "verdicts.jsonl")}
    (tmp_path / "verdicts.jsonl").unlink()
    server.reset(lambda request, nth: fair(request))
    judge(server, tmp_path, samples=tmp_path / "s")
    assert {row["key"] for row in read_jsonl(tmp_path / "verdicts.jsonl")} == keys
    assert all(request["temperature"] == 0 and request["max_tokens"] == 2048 for _, request in server.requests)


def test_no_sample_is_drawn_at_another_temperature(server):
    server.reset(reasoning_model)
    with pytest.raises(evaluate.UserError, match="1 of 1 requests failed.*temperature"):
        completions(server, [(0, [dict(role="user", content="hi")])], k=1)
    assert all(request["temperature"] == 0.7 for _, request in server.requests)


def test_a_text_has_no_other_names(server):
    """max_completion_tokens is of conversations alone: the server's own words are said, not that the client knows none."""
    server.reset(lambda request, nth: (400, "max_tokens is not supported"))
    with pytest.raises(evaluate.UserError, match="1 of 1 requests failed.*max_tokens is not supported"):
        completions(server, [(0, "once upon")], k=1)


@pytest.mark.parametrize("reply", [None, [dict(type="text", text="More helpful: A")], 7])
def test_a_reply_that_is_no_text(server, tmp_path, reply):
    """It is a failure for judge and sample alike: nothing of it is kept, and the run goes on."""
    broken = lambda request, nth: dict(text=reply, finish_reason="stop") if "question 2?" in content(request) else fair(request)
    server.reset(broken)
    with pytest.raises(evaluate.UserError, match="1 of 4 requests failed.*content is no text"):
        judge(server, tmp_path, samples=samples(tmp_path / "s", 4))
    assert len(read_jsonl(tmp_path / "verdicts.jsonl")) == 3
    server.reset(lambda request, nth: dict(text=reply, finish_reason="stop") if "messages" in request else sampled(request))
    kept = {}
    with pytest.raises(evaluate.UserError, match="1 of 3 requests failed.*content is no text"):
        completions(server, PROMPTS, keep=kept.update)
    assert kept.keys() == {0, 2}


@pytest.mark.parametrize("reply", [b"[" * 100000, b'{"choices": [], "model": "\xff"}'], ids=["deeply nested", "no UTF-8"])
def test_a_reply_that_cannot_be_read(server, tmp_path, reply):
    server.reset(lambda request, nth: reply if "question 1?" in content(request) else fair(request))
    with pytest.raises(evaluate.UserError, match="1 of 3 requests failed"):
        judge(server, tmp_path, samples=samples(tmp_path / "s", 3))
    assert len(read_jsonl(tmp_path / "verdicts.jsonl")) == 2


def test_a_byte_now_and_then(server, tmp_path, monkeypatch):
    """A read of which never times out: the request does."""
    monkeypatch.setattr("plumbing.server.TOTAL_TIME", 2)
    server.reset(lambda request, nth: "drip" if "question 1?" in content(request) else fair(request))
    began = time.monotonic()
    with pytest.raises(evaluate.UserError, match="1 of 4 requests failed.*within 2 seconds"):
        judge(server, tmp_path, samples=samples(tmp_path / "s", 4), concurrency=1)
    assert 2 <= time.monotonic() - began < 20 and len(read_jsonl(tmp_path / "verdicts.jsonl")) == 3


def test_redirects_are_not_followed(server, tmp_path):
    """Prompts and key go to the host that was named, and to no other."""
    elsewhere = Server()
    server.reset(lambda request, nth: (307, ("Location", f"{elsewhere.url}/chat/completions")))
    with pytest.raises(evaluate.UserError, match="refuses a request.*307|Redirect"):
        judge(server, tmp_path, samples=samples(tmp_path / "s", 2))
    assert not elsewhere.requests
    elsewhere.shutdown()


def test_a_summary_of_the_users_own(server, tmp_path):
    (tmp_path / "verdicts.summary.json").write_text('{"my": "notes"}')
    with pytest.raises(evaluate.UserError, match="verdicts.summary.json is not one that this command wrote"):
        judge(server, tmp_path, samples=samples(tmp_path / "s", 2))
    assert (tmp_path / "verdicts.summary.json").read_text() == '{"my": "notes"}' and not server.requests


def test_a_wrong_key_is_one_line(server, tmp_path):
    server.reset(lambda request, nth: (401,))
    process = start(command(server, tmp_path, samples=samples(tmp_path / "s", 5)))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err.startswith("error: ") and len(err.splitlines()) == 1 and "401" in err
    assert f"Bearer {KEY}" in server.keys  # the server quotes it
    no_key(tmp_path, out, err)


def test_key_and_url(server, tmp_path, monkeypatch):
    """From the environment only; none for a local server is fine, one that no header can hold is an error."""
    judge(server, tmp_path, samples=samples(tmp_path / "s", 1))
    assert server.keys == {f"Bearer {KEY}"}
    no_key(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9")
    with pytest.raises(evaluate.UserError, match="OPENAI_API_KEY"):
        judge(server, tmp_path, samples=tmp_path / "s", judge="other")
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge(server, tmp_path, samples=tmp_path / "s", judge="other")["scored"] == 1
    for url in ("localhost:8000", "http://user:secret@host/v1", "http://host/v1?key=secret"):
        with pytest.raises(evaluate.UserError, match="--api") as error:
            judge(server, tmp_path, samples=tmp_path / "s", judge="third", api=url)
        assert "secret" not in str(error.value)
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(evaluate.UserError, match="pip install openai"):
        judge(server, tmp_path, samples=tmp_path / "s", judge="third")


@pytest.mark.parametrize("line, words", [
    ("{broken", "s:1: not JSON"), ('{"format": 2, "prompt": "a", "completions": "b"}', "want prompt.*s:1"), ("", "nothing to judge"),
    ('{"prompt": "<|im_start|>user", "completions": ["b"]}', "no sample of format 2.*s:1"),
    ('{"format": 2, "prompt": ["a"], "completions": ["b"]}', "want prompt.*s:1"),
    *((json.dumps(dict(format=2, prompt="a", completions=["b", "c"], references=["d"]) | wrong), "want prompt.*s:1") for wrong in (
        dict(stops="bc"), dict(stops=None), dict(stops=[1, 2]), dict(stops=[""]), dict(stops={"b": 1, "c": 2}),
        dict(logps=[-1.0]), dict(logps=[-1.0] * 3), dict(logps=[]), dict(logps=-1.0), dict(logps=["x", None]), dict(logps=[0.5, -1.0]),
        dict(logps=[True, -1.0]), dict(logps=[-math.inf, -1.0]), dict(logps=[math.nan, -1.0]))),
    ('{"format": 2, "prompt": "\\ud800", "completions": ["a"], "references": ["b"]}', "broken Unicode.*s:1")])
def test_bad_samples(server, tmp_path, line, words):
    (tmp_path / "s").write_text(line + "\n")
    with pytest.raises(evaluate.UserError, match=words):
        judge(server, tmp_path, samples=tmp_path / "s")


def test_one_bad_sample(server, tmp_path, capsys):
    """It is said with its place, the others are judged, and the exit code is 1."""
    rows = read_jsonl(samples(tmp_path / "s", 3))
    del rows[1]["completions"]
    argv = ["judge", *command(server, tmp_path, samples=write_jsonl(tmp_path / "s", rows))]
    assert evaluate.judge(evaluate.parse_args(argv)) == 1
    summary = json.loads((tmp_path / "verdicts.summary.json").read_text())
    assert (summary["bad_rows"], summary["scored"], len(server.requests)) == (1, 2, 2) and f"(first {tmp_path}/s:2)" in capsys.readouterr().out


def test_a_verdict_is_what_the_judge_said(server, tmp_path):
    """Not what somebody wrote beside it."""
    result = judge(server, tmp_path, samples=samples(tmp_path / "s", 5))
    rows = read_jsonl(tmp_path / "verdicts.jsonl")
    for verdict in ("C", None, 7, "AB"[rows[0]["verdict"] == "A"]):
        write_jsonl(tmp_path / "verdicts.jsonl", [rows[0] | dict(verdict=verdict), *rows[1:]])
        assert judge(server, tmp_path, samples=tmp_path / "s") == result and result["win_rate"] == 1


def test_flags(server, tmp_path):
    for flags, words in ((dict(), "--samples"), (dict(samples="s", api=""), "--api is missing"),
                         (dict(samples="s", concurrency=0), "--concurrency 0.*above 0"), (dict(samples="s", out="v.txt"), "--out v.txt.*.jsonl")):
        with pytest.raises(evaluate.UserError, match=words):
            samples(tmp_path / "s", 1)
            judge(server, tmp_path, **{name: tmp_path / value if value == "s" else value for name, value in flags.items()})


# ------------------------------------------------------------------------------------------------- the ledger and the threads
def test_concurrency(server, tmp_path):
    server.reset(lambda request, nth: fair(request), latency=0.1)
    judge(server, tmp_path, samples=samples(tmp_path / "s", 30), concurrency=5)
    assert server.most == 5
    judge(server, tmp_path, samples=samples(tmp_path / "s", 3, ours="good other"), concurrency=1)
    assert len(server.requests) == 33 and "question 2?" in read_jsonl(tmp_path / "verdicts.jsonl")[-1]["prompt"]  # in order


def test_each_reply_is_kept_before_the_next_request(server, tmp_path):
    """Whenever a request comes in, at most `concurrency` of those sent, itself included, are not in the ledger."""
    unkept = []
    out = tmp_path / "verdicts.jsonl"
    ledger = lambda: out.read_bytes().count(b"\n") if out.exists() else 0
    server.reset(lambda request, nth: unkept.append(len(server.requests) - ledger()) or fair(request), latency=0.005)
    judge(server, tmp_path, samples=samples(tmp_path / "s", 60), concurrency=4)
    assert len(unkept) == 60 and max(unkept) <= 4


def test_cut_last_line(server, tmp_path):
    result = judge(server, tmp_path, samples=samples(tmp_path / "s", 5))
    out = tmp_path / "verdicts.jsonl"
    whole = out.read_bytes()
    for cut in (1, 30, len(whole) - 4):
        out.write_bytes(whole[:-cut])
        assert judge(server, tmp_path, samples=tmp_path / "s") == result and len(read_jsonl(out)) == 5
    assert len(server.requests) == 5 + 1 + 1 + 5
    for damaged, words in ((whole.replace(b'"verdict"', b'verdict"', 1), "1: not JSON"), (b"1\n2", "1: not a row of ours"),
                           (whole.replace(b'"verdict"', b'"v"', 1), "1: not a row of ours")):
        out.write_bytes(damaged)
        with pytest.raises(evaluate.UserError, match=f"verdicts.jsonl:{words}"):
            judge(server, tmp_path, samples=tmp_path / "s")
        assert out.read_bytes() == damaged  # another file, perhaps: nothing is cut off it


def test_kill_and_resume(server, tmp_path):
    """kill -9: what was paid for and is not in the ledger is at most what was under way; the next run asks the rest."""
    server.reset(lambda request, nth: fair(request), latency=0.03)
    argv = command(server, tmp_path, samples=samples(tmp_path / "s", 60, k=2), concurrency=4)
    ledger = tmp_path / "verdicts.jsonl"
    process = start(argv)
    wait_for(lambda: ledger.exists() and ledger.read_bytes().count(b"\n") >= 40)
    process.kill()
    process.communicate()
    time.sleep(0.2)  # for what the server still holds
    kept, asked = ledger.read_bytes().count(b"\n"), len(server.requests)
    assert 40 <= kept < 120 and 0 <= asked - kept <= 4
    process = start(argv)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and len(server.requests) == asked + 120 - kept, err
    assert len({row["key"] for row in read_jsonl(ledger)}) == len(read_jsonl(ledger)) == 120 and '"win_rate": 1.0' in out
    no_key(tmp_path, out, err)


def test_interrupt(server, tmp_path):
    """Ctrl-C while requests hang: 130 at once, no traceback, what came in before is kept."""
    server.reset(lambda request, nth: fair(request) if len(server.requests) <= 10 else "hang")
    process = start(command(server, tmp_path, samples=samples(tmp_path / "s", 40), concurrency=4))
    ledger = tmp_path / "verdicts.jsonl"
    wait_for(lambda: len(server.requests) == 14 and ledger.read_bytes().count(b"\n") == 10)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and time.monotonic() - began < 3 and "Traceback" not in err
    assert len(read_jsonl(ledger)) == 10


# --------------------------------------------------------------------------------------------------------------- MT-Bench
def suite_files(directory):
    """FastChat's layout, fastchat/llm_judge/data."""
    (directory / "mt_bench" / "reference_answer").mkdir(parents=True)
    return dict(questions=directory / "mt_bench" / "question.jsonl", judge_prompts=directory / "judge_prompts.jsonl",
                reference_answers=directory / "mt_bench" / "reference_answer" / "gpt-4.jsonl")


@pytest.fixture(params=["published", "small"])
def suite(request, tmp_path):
    """-> FastChat's published files where they are, and a suite of our own with a category of each kind."""
    files = suite_files(tmp_path / "data")
    if request.param == "published":
        directory = request.getfixturevalue("shared") / "data" / "mt_bench"
        if not directory.is_dir():
            pytest.skip("no ../shared/data/mt_bench")
        for name, published in (("questions", "question.jsonl"), ("judge_prompts", "judge_prompts.jsonl"),
                                ("reference_answers", "reference_answers_gpt4.jsonl")):
            files[name].write_text((directory / published).read_text())
        return files
    question = lambda n, category: dict(question_id=n, category=category, turns=[f"first {{x}} {n}", f"second {n}"])
    write_jsonl(files["questions"], [question(n, c) for n, c in enumerate(("writing", "math", "writing", "coding", "stem"))])
    write_jsonl(files["reference_answers"], [dict(question_id=n, choices=[dict(turns=[f"r1 {n}", f"r2 {n}"])]) for n in (1, 3)])
    one, two = "{question} | {answer}", "{question_1} | {answer_1} | {question_2} | {answer_2}"
    template = lambda name, text: dict(name=name, system_prompt=f"system of {name}", prompt_template=text)
    write_jsonl(files["judge_prompts"], [
        template("single-v1", one), template("single-v1-multi-turn", two), template("single-math-v1", one + " | {ref_answer_1}"),
        template("single-math-v1-multi-turn", two + " | {ref_answer_1} | {ref_answer_2}")])
    return files


def test_mt_bench(server, tmp_path, suite, capsys):
    """The requests against a plain filling-in of the templates; means against numpy."""
    questions = read_jsonl(suite["questions"])
    answers = {q["question_id"]: [f"answer {q['question_id']} {{answer}}", f"again {q['question_id']}"] for q in questions[:-1]}
    line = lambda n, turns: dict(question_id=n, answer_id="x", model_id="m", choices=[dict(index=0, turns=turns)], tstamp=0.0)
    file = write_jsonl(tmp_path / "answers.jsonl", [line(n, turns) for n, turns in answers.items()])
    grades = {}

    def behave(request, nth):
        """A grade that depends on the request; the first answer's second turn gets none."""
        text = content(request)
        grade = None if f"again {questions[0]['question_id']}" in text else 1 + sum(text.encode()) % 19 / 2
        grades[json.dumps(request["messages"])] = grade
        return "no grade" if grade is None else f"Fair. Rating: [[{grade}]]"

    server.reset(behave)
    result = judge(server, tmp_path, samples=file, mt_bench=tmp_path / "data")

    templates = {row["name"]: row for row in read_jsonl(suite["judge_prompts"])}
    references = {row["question_id"]: row["choices"][0]["turns"] for row in read_jsonl(suite["reference_answers"])}
    expected = {}
    for question in questions[:-1]:
        n, math_like = question["question_id"], question["category"] in ("math", "reasoning", "coding")
        fields = dict(question=question["turns"][0], question_1=question["turns"][0], question_2=question["turns"][1],
                      answer=answers[n][0], answer_1=answers[n][0], answer_2=answers[n][1])
        if math_like:
            fields |= dict(ref_answer_1=references[n][0], ref_answer_2=references[n][1])
        for turn in (1, 2):
            row = templates[f"single{'-math' if math_like else ''}-v1{'-multi-turn' if turn == 2 else ''}"]
            filled = re.sub(r"\{(\w+)\}", lambda m: fields[m[1]], row["prompt_template"])
            messages = [dict(role="system", content=row["system_prompt"]), dict(role="user", content=filled)]
            expected[json.dumps(messages)] = question["category"], turn
    assert expected.keys() == grades.keys() and len(server.requests) == len(expected) == 2 * len(questions) - 2

    rows = [(*expected[key], grade) for key, grade in grades.items() if grade is not None]
    of = lambda category, turns: [g for c, t, g in rows if category in (c, None) and t in turns]
    mean = lambda category, turns: pytest.approx(np.mean(of(category, turns))) if of(category, turns) else None
    means = lambda category: {name: mean(category, turns) for name, turns in (("turn_1", (1,)), ("turn_2", (2,)), ("both", (1, 2)))
                              if of(category, turns)}
    grades = result["grades"]
    assert grades.pop("overall") == means(None) and grades.keys() == {c for c, _, _ in rows}
    assert all(row == means(category) for category, row in grades.items())
    assert (result["malformed"], result["unmatched"]) == (1, 1) and result["scored"] == len(expected) - 1
    again = judge(server, tmp_path, samples=file, mt_bench=tmp_path / "data")
    assert again["scored"] == result["scored"] and len(server.requests) == len(expected)


@pytest.mark.parametrize("suite", ["small"], indirect=True)
def test_mt_bench_files_that_do_not_fit(server, tmp_path, suite, capsys):
    answers = [dict(question_id=n, choices=[dict(turns=["a", "b"])]) for n in range(5)]
    run = lambda rows: judge(server, tmp_path, samples=write_jsonl(tmp_path / "a.jsonl", rows), mt_bench=tmp_path / "data")
    server.reset(lambda request, nth: "[[7]]")
    bad = {"choices": dict(question_id=0), "answer_2": dict(question_id=0, choices=[dict(turns=["a"])]),
           "'ab'": dict(question_id=0, choices=[dict(turns="ab")]), "[None, 'b']": dict(question_id=0, choices=[dict(turns=[None, "b"])])}
    for words, row in bad.items():
        with pytest.raises(evaluate.UserError, match=f"nothing to judge.*does not fit.*{re.escape(words)}.*a.jsonl:1"):
            run([row])
        # Beside it all others are graded, of a question answered twice the first; the exit code says that one is not.
        result = run([row, *answers[1:], answers[1]])
        assert (result["bad_rows"], result["scored"]) == (2, 8)
    write_jsonl(suite["reference_answers"], read_jsonl(suite["reference_answers"])[:1])
    argv = ["judge", *command(server, tmp_path, samples=write_jsonl(tmp_path / "a.jsonl", answers), mt_bench=tmp_path / "data")]
    assert evaluate.judge(evaluate.parse_args(argv)) == 1
    said = capsys.readouterr().out
    assert "ref_answer_1" in said and f"(first {tmp_path}/a.jsonl:4)" in said
    (tmp_path / "data" / "judge_prompts.jsonl").write_text("{}")
    with pytest.raises(evaluate.UserError, match="not FastChat's"):
        run(answers)


# ------------------------------------------------------------------------------------------------------------ sample --api
def completions(server, prompts, k=2, keep=None, **flags):
    """-> {index: (texts, stops, tokens)}"""
    how = dict(command="sample", model="m", temperature=0.7, top_p=0.95, max_new_tokens=9, seed=3, k=k)
    args = SimpleNamespace(**dict(api=server.url, concurrency=8) | how | flags)
    rows = {}
    for fresh in evaluate.api_rows([evaluate.Prompt(index, text, None, None, []) for index, text in prompts], args):
        rows |= {row["index"]: (row["completions"], row["stops"], row["n_tokens"]) for row in fresh}
        if keep:
            keep(rows)
    return rows


PROMPTS = [(0, "once upon"), (1, [dict(role="user", content="hello")]), (2, "there was")]


def sampled(request, nth=1):
    short = request["seed"] % 2
    return dict(text=f"text {request['seed']}", finish_reason="stop" if short else "length", **(dict(usage=7) if short else {}))


def test_api_completions(server):
    server.reset(sampled, latency=0.01)
    rows = completions(server, PROMPTS, k=4)
    assert rows.keys() == {0, 1, 2} and len(server.requests) == 12
    for key, prompt in PROMPTS:
        seeds = [evaluate.request_seed(3, prompt, j) for j in range(4)]
        assert len(set(seeds)) == 4
        assert rows[key] == ([f"text {s}" for s in seeds], ["" if s % 2 else None for s in seeds], [7 if s % 2 else None for s in seeds])
    for path, request in server.requests:
        assert path == ("/v1/chat/completions" if "messages" in request else "/v1/completions")
        assert request["model"] == "m" and [request[n] for n in ("temperature", "top_p", "max_tokens")] == [0.7, 0.95, 9]
    chat = [request for path, request in server.requests if "chat" in path]
    assert len(chat) == 4 and all(request["messages"] == PROMPTS[1][1] for request in chat)


def test_api_completions_that_fail(server):
    """Half of the second fails: it is not kept, the others are, and the error at the end says so. A refusal ends at once."""
    server.reset(lambda request, nth: (503,) if request["seed"] == evaluate.request_seed(3, PROMPTS[1][1], 1) else sampled(request))
    kept = {}
    with pytest.raises(evaluate.UserError, match="1 of 3 requests failed.*same command") as error:
        completions(server, PROMPTS, keep=kept.update)
    assert kept.keys() == {0, 2} and KEY not in str(error.value)
    server.reset(lambda request, nth: (404,))
    with pytest.raises(evaluate.UserError, match="refuses a request.*404") as error:
        completions(server, PROMPTS, concurrency=1)
    assert len(server.requests) == 1 and KEY not in str(error.value)


def test_completions_are_kept_as_they_come(server):
    """A prompt is written down while later ones are still to come."""
    server.reset(lambda request, nth: sampled(request), latency=0.01)
    asked = []
    completions(server, PROMPTS, k=1, concurrency=1, keep=lambda rows: asked.append((len(rows), len(server.requests))))
    assert asked == [(1, 1), (2, 2), (3, 3)]


def test_sample_through_an_api(server, tmp_path):
    """The command: faults are retried, a failed prompt is asked again by the same command, whole prompts are kept, and the rows
    are those of `sample`. Conversations go to the chat endpoint as messages."""
    data = write_jsonl(tmp_path / "prompts.jsonl", [dict(prompt=f"post {i} TL;DR:", completion=" c") for i in range(6)]
                       + [dict(prompt=[dict(role="user", content="hi")], completion=[dict(role="assistant", content="ho")])])
    down = {"on": True}

    def behave(request, nth):
        if request.get("prompt") == "post 3 TL;DR:" and down["on"]:
            return (503, ("Retry-After-Ms", "10"))
        return ((429, ("Retry-After-Ms", "10")), "cut", sampled(request))[min(nth, 3) - 1]

    def run():
        argv = ["sample", "--model", "m", "--data", data, "--api", server.url, "--out", tmp_path / "s.jsonl", "--n", 9]
        return subprocess.run([sys.executable, ROOT / "evaluate.py", *map(str, argv)], capture_output=True, text=True)

    server.reset(behave)
    first = run()
    assert first.returncode == 1 and "1 of 7 requests failed" in first.stderr and "Traceback" not in first.stderr
    kept = read_jsonl(tmp_path / "s.jsonl")
    assert sorted(row["index"] for row in kept) == [0, 1, 2, 4, 5, 6]
    down["on"], before = False, len(server.requests)
    second = run()
    assert second.returncode == 0, second.stderr
    assert {request.get("prompt") for _, request in server.requests[before:]} == {"post 3 TL;DR:"}
    rows = read_jsonl(tmp_path / "s.jsonl")
    assert [row["index"] for row in rows] == list(range(7)) and [row for row in rows if row["index"] != 3] == sorted(kept, key=lambda r: r["index"])
    assert rows[6]["prompt"] == [dict(role="user", content="hi")] and rows[6]["references"] == ["ho"]
    assert all(len(row["completions"]) == len(row["stops"]) == len(row["n_tokens"]) == 2 for row in rows)
    assert any("chat" in path for path, _ in server.requests)
    no_key(tmp_path, first.stdout, first.stderr, second.stdout, second.stderr)


def test_a_key_in_a_verdict_is_cut_out(server, tmp_path, capsys):
    """A server that quotes the key it was sent."""
    server.reset(lambda request, nth: f"Comparison: your key is {KEY}.\nMore helpful: A")
    assert judge(server, tmp_path, samples=samples(tmp_path / "s", 3))["scored"] == 3
    assert "your key is [key]" in read_jsonl(tmp_path / "verdicts.jsonl")[0]["text"]
    no_key(tmp_path, *capsys.readouterr())


def test_a_key_in_any_other_field_is_cut_out(server, tmp_path):
    quoting = lambda request, nth: dict(text="More helpful: A", finish_reason=f"stop {KEY}", model=f"m {KEY}", usage=f"3 {KEY}")
    server.reset(quoting)
    assert judge(server, tmp_path, samples=samples(tmp_path / "s", 1))["scored"] == 1
    (row,) = read_jsonl(tmp_path / "verdicts.jsonl")
    assert (row["finish_reason"], row["model"], row["tokens"]) == ("stop [key]", "m [key]", None)
    no_key(tmp_path)


def test_conversations_are_judged(server, tmp_path, monkeypatch):
    """Sampled through --api from messages: the judge reads them in the form of the paper's dialogues, and no template."""
    row = dict(prompt=[dict(role="system", content="Be brief."), dict(role="user", content="question 1?")],
               completion=[dict(role="assistant", content="bad")])
    data = write_jsonl(tmp_path / "d.jsonl", [row])
    server.reset(lambda request, nth: dict(text="good", finish_reason="stop"))
    argv = ["sample", "--model", "m", "--data", data, "--api", server.url, "--out", tmp_path / "s.jsonl", "--k", 1]
    monkeypatch.setattr(evaluate, "init_distributed", lambda *how: (0, 1, "cpu"))  # the tests' group stands
    evaluate.sample(evaluate.parse_args([*map(str, argv)]))
    (sample,) = read_jsonl(tmp_path / "s.jsonl")
    assert (sample["prompt"], sample["completions"], sample["references"]) == (row["prompt"], ["good"], ["bad"])
    server.reset(lambda request, nth: fair(request))
    assert judge(server, tmp_path, samples=tmp_path / "s.jsonl")["win_rate"] == 1
    (_, request), = server.requests
    assert "Dialogue history:\n\nSystem: Be brief.\n\nHuman: question 1?\n\nAssistant:\n\nResponse A:" in content(request)
    assert sorted(texts_a_b(request)) == ["bad", "good"]


@pytest.mark.parametrize("key", ["x", "EMPTY", "null"])
def test_a_key_that_is_no_secret_changes_nothing(server, tmp_path, monkeypatch, key):
    """What people set for a local server, which asks for none, stands in many texts."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    text = "Comparison: an example, not null, of EMPTY praise.\nMore helpful: A"
    server.reset(lambda request, nth: text)
    assert judge(server, tmp_path, samples=samples(tmp_path / "s", 3))["scored"] == 3
    assert read_jsonl(tmp_path / "verdicts.jsonl")[0]["text"] == text


def test_verdicts_that_stand_twice(server, tmp_path, capsys):
    """They were paid for twice: the first stays, and it is said."""
    samples(tmp_path / "s", 4)
    result = judge(server, tmp_path, samples=tmp_path / "s")
    lines = (tmp_path / "verdicts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "verdicts.jsonl").write_text("".join(lines) + lines[1].replace("better", "worse") + lines[2])
    assert judge(server, tmp_path, samples=tmp_path / "s") == result
    assert "verdicts.jsonl: 2 rows stood there twice" in capsys.readouterr().out
    assert (tmp_path / "verdicts.jsonl").read_text() == "".join(lines)


def test_two_judges_on_one_ledger(server, tmp_path):
    """The second is refused in one line that says who holds it, and pays for nothing."""
    server.reset(lambda request, nth: "hang")
    argv = command(server, tmp_path, samples=samples(tmp_path / "s", 2))
    first = start(argv)
    wait_for(lambda: len(server.requests) == 2)
    second = start(argv)
    out, err = second.communicate(timeout=60)
    assert second.returncode == 1 and len(err.splitlines()) == 1 and f"process {first.pid}" in err and "verdicts.jsonl" in err
    assert len(server.requests) == 2
    first.kill()
    first.communicate()
    server.reset(lambda request, nth: fair(request))
    third = start(argv)  # the lock has died with its process
    out, err = third.communicate(timeout=60)
    assert third.returncode == 0, err
