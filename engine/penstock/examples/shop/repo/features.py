"""Features of the shop's users and items."""

from datetime import timedelta

from penstock import (
    Entity,
    FeatureService,
    FeatureView,
    ParquetSource,
    RequestSource,
    col,
    count,
    now,
    percentile_rank,
    sum,
)

user = Entity("user", join_keys=["user_id"])
item = Entity("item", join_keys=["item_id"])

transactions = ParquetSource(
    "data/transactions.parquet", timestamp="event_timestamp", created="created_timestamp"
)
prices = ParquetSource("data/prices.parquet", timestamp="event_timestamp")

user_features = FeatureView(
    "user_features",
    entities=[user],
    source=transactions,
    ttl=timedelta(days=90),
    features={
        "daily_transactions": count(window="1d"),
        "weekly_spend": sum(col("amount"), window="7d", every="1h"),
        "account_age_days": (now() - col("signup_time")).days(),
    },
)

item_features = FeatureView(
    "item_features",
    entities=[item],
    source=prices,
    features={
        "category": col("category"),
        "price": col("price"),
        "price_percentile": percentile_rank(col("price")),
    },
)

basket = RequestSource("basket", {"basket_value": "float64"})

purchase = FeatureService(
    "purchase",
    features=[
        "user_features:daily_transactions",
        "user_features:weekly_spend",
        "user_features:account_age_days",
        "item_features:price_percentile",
        "basket:basket_value",
    ],
    request=basket,
)
