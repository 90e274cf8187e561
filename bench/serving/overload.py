"""The lines without a peer: open loop, overload, a hung model, the edge cache, and a sustained minute."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import in_process
import numpy as np
from common import Absent
from lines import Line, attempt
from servers import Contender, Measured, Server, configuration, free_port, measure, penstock

from penstock import Client, loadgen
from penstock.config import CachesConfig
from penstock.errors import PenstockError
from penstock.loadgen import Load, Requests, vector_requests
from penstock.models.bundle import save_bundle

if TYPE_CHECKING:
    from bench import Run

LIMIT_MS = 50.0
ZIPF_KEYS = 1_000_000
PIPELINED: dict[str, Any] = {"connections": 8, "in_flight": 64}
OPEN: dict[str, Any] = {"connections": 8, "in_flight": 1000}  # as many connections as the capacity is of
# A client that bounds what it has in flight, as real ones do: at twice the server's lane, which it so fills.
# Without the bound the backlog would stand in the sockets' buffers, where no server can see how old it is.
OVERLOAD: dict[str, Any] = {"connections": 64, "in_flight": 128, "shed": True}
REFUSALS = set(loadgen.REFUSALS)


def onnx_bundle(run: Run) -> Path:
    """The model as an ONNX bundle. Raises Absent where this build has no such backend."""
    if run.onnx is None:
        raise Absent("the model is not there as ONNX")
    frame = {name: run.columns[:, i] for i, name in enumerate([*in_process.NAMES, "label"])}
    save: Any = save_bundle
    import pandas

    try:
        made = save(
            run.onnx,
            pandas.DataFrame(frame),
            name="forest",
            directory=run.folder / "onnx",
            version=None,
            label="label",
            output="probabilities",
        )
    except TypeError as error:
        raise Absent(f"this build has no onnx backend ({error})") from error
    except PenstockError as error:
        raise Absent(f"no onnx bundle ({error})") from error
    return Path(made.path)


def serve(run: Run, name: str, bundle: Path, **sections: Any) -> Contender:
    """A Penstock server of its own on TCP, stopped at the end of the run's stack."""
    address = f"tcp://127.0.0.1:{free_port()}"
    server = penstock(configuration(run.folder / name, {"forest": bundle}, [address], **sections))
    return run.start(f"Penstock ({name})", server, address, run.requests, pipelined=True)


def open_loop_line(run: Run, ours: Contender, capacity: float | None) -> None:
    """Poisson arrivals at 70 % of what the closed loop of 512 in flight reached."""
    book, plan = run.book, run.plan
    measure_text = "open loop at 70 % of own capacity"
    if capacity is None:
        book.missing(measure_text, "p99 <= 5 ms, p99.9 <= 15 ms", "not available: capacity unknown")
        return
    run.say("open loop at 70 % of capacity")
    for number in range(plan.rounds):
        load = Load(
            ours.address,
            **OPEN,
            rate=0.7 * capacity,
            seed=number,
            warmup=plan.warmup,
            duration=plan.open_window,
            goodput_ms=LIMIT_MS,
        )
        made = measure(ours, load)
        ok = made.result.ok
        note_cores(run, ours, measure_text, made)
        if ok is None:
            continue
        book.add(ours.name, "open loop at 70 %, p99 ms", ok.p99 / 1e3)
        book.add(ours.name, "open loop at 70 %, p99.9 ms", ok.p999 / 1e3)
        book.add(ours.name, "open loop at 70 %, not right", made.result.failed)
    note = f"{0.7 * capacity:,.0f} requests/s, Poisson; latency from the due time"
    for share, target in (("p99", 5.0), ("p99.9", 15.0)):
        book.limit(
            f"{measure_text}, {share}",
            book.median(ours.name, f"open loop at 70 %, {share} ms"),
            "ms",
            target,
            note,
        )


def sustained_line(run: Run, ours: Contender) -> None:
    """A closed loop of 512 in flight for a minute: predictions a second, all inside the limit."""
    run.say(f"sustained for {run.plan.sustained:g} s")
    load = Load(
        ours.address,
        **PIPELINED,
        warmup=run.plan.warmup,
        duration=run.plan.sustained,
        goodput_ms=LIMIT_MS,
        series=True,
    )
    made = measure(ours, load)
    note_cores(run, ours, "sustained", made)
    result = made.result
    slowest = max((us for _, _, us in result.series), default=0.0) / 1e3
    line = Line(
        f"sustained for {result.window:.0f} s, all answers inside {LIMIT_MS:g} ms",
        ">= 116,000 predictions/s",
        "/s",
        result.rate,
    )
    line.passed = result.rate >= 116_000 and result.failed == 0 and slowest <= LIMIT_MS
    line.note = (
        f"{result.rate * 86_400 / 1e9:.1f} billion a day; slowest {slowest:.1f} ms; {result.failed} failed; "
        f"slowest second {min((ok for ok, _, _ in result.series), default=0):,} answers"
    )
    run.book.lines.append(line)


