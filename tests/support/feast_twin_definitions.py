"""The twin of the shop in Feast's own definitions."""

TWIN_DEFINITIONS = """
from datetime import timedelta
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, Int64

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)
user_features = FeatureView(name="user_features", entities=[user], ttl=timedelta(days=2),
    schema=[Field(name="user_id", dtype=Int64), Field(name="daily_transactions", dtype=Int64),
            Field(name="account_age_days", dtype=Float64)],
    source=FileSource(path="data/users.parquet", timestamp_field="event_timestamp"))
item_features = FeatureView(name="item_features", entities=[item], ttl=timedelta(0),
    schema=[Field(name="item_id", dtype=Int64), Field(name="price_percentile", dtype=Float64)],
    source=FileSource(path="data/items.parquet", timestamp_field="event_timestamp"))
"""
