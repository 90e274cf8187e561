"""
Native core of Penstock.
"""

from __future__ import annotations

import collections.abc
import typing

import numpy
import numpy.typing

@typing.type_check_only
class _NativeType(type):
    """
    The metaclass of every class here.
    """

class WireSession(metaclass=_NativeType):
    """
    One connection's framing, requests in flight and output. One thread.
    """
    def __init__(
        self,
        max_message_bytes: typing.SupportsInt | typing.SupportsIndex = 16777216,
        max_depth: typing.SupportsInt | typing.SupportsIndex = 16,
        max_in_flight: typing.SupportsInt | typing.SupportsIndex = 1024,
        max_output_bytes: typing.SupportsInt | typing.SupportsIndex = 67108864,
    ) -> None: ...
    def advance(self, n: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        `n` bytes were written into the last get_buffer.
        """
    def feed(self, data: str) -> None:
        """
        Copy bytes in. RuntimeError when there is no room or it is closed.
        """
    def finish(self, msgid: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        The request is answered; False if not in flight.
        """
    def get_buffer(self, hint: typing.SupportsInt | typing.SupportsIndex = 16384) -> memoryview:
        """
        Writable memoryview for the next read; valid until the next get_buffer or feed. Empty: no room.
        """
    def goaway(self, grace_ms: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Append the goaway notification. False: the output limit is hit.
        """
    def next_message(self) -> typing.Any:
        """
        (kind, msgid | None, method, params bytes, (code, message) | None), or None when none is complete.
        """
    def output_sent(self) -> None:
        """
        The bytes of take_output are sent.
        """
    def reply_error(
        self,
        msgid: typing.SupportsInt | typing.SupportsIndex | None,
        code: str,
        message: str,
        retryable: bool,
        retry_after_ms: typing.SupportsInt | typing.SupportsIndex | None = None,
    ) -> bool:
        """
        Append an error response. False: the output limit is hit.
        """
    def reply_raw(self, msgid: typing.SupportsInt | typing.SupportsIndex, result: str) -> bool:
        """
        Append a response whose result is MessagePack bytes already.
        """
    def reply_scores(
        self,
        msgid: typing.SupportsInt | typing.SupportsIndex,
        scores: collections.abc.Sequence[typing.SupportsFloat | typing.SupportsIndex],
        version: str,
        request_ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        status: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None,
        timings: collections.abc.Sequence[tuple[str, typing.SupportsInt | typing.SupportsIndex]] = [],
        as_bin_f32: bool = False,
    ) -> bool:
        """
        Append a scores response (scores row-major float64). False: the output limit is hit.
        """
    def take_output(self) -> typing.Any:
        """
        Bytes to send, or None when there are none or earlier ones are not sent yet.
        """
    @property
    def closed(self) -> bool: ...
    @property
    def dropped(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def input_capacity(self) -> int: ...
    @property
    def unfinished_bytes(self) -> int: ...
    @property
    def pending_output_bytes(self) -> int: ...

class OnnxSession(metaclass=_NativeType):
    """
    An ONNX model on onnxruntime's CPU provider, run without the GIL.
    """
    def __init__(
        self,
        model: bytes,
        *,
        library: str,
        input: str,
        output: str,
        n_features: typing.SupportsInt | typing.SupportsIndex,
        width: typing.SupportsInt | typing.SupportsIndex,
        flat: bool,
        wide: bool,
        column: typing.SupportsInt | typing.SupportsIndex | None = None,
        probability: bool = False,
        threads: typing.SupportsInt | typing.SupportsIndex = 1,
    ) -> None:
        """
        model: the bytes of a ModelProto that takes `input`, float32 [n, n_features], and gives `output`,
        [n] if flat, else [n, width], float64 if wide, else float32. library: libonnxruntime.so.
        column: the one that is served; None: all. ValueError: the model is refused; RuntimeError: the
        library is.
        """
    def run(self, rows: numpy.typing.NDArray[numpy.float32]) -> typing.Any:
        """
        Scores float64 [n, outputs] of float32 [n, F], n in 1..64, or (code, message). One caller at once.
        """
    def interrupt(self) -> None:
        """
        Ends a run in progress at its next operator; no run succeeds after.
        """

class PythonModel(metaclass=_NativeType):
    """
    A model in this process that is called under the GIL, over buffers made once.
    """
    def __init__(
        self,
        run: collections.abc.Callable[[int], None],
        rows: numpy.ndarray,
        scores: numpy.ndarray,
        *,
        column: typing.SupportsInt | typing.SupportsIndex | None = None,
        probability: bool = False,
    ) -> None:
        """
        run(n) scores rows[:n], float32 [64, F], into scores[:n], float64 [64, width].
        column: the one that is served; None: all.
        """
    def run(self, rows: numpy.typing.NDArray[numpy.float32]) -> typing.Any:
        """
        Scores float64 [n, outputs] of float32 [n, F], n in 1..64, or (code, message). One caller at once.
        """

class ChildChannel(metaclass=_NativeType):
    """
    The shared memory and the doorbell of a model in a child process.
    """
    def __init__(
        self,
        n_features: typing.SupportsInt | typing.SupportsIndex,
        width: typing.SupportsInt | typing.SupportsIndex,
        *,
        column: typing.SupportsInt | typing.SupportsIndex | None = None,
        probability: bool = False,
        run_timeout_s: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None: ...
    @property
    def memory_fd(self) -> int: ...
    @property
    def alarm_fd(self) -> int: ...
    @property
    def reason(self) -> str: ...
    def read_alarm(self) -> None: ...
    def attach(
        self,
        socket: typing.SupportsInt | typing.SupportsIndex,
        pidfd: typing.SupportsInt | typing.SupportsIndex,
        restart_s: typing.SupportsFloat | typing.SupportsIndex,
    ) -> None:
        """
        Takes both descriptors over; pidfd may be -1. Another child would be ready restart_s after its end.
        """
    def detach(self, reason: str) -> None: ...
    def expect_after(self, seconds: typing.SupportsFloat | typing.SupportsIndex) -> None: ...
    def close(self) -> None: ...
    def run(self, rows: numpy.typing.NDArray[numpy.float32]) -> typing.Any:
        """
        Scores float64 [n, outputs] of float32 [n, F], n in 1..64, or (code, message).
        """
    @staticmethod
    def layout(
        n_features: typing.SupportsInt | typing.SupportsIndex,
        width: typing.SupportsInt | typing.SupportsIndex,
    ) -> tuple:
        """
        Offsets of scores and of text, and the size of the block.
        """

class TreeEnsemble(metaclass=_NativeType):
    """
    A forest loaded from the bytes of trees.bin; immutable.
    """
    def __init__(self, data: bytes) -> None:
        """
        Raises ValueError if data is corrupt.
        """
    def predict(self, rows: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.float64]:
        """
        Transformed scores, float64 [n, n_outputs], of rows float32 [n, n_features]; NaN is missing.
        Raises ValueError on another shape, TypeError on another dtype.
        """
    def predict_leaf(self, rows: numpy.typing.NDArray[numpy.float32]) -> numpy.typing.NDArray[numpy.int32]:
        """
        Leaf reached in each tree, int32 [n, n_trees], numbered from left to right in its tree.
        """
    def predict_margin(
        self, rows: numpy.typing.NDArray[numpy.float32]
    ) -> numpy.typing.NDArray[numpy.float64]:
        """
        As predict, before the transform.
        """
    @property
    def n_features(self) -> int: ...
    @property
    def n_outputs(self) -> int: ...
    @property
    def n_trees(self) -> int: ...

class EventTable(metaclass=_NativeType):
    """
    The events of a view by key, and its stored rows at any time.
    """
    def __init__(
        self,
        *,
        plain: object,
        plain_inputs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        values: object,
        value_inputs: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
        windows: collections.abc.Sequence[tuple[int, int, int, int, int, bool]],
        aggregates: collections.abc.Sequence[tuple[int, int, int, int]],
        features: collections.abc.Sequence[tuple[bool, int, bool]],
        ttl: typing.SupportsInt | typing.SupportsIndex,
        tick: typing.SupportsInt | typing.SupportsIndex,
        as_known: bool,
        tiles: bool,
        events: dict,
        raw: list,
        texts: collections.abc.Sequence[collections.abc.Sequence[str] | None],
        threads: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        plain, values: programs of the plain features and of the aggregated values, or None; *_inputs:
        the column in `raw` of each of their inputs. windows: (enters, leaves, every, lag, tile, as_known)
        in microseconds. aggregates: (kind, value or -1, window, parameter). features: (whether an
        aggregate, which, whether float64). events: arrays keys (int64[n], or uint64[n, 2]), event_time,
        known_at, null_keys, event_ids, null_ids, deleted. raw: (float32, float64 or int64 [n], bool [n]
        or None). texts: of each aggregated value, those of its codes, or None. The arrays are referred
        to, not copied. ValueError where they do not fit.
        """
    def append(
        self, events: dict, raw: list, texts: collections.abc.Sequence[collections.abc.Sequence[str] | None]
    ) -> numpy.typing.NDArray[numpy.uint64]:
        """
        Add events behind those there are; `texts` are new ones, behind the old. Returns the distinct
        keys uint64[k, 2].
        """
    def changed_keys(
        self, start: typing.SupportsInt | typing.SupportsIndex, end: typing.SupportsInt | typing.SupportsIndex
    ) -> numpy.typing.NDArray[numpy.uint64]:
        """
        Keys uint64[k, 2], ascending, whose row may differ between the two times.
        """
    def erase(
        self, lo: typing.SupportsInt | typing.SupportsIndex, hi: typing.SupportsInt | typing.SupportsIndex
    ) -> bool:
        """
        Forget the events of a key; False if it was unknown.
        """
    def keys(self) -> numpy.typing.NDArray[numpy.uint64]:
        """
        The distinct keys uint64[m, 2], ascending.
        """
    def rows_at(
        self,
        keys: numpy.typing.NDArray[numpy.uint64],
        now: numpy.typing.NDArray[numpy.int64],
        nulls: object,
        known_by: object,
        threads: typing.SupportsInt | typing.SupportsIndex = 1,
    ) -> tuple:
        """
        Rows of keys uint64[n, 2] at the times now int64[n]: a list of (values, valid), status uint8[n],
        meta int64[n, 4].
        """
    def newest_events(
        self, keys: numpy.typing.NDArray[numpy.uint64], now: typing.SupportsInt | typing.SupportsIndex
    ) -> numpy.typing.NDArray[numpy.int64]:
        """
        Time int64[k] of the newest event by `now` of each key uint64[k, 2], or INT64_MIN.
        """
    def source_rows(self) -> numpy.typing.NDArray[numpy.int64]:
        """
        One source row int64[k] of each key that the source has events of, erased keys left out.
        """
    @property
    def n_keys(self) -> int:
        """
        Distinct keys, erased ones too.
        """
    @property
    def n_events(self) -> int:
        """
        Events held.
        """

class FeatureCache(metaclass=_NativeType):
    """
    Fixed-capacity cache of feature rows. Reads are lock-free; a write locks one bucket.
    """
    def __init__(
        self,
        capacity: typing.SupportsInt | typing.SupportsIndex,
        row_words: typing.SupportsInt | typing.SupportsIndex,
        ttl_ns: typing.SupportsInt | typing.SupportsIndex = 0,
        negative_ttl_ns: typing.SupportsInt | typing.SupportsIndex = 0,
        refresh_ahead: typing.SupportsFloat | typing.SupportsIndex = 0.0,
    ) -> None:
        """
        capacity: rows, rounded up to whole buckets of 15; row_words: uint64 words a row, 1 to 2048; ttl_ns: memory TTL, none if <= 0; negative_ttl_ns: a shorter one of rows that say NOT_FOUND; refresh_ahead: last part of a row's life, 0 to 0.5, in which a read queues it for take_refreshes. Raises ValueError, or RuntimeError if the memory cannot be mapped.
        """
    @staticmethod
    def open_shared(
        path: str,
        capacity: typing.SupportsInt | typing.SupportsIndex,
        row_words: typing.SupportsInt | typing.SupportsIndex,
        ttl_ns: typing.SupportsInt | typing.SupportsIndex = 0,
        negative_ttl_ns: typing.SupportsInt | typing.SupportsIndex = 0,
        refresh_ahead: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        identity: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> FeatureCache:
        """
        The cache in the file at `path`, which several processes share and the first one makes. identity: uint64 of the key hash and row layout. Raises RuntimeError, naming what differs, where the file holds another kind of arena.
        """
    @staticmethod
    def attach(fd: typing.SupportsInt | typing.SupportsIndex) -> FeatureCache:
        """
        The cache in an open file, whatever its geometry. Raises RuntimeError if it is no arena.
        """
    @property
    def row_words(self) -> int: ...
    def take_refreshes(
        self, n: typing.SupportsInt | typing.SupportsIndex
    ) -> tuple[
        numpy.typing.NDArray[numpy.uint64],
        numpy.typing.NDArray[numpy.int64],
        numpy.typing.NDArray[numpy.bool_],
    ]:
        """
        Up to n rows that were read shortly before their end: keys uint64[k, 2], request times to load them for int64[k], and hold bool[k]: not to be stored before that time.
        """
    def _abandon_put(
        self,
        key: typing.Any,
        row: typing.Any,
        meta: typing.Any,
        stamp: typing.SupportsInt | typing.SupportsIndex,
        mono_ns: typing.SupportsInt | typing.SupportsIndex,
        owner: typing.SupportsInt | typing.SupportsIndex,
        words: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        For tests: a put that stops after `words` words with the bucket locked.
        """
    def clear(
        self,
        owner: typing.SupportsInt | typing.SupportsIndex = 0,
        stamp: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None:
        """
        Remove every row; the stamps are remembered, and lesser ones than `stamp` are refused from then on.
        """
    def discard_many(
        self,
        keys: typing.Any,
        stamp: typing.SupportsInt | typing.SupportsIndex,
        owner: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> int:
        """
        Remove keys uint64[n, 2] whose rows have no greater stamp, and refuse lesser stamps from then on. Returns how many were removed.
        """
    def get_many(
        self,
        keys: typing.Any,
        now_us: typing.SupportsInt | typing.SupportsIndex,
        mono_ns: typing.SupportsInt | typing.SupportsIndex,
        out: typing.Any,
        status: typing.Any,
        meta: typing.Any = None,
        slot_versions: typing.Any = None,
    ) -> int:
        """
        Read keys uint64[n, 2] into out uint64[n, row_words], status uint8[n] (0 hit, 1 miss, 2 expired, 3 busy) and, if given, meta int64[n, 4] and slot_versions uint64[n]. Rows of non-hits are left as they were. Returns the number of hits. Raises ValueError naming the array.
        """
    def put_many(
        self,
        keys: typing.Any,
        rows: typing.Any,
        meta: typing.Any,
        stamp: typing.SupportsInt | typing.SupportsIndex,
        mono_ns: typing.SupportsInt | typing.SupportsIndex,
        owner: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> numpy.typing.NDArray[numpy.uint8]:
        """
        Store rows uint64[n, row_words] with meta int64[n, 4] (valid_from, valid_until, event_time, known_at; us). Returns uint8[n]: 0 stored, 1 replaced, 2 superseded. Raises ValueError naming the array.
        """
    def reclaim_owner(
        self,
        dead: typing.SupportsInt | typing.SupportsIndex,
        survivor: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> int:
        """
        Take over the bucket locks of a writer known to have ended and empty what it left half-written. Returns the number of locks.
        """
    def resident_many(self, keys: typing.Any) -> numpy.typing.NDArray[numpy.bool]:
        """
        Which keys uint64[n, 2] have a row, valid or not: bool[n]. A hint; counts as no read.
        """
    def stats(self) -> dict:
        """
        Counters and sizes, by name.
        """

class FeatureReader(metaclass=_NativeType):
    """
    Reads a feature service into float32 rows through feature caches.
    """
    def __init__(self, plan: dict, tables: list = ...) -> None:
        """
        plan: as ServingCore.load takes it. tables: the EventTable of each of its views, from which rows
        are computed that no cache has, or none. Raises ValueError.
        """
    def read(
        self,
        params: bytes,
        now_us: typing.SupportsInt | typing.SupportsIndex,
        mono_ns: typing.SupportsInt | typing.SupportsIndex,
        out: typing.Any,
        stamp: typing.SupportsInt | typing.SupportsIndex,
        load: typing.Any,
    ) -> typing.Any:
        """
        params: MessagePack [any text, entities, inputs or nil]. Fills out float32[rows, features] (a new
        array if None) and returns it. Rows that no cache has are computed, and put into it under
        `stamp`. Without tables, load(keys) is asked for them: given keys uint64[k, 2] by view, it returns
        (rows uint64[k, row_words], meta int64[k, 4]) by view. Raises ValueError naming the column, row or
        array, and what load raises.
        """

class HistogramCounts(metaclass=_NativeType):
    """
    Counts per column: fine bins (e[k-1], e[k]] or codes, then missing, unseen, -inf, +inf. One writer at a time.
    """
    def __init__(self, columns: list) -> None:
        """
        columns: per column a float32 array of strictly increasing finite edges, or the int number of codes of a categorical column. Raises ValueError.
        """
    def clear(self) -> None:
        """
        Sets every count to zero.
        """
    def count(self, rows: numpy.typing.NDArray[numpy.float32]) -> None:
        """
        Adds float32 rows [n, columns]. Raises ValueError on another shape.
        """
    def merge(self, other: HistogramCounts) -> None:
        """
        Adds other's counts. Raises ValueError, unchanged, when the specs differ.
        """
    def snapshot(self) -> numpy.typing.NDArray[numpy.uint64]:
        """
        A copy of all counts, uint64 [slots].
        """

class DriftPanes(metaclass=_NativeType):
    """
    Drift counts of served rows by pane of request time. Any thread; the GIL is not held while it counts.
    """
    def __init__(
        self,
        columns: list,
        score: list,
        *,
        pane_us: typing.SupportsInt | typing.SupportsIndex,
        window_us: typing.SupportsInt | typing.SupportsIndex,
    ) -> None:
        """
        columns, score: as of HistogramCounts; one column of score. Raises ValueError.
        """
    def add(
        self,
        now_us: numpy.typing.NDArray[numpy.int64],
        rows: numpy.typing.NDArray[numpy.float32],
        scores: numpy.typing.NDArray[numpy.float64],
    ) -> int:
        """
        Count rows float32 [n, columns] with request times int64 [n] >= 0 and float64 scores [n]; returns
        how many came too late. Raises ValueError.
        """
    def merge(self, other: DriftPanes) -> None:
        """
        Add what other holds. Raises ValueError, unchanged, where they do not fit.
        """
    def window(
        self,
        last: typing.SupportsInt | typing.SupportsIndex | None,
        panes: typing.SupportsInt | typing.SupportsIndex,
    ) -> tuple:
        """
        (last, n, rows, late, expired, inputs uint64 [slots], score uint64 [slots]) of the panes up to
        `last` (None: the newest held; -1 when there is none). rows, late and expired are since the start.
        """

class FeatureProgram(metaclass=_NativeType):
    """
    A compiled feature program; immutable.
    """
    def __init__(self, data: bytes) -> None:
        """
        Load the bytes of compile_program; ValueError if any part of them is corrupt.
        """
    def run(self, inputs: list, rows: typing.SupportsInt | typing.SupportsIndex = 0) -> list:
        """
        inputs: a list of (values [n] float64 or int64, valid bool [n] or None) in the order of `inputs`.
        rows: the row count of a program without inputs. Returns a like list of outputs; the value of a null
        is 0. ValueError names the column that has a wrong dtype or length.
        """
    def run_row(self, row: object) -> tuple:
        """
        One row, quickly: a list or tuple of the inputs' values in order, or a dict by input name. A value is
        a float, an int (times in microseconds, strings as codes), a bool, or None for null; so are the outputs,
        a tuple. ValueError names the column that has no such value.
        """
    @property
    def inputs(self) -> list[tuple[str, str]]:
        """
        (name, dtype) of each input column.
        """
    @property
    def outputs(self) -> list[tuple[str, str]]:
        """
        (name, dtype) of each output column.
        """

class PushCoder(metaclass=_NativeType):
    """
    Codes the pushes of one source. Any thread.
    """
    def __init__(
        self,
        *,
        columns: collections.abc.Sequence[tuple[str, str, bool]],
        time: typing.SupportsInt | typing.SupportsIndex,
        created: typing.SupportsInt | typing.SupportsIndex,
        event_id: typing.SupportsInt | typing.SupportsIndex,
        deleted: typing.SupportsInt | typing.SupportsIndex,
        seed: bytes,
        views: collections.abc.Sequence[
            tuple[
                typing.Any,
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex],
                typing.SupportsInt | typing.SupportsIndex,
            ]
        ],
    ) -> None:
        """
        columns: (name, dtype, whether it must not be null). time, created, event_id, deleted: which of
        them, -1: none. seed: of the key hash. views: (EventTable, its key columns, its raw columns, how
        many value columns it has). ValueError where they do not fit.
        """
    def add_texts(
        self,
        view: typing.SupportsInt | typing.SupportsIndex,
        raw: typing.SupportsInt | typing.SupportsIndex,
        texts: collections.abc.Sequence[str],
    ) -> None:
        """
        Further texts of a raw column of a view, in the order of their codes.
        """
    def append(
        self,
        view: typing.SupportsInt | typing.SupportsIndex,
        rows: PushedRows,
        arrival_us: typing.SupportsInt | typing.SupportsIndex,
    ) -> bool:
        """
        Append to a view's table; whether it has new keys. ValueError if the table is full.
        """
    def code(self, rows: typing.Any) -> typing.Any:
        """
        rows: dict of columns as lists, tuples or scalars. PushedRows; None where anything is wrong or not
        of the plain kinds: int, float, bool, str and None, times as int microseconds, known texts.
        """
    def column(self, at: typing.SupportsInt | typing.SupportsIndex, rows: PushedRows) -> tuple:
        """
        (values, valid bool[n] or None) of a column: a list of str, or an array of its dtype.
        """
    def keys(
        self, view: typing.SupportsInt | typing.SupportsIndex, rows: PushedRows
    ) -> numpy.typing.NDArray[numpy.uint64]:
        """
        Entity keys uint64[n, 2] of a view.
        """
    def n_texts(
        self, view: typing.SupportsInt | typing.SupportsIndex, raw: typing.SupportsInt | typing.SupportsIndex
    ) -> int:
        """
        Texts known of a raw column of a view.
        """

class PushedRows(metaclass=_NativeType):
    """
    Events of one push, checked and coded.
    """
    def __init__(self, *args: object, **kwargs: object) -> typing.Never:
        """
        TypeError: only the core makes them.
        """
    @property
    def bytes(self) -> int:
        """
        About their size in the log.
        """
    @property
    def n(self) -> int:
        """
        How many.
        """

class RowSchema(metaclass=_NativeType):
    """
    Layout of a stored feature row.
    """
    def __init__(self, fields: collections.abc.Sequence[tuple[str, str]]) -> None:
        """
        fields: a list of (name, dtype); ValueError for a repeated name or unknown dtype.
        """
    def decode(self, rows: numpy.typing.NDArray[numpy.uint64]) -> list:
        """
        rows: uint64 [n, row_words]. Returns a list of (values [n], valid bool [n]).
        """
    def encode(
        self, columns: list, status: numpy.typing.NDArray[numpy.uint8]
    ) -> numpy.typing.NDArray[numpy.uint64]:
        """
        columns: a list of (values [n] float64 or int64, valid bool [n] or None); status uint8 [n].
        Returns uint64 [n, row_words].
        """
    @property
    def fields(self) -> list[tuple[str, str]]:
        """
        (name, dtype) of each field.
        """
    @property
    def row_words(self) -> int:
        """
        64-bit words in a row.
        """

class HotInputs(metaclass=_NativeType):
    """
    Requests, encoded, most frequent first.
    """
    def __init__(self, *args: object, **kwargs: object) -> typing.Never:
        """
        TypeError: only the core makes them.
        """
    def __len__(self) -> int: ...

class ServedModel(metaclass=_NativeType):
    """
    One live version of a model: lane, executor thread, counters.
    """
    def __init__(self, *args: object, **kwargs: object) -> typing.Never:
        """
        TypeError: only the core makes them.
        """
    def _hold(self, held: bool) -> None:
        """
        For tests: while held, batches block on the executor as in a model that hangs.
        """
    def drain(self, n: typing.SupportsInt | typing.SupportsIndex = 65536) -> tuple:
        """
        Up to n rows answered OK and not drained yet: (request_ids uint64 [n], now_us int64 [n],
        features float32 [n, F], scores float64 [n, K], status uint8 [n], event_time int64 [n, V]).
        One thread at a time. Drift has counted them.
        """
    def drain_samples(self) -> list:
        """
        The sampled vectors since the last call: [(now_us, wall clock us when they were made, params of
        the predict call, float32 [n, F])]. One thread at a time.
        """
    def count_drift(self, panes: DriftPanes) -> None:
        """
        Count every row answered OK in these DriftPanes. Before it is published. Raises ValueError.
        """
    def drain_traces(self) -> list:
        """
        Those requests: [(trace id's high and low uint64, parent span uint64, received monotonic ns, then
        ns of receive, gather, queue, run, encode, total, then rows, code)].
        """
    def hot_inputs(self) -> HotInputs:
        """
        The most frequent requests of one row that the edge cache saw.
        """
    def hot_misses(
        self, hot: HotInputs, now_us: typing.SupportsInt | typing.SupportsIndex
    ) -> list[tuple[str, numpy.typing.NDArray[numpy.uint64]]]:
        """
        [(view, keys uint64 [n, 2])]: the feature rows that these requests lack.
        """
    def precompute(
        self,
        hot: HotInputs,
        now_us: typing.SupportsInt | typing.SupportsIndex,
        limit_s: typing.SupportsFloat | typing.SupportsIndex,
    ) -> int:
        """
        Compute those that the edge cache lacks and whose features are cached; how many. Waits for an
        idle lane, limit_s at most.
        """
    def stats(self) -> dict:
        """
        Counters, batch sizes (rows: runs) and latency quantiles, by name.
        """
    def idle(self) -> bool:
        """
        Every request has its answer, and nothing runs.
        """
    def count_in(self, word: numpy.typing.NDArray[numpy.uint64]) -> None:
        """
        Add every row answered OK to word, uint64 [1], from now on. Before the version is live.
        """
    def stop(self) -> None:
        """
        End what is unanswered as UNAVAILABLE and join the executor.
        """
    def trace(self, capacity: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Keep up to `capacity` requests with a sampled traceparent that ended; more are dropped and counted.
        """
    @property
    def n_features(self) -> int: ...
    @property
    def n_outputs(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...

class Connection(metaclass=_NativeType):
    """
    One peer. Every call belongs to the loop thread.
    """
    def __init__(self, *args: object, **kwargs: object) -> typing.Never:
        """
        TypeError: only the core makes them.
        """
    def attach(self, fd: typing.SupportsInt | typing.SupportsIndex) -> bool:
        """
        Replies go straight to this connected socket from now on; its descriptor is duplicated. False:
        no descriptor is free.
        """
    def authorize(self, until_us: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Predict calls are UNAUTHENTICATED from this wall-clock microsecond on; 0: at once. While they are,
        received stops after each `auth` request: decide on it, then call received(0).
        """
    def drop(self) -> None:
        """
        The peer is gone: its requests are cancelled.
        """
    def get_buffer(self, sizehint: typing.SupportsInt | typing.SupportsIndex = -1) -> memoryview:
        """
        Writable memoryview for the next read; valid until the next get_buffer, and not after the
        connection. Empty: no room.
        """
    def goaway(self, grace_ms: typing.SupportsInt | typing.SupportsIndex) -> bool: ...
    def output_sent(self) -> None:
        """
        The bytes of take_output are sent.
        """
    def received(self, n: typing.SupportsInt | typing.SupportsIndex) -> list:
        """
        n bytes were read into the last get_buffer: answers the predict calls in them, now or in wake, and
        returns the other requests as (msgid, method, params as MessagePack bytes).
        """
    def refuse(self, code: str, message: str) -> bool:
        """
        Append an error that answers no request (msgid nil).
        """
    def reply(self, msgid: typing.SupportsInt | typing.SupportsIndex, result: bytes) -> bool:
        """
        Answer with a MessagePack value. False: not in flight, or it does not fit and the answer is
        RESOURCE_EXHAUSTED.
        """
    def reply_error(
        self,
        msgid: typing.SupportsInt | typing.SupportsIndex,
        code: str,
        message: str,
        retryable: bool,
        retry_after_ms: typing.SupportsInt | typing.SupportsIndex | None = None,
    ) -> bool: ...
    def send_output(self) -> bool:
        """
        Send to the attached socket what waits. True: look after the rest, with take_output.
        """
    def take_output(self) -> typing.Any:
        """
        Bytes to send, or None when there are none or earlier ones are not sent yet.
        """
    def touch(self) -> None:
        """
        The peer was kept waiting by us: its silence counts from now on.
        """
    def watch(self) -> None:
        """
        Have wake tell of every output of this connection.
        """
    @property
    def closed(self) -> bool: ...
    @property
    def dropped_notifications(self) -> int: ...
    @property
    def id(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def pending_output_bytes(self) -> int: ...

class MissBatch(metaclass=_NativeType):
    """
    Rows that parked requests lack.
    """
    def __init__(self, *args: object, **kwargs: object) -> typing.Never:
        """
        TypeError: only the core makes them.
        """
    @property
    def views(self) -> list:
        """
        [(view, keys uint64 [n, 2], now_us int64 [n])], pairs distinct in a view.
        """

class ServingCore(metaclass=_NativeType):
    """
    Live models, connections and the loader's queue.
    """
    def __init__(
        self,
        worker: typing.SupportsInt | typing.SupportsIndex = 0,
        cache_owner: typing.SupportsInt | typing.SupportsIndex = 0,
    ) -> None:
        """
        worker: index among the processes that serve together, 0 to 63: their request ids are apart.
        cache_owner: the process's number as a writer of shared feature caches.
        """
    def call(self, vectors: bool, params: bytes, timings: bool = True) -> tuple:
        """
        predict (or predict_vectors) on this thread; params as MessagePack bytes. Returns (scores
        float64 [n], [n, K] for K outputs, version, request_ids uint64 [n], status uint8 [n] | None,
        timings | None) or (code, message, retry_after_ms | None).
        """
    def close(self) -> None: ...
    def connection(
        self,
        max_message_bytes: typing.SupportsInt | typing.SupportsIndex,
        max_depth: typing.SupportsInt | typing.SupportsIndex,
        max_in_flight: typing.SupportsInt | typing.SupportsIndex,
        max_output_bytes: typing.SupportsInt | typing.SupportsIndex,
    ) -> Connection: ...
    def drain(self) -> None:
        """
        Refuse new predict calls from now on.
        """
    def expire(self) -> list[int]:
        """
        Answer what is due; ids of connections with output.
        """
    def fail_misses(self, misses: MissBatch, code: str, message: str) -> None: ...
    def finish_misses(
        self, misses: MissBatch, rows: list, stamp: typing.SupportsInt | typing.SupportsIndex
    ) -> None:
        """
        rows: [(words uint64 [n, row_words], meta int64 [n, 4])], one pair for each of misses.views.
        """
    def live(self) -> list[ServedModel]:
        """
        The live models.
        """
    def load(
        self,
        name: str,
        version: str,
        model: bytes | OnnxSession | PythonModel | ChildChannel,
        plan: typing.Any = None,
        *,
        max_batch_rows: typing.SupportsInt | typing.SupportsIndex = 64,
        max_latency_ms: typing.SupportsFloat | typing.SupportsIndex = 50.0,
        guard_ms: typing.SupportsFloat | typing.SupportsIndex = 0.5,
        inline_limit_us: typing.SupportsInt | typing.SupportsIndex = 200,
        max_rows_per_request: typing.SupportsInt | typing.SupportsIndex = 4096,
        max_requests: typing.SupportsInt | typing.SupportsIndex = 4096,
        max_queued_rows: typing.SupportsInt | typing.SupportsIndex = 16384,
        allow_replay: bool = False,
        served_capacity: typing.SupportsInt | typing.SupportsIndex = 65536,
        low_share: typing.SupportsFloat | typing.SupportsIndex = 0.125,
        breaker_timeout_ms: typing.SupportsFloat | typing.SupportsIndex | None = None,
        breaker_probe_ms: typing.SupportsFloat | typing.SupportsIndex = 1000.0,
        breaker_failures: typing.SupportsInt | typing.SupportsIndex = 5,
        edge: typing.Any = None,
        sample_share: typing.SupportsFloat | typing.SupportsIndex = 0.0,
        sample_bytes: typing.SupportsInt | typing.SupportsIndex = 1048576,
    ) -> ServedModel:
        """
        Load a model version (trees.bin bytes, an OnnxSession, PythonModel or ChildChannel), warm it up
        and start it; it is not live yet.
        plan: None, or a dict of entities, inputs [(name, dtype)], request_source, views [{name, cache,
        fields, key_columns}], program, key_seed, error_on_missing. edge: None, or a dict of mode (off, auto
        or on), capacity, ttl_ns, precompute, seed. sample_share: of the keys whose feature vectors are kept for
        drain_samples(), in sample_bytes at most. ValueError says what is wrong.
        """
    def overdue(
        self,
        idle_s: typing.SupportsFloat | typing.SupportsIndex,
        read_s: typing.SupportsFloat | typing.SupportsIndex,
    ) -> tuple[list[int], list[int]]:
        """
        Ids of connections that sent nothing for idle_s and wait for nothing, and of those whose unfinished
        message made no progress for read_s.
        """
    def publish(self, model: ServedModel) -> ServedModel | None:
        """
        Make it the live version of its name; returns the one before it, still running, or None. Ends a trial.
        """
    def put_on_trial(
        self,
        name: str,
        model: ServedModel | None,
        shadow: bool = False,
        share: typing.SupportsFloat | typing.SupportsIndex = 0.0,
    ) -> None:
        """
        Let a version (None: none) take part in that share of the sticky keys: it answers them, or scores
        them unseen as a shadow. In place of the trial before. ValueError if the name is not live, or a shadow takes other inputs.
        """
    def retire(self, name: str) -> ServedModel | None: ...
    def wait_misses(self, timeout_s: typing.SupportsFloat | typing.SupportsIndex) -> typing.Any:
        """
        A MissBatch, or None.
        """
    def wake(self) -> list[int]:
        """
        event_fd is readable: run what reads left, encode replies of ended requests and send them. Ids of
        connections whose output somebody else must look after.
        """
    @property
    def unauthenticated(self) -> int: ...
    @property
    def event_fd(self) -> int: ...
    @property
    def timer_fd(self) -> int: ...

def cpu_level() -> int:
    """
    Instruction-set path in force: 0 portable, 1 AVX2, 2 AVX-512.
    """

def force_cpu_level(level: typing.SupportsInt | typing.SupportsIndex) -> int:
    """
    Lower the path in force (tests, benchmarks); returns the path that now holds.
    """

def keys128(columns: list, seed: bytes) -> tuple:
    """
    Entity keys of n rows. columns: one int64[n] array or list of int, str, bytes or None per join key, in order; seed: 16 bytes. Returns (keys uint64[n, 2] as lo, hi; nulls bool[n]); a null key's words are 0. Raises ValueError naming the column, row and value.
    """

def siphash128(data: bytes, seed: bytes) -> bytes:
    """
    SipHash-2-4 with 128-bit output of data under a 16-byte seed, as 16 bytes.
    """

def wire_decode_predict(params: str, kinds: dict = {}) -> dict:
    """
    Decode the params of `predict`: dict of model, rows, entities, inputs, options. `kinds` maps a column to int64 (default), float64, bool or string. ValueError names field, value and expectation.
    """

def wire_decode_predict_vectors(params: str) -> dict:
    """
    Decode the params of `predict_vectors`: dict of model, data (bytes), rows, options. ValueError as above.
    """

def wire_transcode(message: str) -> bytes:
    """
    Re-encode one MessagePack value (bytes) in smallest form. ValueError if it is not one whole value.
    """

class HdrHistogram(metaclass=_NativeType):
    """
    Latencies in nanoseconds, exact to three significant digits. One thread.
    """
    def __init__(self) -> None: ...
    def add(self, ns: numpy.typing.ArrayLike) -> None:
        """
        Add every value of an int64 array.
        """
    def count_up_to(self, ns: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Values in the buckets up to that of `ns`.
        """
    def quantile(self, q: typing.SupportsFloat | typing.SupportsIndex) -> int:
        """
        The largest value of the bucket that holds the ceil(q * count)-th smallest; 0 if empty.
        """
    @property
    def count(self) -> int: ...
    @property
    def max(self) -> int: ...
    @property
    def mean(self) -> float: ...
    @property
    def min(self) -> int: ...

def run_load(
    address: str,
    requests: bytes | bytearray | memoryview,
    offsets: numpy.typing.NDArray[numpy.uint64],
    *,
    protocol: str = "rpc",
    order: numpy.typing.NDArray[numpy.uint32] | None = None,
    expected: numpy.typing.NDArray[numpy.float64] | None = None,
    scores_per_request: typing.SupportsInt | typing.SupportsIndex = 1,
    tolerance: typing.SupportsFloat | typing.SupportsIndex = 1e-05,
    body_format: str = "none",
    json_key: str = "",
    fixed_reply: bytes = b"",
    greeting: bytes = b"",
    connections: typing.SupportsInt | typing.SupportsIndex = 1,
    in_flight: typing.SupportsInt | typing.SupportsIndex = 1,
    rate: typing.SupportsFloat | typing.SupportsIndex = 0.0,
    poisson: bool = False,
    shed: bool = False,
    seed: typing.SupportsInt | typing.SupportsIndex = 0,
    warmup_s: typing.SupportsFloat | typing.SupportsIndex = 1.0,
    duration_s: typing.SupportsFloat | typing.SupportsIndex = 5.0,
    drain_s: typing.SupportsFloat | typing.SupportsIndex = 2.0,
    tick_us: typing.SupportsFloat | typing.SupportsIndex = 50.0,
    goodput_ms: typing.SupportsFloat | typing.SupportsIndex = 50.0,
    reconnect_s: typing.SupportsFloat | typing.SupportsIndex = 0.1,
    series: bool = False,
    watch: collections.abc.Callable[[str, float, int, int], bool | None] | None = None,
) -> dict[str, typing.Any]:
    """
    Load a server (csrc/load/load.h) and return what came of it. ValueError: an option is wrong; ConnectionError: no connection. watch(phase, seconds, ok, failed): False ends the run.
    """
