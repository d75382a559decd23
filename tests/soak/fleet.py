"""The mode `fleet`: three servers behind nginx on one PostgreSQL, all of which die now and then.

Four clients submit jobs to POST /run, through nginx, and ask for them on whichever server it
chooses; some jobs are cancelled. Meanwhile, in an order that the seed decides,

    a server is killed (kill -9, all its processes) and started again,
    the database is stopped at once, and started again after some seconds,
    a server is frozen (SIGSTOP) until its lease is over and others have its jobs, and woken.

In the end

    every job that was accepted is COMPLETED, or CANCELLED if /cancel said so,
    every server answers the same for it, and what was read once reads the same for ever,
    every image is the one that a single undisturbed server makes,
    there is one result of each completed job, and its webhook was posted, with that result.
"""

from __future__ import annotations

import random
import signal
import tempfile
import threading
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg

from sdbento.jobs.fleet.servers import LEASE
from tests.soak.kills import job_input
from tests.support.listener import Listener, listening
from tests.support.nginx import nginx
from tests.support.postgres import new_database, postgres, stopped
from tests.support.server import Server, alike, free_port, generated, pixels, serving

SERVERS, CLIENTS = 3, 4
CANCELLED = 20  # every so many jobs, one is cancelled
BETWEEN_FAULTS = (2.0, 12.0)  # seconds
DOWN = (0.0, 5.0)  # seconds until a killed server is started again
AWAY = (1.0, 6.0)  # seconds for which the database is stopped
FROZEN = LEASE + 12.0  # seconds: its jobs are taken over meanwhile, and may even be done
EXECUTION_LIMIT = 3_600_000  # ms
COMPLETION_LIMIT = 1200.0  # seconds until all jobs have ended after the last fault

Answer = dict[str, Any]


def small_input(i: int) -> dict[str, Any]:
    """The i-th job of `kills`, with a quarter of its pixels: three servers share the machine."""
    return job_input(i) | {"width": 64, "height": 64, "num_inference_steps": 10}


class Member:
    """One of the servers, which can be killed, frozen and started again."""

    def __init__(self, folder: Path, **variables: Any) -> None:
        folder.mkdir()
        self.port = free_port()
        self._folder, self._variables = folder, variables
        self._serving: Any = None
        self.server: Server
        self.errors = 0

    def start(self) -> None:
        self._serving = serving(self._folder, port=self.port, **self._variables)
        self.server = self._serving.__enter__()

    def kill(self) -> None:
        self.server.kill()
        self.stop()

    def stop(self) -> None:
        self._serving.__exit__(None, None, None)
        self.errors += self.server.log.read_text(errors="replace").count("ERROR")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        process = psutil.Process(self.server.process.pid)
        family = [*process.children(recursive=True), process]
        for one in family:
            one.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for one in family:
                one.send_signal(signal.SIGCONT)


