"""Requests to a language model behind an OpenAI-compatible API: each is paid for once, and what fails is counted."""

import itertools
import json
import os
import re
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

from tqdm import tqdm

from plumbing.process import UserError, print_rank0

PATIENCE = dict(timeout=300, max_retries=8)  # seconds a read; retries after 429, 5xx, a time-out or no connection
TOTAL_TIME = 1800  # seconds a request, its repetitions included: a server may send a byte a second
GIVE_UP = 20  # requests failed in a row, each after its retries: the server is down
REFUSES_THIS_ONE = (400, 413, 422)  # a content filter, a context too long: others may pass
NOT_THIS_TIME = (408, 409, 429)
# A judge that refuses one of these parameters is asked with the other name for it, or without it.
OTHER_NAMES = {"max_tokens": "max_completion_tokens", "temperature": None}


class Server:
    """An OpenAI-compatible server at args.api. The key is read from the environment and goes nowhere else. Raises
    UserError where it cannot be asked."""

    def __init__(self, args):
        try:
            import openai
        except ImportError:
            raise UserError("asking a model through --api needs `pip install openai`") from None
        if not re.fullmatch(r"https?://[^@?#\s]+", args.api):  # not repeated here: it may hold a password
            raise UserError("--api: want http(s)://HOST[:PORT]/PATH without credentials, such as"
                            " http://localhost:8000/v1")
        self.key = os.environ.get("OPENAI_API_KEY", "").strip() or "no-key-is-set"  # a local server wants none
        if not (self.key.isascii() and self.key.isprintable()):
            raise UserError("OPENAI_API_KEY: a key has plain letters only")
        self.url = args.api
        # A judge without temperature 0 judges still; a sample of another temperature is another sample.
        self.other_names = dict(OTHER_NAMES)
        if args.command == "sample":
            del self.other_names["temperature"]
        self.renamed = set()  # parameters that this server has taken under their other names
        # Redirects are not followed: prompts are for the host that was named.
        http = openai.DefaultHttpxClient(follow_redirects=False)
        self.client = openai.OpenAI(api_key=self.key, base_url=args.api, http_client=http, **PATIENCE)
        # What a request may fail with; after the first two, what a proxy's page, cut or deeply nested JSON or bytes
        # that are no UTF-8 lead to.
        self.failures = (openai.APIError, TimeoutError, json.JSONDecodeError, UnicodeDecodeError, AttributeError,
                         LookupError, TypeError, RecursionError)

    def redact(self, words):
        """Cut the key out, which some servers quote. `x` or `EMPTY`, as people set for a local one, is no secret."""
        return words.replace(self.key, "[key]") if len(self.key) > 15 else words

    def ask(self, request):
        """-> reply: text, finish_reason, model, and tokens or None. Repeating is the openai client's business."""
        answer = self.create(request)
        choice = answer.choices[0]
        text = choice.message.content if "messages" in request else choice.text
        if not isinstance(text, str):
            raise TypeError(f"the reply's content is no text but {text!r:.80}")
        reason = choice.finish_reason
        tokens = answer.usage.completion_tokens if answer.usage else None
        return dict(text=self.redact(text), finish_reason=self.redact(reason) if isinstance(reason, str) else None,
                    model=self.redact(str(answer.model or "")), tokens=tokens if type(tokens) is int else None)

    def create(self, request):
        """Send it, in the form that the server takes, see OTHER_NAMES."""
        endpoint = self.client.chat.completions if "messages" in request else self.client.completions
        tried = set(self.renamed)
        while True:  # until it is taken, or refused for something else
            asked = dict(request)
            for parameter in tried & asked.keys():
                value = asked.pop(parameter)
                if self.other_names[parameter]:
                    asked[self.other_names[parameter]] = value
            try:
                answer = endpoint.create(**asked)
            except self.failures as error:
                parameter = self.unknown_parameter(error, asked)
                if parameter is None:
                    raise
                tried.add(parameter)
                continue
            for parameter in tried - self.renamed:
                print_rank0(f"{self.url} does not take {parameter}: asked {OTHER_NAMES[parameter] or 'without it'}")
            self.renamed |= tried
            return answer

    def unknown_parameter(self, error, asked):
        """The parameter that a refusal says the server does not know, of those with another name, or None. Requests
        that continue a text have no other names."""
        words = str(error)
        refused = getattr(error, "status_code", None) == 400 and re.search(r"(?i)support|recogni", words)
        if refused and "messages" in asked:
            for parameter in self.other_names:
                if parameter in asked and re.search(rf"\b{parameter}\b", words):
                    return parameter
        return None


def ask_all(items, args):
    """Send the requests of items (what they are for, its name, the requests), one after another, of args.concurrency
    items at a time; yield (what for, replies), and send no more until that is kept: never are more replies paid for and
    not kept.

    Raises UserError: at once where the server refuses whatever is asked (a wrong key, model or address), at the end
    where requests failed, which are counted; the others are asked nevertheless."""
    server = Server(args)

    def ask_in_turn(requests):
        return [server.ask(request) for request in requests]

    unsent = iter(tqdm(items, disable=None))  # with a bar on a terminal
    running = {}  # future: (what it is for, its name, when it is given up)
    failures = []
    n_answered = 0
    in_a_row = 0  # that failed
    pool = ThreadPoolExecutor(len(items) or 1)  # a thread that is given up hangs on; of others there are `concurrency`
    try:
        while True:
            free = args.concurrency - len(running) if in_a_row < GIVE_UP else 0
            for what, name, requests in itertools.islice(unsent, free):
                deadline = time.monotonic() + TOTAL_TIME * len(requests)
                running[pool.submit(ask_in_turn, requests)] = what, name, deadline
            if not running:
                break
            first_deadline = min(deadline for *_, deadline in running.values())
            done, pending = wait(running, first_deadline - time.monotonic(), return_when=FIRST_COMPLETED)
            overdue = [future for future in pending if running[future][-1] <= time.monotonic()]
            for future in [*done, *overdue]:
                what, name, _ = running.pop(future)
                try:
                    if future in overdue:
                        raise TimeoutError(f"no whole reply within {TOTAL_TIME} seconds a request")
                    yield what, future.result()
                    n_answered += 1
                    in_a_row = 0
                except server.failures as error:
                    why = server.redact(f"{type(error).__name__}: {' '.join(str(error).split())}")[:300]
                    failures.append(f"{why} ({name})")
                    status = getattr(error, "status_code", 500)
                    if status < 500 and status not in (*REFUSES_THIS_ONE, *NOT_THIS_TIME):
                        raise UserError(f"{args.api} refuses a request: {why}") from None
                    # A stretch of prompts that a filter refuses is no sign that the server is down.
                    if status not in REFUSES_THIS_ONE or n_answered == 0:
                        in_a_row += 1
    finally:  # Ctrl-C, or a request refused: do not wait for what is under way
        pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(items)} requests failed, the first: {failures[0]}; after {GIVE_UP} in"
                        " a row no more is asked; the same command asks those that are missing")
