"""Which vectors are tried, what is believed of the others, and which trials are on the front."""
