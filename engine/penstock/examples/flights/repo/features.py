"""Features of a flight, as they are known 60 minutes before its scheduled departure.

What happens is pushed: landings, departures that fall due, the weather; the files hold what was before.
A delay enters at the landing, when it became known. Means over many flights are as of the last full hour, so
that their rows stay valid, and cached, until the next one. The calendar is New York's, at departure. Neither
the month nor the day is a feature: four months of training cannot teach a season.
"""

from datetime import UTC, datetime, timedelta

from penstock import (
    Entity,
    FeatureService,
    FeatureView,
    ParquetSource,
    PushSource,
    col,
    count,
    mean,
    now,
    percentile_rank,
    where,
)

carrier = Entity("carrier", join_keys=["carrier"])
origin = Entity("origin", join_keys=["origin"])
route = Entity("route", join_keys=["origin", "dest"])
aircraft = Entity("aircraft", join_keys=["tailnum"])

leg = {"row": "int64", "origin": "string", "dest": "string"}
landings = PushSource(
    "landings",
    {
        **leg,
        "carrier": "string",
        "tailnum": "string",
        "landed_at": "timestamp",
        "arr_delay": "float32",
        "dep_delay": "float32",
    },
    timestamp="landed_at",
    event_id="row",
    batch=ParquetSource("data/landings.parquet", timestamp="landed_at"),
)
departures_due = PushSource(
    "departures_due",
    {**leg, "scheduled_departure": "timestamp"},
    timestamp="scheduled_departure",
    event_id="row",
    batch=ParquetSource("data/departures_due.parquet", timestamp="scheduled_departure"),
)
measured = ("temp", "dewp", "humid", "wind_speed", "wind_gust", "precip", "pressure", "visib")
observations = PushSource(
    "weather",
    {"origin": "string", "observed_at": "timestamp", **dict.fromkeys(measured, "float32")},
    timestamp="observed_at",
    batch=ParquetSource("data/weather.parquet", timestamp="observed_at"),
)
planes = ParquetSource("data/planes.parquet", timestamp="known_at")
routes = ParquetSource("data/routes.parquet", timestamp="known_at")

delay = col("arr_delay")
late = (delay >= 30.0).cast("float64")

carrier_delays = FeatureView(
    "carrier_delays",
    entities=[carrier],
    source=landings,
    features={
        "carrier_delay_3h": mean(delay, window="3h", every="1h"),
        "carrier_delay_1d": mean(delay, window="1d", every="1h"),
        "carrier_late_share_6h": mean(late, window="6h", every="1h"),
    },
)

origin_delays = FeatureView(
    "origin_delays",
    entities=[origin],
    source=landings,
    features={
        "origin_delay_3h": mean(delay, window="3h", every="1h"),
        "origin_departure_delay_2h": mean(col("dep_delay"), window="2h", every="1h"),
        "origin_late_share_6h": mean(late, window="6h", every="1h"),
        "origin_landings_6h": count(window="6h", every="1h"),
    },
)

route_delays = FeatureView(
    "route_delays",
    entities=[route],
    source=landings,
    features={
        "route_delay_1d": mean(delay, window="1d", every="1h"),
        "route_late_share_7d": mean(late, window="7d", every="1h"),
    },
)

route_schedule = FeatureView(
    "route_schedule",
    entities=[route],
    source=departures_due,
    features={"route_flights_1d": count(window="1d")},
)

aircraft_delays = FeatureView(
    "aircraft_delays",
    entities=[aircraft],
    source=landings,
    ttl=timedelta(days=3),
    features={
        "aircraft_last_delay": delay,
        "aircraft_delay_1d": mean(delay, window="1d"),
        "aircraft_landings_1d": count(window="1d"),
        "aircraft_hours_since_landing": (now() - col("landed_at")).hours(),
    },
)

aircraft_facts = FeatureView(
    "aircraft_facts",
    entities=[aircraft],
    source=planes,
    features={
        "aircraft_age_years": (now() - col("made_at")).days() / 365.25,
        "aircraft_seats": col("seats"),
    },
)

weather = FeatureView(
    "weather",
    entities=[origin],
    source=observations,
    ttl=timedelta(hours=3),
    features={
        "temperature": col("temp"),
        "dew_point_gap": col("temp") - col("dewp"),
        "humidity": col("humid"),
        "wind_speed": col("wind_speed"),
        "wind_gust": col("wind_gust"),
        "precipitation": col("precip"),
        "pressure": col("pressure"),
        "visibility": col("visib"),
    },
)

summer_time = (now() >= datetime(2013, 3, 10, 7, tzinfo=UTC)) & (now() < datetime(2013, 11, 3, 6, tzinfo=UTC))
departure = now() + timedelta(minutes=60) - where(summer_time, timedelta(hours=4), timedelta(hours=5))

route_facts = FeatureView(
    "route_facts",
    entities=[route],
    source=routes,
    features={
        "distance": col("distance"),
        "distance_percentile": percentile_rank(col("distance")),
        "departure_hour": departure.hour(),
        "departure_minute": departure.minute(),
        "departure_weekday": departure.weekday(),
    },
)

arrival_delay = FeatureService(
    "arrival_delay",
    features=[
        f"{view.name}:{feature}"
        for view in (
            carrier_delays,
            origin_delays,
            route_delays,
            route_schedule,
            aircraft_delays,
            aircraft_facts,
            weather,
            route_facts,
        )
        for feature in view.features
    ],
)