def note_cores(run: Run, who: Contender, column: str, made: Measured) -> None:
    run.cores[f"{who.name}, {column}"] = {
        "server": round(made.server_cores, 2),
        "client": round(made.client_cores, 2),
    }


def overload_lines(run: Run) -> None:
    """Five times the capacity, open loop: what is answered in time, and how soon the rest is refused."""
    target = {"front end": 0.6, "model": 0.9}
    _overload(run, "front end", serve(run, "overload", run.bundle), target["front end"])
    attempt(
        run.book,
        "5x overload, goodput over its peak, model the bottleneck (onnxruntime)",
        ">= 0.9x",
        lambda: _overload(
            run,
            "model",
            serve(run, "overload, onnx", onnx_bundle(run), caches={"edge": {"mode": "off"}}),
            target["model"],
        ),
    )


def _overload(run: Run, bottleneck: str, ours: Contender, target: float) -> None:
    book, plan = run.book, run.plan
    run.say(f"overload, the {bottleneck} the bottleneck")

    def loaded(**settings: Any) -> Measured:
        timing = {"warmup": plan.warmup, "duration": plan.window, "drain": 1.0, "goodput_ms": LIMIT_MS}
        return measure(ours, Load(ours.address, **settings, **timing))

    closed = loaded(**PIPELINED).result
    capacity = closed.rate
    peak = closed.goodput
    for share in (0.8, 0.95):
        peak = max(peak, loaded(**OPEN, rate=share * capacity).result.goodput)
    loaded(**OVERLOAD, rate=5 * capacity)  # whatever grows on first use has grown
    before = ours.server.rss_bytes()
    made, probes = [], []
    for number in range(plan.rounds):
        with ThreadPoolExecutor(1) as beside:
            probe = Load(
                ours.address,
                connections=4,
                in_flight=64,
                rate=500,
                warmup=1.5 * plan.warmup,  # inside the overload
                duration=plan.window,
                drain=1.0,
            )
            probing = beside.submit(loadgen.run_apart, probe, ours.requests)
            made.append(loaded(**OVERLOAD, rate=5 * capacity, seed=number))
            probes.append(probing.result())
    after = ours.server.rss_bytes()
    note_cores(run, ours, "5x overload", made[-1])
    goodput = float(np.median([one.result.goodput for one in made]))
    due = sum(one.result.due for one in made)
    shed = sum(one.result.shed for one in made)
    refused = sum(
        one.result.outcomes[name].count for one in made for name in REFUSALS & one.result.outcomes.keys()
    )
    book.share(
        f"5x overload, goodput over its peak, {bottleneck} the bottleneck",
        goodput,
        peak,
        target,
        "/s",
        f"capacity {capacity:,.0f}/s; {refused / due:.0%} refused, {shed / due:.0%} found all "
        f"{OVERLOAD['connections'] * OVERLOAD['in_flight']:,} places in flight taken",
    )
    text = f"5x overload, the latest refusal after its read ({bottleneck})"
    with Client(ours.address) as client:
        refuse = client.stats()["models"]["forest"]["stages"]["refuse"]
    seen = [found for one in probes if (found := one.from_send.get("RESOURCE_EXHAUSTED")) is not None]
    if refuse["count"]:
        note = f"{refuse['count']:,} refusals, by the server's clock; p99.9 {refuse['p999_ns'] / 1e6:.2g} ms"
        if seen:
            p99 = float(np.median([one.p99 for one in seen])) / 1e3
            note += f"; a light client beside it, from its write: p99 {p99:.2g} ms"
        book.limit(text, refuse["max_ns"] / 1e6, "ms", 2, note)
    else:
        book.missing(text, "<= 2 ms", "none was refused on arrival")
    line = Line(f"5x overload, memory flat ({bottleneck})", "<= 1.05x", "MiB", after / 2**20)
    line.peer, line.theirs, line.ratio = "before", before / 2**20, after / before
    line.passed = line.ratio <= 1.05
    book.lines.append(line)


