"""Which model it is: where it comes from, its head, what its files hold, how long its rows may be."""