class Clients:
    """The jobs as their clients know them."""

    def __init__(self, url: str, webhook: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=40.0, trust_env=False)
        self.webhook = webhook
        self.accepted: dict[str, int] = {}  # id -> number of the input
        self.ended: dict[str, Answer] = {}
        self.cancelled: set[str] = set()  # as /cancel said
        self.problems: list[str] = []
        self.statuses: Counter[int] = Counter()  # of all answers

    def ask(self, method: str, path: str, **options: Any) -> Answer | None:
        """The answer; None if there was none, or a 502 to 504: a server, or the database, is away.
        Anything else is a problem."""
        with suppress(httpx.TransportError):
            response = self.http.request(method, path, **options)
            self.statuses[response.status_code] += 1
            if response.status_code == 200:
                answer: Answer = response.json()
                return answer
            if response.status_code not in (502, 503, 504):
                told = f"{method} {path} answers {response.status_code}: {response.text[:200]}"
                self.problems.append(told)
        return None

    def submit(self, i: int) -> None:
        """Repeats until the job is accepted; one that was stored without an answer runs as well."""
        body = {
            "input": small_input(i) | {"return": "full"},
            "webhook": self.webhook,
            "policy": {"executionTimeout": EXECUTION_LIMIT},
        }
        while (answer := self.ask("POST", "/run", json=body)) is None:
            time.sleep(0.2)
        job_id = answer["id"]
        self.accepted[job_id] = i
        if i % CANCELLED == CANCELLED - 1:
            while (answer := self.ask("POST", f"/cancel/{job_id}")) is None:
                time.sleep(0.2)
            if answer["status"] == "CANCELLED":
                self.cancelled.add(job_id)

    def look(self, job_id: str, chance: random.Random) -> None:
        """Ask for a job in one of the ways that there are."""
        path = chance.choice(["/status/{}", "/status/{}", "/status-sync/{}?wait=1000"])
        if (answer := self.ask("GET", path.format(job_id))) is None:
            return
        before = self.ended.get(job_id)
        if before is not None and before != answer:
            self.problems.append(f"{job_id} changed after it was {before['status']}")
        elif answer["status"] not in ("IN_QUEUE", "IN_PROGRESS"):
            self.ended[job_id] = answer
        elif chance.random() < 0.2:
            self.ask("GET", f"/stream/{job_id}?wait=1000")

    def watch(self, stop: threading.Event, chance: random.Random) -> None:
        while not stop.wait(0.2):
            unfinished = self.accepted.keys() - self.ended
            again = chance.sample(sorted(self.ended), min(3, len(self.ended)))
            for job_id in [*sorted(unfinished)[:12], *again]:
                self.look(job_id, chance)


def faults(
    members: list[Member], database: str, counts: dict[str, int], chance: random.Random
) -> None:
    """All of the faults, one at a time, each at a random moment."""

    def kill() -> None:
        member = chance.choice(members)
        member.kill()
        time.sleep(chance.uniform(*DOWN))
        member.start()

    def stop_database() -> None:
        with stopped(database):
            time.sleep(chance.uniform(*AWAY))

    def freeze() -> None:
        with chance.choice(members).frozen():
            time.sleep(FROZEN)

    kinds: dict[str, Callable[[], None]] = {
        "kill": kill,
        "database": stop_database,
        "freeze": freeze,
    }
    order = [name for name, count in counts.items() for _ in range(count)]
    chance.shuffle(order)
    for name in order:
        time.sleep(chance.uniform(*BETWEEN_FAULTS))
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        kinds[name]()


def wait_until_all_is_done(clients: Clients, listener: Listener) -> None:
    give_up = time.monotonic() + COMPLETION_LIMIT
    while time.monotonic() < give_up:
        posted = {body["id"] for body in list(listener.heard)}
        if clients.ended.keys() >= clients.accepted.keys() <= posted:
            return
        time.sleep(0.5)


def verdicts(
    clients: Clients, listener: Listener, members: list[Member], results: Path
) -> list[str]:
    problems = list(clients.problems)
    posted = {body["id"]: body for body in listener.heard}
    for body in listener.heard:
        if body != posted[body["id"]]:
            problems.append(f"two ends of {body['id']} were posted")
    for job_id in clients.accepted:
        answer = clients.ended.get(job_id)
        wanted = "CANCELLED" if job_id in clients.cancelled else "COMPLETED"
        if answer is None or answer["status"] != wanted:
            problems.append(f"{job_id} is {answer and answer['status']}, not {wanted}")
            continue
        if posted.get(job_id) != answer:
            problems.append(f"the webhook of {job_id} got {str(posted.get(job_id))[:80]}")
        for member in members:
            if member.server.client.get(f"/status/{job_id}").json() != answer:
                problems.append(f"the server at {member.port} answers otherwise for {job_id}")
    files = Counter(path.name.split(".")[0] for path in results.glob("*.json"))
    for job_id, answer in clients.ended.items():
        if files[job_id] != (answer["status"] == "COMPLETED"):
            problems.append(f"{job_id}, {answer['status']}, has {files[job_id]} results")
    return problems + _unlike_alone(clients, members[0].server)