def hung_line(run: Run) -> None:
    """The model hangs in mid-load; each request has the server's limit for a deadline."""
    run.say("a hung model")
    hold = run.folder / "hold"
    address = f"tcp://127.0.0.1:{free_port()}"
    config = configuration(
        run.folder / "hung", {"forest": run.bundle}, [address], serving={"max_latency_ms": LIMIT_MS}
    )
    script = str(Path(__file__).with_name("hung.py"))
    command = [sys.executable, script, str(config), str(hold)]
    server = Server(command, config.with_name("server.log"), loadgen.environment())
    ours = run.start("Penstock (hung)", server, address, run.requests, pipelined=True)

    def watch(phase: str, *_: Any) -> bool:
        if phase == "window":
            hold.touch()
        return True

    load = Load(address, connections=8, in_flight=512, rate=1000, warmup=0.5, duration=3, drain=2)
    result = loadgen.run_apart(load, ours.requests, watch)
    latest = max((one.max for name, one in result.from_send.items() if name != "OK"), default=None)
    if latest is None or "DEADLINE_EXCEEDED" not in result.outcomes:
        raise Absent("no request met the hung model")
    line = Line("hung model, latest reply after its deadline", "<= 2 ms", "ms", latest / 1e3 - LIMIT_MS)
    line.passed = line.ours is not None and line.ours <= 2 and result.unanswered == 0
    late = result.from_send["DEADLINE_EXCEEDED"]
    line.note = (
        f"p99 {late.p99 / 1e3 - LIMIT_MS:.2f} ms; {late.count:,} replies, {result.unanswered} missing; "
        "from the client's write"
    )
    run.book.lines.append(line)


# ---- edge cache


def _fresh_rows(run: Run, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.random.default_rng(seed).standard_normal((count, run.rows.shape[1]), np.float32)
    return rows, np.asarray(run.booster.predict(rows, num_threads=1))


def unique_requests(run: Run, count: int) -> Requests:
    """So many different rows that none comes again before a cache has forgotten it."""
    rows, expected = _fresh_rows(run, count, 11)
    return vector_requests("forest", rows, expected=expected)


def zipf_requests(run: Run, draws: int) -> Requests:
    """Draws from ZIPF_KEYS keys, the k-th with a chance of 1/k."""
    weights = 1 / np.arange(1, ZIPF_KEYS + 1)
    keys = np.random.default_rng(12).choice(ZIPF_KEYS, draws, p=weights / weights.sum())
    distinct, order = np.unique(keys, return_inverse=True)
    rows, expected = _fresh_rows(run, len(distinct), 13)
    return vector_requests("forest", rows, expected=expected, order=order.astype(np.uint32))


def edge_lines(run: Run) -> None:
    """Throughput with the edge cache on over off: where nothing repeats, and where much does."""
    quick = run.plan.rounds == 1
    lines = (
        ("edge cache, all-unique inputs, a lane that bypasses it, on / off", 0.98, False, "auto"),
        ("edge cache, all-unique inputs, a lane that uses it (onnxruntime), on / off", 0.95, True, "on"),
        ("edge cache, Zipf 1.0 over 1e6 keys (onnxruntime), on / off", 2.0, True, "on"),
    )
    for text, target, onnx, mode in lines:

        def work(text: str = text, target: float = target, onnx: bool = onnx, mode: str = mode) -> None:
            if "edge" not in CachesConfig.model_fields:
                raise Absent("this build has no edge cache")
            bundle = onnx_bundle(run) if onnx else run.bundle
            count = (50_000 if onnx else 100_000) if quick else (200_000 if onnx else 400_000)
            requests = zipf_requests(run, count) if "Zipf" in text else unique_requests(run, count)
            run.say(text)
            name = f"edge {len(run.book.lines)}"
            # Rows come again after some seconds: without a short life they would be hits then.
            life = {} if "Zipf" in text else {"ttl": "100ms"}
            on = serve(run, f"{name} on", bundle, caches={"edge": {"mode": mode, **life}})
            off = serve(run, f"{name} off", bundle, caches={"edge": {"mode": "off"}})
            for _ in range(run.plan.rounds):
                for who, state in ((on, "on"), (off, "off")):
                    result = run.sample(who, text, PIPELINED, requests)
                    run.book.add(f"edge cache {state}", text, result.rate)
            on.server.stop()
            off.server.stop()
            run.book.share(
                text,
                run.book.median("edge cache on", text),
                run.book.median("edge cache off", text),
                target,
                "/s",
            )

        attempt(run.book, text, f">= {target:g}x", work)
