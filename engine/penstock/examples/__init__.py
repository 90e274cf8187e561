"""Complete feature repositories, with the data that they are made from."""
