"""A small web shop: purchases of users, prices of items. Its data is generated, always the same."""