def _unlike_alone(clients: Clients, server: Server) -> list[str]:
    problems = []
    for job_id, answer in clients.ended.items():
        if answer["status"] != "COMPLETED":
            continue
        alone = generated(server, **small_input(clients.accepted[job_id]))
        made = [pixels(b64decode(image)) for image in answer["output"]["images"]]
        if len(made) != len(alone) or not all(map(alike, made, alone)):
            problems.append(f"{job_id} (input {clients.accepted[job_id]}) is not its solo run")
    return problems


def run(num_jobs: int, counts: dict[str, int], seed: int) -> int:
    """counts: how often each fault happens. Returns the number of problems."""
    print(f"fleet --jobs {num_jobs} --seed {seed}, {counts}", flush=True)
    chance = random.Random(seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        listener = stack.enter_context(listening())
        database = stack.enter_context(postgres())
        url = new_database(database)
        variables = {
            "JOB_STORE_URL": url,
            "SDBENTO_JOB_RESULTS_DIR": str(folder / "shared"),
            "SDBENTO_ALLOW_PRIVATE_URLS": "true",  # webhooks on loopback
            "SDBENTO_NUM_THREADS": "1",  # for each: the threads of several would wait for cores
        }
        members = [Member(folder / f"server-{i}", **variables) for i in range(SERVERS)]
        for member in members:
            member.start()
            stack.callback(member.stop)
        for member in members:
            member.server.wait_until_ready()
        ports = [member.port for member in members]
        clients = Clients(
            stack.enter_context(nginx(folder / "nginx", free_port(), ports)), listener.url
        )
        stack.callback(clients.http.close)
        _disturb(clients, members, database, num_jobs, counts, chance, listener)
        for member in members:
            member.server.wait_until_ready()
        members[0].kill()  # its start removes what the killed ones have left beside the results
        members[0].start()
        members[0].server.wait_until_ready()
        problems = verdicts(clients, listener, members, folder / "shared" / "results")
        report(clients, listener, members, url)
    for problem in problems[:50]:
        print(f"PROBLEM {problem}")
    print(f"FAILED: {len(problems)} problems" if problems else "nothing lost, nothing twice")
    return len(problems)


def _disturb(
    clients: Clients,
    members: list[Member],
    database: str,
    num_jobs: int,
    counts: dict[str, int],
    chance: random.Random,
    listener: Listener,
) -> None:
    """Submit and watch the jobs, while the faults happen, until all have ended."""
    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        watching = pool.submit(clients.watch, stop, random.Random(chance.random()))
        submitting = [pool.submit(clients.submit, i) for i in range(num_jobs)]
        try:
            faults(members, database, counts, chance)
            for future in submitting:
                future.result()
            wait_until_all_is_done(clients, listener)
        finally:
            stop.set()
        watching.result()


def report(clients: Clients, listener: Listener, members: list[Member], url: str) -> None:
    with psycopg.connect(url) as connection:
        columns = "count(*), sum(run), count(*) FILTER (WHERE interruptions > 0)"
        row = connection.execute(f"SELECT {columns} FROM jobs".encode()).fetchone()
    jobs, runs, interrupted = row or (0, 0, 0)
    print(f"{len(clients.accepted)} jobs accepted, {len(clients.cancelled)} cancelled")
    print(f"{jobs} jobs stored, {runs} runs begun, {interrupted} jobs interrupted and taken over")
    repeats = Counter(body["id"] for body in listener.heard)
    print(f"{len(repeats)} webhooks, of which {sum(n > 1 for n in repeats.values())} posted again")
    print(f"answers: {dict(sorted(clients.statuses.items()))}")
    print(f"errors in the logs of the servers that have ended: {sum(m.errors for m in members)}")
